//! What threads may see of each other when one flushes for another, in every order that the memory
//! model allows: for the model checker loom, so nothing here runs in an ordinary test.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release -p lychgate-iommu --test flush_races
//! ```

#![cfg(loom)]
#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::convert::Infallible;
use std::sync::Arc;

use loom::sync::Mutex;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use lychgate_iommu::iova::{Flush, FlushClock, FlushQueue, Limits, Unmapped};
use lychgate_types::{Iova, Lock, Locks};

struct LoomLocks;

struct LoomMutex<T>(Mutex<T>);

impl Locks for LoomLocks {
    type Mutex<T: Send> = LoomMutex<T>;
}

impl<T: Send> Lock<T> for LoomMutex<T> {
    fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
        f(&mut self.0.lock().unwrap())
    }
}

/// Entries of a page table and what the IOTLB holds of them: mapped and cached at first. All accesses are
/// relaxed, as those to tables are.
struct Hardware {
    table: [AtomicU64; 2],
    iotlb: [AtomicU64; 2],
}

impl Hardware {
    fn new() -> Arc<Self> {
        let mapped = || [AtomicU64::new(1), AtomicU64::new(1)];
        Arc::new(Self { table: mapped(), iotlb: mapped() })
    }
}

struct Thread {
    hardware: Arc<Hardware>,
    released: usize,
}

impl Flush<()> for Thread {
    type Error = Infallible;

    /// Forgets what is gone from the table as far as this thread can tell; the rest is fetched
    /// again at once.
    fn flush(&mut self) -> Result<(), Infallible> {
        for (table, iotlb) in self.hardware.table.iter().zip(&self.hardware.iotlb) {
            if table.load(Ordering::Relaxed) == 0 {
                iotlb.store(0, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    fn release(&mut self, unmapped: Unmapped<()>) {
        let entry = usize::try_from(unmapped.iova.get()).unwrap();
        let cached = self.hardware.iotlb[entry].load(Ordering::Relaxed);
        assert_eq!(cached, 0, "entry {entry} is released and still cached");
        self.released += 1;
    }
}

type Clock = FlushClock<(), LoomLocks>;
type Queue = FlushQueue<(), LoomLocks>;

/// A thread with a queue of its own.
fn begin(hardware: &Arc<Hardware>, clock: &Arc<Clock>) -> (Thread, Queue) {
    let thread = Thread { hardware: Arc::clone(hardware), released: 0 };
    (thread, Queue::new(Arc::clone(clock), Limits { entries: 16, delay: 1000 }))
}

fn unmap(entry: u64, queue: &mut Queue, thread: &mut Thread) {
    thread.hardware.table[usize::try_from(entry).unwrap()].store(0, Ordering::Relaxed);
    let unmapped = Unmapped { iova: Iova::new(entry), len: 1, dead: () };
    let Ok(()) = queue.push(0, unmapped, thread);
}

#[test]
fn what_the_flush_of_another_frees_was_unmapped_before_it_began() {
    loom::model(|| {
        let (hardware, clock) = (Hardware::new(), Arc::new(Clock::new()));
        let (mut thread, mut queue) = begin(&hardware, &clock);
        let other = thread::spawn(move || {
            let (mut other, _) = begin(&hardware, &clock);
            let Ok(()) = clock.flush(&mut other);
        });
        unmap(0, &mut queue, &mut thread);
        // Once to have a stamp, and once to find the flush completed, or not.
        let Ok(()) = queue.poll(1, &mut thread);
        let Ok(()) = queue.poll(2, &mut thread);
        other.join().unwrap();
    });
}

#[test]
fn of_two_who_flush_at_once_each_releases_its_own() {
    loom::model(|| {
        let (hardware, clock) = (Hardware::new(), Arc::new(Clock::new()));
        let (mut thread, mut queue) = begin(&hardware, &clock);
        let other = thread::spawn(move || {
            let (mut other, mut queue) = begin(&hardware, &clock);
            unmap(1, &mut queue, &mut other);
            let Ok(()) = queue.flush(&mut other);
            assert_eq!(other.released, 1);
        });
        unmap(0, &mut queue, &mut thread);
        let Ok(()) = queue.flush(&mut thread);
        assert_eq!(thread.released, 1);
        other.join().unwrap();
    });
}

#[test]
fn what_a_queue_leaves_behind_is_released_once_and_not_too_early() {
    loom::model(|| {
        let (hardware, clock) = (Hardware::new(), Arc::new(Clock::new()));
        let (mut thread, queue) = begin(&hardware, &clock);
        let other = {
            let clock = Arc::clone(&clock);
            thread::spawn(move || {
                let (mut other, mut queue) = begin(&hardware, &clock);
                unmap(1, &mut queue, &mut other);
            })
        };
        let Ok(()) = clock.flush(&mut thread);
        other.join().unwrap();
        let Ok(()) = clock.flush(&mut thread);
        assert_eq!((thread.released, queue.deadline()), (1, None));
    });
}
