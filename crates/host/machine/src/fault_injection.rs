//! Fault injection as programs control it: `fail-nth` of each thread, and the knobs in debugfs
//! (`Documentation/fault-injection/fault-injection.rst`).
//!
//! Only `fail-nth` makes steps fail: there is no `probability` here, and so none of the knobs that
//! come with it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommufd::error::Result;
use lychgate_iommufd::fault_injection::{FaultInjection, Step};

use crate::text::{Text, number, switch};

/// Where Linux has debugfs.
const DEBUGFS: &str = "/sys/kernel/debug";

/// How many threads are kept before those that wait for no fault are forgotten.
const MANY_TASKS: usize = 64;

/// What a program can set, by its path in debugfs.
struct Knob {
    path: &'static str,
    kind: Kind,
    value: AtomicU32,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `Y` or `N`.
    Switch,
    /// A number.
    Number,
}

/// The knobs of all three capabilities with the defaults of Linux (`mm/failslab.c`,
/// `mm/fail_page_alloc.c`, `DEFINE_FAULT_ATTR`).
struct Knobs {
    slab_ignores_waiting: Arc<Knob>,
    slab_verbose: Arc<Knob>,
    pages_ignore_waiting: Arc<Knob>,
    pages_ignore_highmem: Arc<Knob>,
    pages_min_order: Arc<Knob>,
    pages_verbose: Arc<Knob>,
    iommufd_verbose: Arc<Knob>,
}

/// All of it, of one machine.
pub(crate) struct Injection {
    knobs: Arc<Knobs>,
    tasks: Arc<Tasks>,
}

/// Threads that have been told to fail.
#[derive(Default)]
struct Tasks(Mutex<HashMap<u32, Arc<AtomicU32>>>);

impl Injection {
    pub(crate) fn new() -> Self {
        Self { knobs: Arc::new(Knobs::new()), tasks: Arc::default() }
    }

    /// The knobs by path, with what they show.
    pub(crate) fn attributes(&self) -> Vec<(String, String)> {
        let knobs = self.knobs.all().into_iter();
        knobs.map(|knob| (format!("{DEBUGFS}/{}", knob.path), knob.text())).collect()
    }

    /// The knob at an absolute path.
    pub(crate) fn attribute(&self, path: &str) -> Option<Arc<dyn Text>> {
        let name = path.strip_prefix(DEBUGFS)?.strip_prefix('/')?;
        let knob = self.knobs.all().into_iter().find(|knob| knob.path == name)?;
        Some(Arc::clone(knob) as _)
    }

    /// The `fail-nth` of a thread.
    pub(crate) fn fail_nth(&self, thread: u32) -> Arc<dyn Text> {
        Arc::new(FailNth { thread, tasks: Arc::clone(&self.tasks) })
    }

    /// Who decides for the calls of a thread; `None` when none of its steps is to fail.
    pub(crate) fn of(&self, thread: u32) -> Option<Arc<dyn FaultInjection>> {
        let left = self.tasks.find(thread).filter(|left| left.load(Ordering::Relaxed) > 0)?;
        Some(Arc::new(Task { left, knobs: Arc::clone(&self.knobs) }))
    }
}

/// A thread of which a step is to fail.
struct Task {
    /// `task_struct.fail_nth`: 1 for the next step, 0 for none.
    left: Arc<AtomicU32>,
    knobs: Arc<Knobs>,
}

impl FaultInjection for Task {
    /// `should_failslab`, `should_fail_alloc_page` and `iommufd_should_fail`, and what they have in
    /// common, `should_fail_ex`.
    fn should_fail(&self, step: Step) -> bool {
        let Some(verbose) = self.knobs.counted(step) else { return false };
        let less = |left: u32| left.checked_sub(1);
        let fails = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) == Ok(1);
        if fails && verbose {
            tracing::info!(?step, "forcing a failure");
        }
        fails
    }
}

impl Tasks {
    fn find(&self, thread: u32) -> Option<Arc<AtomicU32>> {
        self.lock().get(&thread).cloned()
    }

