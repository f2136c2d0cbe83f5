//! One thread's ranges: what is allocated and freed without a lock.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;
use core::mem;

use lychgate_types::{Iova, Locks};

use super::depot::Magazine;
use super::error::{AllocError, FreeError};
use super::ranges::Want;
use super::shape::{CLASSES, LOW, Shape, WINDOWS};
use super::space::IovaSpace;

/// A thread's, or a processor's, own way to an [`IovaSpace`] (Linux, `struct iova_rcache`).
///
/// It keeps freed ranges by size, up to 2^12 granules, and gives them out again: two magazines
/// for each size below 4 GiB, and two above. As long as these are neither empty nor full, [`alloc`]
/// and [`free`] touch nothing that another thread touches. Beyond that, whole magazines are
/// exchanged with those of other threads, and only then is the tree asked, for several ranges at
/// once.
///
/// It takes 3 KiB, and 1 KiB for each magazine that has ever held something.
///
/// In a kernel there is one for each processor, used with preemption off; in user space, one for each
/// thread. A range may be freed to another cache than it came from. Dropping a cache gives what it
/// holds back to the space.
///
/// [`alloc`]: Self::alloc
/// [`free`]: Self::free
#[repr(align(128))]
pub struct IovaCache<L: Locks> {
    slots: [[Slot; SLOTS]; WINDOWS],
    /// By slot, the magazine that was loaded before: full or empty, but for what a limit took.
    previous: [[Magazine; SLOTS]; WINDOWS],
    shape: Shape,
    space: Arc<IovaSpace<L>>,
    /// What the space's pressure was when this cache last gave everything back, by window.
    pressure: [u64; WINDOWS],
}

/// What allocation and free touch of one class in one window: one cache line.
#[repr(align(64))]
struct Slot {
    loaded: Magazine,
    /// Bytes of a range, less one.
    mask: u64,
    /// Ranges are numbered from address 0; the first that lies in the space, and how many follow it.
    first: u64,
    more: u64,
    /// log2 of the bytes of a range.
    shift: u32,
    /// Ranges that a magazine holds; 0 when none are kept.
    capacity: u16,
    /// Ranges that the tree is asked for at once, next time.
    batch: u16,
}

/// [`CLASSES`], rounded up so that a slot is found by shifts alone. The others hold nothing.
const SLOTS: usize = CLASSES.next_power_of_two();

/// Ranges that the tree is first asked for at once. Doubled each time, so that who needs few
/// takes few.
const FIRST_BATCH: u16 = 4;

impl<L: Locks> IovaCache<L> {
    /// An empty cache of `space`.
    pub fn new(space: Arc<IovaSpace<L>>) -> Self {
        let shape = space.shape;
        let slots = |window| core::array::from_fn(|class| Slot::new(&shape, window, class));
        let slots = core::array::from_fn(slots);
        let pressure = core::array::from_fn(|window| space.pressure(window));
        Self { slots, previous: Default::default(), shape, space, pressure }
    }

    /// The space that the ranges come from.
    pub const fn space(&self) -> &Arc<IovaSpace<L>> {
        &self.space
    }

    /// Allocates `len` bytes that end at `limit` or below, aligned to their length rounded up to a
    /// power of two. `limit` is a device's DMA mask, or 2^32 - 1 for a caller that tries to stay below
    /// 4 GiB first; `u64::MAX` for none.
    ///
    /// # Errors
    /// [`AllocError::Empty`]; [`AllocError::NoSpace`] when nothing fits after everything came back that
    /// this cache and the depots hold. Other caches are then told to give back what they hold
    /// the next time they miss, or at [`IovaCache::relieve`].
    #[inline]
    pub fn alloc(&mut self, len: u64, limit: Iova) -> Result<Iova, AllocError> {
        let window = self.shape.window(limit.get());
        if let Some(slot) = self.slots[window].get_mut(self.shape.class(len))
            && let Some(&iova) = slot.loaded.last()
            && iova | slot.mask <= limit.get()
        {
            slot.loaded.pop();
            self.space.ledger.enter(iova, slot.mask + 1);
            return Ok(Iova::new(iova));
        }
        self.alloc_slow(len, limit)
    }

    /// Frees what was allocated with a length of `len`, by this cache, another, or the space.
    ///
    /// # Errors
    /// [`FreeError`], and nothing has changed. A range of a cached size that is free already is
    /// found out in builds with debug assertions only, as anything else costs more than a hit does.
    #[inline]
    pub fn free(&mut self, iova: Iova, len: u64) -> Result<(), FreeError> {
        let iova = iova.get();
        if let Some(slot) = self.slots[self.shape.window(iova)].get_mut(self.shape.class(len))
            && slot.loaded.len() < slot.loaded.capacity()
            && slot.is_range(iova)
        {
            self.space.ledger.strike(iova, slot.mask + 1)?;
            slot.loaded.push(iova);
            return Ok(());
        }
        self.free_slow(iova, len)
    }

    /// Gives everything that the cache holds back to the space, where ranges coalesce.
    pub fn drain(&mut self) {
        for window in 0..WINDOWS {
            self.drain_window(window, self.space.pressure(window));
        }
    }

    /// Gives everything back that an allocation has missed since the last time, here or elsewhere.
    /// For a timer, so that an idle thread does not keep what others need; the cache does the same
    /// by itself whenever it misses.
    pub fn relieve(&mut self) {
        for window in 0..WINDOWS {
            let pressure = self.space.pressure(window);
            if self.pressure[window] != pressure {
                self.drain_window(window, pressure);
            }
        }
    }

