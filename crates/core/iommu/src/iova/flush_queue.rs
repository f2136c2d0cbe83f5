//! Lazy invalidation: ranges that were unmapped wait until a flush has made hardware forget them.

use alloc::collections::VecDeque;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem;
use core::sync::atomic::Ordering;

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Lock, Locks};

/// What the queues of a domain need of it.
pub trait Flush<T> {
    /// Why hardware could not be flushed.
    type Error;

    /// Makes hardware forget every translation of the domain. When it returns, no device uses what was
    /// unmapped before the call, and every DMA that did has completed.
    ///
    /// # Errors
    /// Nobody can say what hardware still uses: everything goes on waiting.
    fn flush(&mut self) -> Result<(), Self::Error>;

    /// Takes a range that no hardware uses any more: its IOVAs can be given again, its tables freed.
    fn release(&mut self, unmapped: Unmapped<T>);
}

/// A range that was taken out of the page tables, without an invalidation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unmapped<T> {
    /// First byte.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u64,
    /// What else must wait: page tables that were taken out.
    pub dead: T,
}

/// How much may wait, and how long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Entries of one queue; at least 1.
    pub entries: usize,
    /// Nanoseconds.
    pub delay: u64,
}

impl Default for Limits {
    /// Those of Linux's per-processor queues: 256 entries, 10 ms.
    fn default() -> Self {
        Self { entries: 256, delay: 10_000_000 }
    }
}

/// What the queues of one domain share: which flushes have begun and which have completed.
///
/// A range may be used again when a flush has completed that began after the range was unmapped.
/// Flushes are numbered as they begin. An entry is stamped with the number of those
/// that had begun by then; it is free once any later one has completed, whoever asked for that.
pub struct FlushClock<T: Send, L: Locks> {
    begun: AtomicU64,
    /// The highest number of a flush that has completed.
    completed: AtomicU64,
    /// What the queues of threads that have ended left behind.
    orphans: L::Mutex<Vec<Entry<T>>>,
    /// When the oldest of them was pushed; [`NEVER`] without any.
    orphans_since: AtomicU64,
}

/// One thread's, or processor's, queue of a domain (Linux, `struct iova_fq`): ranges that were unmapped and
/// wait for a flush.
///
/// Time is any clock in nanoseconds that does not run backwards. The queue flushes by itself
/// when it is full, and when something is pushed while the oldest entry has waited too long; it is on
/// its owner to call [`poll`](Self::poll) when nothing is pushed, at [`deadline`](Self::deadline) or
/// from a timer.
///
/// Until the flush, hardware may go on using what was unmapped: that is the price, and `delay`
/// its bound. Dropping a queue loses nothing: what still waits is left to the [`FlushClock`], and goes
/// with the next flush that any queue makes.
pub struct FlushQueue<T: Send, L: Locks> {
    entries: VecDeque<Entry<T>>,
    /// Entries that have a stamp: the first so many.
    stamped: usize,
    /// Pushes until the queue is looked at.
    countdown: usize,
    /// When the first entry was pushed; [`NEVER`] without any.
    oldest: u64,
    limits: Limits,
    clock: Arc<FlushClock<T, L>>,
}

struct Entry<T> {
    unmapped: Unmapped<T>,
    since: u64,
    /// Flushes that had begun.
    stamp: u64,
}

/// Entries that are stamped at once. A stamp needs a locked access to what all threads share, and may as
/// well be late: that only makes it wait for a flush that began later.
const STAMPED_AT_ONCE: usize = 64;

const NEVER: u64 = u64::MAX;

impl<T: Send, L: Locks> FlushClock<T, L> {
    /// No flush has begun.
    pub fn new() -> Self {
        Self {
            begun: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            orphans: L::Mutex::new(Vec::new()),
            orphans_since: AtomicU64::new(NEVER),
        }
    }

    /// Flushes for everyone, and releases what queues that are gone have left. What other queues hold
    /// is released when they are used next.
    ///
    /// # Errors
    /// Those of [`Flush::flush`].
    pub fn flush<F: Flush<T>>(&self, domain: &mut F) -> Result<(), F::Error> {
        // Whoever has a stamp below it has made its changes visible to what follows.
        let number = self.begun.fetch_add(1, Ordering::AcqRel) + 1;
        domain.flush()?;
        self.completed.fetch_max(number, Ordering::AcqRel);
        self.release_orphans(domain);
        Ok(())
    }

    fn release_orphans<F: Flush<T>>(&self, domain: &mut F) {
        if self.orphans_since.load(Ordering::Acquire) == NEVER {
            return;
        }
        let completed = self.completed.load(Ordering::Acquire);
        let mut free = Vec::new();
        self.change_orphans(|orphans| {
            let is_free = |entry: &Entry<T>| entry.stamp < completed;
            let (now_free, rest) = mem::take(orphans).into_iter().partition(is_free);
            (free, *orphans) = (now_free, rest);
        });
        for entry in free {
            domain.release(entry.unmapped);
        }
    }

