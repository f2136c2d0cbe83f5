//! The machine's own RAM: what software allocates for hardware to read.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use lychgate_types::{OutOfMemory, PhysAddr};

use super::layout::RAM_BASE;
use crate::mapped::Mapping;

const PAGE: u64 = 4096;

/// Orders of allocations: 4 KiB to 1 GiB.
const ORDERS: usize = 19;

/// The size that is asked for first; address space, not memory.
const WANTED: usize = 16 << 30;

/// The size below which a machine makes no sense.
const LEAST: usize = 64 << 20;

/// RAM from [`RAM_BASE`], which takes memory of the host as it is used.
pub(crate) struct Ram {
    mapping: Mapping,
    free: Mutex<Free>,
}

/// What is free: blocks that were given back, and everything from `fresh` on.
#[derive(Default)]
struct Free {
    by_order: [Vec<u64>; ORDERS],
    fresh: u64,
}

/// A block, as an offset into RAM.
struct Block {
    at: u64,
    /// Nobody had it before: its bytes are zeros.
    fresh: bool,
}

impl Ram {
    /// RAM of 16 GiB, or as much less as a limit on this process's address space demands.
    pub(crate) fn new() -> io::Result<Self> {
        let mut len = WANTED;
        let mapping = loop {
            match Mapping::anonymous(len) {
                Err(_) if len > LEAST => len /= 2,
                result => break result?,
            }
        };
        mapping.prefer_huge_pages();
        Ok(Self { mapping, free: Mutex::default() })
    }

    /// The offset of an address, if it lies in RAM.
    pub(crate) fn offset(&self, at: PhysAddr) -> Option<usize> {
        let offset = usize::try_from(at.get().checked_sub(RAM_BASE)?).ok()?;
        (offset < self.mapping.len()).then_some(offset)
    }

    /// The bytes, by offset.
    pub(crate) fn bytes(&self) -> &Mapping {
        &self.mapping
    }

    /// The word at an address that is a multiple of 8.
    pub(crate) fn word(&self, at: PhysAddr) -> Option<&AtomicU64> {
        self.mapping.words64().get(self.offset(at).filter(|offset| offset.is_multiple_of(8))? / 8)
    }

    /// The words of a range; none of them when it passes the end or is misaligned.
    pub(crate) fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        let first =
            self.offset(at).filter(|offset| offset.is_multiple_of(8)).map(|offset| offset / 8);
        first
            .and_then(|first| self.mapping.words64().get(first..first.checked_add(count)?))
            .unwrap_or(&[])
    }

    /// Allocates a power of two of bytes, aligned to it; zeros if `zero`.
    pub(crate) fn alloc(&self, bytes: u64, zero: bool) -> Result<PhysAddr, OutOfMemory> {
        let order = order(bytes).ok_or(OutOfMemory)?;
        let end = self.mapping.len() as u64;
        let block = self.free.lock().unwrap_or_else(PoisonError::into_inner).take(order, end);
        let block = block.ok_or(OutOfMemory)?;
        let at = PhysAddr::new(RAM_BASE + block.at);
        if zero && !block.fresh {
            for word in self.words(at, usize::try_from(bytes / 8).unwrap_or(0)) {
                word.store(0, Ordering::Relaxed);
            }
        }
        Ok(at)
    }

    /// Gives back what `alloc` gave for `bytes`.
    pub(crate) fn free(&self, at: PhysAddr, bytes: u64) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(order), Some(offset)) = (order(bytes), self.offset(at))
            && let Some(list) = free.by_order.get_mut(order)
        {
            list.push(offset as u64);
        }
    }
}

impl Free {
    fn take(&mut self, order: usize, end: u64) -> Option<Block> {
        if let Some(at) = self.by_order.get_mut(order)?.pop() {
            return Some(Block { at, fresh: false });
        }
        self.take_fresh(order, end).or_else(|| self.split(order))
    }

    /// Cuts a block off what nobody had; what alignment leaves over becomes free blocks.
    fn take_fresh(&mut self, order: usize, end: u64) -> Option<Block> {
        let size = PAGE << order;
        let at = self.fresh.checked_next_multiple_of(size)?;
        let next = at.checked_add(size).filter(|next| *next <= end)?;
        while self.fresh < at {
            let order = ((self.fresh / PAGE).trailing_zeros() as usize).min(ORDERS - 1);
            self.by_order.get_mut(order)?.push(self.fresh);
            self.fresh += PAGE << order;
        }
        self.fresh = next;
        Some(Block { at, fresh: true })
    }

    /// Halves the smallest larger block until one of the size is there.
    fn split(&mut self, order: usize) -> Option<Block> {
        let mut from = (order + 1..ORDERS).find(|from| !self.by_order[*from].is_empty())?;
        let at = self.by_order[from].pop()?;
        while from > order {
            from -= 1;
            self.by_order[from].push(at + (PAGE << from));
        }
        Some(Block { at, fresh: false })
    }
}

/// The order of an allocation; `None` for what is no power of two of pages or too large.
fn order(bytes: u64) -> Option<usize> {
    let order = (bytes / PAGE).checked_ilog2()? as usize;
    (bytes.is_power_of_two() && order < ORDERS).then_some(order)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_that_are_no_power_of_two_pages_or_too_large_are_refused() {
        let ram = Ram::new().unwrap();
        for bytes in [0, 1, 2048, 12288, 2 << 30, u64::MAX] {
            assert_eq!(ram.alloc(bytes, true), Err(OutOfMemory), "{bytes}");
        }
    }

    #[test]
    fn memory_that_comes_back_is_zero_when_asked() {
        let ram = Ram::new().unwrap();
        let at = ram.alloc(8192, true).unwrap();
        for word in ram.words(at, 1024) {
            assert_eq!(word.swap(!0, Ordering::Relaxed), 0);
        }
        ram.free(at, 8192);
        assert_eq!(ram.alloc(8192, true), Ok(at));
        assert!(ram.words(at, 1024).iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn memory_ends() {
        let mut free = Free::default();
        let taken = std::iter::from_fn(|| free.take(9, 8 << 20)).count();
        assert_eq!(taken, 4);
        assert!(free.take(0, 8 << 20).is_none());
        free.by_order[9].push(2 << 20);
        assert_eq!(free.take(0, 8 << 20).unwrap().at, 2 << 20);
        assert_eq!(std::iter::from_fn(|| free.take(0, 8 << 20)).count(), 511);
    }

    proptest! {
        #[test]
        fn live_allocations_are_aligned_and_never_overlap(
            steps in prop::collection::vec((0_u32..10, any::<bool>(), any::<prop::sample::Index>()), 1..80),
        ) {
            let ram = Ram::new().unwrap();
            let mut live = BTreeMap::new();
            for (order, free, which) in steps {
                if free && !live.is_empty() {
                    let at = *which.get(&live.keys().copied().collect::<Vec<_>>());
                    ram.free(PhysAddr::new(at), live.remove(&at).unwrap());
                    continue;
                }
                let bytes = PAGE << order;
                let at = ram.alloc(bytes, true).unwrap();
                prop_assert!(at.is_aligned(bytes));
                let before = live.range(..at.get() + bytes).next_back();
                prop_assert!(before.is_none_or(|(start, len)| start + len <= at.get()));
                live.insert(at.get(), bytes);
            }
        }
    }
}
