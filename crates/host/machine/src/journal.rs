//! What was mapped where, and which call changed it: the memory of fault reports.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lychgate_iommufd::{Event, Observer};
use lychgate_origins::{Origins, Stack};
use lychgate_types::{Bdf, Iova, Prot};

use crate::system::Call;

/// Mappings that have ended and are still remembered.
const MAX_ENDED: usize = 1 << 16;

thread_local! {
    /// The calls that this thread is in, the last one innermost.
    static CALLS: RefCell<Vec<Arc<Call>>> = const { RefCell::new(Vec::new()) };
    /// Where they come from.
    static STACKS: RefCell<Vec<Stack>> = const { RefCell::new(Vec::new()) };
}

/// A call begins on this thread.
pub(crate) fn call_begins(call: Call) {
    CALLS.with_borrow_mut(|calls| calls.push(Arc::new(call)));
    STACKS.with_borrow_mut(|stacks| stacks.push(Stack::default()));
}

/// Where the call that began last on this thread comes from.
pub(crate) fn call_came_from(stack: Stack) {
    STACKS.with_borrow_mut(|stacks| {
        if let Some(last) = stacks.last_mut() {
            *last = stack;
        }
    });
}

/// The call that began last on this thread is over.
pub(crate) fn call_ends() {
    CALLS.with_borrow_mut(|calls| drop(calls.pop()));
    STACKS.with_borrow_mut(|stacks| drop(stacks.pop()));
}

fn current_call() -> Option<Arc<Call>> {
    CALLS.with_borrow(|calls| calls.last().cloned())
}

/// When something happened, and in which call; `None` for what no call did, as when a process ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cause {
    /// When.
    pub time: Instant,
    /// In which call.
    pub call: Option<Arc<Call>>,
    /// The program's frames in that call; empty unless somebody looked for them.
    pub stack: Stack,
    /// The place in the program's source, once it was asked for.
    pub place: Option<String>,
}

impl Cause {
    /// Now, in the call that this thread is in.
    pub(crate) fn now() -> Self {
        let stack = STACKS.with_borrow(|stacks| stacks.last().cloned().unwrap_or_default());
        Self { time: Instant::now(), call: current_call(), stack, place: None }
    }

    pub(crate) fn locate(&mut self, origins: &Origins) {
        self.place = origins.place(&self.stack).map(|place| place.to_string());
    }
}

/// A mapping, as long as it lived.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// First IOVA.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u64,
    /// Rights that were asked for.
    pub prot: Prot,
    /// Who mapped it.
    pub mapped: Cause,
    /// Who unmapped it; `None` while it lives.
    pub unmapped: Option<Cause>,
}

impl Mapping {
    /// Last IOVA, inclusive.
    pub fn last(&self) -> Iova {
        self.iova.wrapping_add(self.len.wrapping_sub(1))
    }

    fn covers(&self, at: Iova) -> bool {
        (self.iova..=self.last()).contains(&at)
    }
}

/// What is known of an IOVA of a device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct History {
    /// Whether the device is attached to something.
    pub attached: bool,
    /// The mapping that is there, else the one that was there last.
    pub mapping: Option<Mapping>,
    /// Where none is and none was: the live mapping that ends last before the IOVA.
    pub below: Option<Mapping>,
    /// As `below`: the live mapping that starts first behind it.
    pub above: Option<Mapping>,
}

impl History {
    /// Looks for the places in the source behind every cause.
    pub(crate) fn locate(&mut self, origins: &Origins) {
        for mapping in [&mut self.mapping, &mut self.below, &mut self.above].into_iter().flatten() {
            mapping.mapped.locate(origins);
            if let Some(unmapped) = &mut mapping.unmapped {
                unmapped.locate(origins);
            }
        }
    }
}

/// The journal. It hears what happens as iommufd's [`Observer`].
#[derive(Default)]
pub struct Journal(Mutex<State>);

