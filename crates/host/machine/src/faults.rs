//! From an aborted transfer and the driver's fault report to one story.
//!
//! The bus knows what the device was doing; the IOMMU's driver, which reads the event log on a
//! thread of its own, knows why the request did not pass. Both meet here.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use lychgate_iommu::{FaultReport, FaultSink};
use lychgate_model::{Access, Finding};
use lychgate_origins::Origins;
use lychgate_types::{Bdf, Iova, Pasid, RequesterId};

use crate::check::StaleStory;
use crate::journal::{Cause, History, Journal};
use crate::report::{FaultStory, Reason};

/// Who hears of DMA that did not pass. Called from threads of the machine.
pub trait FaultListener: Send + Sync {
    /// A request did not pass.
    fn fault(&self, story: &FaultStory);

    /// The IOMMU's log overflowed: faults were lost.
    fn faults_lost(&self) {}

    /// On a machine that checks: the IOMMU has a copy that its tables contradict.
    fn stale(&self, story: &StaleStory) {
        let _ = story;
    }
}

/// Aborts that wait for the driver's report.
const MAX_ABORTS: usize = 256;

/// How long a report waits for its abort: the bus notes it as soon as the IOMMU lets it go on.
const PATIENCE: Duration = Duration::from_millis(50);

/// A transfer that did not pass, as the bus knows it.
#[derive(Clone, Debug)]
pub(crate) struct Abort {
    pub(crate) requester: RequesterId,
    pub(crate) pasid: Option<Pasid>,
    pub(crate) access: Access,
    pub(crate) iova: Iova,
    pub(crate) initiator: String,
}

/// An abort with what was mapped when it happened.
struct Noted {
    abort: Abort,
    time: Instant,
    history: History,
}

/// Where both meet.
pub(crate) struct Faults {
    journal: Arc<Journal>,
    listener: Option<Arc<dyn FaultListener>>,
    origins: Option<Arc<Origins>>,
    devices: OnceLock<HashMap<RequesterId, (Bdf, String)>>,
    aborts: Mutex<VecDeque<Noted>>,
    noted: Condvar,
    count: AtomicU64,
}

impl Faults {
    pub(crate) fn new(
        journal: Arc<Journal>,
        listener: Option<Arc<dyn FaultListener>>,
        origins: Option<Arc<Origins>>,
    ) -> Self {
        Self {
            journal,
            listener,
            origins,
            devices: OnceLock::new(),
            aborts: Mutex::default(),
            noted: Condvar::new(),
            count: AtomicU64::new(0),
        }
    }

    /// Names the functions, once.
    pub(crate) fn name_devices(&self, devices: HashMap<RequesterId, (Bdf, String)>) {
        let _ = self.devices.set(devices);
    }

    /// How many requests did not pass.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// A transfer did not pass: the IOMMU stopped it, or memory is `unreachable`, of which the IOMMU
    /// says nothing.
    pub(crate) fn aborted(&self, abort: Abort, unreachable: bool) {
        let (device, _) = self.device(abort.requester);
        let history = self.journal.history(device, abort.iova);
        let noted = Noted { abort, time: Instant::now(), history };
        if unreachable {
            self.tell(self.story(noted, Reason::MemoryGone, None));
            return;
        }
        let mut aborts = self.lock();
        if aborts.len() == MAX_ABORTS {
            aborts.pop_front();
        }
        aborts.push_back(noted);
        self.noted.notify_all();
    }