    #[cold]
    #[inline(never)]
    fn alloc_slow(&mut self, len: u64, limit: Iova) -> Result<Iova, AllocError> {
        let want = self.shape.want(len, limit)?;
        let (window, class) = (self.shape.window(limit.get()), self.shape.class(len));
        self.relieve();
        let found = self
            .take_kept(window, class, want.limit)
            .or_else(|| self.take_from_tree(window, class, &want))
            .or_else(|| match window {
                LOW => None,
                _ => self.take_kept(LOW, class, want.limit),
            });
        let found = found.or_else(|| {
            let space = Arc::clone(&self.space);
            space.take_last(&want, window, || self.drain())
        });
        let iova = found.ok_or(AllocError::NoSpace)?;
        self.space.ledger.enter(iova, want.bytes);
        Ok(Iova::new(iova))
    }

    fn drain_window(&mut self, window: usize, pressure: u64) {
        self.pressure[window] = pressure;
        let slots = self.slots[window].iter_mut().zip(&mut self.previous[window]);
        for (class, (slot, previous)) in slots.enumerate() {
            slot.batch = FIRST_BATCH;
            self.space.put_all(window, class, &mut slot.loaded);
            self.space.put_all(window, class, previous);
        }
    }

    /// Takes a range that ends at `limit` or below from the magazines of this cache, or else from
    /// one of the depot.
    fn take_kept(&mut self, window: usize, class: usize, limit: u64) -> Option<u64> {
        let slot = self.slots.get_mut(window)?.get_mut(class)?;
        let previous = self.previous.get_mut(window)?.get_mut(class)?;
        if slot.loaded.is_empty() {
            mem::swap(&mut slot.loaded, previous);
        }
        if slot.loaded.is_empty() {
            self.space.take_full(window, class, &mut slot.loaded);
        }
        [&mut slot.loaded, previous].into_iter().find_map(|magazine| {
            let at = magazine.iter().rposition(|iova| *iova | slot.mask <= limit)?;
            Some(magazine.remove(at))
        })
    }

    /// Asks the tree for one range, or for several if the class is kept and has none; gives the
    /// highest and keeps the others.
    fn take_from_tree(&mut self, window: usize, class: usize, want: &Want) -> Option<u64> {
        let slot = self.slots.get_mut(window)?.get_mut(class);
        // What may still be loaded lies above the limit: more of it would not help.
        let Some(slot) = slot.filter(|slot| slot.capacity != 0 && slot.loaded.is_empty()) else {
            return self.space.take(want, 1, 0).map(|(iova, _)| iova);
        };
        // All of them in one window.
        let floor = if window == LOW { 0 } else { self.shape.split.saturating_add(1) };
        let count = slot.batch.min(slot.capacity);
        let (lowest, count) = self.space.take(want, count.into(), floor)?;
        slot.batch = slot.batch.saturating_mul(2).min(slot.capacity);
        slot.reserve();
        slot.loaded.extend((0..count - 1).map(|n| lowest + n * want.bytes));
        Some(lowest + (count - 1) * want.bytes)
    }

    #[cold]
    #[inline(never)]
    fn free_slow(&mut self, iova: u64, len: u64) -> Result<(), FreeError> {
        let bytes = self.space.check(iova, len)?;
        self.space.ledger.strike(iova, bytes)?;
        self.relieve();
        let (window, class) = (self.shape.window(iova), self.shape.class(len));
        let slot = self.slots.get_mut(window).and_then(|slots| slots.get_mut(class));
        let previous = self.previous.get_mut(window).and_then(|slots| slots.get_mut(class));
        let (Some(slot), Some(previous)) = (slot.filter(|slot| slot.capacity != 0), previous)
        else {
            return self.space.put(iova, bytes);
        };
        slot.reserve();
        if slot.is_full() {
            mem::swap(&mut slot.loaded, previous);
            slot.reserve();
        }
        if slot.is_full() {
            self.space.take_empty(window, class, &mut slot.loaded);
        }
        slot.loaded.push(iova);
        Ok(())
    }
}

impl Slot {
    fn new(shape: &Shape, window: usize, class: usize) -> Self {
        let bytes = shape.class_bytes(class);
        let first = shape.first.div_ceil(bytes);
        let last = shape.last.saturating_sub(bytes - 1) / bytes;
        Self {
            loaded: Magazine::new(),
            mask: bytes - 1,
            first,
            // A class of which none fits keeps no magazine either.
            more: last.saturating_sub(first),
            shift: bytes.trailing_zeros(),
            capacity: u16::try_from(shape.magazine(window, class)).unwrap_or(0),
            batch: FIRST_BATCH,
        }
    }

    /// Whether a range of the class that lies in the space begins at `iova`.
    #[inline(always)]
    const fn is_range(&self, iova: u64) -> bool {
        // Bits below a range's alignment become the highest ones, and the number too large.
        iova.rotate_right(self.shift).wrapping_sub(self.first) <= self.more
    }

    fn is_full(&self) -> bool {
        self.loaded.len() >= self.loaded.capacity()
    }

    /// Makes sure that the loaded magazine can hold what a magazine holds.
    fn reserve(&mut self) {
        if self.loaded.capacity() == 0 {
            self.loaded.reserve_exact(self.capacity.into());
        }
    }
}

impl<L: Locks> Drop for IovaCache<L> {
    fn drop(&mut self) {
        self.drain();
    }
}

impl<L: Locks> fmt::Debug for IovaCache<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let loaded = self.slots.iter().flatten().map(|slot| &slot.loaded);
        let kept: usize = loaded.chain(self.previous.iter().flatten()).map(Vec::len).sum();
        f.debug_struct("IovaCache").field("kept", &kept).finish_non_exhaustive()
    }
}
