//! Table memory that costs next to nothing, as from a kernel's lists of pages per processor: no lock,
//! nothing shared between threads.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_types::{OutOfMemory, Pages, PhysAddr};

use super::machine::ask_for_huge_pages;

const SMALLEST: u32 = 12;
/// Sizes of tables: 4 KiB to 1 MiB, a root of 16 concatenated tables of 64 KiB.
const SIZES: usize = 9;
/// Memory begins at a multiple of this: of the greatest table, and of a huge page.
const ALIGN: usize = 2 << 20;

thread_local! {
    static LANE: Cell<usize> = const { Cell::new(0) };
}

/// Words of a pool. As a constant, and with addresses that wrap around, reaching a table takes no check:
/// a kernel's way from a physical address to a pointer has none either.
const WORDS: usize = 1 << 26;

/// Memory for tables of every size, in one lane per thread. Physical addresses are offsets in it.
/// A freed table is the next to be allocated, with what was in it.
pub(crate) struct Pool {
    words: &'static [AtomicU64; WORDS],
    lanes: Box<[Lane]>,
}

/// `count` words that are 0 and stay for good, in huge pages, at a multiple of [`ALIGN`].
pub(crate) fn memory(count: usize) -> &'static [AtomicU64] {
    let mut words = Vec::with_capacity(count + ALIGN / 8);
    ask_for_huge_pages(words.spare_capacity_mut());
    words.extend((0..count + ALIGN / 8).map(|_| AtomicU64::new(0)));
    let words = words.leak();
    let skip = words.as_ptr().align_offset(ALIGN);
    words.get(skip..skip + count).unwrap_or(&[])
}

/// What one thread allocates from.
#[repr(align(128))]
struct Lane {
    first: u64,
    end: u64,
    /// Memory from here on has never been allocated.
    unused: AtomicU64,
    free: [Stack; SIZES],
}

/// Tables of one size that are free.
struct Stack {
    slots: Box<[AtomicU64]>,
    count: AtomicU64,
}

impl Pool {
    /// A pool with lanes of `sizes` bytes, multiples of 1 MiB and 512 MiB in all at most.
    pub(crate) fn new(sizes: &[u64]) -> Option<Self> {
        let mut first = 0;
        let lanes = sizes.iter().map(|size| {
            let lane = Lane::new(first, first + size);
            first = lane.end;
            lane
        });
        let lanes = lanes.collect();
        let words = memory(WORDS).first_chunk()?;
        (first <= 8 * WORDS as u64).then_some(Self { words, lanes })
    }

    /// Makes this thread allocate from `lane`. Threads begin with lane 0.
    pub(crate) fn enter(lane: usize) {
        LANE.set(lane);
    }

    /// Takes everything back that was ever allocated, which nobody uses any more.
    pub(crate) fn reset(&self) {
        for lane in &self.lanes {
            lane.unused.store(lane.first, Ordering::Relaxed);
            for stack in &lane.free {
                stack.count.store(0, Ordering::Relaxed);
            }
        }
    }

    #[inline(always)]
    fn lane(&self) -> Option<&Lane> {
        self.lanes.get(LANE.get())
    }
}

impl Lane {
    fn new(first: u64, end: u64) -> Self {
        // Address 0 is left out.
        let first = first.max(ALIGN as u64);
        let stack = |order: usize| Stack {
            slots: (0..(end - first) >> SMALLEST >> order).map(|_| AtomicU64::new(0)).collect(),
            count: AtomicU64::new(0),
        };
        Self {
            first,
            end,
            unused: AtomicU64::new(first),
            free: [0, 1, 2, 3, 4, 5, 6, 7, 8].map(stack),
        }
    }

    #[cold]
    fn grow(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let at = self.unused.load(Ordering::Relaxed).next_multiple_of(bytes);
        if at + bytes > self.end {
            return Err(OutOfMemory);
        }
        self.unused.store(at + bytes, Ordering::Relaxed);
        Ok(PhysAddr::new(at))
    }
}

impl Pages for Pool {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let at = self.alloc_uninit(bytes)?;
        for word in self.words(at, index(bytes / 8)) {
            word.store(0, Ordering::Relaxed);
        }
        Ok(at)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let lane = self.lane().ok_or(OutOfMemory)?;
        let stack = lane.free.get(order(bytes)).ok_or(OutOfMemory)?;
        let count = stack.count.load(Ordering::Relaxed);
        let Some(slot) = count.checked_sub(1).and_then(|top| stack.slots.get(index(top))) else {
            return lane.grow(bytes);
        };
        stack.count.store(count - 1, Ordering::Relaxed);
        Ok(PhysAddr::new(slot.load(Ordering::Relaxed)))
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        let stack = self.lane().and_then(|lane| lane.free.get(order(bytes)));
        let Some(stack) = stack else {
            return;
        };
        let count = stack.count.load(Ordering::Relaxed);
        if let Some(slot) = stack.slots.get(index(count)) {
            slot.store(at.get(), Ordering::Relaxed);
            stack.count.store(count + 1, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        if !count.is_power_of_two() || count > WORDS {
            return &[];
        }
        // Tables are aligned to their size.
        let first = index(at.get() / 8) & (WORDS - count);
        self.words.get(first..first + count).unwrap_or(&[])
    }
}

const fn order(bytes: u64) -> usize {
    bytes.trailing_zeros().saturating_sub(SMALLEST) as usize
}

#[inline(always)]
fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