    /// The oldest abort that a report describes.
    fn take(&self, report: &FaultReport) -> Option<Noted> {
        let fits = |noted: &Noted| {
            let abort = &noted.abort;
            abort.requester == report.requester
                && (abort.access == Access::Write) == report.write
                && abort.iova.align_down(4096) == report.iova.align_down(4096)
        };
        let until = Instant::now() + PATIENCE;
        let mut aborts = self.lock();
        loop {
            if let Some(at) = aborts.iter().position(fits) {
                return aborts.remove(at);
            }
            let left = until.checked_duration_since(Instant::now())?;
            let waited = self.noted.wait_timeout(aborts, left);
            aborts = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn story(&self, noted: Noted, reason: Reason, raw: Option<[u64; 4]>) -> FaultStory {
        let (device, name) = self.device(noted.abort.requester);
        FaultStory {
            device,
            name,
            initiator: Some(noted.abort.initiator),
            access: noted.abort.access,
            iova: noted.abort.iova,
            pasid: noted.abort.pasid,
            reason,
            time: noted.time,
            history: noted.history,
            raw,
        }
    }

    /// Tells of a copy that the tables contradict.
    pub(crate) fn tell_stale(&self, finding: Finding) {
        let (device, name) = self.device(finding.requester);
        let mut history = self.journal.history(device, Iova::new(finding.span.start));
        let mut after = Cause::now();
        if let Some(origins) = &self.origins {
            history.locate(origins);
            after.locate(origins);
        }
        if let Some(listener) = &self.listener {
            listener.stale(&StaleStory { device, name, finding, history, after });
        }
    }

    fn tell(&self, mut story: FaultStory) {
        self.count.fetch_add(1, Ordering::Relaxed);
        if let Some(origins) = &self.origins {
            story.history.locate(origins);
        }
        if let Some(listener) = &self.listener {
            listener.fault(&story);
        }
    }

    fn device(&self, requester: RequesterId) -> (Bdf, String) {
        let known = self.devices.get().and_then(|devices| devices.get(&requester)).cloned();
        known.unwrap_or_else(|| (Bdf { segment: 0, requester }, "unknown device".to_owned()))
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<Noted>> {
        self.aborts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FaultSink for Faults {
    fn fault(&self, report: &FaultReport) {
        let reason = Reason::Iommu(report.reason);
        if let Some(noted) = self.take(report) {
            self.tell(self.story(noted, reason, Some(report.raw)));
            return;
        }
        let (device, name) = self.device(report.requester);
        self.tell(FaultStory {
            history: self.journal.history(device, report.iova),
            device,
            name,
            initiator: None,
            access: if report.write { Access::Write } else { Access::Read },
            iova: report.iova,
            pasid: report.pasid,
            reason,
            time: Instant::now(),
            raw: Some(report.raw),
        });
    }

    fn faults_lost(&self) {
        if let Some(listener) = &self.listener {
            listener.faults_lost();
        }
    }
}

#[cfg(test)]
mod tests {
    use lychgate_iommu::FaultReason;

    use super::*;

    #[derive(Default)]
    struct Heard(Mutex<Vec<FaultStory>>);

    impl FaultListener for Heard {
        fn fault(&self, story: &FaultStory) {
            self.0.lock().unwrap().push(story.clone());
        }
    }

    fn abort(iova: u64, initiator: &str) -> Abort {
        Abort {
            requester: RequesterId::new(0x100),
            pasid: None,
            access: Access::Write,
            iova: Iova::new(iova),
            initiator: initiator.into(),
        }
    }

    fn report(iova: u64, write: bool) -> FaultReport {
        FaultReport {
            requester: RequesterId::new(0x100),
            pasid: None,
            iova: Iova::new(iova),
            write,
            reason: FaultReason::NotPresent,
            raw: [1, 2, 0, 0],
        }
    }

    fn faults() -> (Arc<Faults>, Arc<Heard>) {
        let heard = Arc::new(Heard::default());
        (
            Arc::new(Faults::new(Arc::new(Journal::new()), Some(Arc::clone(&heard) as _), None)),
            heard,
        )
    }

    #[test]
    fn a_report_finds_its_abort_whichever_comes_first() {
        let (faults, heard) = faults();
        faults.aborted(abort(0x2000, "second"), false);
        faults.aborted(abort(0x1008, "first"), false);
        faults.fault(&report(0x1008, true));
        let late = {
            let faults = Arc::clone(&faults);
            std::thread::spawn(move || faults.fault(&report(0x3000, true)))
        };
        faults.aborted(abort(0x3000, "third"), false);
        late.join().unwrap();
        let stories = heard.0.lock().unwrap();
        let initiators: Vec<_> = stories.iter().map(|story| story.initiator.as_deref()).collect();
        assert_eq!(initiators, [Some("first"), Some("third")]);
        assert_eq!(faults.count(), 2);
    }

    #[test]
    fn a_report_without_an_abort_is_told_all_the_same() {
        let (faults, heard) = faults();
        faults.aborted(abort(0x1000, "a write"), false);
        faults.fault(&report(0x1000, false));
        let stories = heard.0.lock().unwrap();
        assert_eq!((stories[0].initiator.clone(), stories[0].access), (None, Access::Read));
    }

    #[test]
    fn memory_that_is_gone_needs_no_report() {
        let (faults, heard) = faults();
        faults.aborted(abort(0x1000, "a write"), true);
        assert_eq!(heard.0.lock().unwrap()[0].reason, Reason::MemoryGone);
    }
}
