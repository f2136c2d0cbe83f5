//! A space of IOVA as all its threads share it.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::fmt;
use core::ops::RangeInclusive;
use core::sync::atomic::{AtomicU64, Ordering};

use lychgate_types::{Iova, Lock, Locks};

use super::depot::{Depot, Magazine};
use super::error::{AllocError, ConfigError, FreeError, ReserveError};
use super::ledger::Ledger;
use super::ranges::{FreeRanges, Want};
use super::shape::{CLASSES, LOW, Shape, WINDOWS};

/// The IOVAs of one domain: which are free, which are reserved (Linux, `struct iova_domain`).
///
/// Every method works under locks; threads that allocate often do so through an
/// [`IovaCache`](super::IovaCache) of their own.
pub struct IovaSpace<L: Locks> {
    pub(super) shape: Shape,
    ranges: L::Mutex<Ranges>,
    depots: [[L::Mutex<Depot>; CLASSES]; WINDOWS],
    /// Counts what came back, to the tree or to a depot, by window.
    returns: [AtomicU64; WINDOWS],
    /// Counts allocations for which the tree had nothing and that ranges of the window would have
    /// served: caches that see it change give back what they hold there.
    pressure: [AtomicU64; WINDOWS],
    /// Counts ranges that came back and were free.
    rejected: AtomicU64,
    pub(super) ledger: Ledger<L>,
}

/// What the tree's lock protects.
struct Ranges {
    free: FreeRanges,
    /// Allocations beyond the classes: first byte and length.
    large: BTreeMap<u64, u64>,
    /// Reserved, upwards, neither overlapping nor touching.
    reserved: Vec<(u64, u64)>,
    /// The last request of each window that failed for good.
    exhausted: [Option<Exhausted>; WINDOWS],
}

/// Nothing came back since `returns`: whatever asks for as much or more fails too (Linux,
/// `max32_alloc_size`).
#[derive(Clone, Copy)]
struct Exhausted {
    returns: u64,
    want: Want,
}

impl<L: Locks> IovaSpace<L> {
    /// A space of the IOVAs from `first` to `last`, both included, in pieces of `granule` bytes, a
    /// power of two. IOVA 0 is never given.
    ///
    /// # Errors
    /// [`ConfigError`]: the granule is none, or too large for the bounds.
    pub fn new(first: Iova, last: Iova, granule: u64) -> Result<Self, ConfigError> {
        let shape = Shape::new(first, last, granule)?;
        let mut free = FreeRanges::new();
        free.put(shape.first, shape.last);
        let ranges =
            Ranges { free, large: BTreeMap::new(), reserved: Vec::new(), exhausted: [None; 2] };
        let depot = || L::Mutex::new(Depot::default());
        Ok(Self {
            shape,
            ranges: L::Mutex::new(ranges),
            depots: core::array::from_fn(|_| core::array::from_fn(|_| depot())),
            returns: Default::default(),
            pressure: Default::default(),
            rejected: AtomicU64::new(0),
            ledger: Ledger::new(),
        })
    }

    /// The unit of allocation in bytes.
    pub const fn granule(&self) -> u64 {
        self.shape.granule()
    }

    /// The IOVAs that can be given at all, reserved ones among them.
    pub const fn bounds(&self) -> RangeInclusive<Iova> {
        Iova::new(self.shape.first)..=Iova::new(self.shape.last)
    }

    /// Bytes that an allocation of `len` bytes takes: up to 2^12 granules the next power of two,
    /// beyond that whole granules. `None` for 0 and for what no space could hold.
    pub fn allocation_size(&self, len: u64) -> Option<u64> {
        self.shape.bytes(len)
    }

    /// Takes `range` out of the space, for good (Linux, `reserve_iova`). It may overlap what is
    /// reserved already; what lies outside the space is ignored; granules are reserved whole.
    ///
    /// # Errors
    /// [`ReserveError::InUse`] when a part is allocated. Ranges that were freed to a thread's cache and
    /// lie there count as allocated until the cache gives them back.
    pub fn reserve(&self, range: RangeInclusive<Iova>) -> Result<(), ReserveError> {
        if range.is_empty() {
            return Err(ReserveError::Empty);
        }
        let mask = self.granule() - 1;
        let first = (range.start().get() & !mask).max(self.shape.first);
        let last = (range.end().get() | mask).min(self.shape.last);
        if first > last {
            return Ok(());
        }
        match self.ranges.with(|ranges| ranges.reserve(first, last)) {
            Err(ReserveError::InUse { .. }) => {
                self.trim();
                self.ranges.with(|ranges| ranges.reserve(first, last))
            }
            done => done,
        }
    }

