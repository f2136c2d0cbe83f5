//! The rings: who stands where, what a doorbell may say, and which phase a slot has (4.1, 4.6).

use lychgate_model::DmaSegment;
use lychgate_types::Iova;

use super::spec::{CQE_SIZE, SQE_SIZE, low};

/// A doorbell was given a value that the queue cannot have (5.2: error event 1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct InvalidDoorbell;

/// A ring in memory: `entries` slots, one of which stays free.
#[derive(Clone, Copy, Debug)]
struct Ring {
    base: u64,
    /// 2 to 65536.
    entries: u32,
    entry_size: u32,
}

impl Ring {
    /// `None` if the ring passes the end of the address space, or has no slot to use.
    fn new(base: u64, entries: u32, entry_size: usize) -> Option<Self> {
        let entry_size = u32::try_from(entry_size).ok()?;
        let len = u64::from(entries) * u64::from(entry_size);
        base.checked_add(len)?;
        (entries >= 2).then_some(Self { base, entries, entry_size })
    }

    fn distance(&self, from: u32, to: u32) -> u32 {
        if to >= from { to - from } else { self.entries - from + to }
    }

    fn after(&self, at: u32, count: u32) -> u32 {
        (at + count) % self.entries
    }

    fn slot(&self, at: u32) -> Iova {
        Iova::new(self.base + u64::from(at) * u64::from(self.entry_size))
    }

    /// `count` slots from `at`: one run, or two around the end.
    fn runs(&self, at: u32, count: u32) -> Runs {
        let first = count.min(self.entries - at);
        let run = |at, count| DmaSegment {
            start: self.slot(at),
            len: u64::from(count) * u64::from(self.entry_size),
        };
        Runs { runs: [run(at, first), run(0, count - first)], wraps: first < count }
    }
}

/// One or two runs of slots.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Runs {
    runs: [DmaSegment; 2],
    wraps: bool,
}

impl Runs {
    pub(crate) fn segments(&self) -> &[DmaSegment] {
        &self.runs[..if self.wraps { 2 } else { 1 }]
    }
}

/// A submission queue, as the controller sees it.
#[derive(Clone, Debug)]
pub(crate) struct SubmissionQueue {
    pub(crate) id: u16,
    /// The completion queue it reports to.
    pub(crate) cqid: u16,
    ring: Ring,
    head: u32,
    tail: u32,
    /// The tail doorbell as last looked at.
    doorbell: u32,
}

impl SubmissionQueue {
    pub(crate) fn new(id: u16, cqid: u16, base: u64, entries: u32) -> Option<Self> {
        let ring = Ring::new(base, entries, SQE_SIZE)?;
        Some(Self { id, cqid, ring, head: 0, tail: 0, doorbell: 0 })
    }

    /// Looks at the tail doorbell. A value seen before says nothing new.
    pub(crate) fn look(&mut self, doorbell: u32) -> Result<(), InvalidDoorbell> {
        if doorbell == self.doorbell {
            return Ok(());
        }
        self.doorbell = doorbell;
        let tail = u32::from(low(doorbell));
        if tail >= self.ring.entries {
            return Err(InvalidDoorbell);
        }
        self.tail = tail;
        Ok(())
    }

    /// Commands that wait to be fetched.
    pub(crate) fn waiting(&self) -> u32 {
        self.ring.distance(self.head, self.tail)
    }

    /// Slot that is fetched next.
    pub(crate) fn head(&self) -> u16 {
        low(self.head)
    }

    /// The next `count` commands, at most [`SubmissionQueue::waiting`].
    pub(crate) fn next(&self, count: u32) -> Runs {
        self.ring.runs(self.head, count)
    }

    /// Counts one command as fetched; returns the new head, which its completion reports.
    pub(crate) fn advance(&mut self) -> u16 {
        self.head = self.ring.after(self.head, 1);
        low(self.head)
    }
}

/// A completion queue, as the controller sees it.
#[derive(Clone, Debug)]
pub(crate) struct CompletionQueue {
    pub(crate) id: u16,
    /// The MSI-X vector, if completions raise one.
    pub(crate) vector: Option<u16>,
    ring: Ring,
    head: u32,
    tail: u32,
    /// What tells a new entry from an old one in the present pass.
    phase: bool,
    /// The head doorbell as last looked at.
    doorbell: u32,
}