    fn set(&self, thread: u32, nth: u32) {
        let mut tasks = self.lock();
        if tasks.len() >= MANY_TASKS {
            tasks.retain(|_, left| left.load(Ordering::Relaxed) > 0);
        }
        tasks.entry(thread).or_default().store(nth, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<AtomicU32>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `/proc/PID/task/TID/fail-nth`: shows how many steps are left up to the one that fails, 0 when it
/// has failed.
struct FailNth {
    thread: u32,
    tasks: Arc<Tasks>,
}

impl Text for FailNth {
    fn show(&self) -> Result<String> {
        let left = self.tasks.find(self.thread).map_or(0, |left| left.load(Ordering::Relaxed));
        Ok(format!("{left}\n"))
    }

    fn store(&self, text: &str) -> Result<()> {
        self.tasks.set(self.thread, number(text)?);
        Ok(())
    }
}

impl Knobs {
    fn new() -> Self {
        let knob = |path, kind, value| Arc::new(Knob { path, kind, value: AtomicU32::new(value) });
        Self {
            slab_ignores_waiting: knob("failslab/ignore-gfp-wait", Kind::Switch, 1),
            slab_verbose: knob("failslab/verbose", Kind::Number, 2),
            pages_ignore_waiting: knob("fail_page_alloc/ignore-gfp-wait", Kind::Switch, 1),
            pages_ignore_highmem: knob("fail_page_alloc/ignore-gfp-highmem", Kind::Switch, 1),
            pages_min_order: knob("fail_page_alloc/min-order", Kind::Number, 1),
            pages_verbose: knob("fail_page_alloc/verbose", Kind::Number, 2),
            iommufd_verbose: knob("fail_iommufd/verbose", Kind::Number, 2),
        }
    }

    fn all(&self) -> [&Arc<Knob>; 7] {
        [
            &self.slab_ignores_waiting,
            &self.slab_verbose,
            &self.pages_ignore_waiting,
            &self.pages_ignore_highmem,
            &self.pages_min_order,
            &self.pages_verbose,
            &self.iommufd_verbose,
        ]
    }

    /// Whether a step counts, and if so, whether its failing is told. All allocations here may wait,
    /// and none is of user pages, so that highmem does not matter.
    fn counted(&self, step: Step) -> Option<bool> {
        let (counts, verbose) = match step {
            Step::Slab => (self.slab_ignores_waiting.get() == 0, &self.slab_verbose),
            Step::Pages { order } => {
                let large_enough = order >= self.pages_min_order.get();
                (large_enough && self.pages_ignore_waiting.get() == 0, &self.pages_verbose)
            }
            Step::Iommufd => (true, &self.iommufd_verbose),
        };
        counts.then(|| verbose.get() > 0)
    }
}

impl Knob {
    fn get(&self) -> u32 {
        self.value.load(Ordering::Relaxed)
    }

    fn text(&self) -> String {
        match (self.kind, self.get()) {
            (Kind::Switch, 0) => "N\n".to_owned(),
            (Kind::Switch, _) => "Y\n".to_owned(),
            (Kind::Number, value) => format!("{value}\n"),
        }
    }
}

impl Text for Knob {
    fn show(&self) -> Result<String> {
        Ok(self.text())
    }

    fn store(&self, text: &str) -> Result<()> {
        let value = match self.kind {
            Kind::Switch => u32::from(switch(text)?),
            Kind::Number => number(text)?,
        };
        self.value.store(value, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes a knob or a `fail-nth` as a program would.
    fn set(text: &dyn Text, value: &str) {
        text.store(value).unwrap();
    }

    fn nth(faults: &Injection, thread: u32) -> FailNth {
        FailNth { thread, tasks: Arc::clone(&faults.tasks) }
    }

    #[test]
    fn the_nth_step_of_a_thread_fails_and_no_other() {
        let faults = Injection::new();
        set(&*faults.knobs.slab_ignores_waiting, "N");
        set(&nth(&faults, 7), "3");
        assert!(faults.of(8).is_none());
        let task = faults.of(7).unwrap();
        let fails: Vec<bool> = (0..5).map(|_| task.should_fail(Step::Slab)).collect();
        assert_eq!(fails, [false, false, true, false, false]);
        assert_eq!(nth(&faults, 7).show().unwrap(), "0\n");
        assert!(faults.of(7).is_none());
    }

    #[test]
    fn what_is_left_is_shown_and_can_be_taken_back() {
        let faults = Injection::new();
        let file = nth(&faults, 7);
        set(&file, "5");
        assert!(!faults.of(7).unwrap().should_fail(Step::Iommufd));
        assert_eq!(file.show().unwrap(), "4\n");
        set(&file, "0");
        assert!(faults.of(7).is_none());
    }

    #[test]
    fn allocations_count_once_those_that_may_wait_do() {
        let faults = Injection::new();
        set(&nth(&faults, 7), "1");
        let task = faults.of(7).unwrap();
        assert!(!task.should_fail(Step::Slab) && !task.should_fail(Step::Pages { order: 3 }));
        set(&*faults.knobs.pages_ignore_waiting, "N");
        assert!(!task.should_fail(Step::Pages { order: 0 }));
        assert!(task.should_fail(Step::Pages { order: 1 }));
    }

    #[test]
    fn knobs_have_the_defaults_of_linux_and_keep_what_is_written() {
        let faults = Injection::new();
        let shown: Vec<String> = faults
            .attributes()
            .into_iter()
            .map(|(path, text)| format!("{path} {}", text.trim_end()))
            .collect();
        assert_eq!(
            shown,
            [
                "/sys/kernel/debug/failslab/ignore-gfp-wait Y",
                "/sys/kernel/debug/failslab/verbose 2",
                "/sys/kernel/debug/fail_page_alloc/ignore-gfp-wait Y",
                "/sys/kernel/debug/fail_page_alloc/ignore-gfp-highmem Y",
                "/sys/kernel/debug/fail_page_alloc/min-order 1",
                "/sys/kernel/debug/fail_page_alloc/verbose 2",
                "/sys/kernel/debug/fail_iommufd/verbose 2",
            ]
        );
        set(&*faults.knobs.pages_min_order, "0");
        assert_eq!(faults.knobs.pages_min_order.text(), "0\n");
        assert!(faults.knobs.pages_min_order.store("many").is_err());
        assert!(faults.attribute("/sys/kernel/debug/fail_iommufd/verbose").is_some());
        assert!(faults.attribute("/sys/kernel/debug/fail_iommufd/probability").is_none());
    }
}