    /// Allocates `len` bytes that end at `limit` or below: the highest that are free, aligned to
    /// their length rounded up to a power of two.
    ///
    /// # Errors
    /// [`AllocError::Empty`], [`AllocError::NoSpace`].
    pub fn alloc(&self, len: u64, limit: Iova) -> Result<Iova, AllocError> {
        let want = self.shape.want(len, limit)?;
        let window = self.shape.window(limit.get());
        let found = self.take(&want, 1, 0).map(|(iova, _)| iova);
        let iova = found.or_else(|| self.take_last(&want, window, || ()));
        let iova = iova.ok_or(AllocError::NoSpace)?;
        self.ledger.enter(iova, want.bytes);
        Ok(Iova::new(iova))
    }

    /// Frees what was allocated with a length of `len`, through a cache or not.
    ///
    /// # Errors
    /// [`FreeError`]: nothing of the kind is allocated. A range that waits in a cache for
    /// its next use is found out only in builds with debug assertions.
    pub fn free(&self, iova: Iova, len: u64) -> Result<(), FreeError> {
        let iova = iova.get();
        let bytes = self.check(iova, len)?;
        self.ledger.strike(iova, bytes)?;
        self.put(iova, bytes)
    }

    /// Gives the magazines that wait in the depots back to the tree, where ranges coalesce: for a
    /// timer, or when memory is short.
    pub fn trim(&self) {
        for (window, depots) in self.depots.iter().enumerate() {
            for (class, depot) in depots.iter().enumerate() {
                let magazines = depot.with(Depot::take_all);
                for mut magazine in magazines {
                    self.put_all(window, class, &mut magazine);
                    depot.with(|depot| depot.keep_empty(magazine));
                }
            }
        }
    }

    /// What the tree has as free, upwards. Ranges in depots and caches are not among it.
    pub fn free_ranges(&self) -> Vec<RangeInclusive<Iova>> {
        let all = self.ranges.with(|ranges| ranges.free.all());
        all.into_iter().map(|(first, last)| Iova::new(first)..=Iova::new(last)).collect()
    }

    /// How many ranges came back that were free already, and were only found when a magazine
    /// was emptied into the tree, long after the call that freed them for the second time.
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// Checks what can be known of a range without a look at the tree. Gives the bytes it takes.
    pub(super) fn check(&self, iova: u64, len: u64) -> Result<u64, FreeError> {
        let bytes = match self.shape.bytes(len) {
            Some(bytes) => bytes,
            None if len == 0 => return Err(FreeError::Empty),
            None => return Err(FreeError::Foreign),
        };
        let align = bytes.checked_next_power_of_two().ok_or(FreeError::Foreign)?;
        let last = iova.checked_add(bytes - 1).ok_or(FreeError::Foreign)?;
        if iova & (align - 1) != 0 || iova < self.shape.first || last > self.shape.last {
            return Err(FreeError::Foreign);
        }
        Ok(bytes)
    }

    /// Takes pieces from the tree: see [`FreeRanges::take`].
    pub(super) fn take(&self, want: &Want, count: u64, floor: u64) -> Option<(u64, u64)> {
        let class = self.shape.class(want.bytes);
        self.ranges.with(|ranges| {
            let found = ranges.free.take(want, count, floor)?;
            if class >= CLASSES {
                ranges.large.insert(found.0, want.bytes);
            }
            Some(found)
        })
    }

    /// As [`Self::take`], of one piece, after everything came back that can be reached: by
    /// `drain` what the caller holds, and what is in the depots.
    pub(super) fn take_last(
        &self,
        want: &Want,
        window: usize,
        drain: impl FnOnce(),
    ) -> Option<u64> {
        let returns = self.returns(window);
        // Whoever misses next gives back what may serve the next request.
        self.pressure.iter().take(window + 1).for_each(|pressure| {
            pressure.fetch_add(1, Ordering::Relaxed);
        });
        if self.ranges.with(|ranges| ranges.is_exhausted(window, returns, want)) {
            return None;
        }
        drain();
        self.trim();
        let found = self.take(want, 1, 0);
        if found.is_none() {
            self.ranges.with(|ranges| {
                if let Some(exhausted) = ranges.exhausted.get_mut(window) {
                    *exhausted = Some(Exhausted { returns, want: *want });
                }
            });
        }
        found.map(|(iova, _)| iova)
    }

    /// Puts a range back that was checked.
    pub(super) fn put(&self, iova: u64, bytes: u64) -> Result<(), FreeError> {
        let class = self.shape.class(bytes);
        self.ranges.with(|ranges| {
            if class >= CLASSES {
                if ranges.large.get(&iova) != Some(&bytes) {
                    return Err(FreeError::NotAllocated);
                }
                ranges.large.remove(&iova);
            }
            ranges.put(iova, iova + (bytes - 1))
        })?;
        self.came_back(self.shape.window(iova));
        Ok(())
    }

    /// Empties a magazine into the tree.
    pub(super) fn put_all(&self, window: usize, class: usize, magazine: &mut Magazine) {
        if magazine.is_empty() {
            return;
        }
        magazine.sort_unstable();
        let bytes = self.shape.class_bytes(class);
        let rejected = self.ranges.with(|ranges| {
            // Neighbours go back as one range; a range that is here twice begins a new one and
            // is then rejected by the tree.
            let neighbours = |a: &u64, b: &u64| *a + bytes == *b;
            magazine.chunk_by(neighbours).map(|run| ranges.put_run(run, bytes)).sum::<u64>()
        });
        magazine.clear();
        if rejected != 0 {
            self.rejected.fetch_add(rejected, Ordering::Relaxed);
        }
        self.came_back(window);
    }