impl CompletionQueue {
    pub(crate) fn new(id: u16, vector: Option<u16>, base: u64, entries: u32) -> Option<Self> {
        let ring = Ring::new(base, entries, CQE_SIZE)?;
        Some(Self { id, vector, ring, head: 0, tail: 0, phase: true, doorbell: 0 })
    }

    /// Looks at the head doorbell: it may move up to the tail, not beyond.
    pub(crate) fn look(&mut self, doorbell: u32) -> Result<(), InvalidDoorbell> {
        if doorbell == self.doorbell {
            return Ok(());
        }
        self.doorbell = doorbell;
        let head = u32::from(low(doorbell));
        let used = self.ring.distance(self.head, self.tail);
        if head >= self.ring.entries || self.ring.distance(self.head, head) > used {
            return Err(InvalidDoorbell);
        }
        self.head = head;
        Ok(())
    }

    /// Completions that may be posted before the queue is full.
    pub(crate) fn room(&self) -> u32 {
        self.ring.entries - 1 - self.ring.distance(self.head, self.tail)
    }

    /// Slot that is filled next.
    pub(crate) fn tail(&self) -> u16 {
        low(self.tail)
    }

    /// The next `count` slots, at most [`CompletionQueue::room`].
    pub(crate) fn next(&self, count: u32) -> Runs {
        self.ring.runs(self.tail, count)
    }

    /// The phase of the slot `ahead` of the tail.
    pub(crate) fn phase(&self, ahead: u32) -> bool {
        self.phase ^ (self.tail + ahead >= self.ring.entries)
    }

    /// Counts `count` slots as filled.
    pub(crate) fn advance(&mut self, count: u32) {
        self.phase = self.phase(count);
        self.tail = self.ring.after(self.tail, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_beyond_the_queue_is_refused_once_and_changes_nothing() {
        let mut queue = SubmissionQueue::new(1, 1, 0x1000, 4).unwrap();
        assert_eq!(queue.look(3), Ok(()));
        assert_eq!(queue.look(4), Err(InvalidDoorbell));
        assert_eq!(queue.look(4), Ok(()), "the same value again says nothing new");
        assert_eq!(queue.waiting(), 3);
        assert_eq!(queue.look(0xffff_0002), Ok(()), "bits 31:16 are reserved");
        assert_eq!(queue.waiting(), 2);
    }

    #[test]
    fn commands_around_the_end_are_two_runs() {
        let mut queue = SubmissionQueue::new(1, 1, 0x1000, 4).unwrap();
        queue.look(3).unwrap();
        assert_eq!([queue.advance(), queue.advance(), queue.advance()], [1, 2, 3]);
        queue.look(2).unwrap();
        let runs = queue.next(queue.waiting());
        let expect = [(0x10c0, 64), (0x1000, 128)];
        assert_eq!(
            runs.segments().iter().map(|s| (s.start.get(), s.len)).collect::<Vec<_>>(),
            expect
        );
    }

    #[test]
    fn the_phase_turns_at_each_wrap_and_no_slot_is_taken_when_full() {
        let mut queue = CompletionQueue::new(1, None, 0x1000, 3).unwrap();
        assert_eq!((queue.room(), queue.phase(0), queue.phase(1)), (2, true, true));
        queue.advance(1);
        assert_eq!(queue.look(2), Err(InvalidDoorbell), "beyond the tail");
        queue.advance(1);
        assert_eq!(queue.room(), 0);
        queue.look(0).unwrap();
        queue.look(2).unwrap();
        assert_eq!((queue.room(), queue.phase(0), queue.phase(1)), (2, true, false));
        queue.advance(2);
        assert_eq!((queue.tail(), queue.phase(0)), (1, false));
        assert_eq!(queue.look(3), Err(InvalidDoorbell), "beyond the queue");
        assert_eq!(queue.look(1), Ok(()));
        assert_eq!(queue.room(), 2);
    }

    #[test]
    fn the_largest_queue_works_and_none_passes_the_end_of_the_address_space() {
        let queue = SubmissionQueue::new(1, 1, 0, 65536).unwrap();
        assert_eq!(queue.next(65535).segments().len(), 1);
        assert!(SubmissionQueue::new(1, 1, u64::MAX - 0xfff, 65).is_none());
        assert!(CompletionQueue::new(1, None, 0x1000, 1).is_none());
    }
}