    fn change_orphans(&self, change: impl FnOnce(&mut Vec<Entry<T>>)) {
        self.orphans.with(|orphans| {
            change(orphans);
            let oldest = orphans.iter().map(|entry| entry.since).min();
            self.orphans_since.store(oldest.unwrap_or(NEVER), Ordering::Release);
        });
    }

    /// The stamp of everything that the calling thread has unmapped so far.
    fn stamp(&self) -> u64 {
        // Not a load: all who change the number see each other's changes in its order, so a flush
        // that is not counted yet finds the page table as this thread has left it.
        self.begun.fetch_add(0, Ordering::AcqRel)
    }
}

impl<T: Send, L: Locks> Default for FlushClock<T, L> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Send, L: Locks> FlushQueue<T, L> {
    /// An empty queue.
    pub fn new(clock: Arc<FlushClock<T, L>>, limits: Limits) -> Self {
        let limits = Limits { entries: limits.entries.max(1), ..limits };
        Self {
            entries: VecDeque::with_capacity(limits.entries),
            stamped: 0,
            countdown: limits.entries.min(STAMPED_AT_ONCE),
            oldest: NEVER,
            limits,
            clock,
        }
    }

    /// Entries that wait.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// When [`poll`](Self::poll) has something to do; `None` when nothing waits, neither here nor left
    /// behind by a queue that is gone.
    pub fn deadline(&self) -> Option<u64> {
        let oldest = self.oldest.min(self.clock.orphans_since.load(Ordering::Relaxed));
        (oldest != NEVER).then(|| oldest.saturating_add(self.limits.delay))
    }

    /// Queues what this thread has just unmapped.
    ///
    /// # Errors
    /// Those of a flush, if one was due. The range is queued all the same, and more than
    /// [`Limits::entries`] wait then.
    #[inline]
    pub fn push<F: Flush<T>>(
        &mut self,
        now: u64,
        unmapped: Unmapped<T>,
        domain: &mut F,
    ) -> Result<(), F::Error> {
        if self.entries.is_empty() {
            self.oldest = now;
        }
        self.entries.push_back(Entry { unmapped, since: now, stamp: u64::MAX });
        self.countdown = self.countdown.saturating_sub(1);
        if self.countdown == 0 || now.saturating_sub(self.oldest) >= self.limits.delay {
            return self.look(now, domain);
        }
        Ok(())
    }

    /// Releases what flushes have freed, and flushes if something has waited for [`Limits::delay`].
    ///
    /// # Errors
    /// Those of the flush; everything goes on waiting.
    pub fn poll<F: Flush<T>>(&mut self, now: u64, domain: &mut F) -> Result<(), F::Error> {
        if self.deadline().is_none() { Ok(()) } else { self.look(now, domain) }
    }

    /// Flushes now, and releases everything.
    ///
    /// # Errors
    /// Those of the flush; everything goes on waiting.
    pub fn flush<F: Flush<T>>(&mut self, domain: &mut F) -> Result<(), F::Error> {
        self.stamp();
        let flushed = self.clock.flush(domain);
        self.release(domain);
        flushed
    }

    /// Stamps and releases; flushes when the queue is full or its oldest entry is.
    #[cold]
    #[inline(never)]
    fn look<F: Flush<T>>(&mut self, now: u64, domain: &mut F) -> Result<(), F::Error> {
        self.stamp();
        self.clock.release_orphans(domain);
        self.release(domain);
        let is_old = self.deadline().is_some_and(|deadline| now >= deadline);
        if is_old || self.entries.len() >= self.limits.entries {
            return self.flush(domain);
        }
        Ok(())
    }

    /// Gives a stamp to entries that have none.
    fn stamp(&mut self) {
        if self.stamped < self.entries.len() {
            let stamp = self.clock.stamp();
            for entry in self.entries.range_mut(self.stamped..) {
                entry.stamp = stamp;
            }
            self.stamped = self.entries.len();
        }
    }

    /// Releases the entries for which a flush has completed that began after their stamp.
    fn release<F: Flush<T>>(&mut self, domain: &mut F) {
        let completed = self.clock.completed.load(Ordering::Acquire);
        while self.entries.front().is_some_and(|entry| entry.stamp < completed)
            && let Some(entry) = self.entries.pop_front()
        {
            self.stamped -= 1;
            domain.release(entry.unmapped);
        }
        self.oldest = self.entries.front().map_or(NEVER, |entry| entry.since);
        let room = self.limits.entries.saturating_sub(self.entries.len());
        self.countdown = room.clamp(1, STAMPED_AT_ONCE);
    }
}

impl<T: Send, L: Locks> Drop for FlushQueue<T, L> {
    fn drop(&mut self) {
        if self.is_empty() {
            return;
        }
        self.stamp();
        let left = mem::take(&mut self.entries);
        self.clock.change_orphans(|orphans| orphans.extend(left));
    }
}

impl<T: Send, L: Locks> fmt::Debug for FlushClock<T, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushClock")
            .field("begun", &self.begun)
            .field("completed", &self.completed)
            .finish_non_exhaustive()
    }
}

impl<T: Send, L: Locks> fmt::Debug for FlushQueue<T, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlushQueue")
            .field("entries", &self.entries.len())
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}