    /// Exchanges an empty magazine for one that is not.
    pub(super) fn take_full(&self, window: usize, class: usize, spent: &mut Magazine) -> bool {
        self.depot(window, class).is_some_and(|depot| depot.with(|depot| depot.take_full(spent)))
    }

    /// Exchanges a full magazine for an empty one.
    pub(super) fn take_empty(&self, window: usize, class: usize, full: &mut Magazine) {
        let Some(depot) = self.depot(window, class) else {
            return;
        };
        match depot.with(|depot| depot.take_empty(full)) {
            None => self.came_back(window),
            Some(mut surplus) => {
                self.put_all(window, class, &mut surplus);
                depot.with(|depot| depot.keep_empty(surplus));
            }
        }
    }

    /// Changes whenever an allocation misses what caches hold in a window.
    pub(super) fn pressure(&self, window: usize) -> u64 {
        self.pressure.get(window).map_or(0, |pressure| pressure.load(Ordering::Relaxed))
    }

    fn depot(&self, window: usize, class: usize) -> Option<&L::Mutex<Depot>> {
        self.depots.get(window)?.get(class)
    }

    /// Changes whenever something came back that a request of `window` could use: one beyond the
    /// low window can use that too.
    fn returns(&self, window: usize) -> u64 {
        let [low, high] = &self.returns;
        let low = low.load(Ordering::Acquire);
        if window == LOW { low } else { low.wrapping_add(high.load(Ordering::Acquire)) }
    }

    fn came_back(&self, window: usize) {
        if let Some(returns) = self.returns.get(window) {
            returns.fetch_add(1, Ordering::Release);
        }
    }
}

impl Ranges {
    fn is_exhausted(&self, window: usize, returns: u64, want: &Want) -> bool {
        self.exhausted.get(window).copied().flatten().is_some_and(|exhausted| {
            exhausted.returns == returns
                && exhausted.want.bytes <= want.bytes
                && exhausted.want.align <= want.align
                && exhausted.want.limit >= want.limit
        })
    }

    fn put(&mut self, first: u64, last: u64) -> Result<(), FreeError> {
        let next = self.reserved.partition_point(|reserved| reserved.1 < first);
        let is_reserved = self.reserved.get(next).is_some_and(|reserved| reserved.0 <= last);
        if is_reserved || !self.free.put(first, last) {
            return Err(FreeError::NotAllocated);
        }
        Ok(())
    }

    /// Puts ranges of `bytes` bytes back that follow each other. Gives how many were free.
    fn put_run(&mut self, run: &[u64], bytes: u64) -> u64 {
        let (Some(first), Some(last)) = (run.first(), run.last()) else {
            return 0;
        };
        if self.put(*first, *last + (bytes - 1)).is_ok() {
            return 0;
        }
        run.iter().filter(|iova| self.put(**iova, **iova + (bytes - 1)).is_err()).count() as u64
    }

    fn reserve(&mut self, first: u64, last: u64) -> Result<(), ReserveError> {
        let parts = self.not_reserved(first, last);
        if let Some((at, _)) = parts.iter().find(|part| !self.free.contains(part.0, part.1)) {
            return Err(ReserveError::InUse { at: Iova::new(*at) });
        }
        for (first, last) in parts {
            self.free.take_range(first, last);
        }
        let touches = |range: &(u64, u64)| {
            range.0 <= last.saturating_add(1) && range.1 >= first.saturating_sub(1)
        };
        let (first, last) = self
            .reserved
            .iter()
            .filter(|range| touches(range))
            .fold((first, last), |all, range| (all.0.min(range.0), all.1.max(range.1)));
        self.reserved.retain(|range| !touches(range));
        let at = self.reserved.partition_point(|range| range.0 < first);
        self.reserved.insert(at, (first, last));
        Ok(())
    }

    /// The parts of a range that are not reserved.
    fn not_reserved(&self, first: u64, last: u64) -> Vec<(u64, u64)> {
        let mut parts = Vec::new();
        let mut from = Some(first);
        for reserved in self.reserved.iter().filter(|range| range.1 >= first && range.0 <= last) {
            if let Some(from) = from.filter(|from| *from < reserved.0) {
                parts.push((from, reserved.0 - 1));
            }
            from = reserved.1.checked_add(1);
        }
        if let Some(from) = from.filter(|from| *from <= last) {
            parts.push((from, last));
        }
        parts
    }
}

impl<L: Locks> fmt::Debug for IovaSpace<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IovaSpace")
            .field("shape", &self.shape)
            .field("rejected", &self.rejected())
            .finish_non_exhaustive()
    }
}