#[derive(Default)]
struct State {
    /// By IOAS and first IOVA.
    live: BTreeMap<(u64, u64), Mapping>,
    ended: VecDeque<(u64, Mapping)>,
    devices: HashMap<Bdf, Attachment>,
}

#[derive(Clone, Copy)]
struct Attachment {
    /// The IOAS, or the last one.
    ioas: u64,
    attached: bool,
}

impl Journal {
    /// Nothing has happened.
    pub fn new() -> Self {
        Self::default()
    }

    /// What is and was mapped at an IOVA for a device.
    pub fn history(&self, device: Bdf, at: Iova) -> History {
        let state = self.lock();
        let Some(attachment) = state.devices.get(&device).copied() else {
            return History::default();
        };
        let mut history = History { attached: attachment.attached, ..History::default() };
        let ioas = attachment.ioas;
        let below =
            state.live.range((ioas, 0)..=(ioas, at.get())).next_back().map(|(_, live)| live);
        let ended = || {
            let there = |(known, mapping): &&(u64, Mapping)| *known == ioas && mapping.covers(at);
            state.ended.iter().rev().find(there).map(|(_, mapping)| mapping)
        };
        history.mapping = below.filter(|live| live.covers(at)).or_else(ended).cloned();
        if history.mapping.is_none() {
            let above = state.live.range((ioas, at.get())..=(ioas, u64::MAX)).next();
            history.below = below.cloned();
            history.above = above.map(|(_, live)| live.clone());
        }
        history
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Ends what is mapped in a range. What lies outside of it lives on, with the same history: a
    /// type1 v1 container cuts mappings.
    fn end(&mut self, ioas: u64, first: u64, len: u64) {
        let last = first.saturating_add(len.saturating_sub(1));
        let cause = Cause::now();
        let overlapping = self.live.range((ioas, 0)..=(ioas, last)).rev();
        let keys: Vec<_> = overlapping
            .take_while(|(_, mapping)| mapping.last().get() >= first)
            .map(|(key, _)| *key)
            .collect();
        for key in keys {
            let Some(whole) = self.live.remove(&key) else { continue };
            let (start, end) = (whole.iova.get(), whole.last().get());
            if start < first {
                self.live.insert((ioas, start), part(&whole, start, first - 1));
            }
            if end > last {
                self.live.insert((ioas, last + 1), part(&whole, last + 1, end));
            }
            if self.ended.len() == MAX_ENDED {
                self.ended.pop_front();
            }
            let ended = part(&whole, start.max(first), end.min(last));
            self.ended.push_back((ioas, Mapping { unmapped: Some(cause.clone()), ..ended }));
        }
    }
}

/// The part of a mapping from `first` to `last`, inclusive.
fn part(whole: &Mapping, first: u64, last: u64) -> Mapping {
    Mapping { iova: Iova::new(first), len: (last - first).saturating_add(1), ..whole.clone() }
}

impl Observer for Journal {
    fn event(&self, event: &Event) {
        let mut state = self.lock();
        match *event {
            Event::Mapped { ioas, iova, len, prot } => {
                let iova = Iova::new(iova);
                let mapping = Mapping { iova, len, prot, mapped: Cause::now(), unmapped: None };
                state.live.insert((ioas, iova.get()), mapping);
            }
            Event::Unmapped { ioas, iova, len } => state.end(ioas, iova, len),
            Event::Attached { device, ioas } => {
                state.devices.insert(device, Attachment { ioas, attached: true });
            }
            Event::Detached { device } => {
                if let Some(attachment) = state.devices.get_mut(&device) {
                    attachment.attached = false;
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICE: Bdf = Bdf { segment: 0, requester: lychgate_types::RequesterId::new(0x100) };

    fn call(number: u64, name: &str) -> Call {
        Call { number, process: 7, thread: 8, instruction: 0x40_1000, name: name.into() }
    }

    fn during(journal: &Journal, number: u64, name: &str, event: Event) {
        call_begins(call(number, name));
        journal.event(&event);
        call_ends();
    }

    fn number(cause: &Cause) -> u64 {
        cause.call.as_ref().unwrap().number
    }

    #[test]
    fn an_iova_is_known_with_the_calls_that_mapped_and_unmapped_it() {
        let journal = Journal::new();
        journal.event(&Event::Attached { device: DEVICE, ioas: 5 });
        let prot = Prot::READ | Prot::WRITE;
        for number in 1..=2 {
            let (iova, len) = (0x1000, 0x2000);
            during(
                &journal,
                number * 10,
                "IOMMU_IOAS_MAP",
                Event::Mapped { ioas: 5, iova, len, prot },
            );
            let history = journal.history(DEVICE, Iova::new(0x2fff));
            assert!(history.attached && history.mapping.unwrap().unmapped.is_none());
            during(
                &journal,
                number * 10 + 1,
                "IOMMU_IOAS_UNMAP",
                Event::Unmapped { ioas: 5, iova, len },
            );
        }
        let mapping = journal.history(DEVICE, Iova::new(0x2fff)).mapping.unwrap();
        assert_eq!(
            (mapping.iova, mapping.last(), mapping.prot),
            (Iova::new(0x1000), Iova::new(0x2fff), prot)
        );
        assert_eq!(number(&mapping.mapped), 20);
        let unmapped = mapping.unmapped.unwrap();
        assert_eq!(number(&unmapped), 21);
        assert!(unmapped.time >= mapping.mapped.time);
        assert_eq!(journal.history(DEVICE, Iova::new(0x3000)).mapping, None);
    }

    #[test]
    fn where_nothing_ever_was_the_neighbours_are_named() {
        let journal = Journal::new();
        journal.event(&Event::Attached { device: DEVICE, ioas: 1 });
        for (ioas, iova) in [(1, 0x1000), (1, 0x9000), (2, 0x5000), (1, u64::MAX - 0xfff)] {
            journal.event(&Event::Mapped { ioas, iova, len: 0x1000, prot: Prot::READ });
        }
        let history = journal.history(DEVICE, Iova::new(0x5000));
        assert_eq!(history.mapping, None);
        assert_eq!(history.below.unwrap().iova, Iova::new(0x1000));
        assert_eq!(history.above.unwrap().iova, Iova::new(0x9000));
        let last = journal.history(DEVICE, Iova::new(u64::MAX)).mapping.unwrap();
        assert_eq!((last.last(), last.mapped.call), (Iova::new(u64::MAX), None));
    }

    #[test]
    fn a_mapping_that_is_cut_lives_on_at_both_ends() {
        let journal = Journal::new();
        journal.event(&Event::Attached { device: DEVICE, ioas: 1 });
        journal.event(&Event::Mapped { ioas: 1, iova: 0x1000, len: 0x5000, prot: Prot::READ });
        journal.event(&Event::Unmapped { ioas: 1, iova: 0x3000, len: 0x1000 });
        let ended = |at| {
            let mapping = journal.history(DEVICE, Iova::new(at)).mapping.unwrap();
            (mapping.unmapped.is_some(), mapping.iova.get(), mapping.last().get())
        };
        assert_eq!(ended(0x2fff), (false, 0x1000, 0x2fff));
        assert_eq!(ended(0x3000), (true, 0x3000, 0x3fff));
        assert_eq!(ended(0x4000), (false, 0x4000, 0x5fff));
    }

    #[test]
    fn a_device_that_was_detached_is_judged_by_its_last_ioas() {
        let journal = Journal::new();
        assert_eq!(journal.history(DEVICE, Iova::new(0)), History::default());
        journal.event(&Event::Mapped { ioas: 1, iova: 0, len: 0x1000, prot: Prot::READ });
        journal.event(&Event::Attached { device: DEVICE, ioas: 1 });
        journal.event(&Event::Detached { device: DEVICE });
        let history = journal.history(DEVICE, Iova::new(0x10));
        assert!(!history.attached && history.mapping.is_some());
    }
}
