//! The thread that gives a function time to work.
//!
//! Stores to mapped registers are found by looking, so an idle function is looked at again: at once
//! for a while, then after giving other threads the processor, then after sleeps. A sleep is a
//! sixteenth of the time that the function has been idle, so that it makes no answer much later than
//! the program made its question, and 1 ms at most. An access that is trapped wakes the thread.

use std::io;
use std::num::NonZeroU64;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use lychgate_model::{Bar, PciFunction, Service};

/// Looks without a pause.
const SPINS: u32 = 100;
/// Looks with a yield between them, after that.
const YIELDS: u32 = 300;
const SHORTEST_SLEEP: Duration = Duration::from_micros(20);
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// A running service thread; it stops when this is dropped.
pub(crate) struct ServiceThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ServiceThread {
    /// Serves `function` from now on.
    pub(crate) fn start(function: Arc<dyn PciFunction>) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let name = format!("service-{}", function.name());
        let thread =
            thread::Builder::new().name(name).spawn(move || serve(&*function, &stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// What wakes the thread.
    pub(crate) fn waker(&self) -> Option<Thread> {
        self.thread.as_ref().map(|thread| thread.thread().clone())
    }
}

impl Drop for ServiceThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It panicked only if the function did; there is nothing more to stop.
            let _ = thread.join();
        }
    }
}

fn serve(function: &dyn PciFunction, stop: &AtomicBool) {
    // The kernel may stretch a sleep by 50 us unless told otherwise: more than twice the shortest.
    // Where it refuses, answers come that much later.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1_000));
    let mut idle = Idle::default();
    while !stop.load(Ordering::Acquire) {
        match function.service() {
            Service::Busy => idle = Idle::default(),
            Service::Idle => idle.pause(),
            Service::At(when) => {
                thread::park_timeout(when.saturating_duration_since(Instant::now()));
                idle = Idle::default();
            }
            Service::Asleep => {
                thread::park();
                idle = Idle::default();
            }
        }
    }
}

/// Looks that found nothing.
#[derive(Default)]
struct Idle {
    looks: u32,
    /// When the first sleep began.
    since: Option<Instant>,
}

impl Idle {
    /// The pause after one look more.
    fn pause(&mut self) {
        let before = self.looks;
        self.looks = before.saturating_add(1);
        if before < SPINS {
            std::hint::spin_loop();
        } else if before < SPINS + YIELDS {
            thread::yield_now();
        } else {
            let since = *self.since.get_or_insert_with(Instant::now);
            thread::park_timeout((since.elapsed() / 16).clamp(SHORTEST_SLEEP, LONGEST_SLEEP));
        }
    }
}

/// A function whose thread is woken by accesses.
pub(crate) struct Served {
    function: Arc<dyn PciFunction>,
    waker: Option<Thread>,
}

impl Served {
    pub(crate) fn new(function: Arc<dyn PciFunction>, thread: &ServiceThread) -> Self {
        Self { function, waker: thread.waker() }
    }

    fn wake(&self) {
        if let Some(thread) = &self.waker {
            thread.unpark();
        }
    }
}

impl PciFunction for Served {
    fn name(&self) -> &str {
        self.function.name()
    }

    fn bars(&self) -> [Option<Bar>; 6] {
        self.function.bars()
    }

    fn config_read(&self, offset: u16, to: &mut [u8]) {
        self.function.config_read(offset, to);
    }

    fn config_write(&self, offset: u16, from: &[u8]) {
        self.function.config_write(offset, from);
        self.wake();
    }

    fn bar_read(&self, bar: u8, offset: u64, to: &mut [u8]) {
        self.function.bar_read(bar, offset, to);
        self.wake();
    }

    fn bar_write(&self, bar: u8, offset: u64, from: &[u8]) {
        self.function.bar_write(bar, offset, from);
        self.wake();
    }

    fn reset(&self) {
        self.function.reset();
        self.wake();
    }

    fn service(&self) -> Service {
        self.function.service()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Sleeper {
        served: Mutex<Sender<Instant>>,
        answer: fn() -> Service,
    }

    impl PciFunction for Sleeper {
        fn name(&self) -> &str {
            "sleeper"
        }
        fn bars(&self) -> [Option<Bar>; 6] {
            [None; 6]
        }
        fn config_read(&self, _: u16, _: &mut [u8]) {}
        fn config_write(&self, _: u16, _: &[u8]) {}
        fn bar_read(&self, _: u8, _: u64, _: &mut [u8]) {}
        fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
        fn reset(&self) {}
        fn service(&self) -> Service {
            let _ = self.served.lock().unwrap().send(Instant::now());
            (self.answer)()
        }
    }

    #[test]
    fn a_function_that_sleeps_is_served_again_only_after_an_access() {
        let (sender, served) = channel();
        let function = Arc::new(Sleeper { served: Mutex::new(sender), answer: || Service::Asleep });
        let thread = ServiceThread::start(Arc::clone(&function) as _).unwrap();
        served.recv().unwrap();
        let front = Served::new(function, &thread);
        for access in [
            (|front: &Served| front.bar_write(0, 0, &[0])) as fn(&Served),
            |front| front.bar_read(0, 0, &mut [0]),
            |front| front.config_write(0, &[0]),
            |front| front.reset(),
        ] {
            while served.try_recv().is_ok() {}
            access(&front);
            served.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        drop(thread);
    }

    #[test]
    fn a_function_that_is_idle_is_looked_at_without_any_access() {
        let (sender, served) = channel();
        let function = Arc::new(Sleeper { served: Mutex::new(sender), answer: || Service::Idle });
        let thread = ServiceThread::start(function).unwrap();
        for _ in 0..SPINS + YIELDS + 20 {
            served.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        drop(thread);
        while served.recv().is_ok() {}
    }
}
