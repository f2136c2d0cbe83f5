//! Memory for structures that hardware reads: page tables, device tables, queues.

use alloc::sync::Arc;
use core::fmt;

use crate::addr::PhysAddr;
use crate::sync::AtomicU64;

/// No page is free.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct OutOfMemory;

impl fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("out of memory for hardware tables")
    }
}

impl core::error::Error for OutOfMemory {}

/// An allocator of physically contiguous, naturally aligned memory that its owner reaches as
/// 64-bit words. The words are in memory as hardware reads them, so little-endian: callers use
/// [`u64::to_le`] and [`u64::from_le`] where the host could differ.
///
/// `bytes` is a power of two of at least 4096 in every call.
pub trait Pages: Send + Sync {
    /// Allocates `bytes`, all zero, aligned to `bytes`.
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory>;

    /// As [`Pages::alloc`], but with unspecified contents, for a caller that fills every word
    /// before hardware can see the page.
    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.alloc(bytes)
    }

    /// Gives back what `alloc` returned for the same `bytes`. The caller has made sure that no
    /// hardware still walks it.
    fn free(&self, at: PhysAddr, bytes: u64);

    /// The `count` words at `at`, which must lie in one allocation; an empty slice otherwise.
    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64];

    /// Writes `words` back from the processor's caches and orders that before later stores, for
    /// hardware that does not snoop them. Does nothing where hardware snoops, as AMD-Vi always does.
    fn clean(&self, words: &[AtomicU64]) {
        let _ = words;
    }
}

macro_rules! shared_pages {
    ($($pointer:ty),*) => {$(
        impl<P: Pages + ?Sized> Pages for $pointer {
            fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
                (**self).alloc(bytes)
            }

            fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
                (**self).alloc_uninit(bytes)
            }

            fn free(&self, at: PhysAddr, bytes: u64) {
                (**self).free(at, bytes);
            }

            fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
                (**self).words(at, count)
            }

            fn clean(&self, words: &[AtomicU64]) {
                (**self).clean(words);
            }
        }
    )*};
}

shared_pages!(&P, Arc<P>);

#[cfg(feature = "std")]
pub use heap::HeapPages;

#[cfg(feature = "std")]
mod heap {
    use alloc::boxed::Box;
    use alloc::vec::Vec;
    use core::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Mutex, OnceLock, PoisonError};

    use super::{OutOfMemory, Pages};
    use crate::addr::PhysAddr;
    use crate::memory::{BusError, Memory};
    use crate::sync::AtomicU64;

    const CHUNK_BYTES: u64 = 1 << 21;
    const CHUNK_WORDS: usize = 1 << 18;
    const CHUNKS: usize = 1 << 12;
    const BASE: u64 = 1 << 32;

    /// [`Pages`] and [`Memory`] on the heap, for tests and benchmarks: physical addresses from
    /// 4 GiB, at most 8 GiB, grown by 2 MiB as needed. An allocation is at most 2 MiB.
    #[derive(Debug)]
    pub struct HeapPages {
        chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
        used_chunks: AtomicUsize,
        free: Mutex<Free>,
        limit: AtomicUsize,
        live: AtomicUsize,
    }

    #[derive(Debug, Default)]
    struct Free {
        by_order: [Vec<u64>; 10],
    }

    impl Default for HeapPages {
        fn default() -> Self {
            Self::new()
        }
    }

    impl HeapPages {
        /// An empty pool.
        pub fn new() -> Self {
            Self {
                chunks: (0..CHUNKS).map(|_| OnceLock::new()).collect(),
                used_chunks: AtomicUsize::new(0),
                free: Mutex::default(),
                limit: AtomicUsize::new(usize::MAX),
                live: AtomicUsize::new(0),
            }
        }

        /// Lets the next `allocations` succeed and every later one fail: for tests of what a caller
        /// does when memory ends.
        pub fn fail_after(&self, allocations: usize) {
            self.limit.store(allocations, Ordering::Relaxed);
        }

        /// Allocations that have not been freed: for tests that look for leaks.
        pub fn live(&self) -> usize {
            self.live.load(Ordering::Relaxed)
        }

        fn word(&self, at: PhysAddr) -> Option<&AtomicU64> {
            if at.is_aligned(8) { self.words(at, 1).first() } else { None }
        }

        fn take(&self, order: usize) -> Option<u64> {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let mut from = order;
            while free.by_order.get(from)?.is_empty() {
                from += 1;
                if from == free.by_order.len() {
                    let chunk = self.used_chunks.fetch_add(1, Ordering::Relaxed);
                    let words = (0..CHUNK_WORDS).map(|_| AtomicU64::new(0)).collect();
                    self.chunks.get(chunk)?.set(words).ok()?;
                    from -= 1;
                    free.by_order[from].push(BASE + CHUNK_BYTES * chunk as u64);
                }
            }
            let at = free.by_order[from].pop()?;
            while from > order {
                from -= 1;
                free.by_order[from].push(at + (4096 << from));
            }
            Some(at)
        }
    }

    impl Pages for HeapPages {
        fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
            let at = self.alloc_uninit(bytes)?;
            for word in self.words(at, usize::try_from(bytes / 8).unwrap_or(0)) {
                word.store(0, Ordering::Relaxed);
            }
            Ok(at)
        }

        fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
            let spent = self.limit.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                if left == usize::MAX { Some(left) } else { left.checked_sub(1) }
            });
            if spent.is_err() || !bytes.is_power_of_two() || bytes < 4096 {
                return Err(OutOfMemory);
            }
            let at = self.take((bytes / 4096).trailing_zeros() as usize).ok_or(OutOfMemory)?;
            self.live.fetch_add(1, Ordering::Relaxed);
            Ok(PhysAddr::new(at))
        }

        fn free(&self, at: PhysAddr, bytes: u64) {
            let order = (bytes / 4096).trailing_zeros() as usize;
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(list) = free.by_order.get_mut(order) {
                list.push(at.get());
                self.live.fetch_sub(1, Ordering::Relaxed);
            }
        }

        fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
            let Some(offset) = at.get().checked_sub(BASE) else {
                return &[];
            };
            let chunk = usize::try_from(offset / CHUNK_BYTES).unwrap_or(usize::MAX);
            let first = usize::try_from(offset % CHUNK_BYTES / 8).unwrap_or(usize::MAX);
            self.chunks
                .get(chunk)
                .and_then(OnceLock::get)
                .and_then(|words| words.get(first..first.checked_add(count)?))
                .unwrap_or(&[])
        }
    }

    impl Memory for HeapPages {
        fn read(&self, from: PhysAddr, to: &mut [u8]) -> Result<(), BusError> {
            for (at, byte) in (from.get()..).zip(to) {
                let at = PhysAddr::new(at);
                let word = self.word(at.align_down(8)).ok_or(BusError { at })?;
                let bytes = u64::from_le(word.load(Ordering::Acquire)).to_le_bytes();
                *byte = bytes[(at.get() % 8) as usize];
            }
            Ok(())
        }

        fn write(&self, to: PhysAddr, from: &[u8]) -> Result<(), BusError> {
            for (at, byte) in (to.get()..).zip(from) {
                let at = PhysAddr::new(at);
                let word = self.word(at.align_down(8)).ok_or(BusError { at })?;
                let mut bytes = u64::from_le(word.load(Ordering::Acquire)).to_le_bytes();
                bytes[(at.get() % 8) as usize] = *byte;
                word.store(u64::from_le_bytes(bytes).to_le(), Ordering::Release);
            }
            Ok(())
        }

        fn load_u64(&self, at: PhysAddr) -> Result<u64, BusError> {
            let word = self.word(at).ok_or(BusError { at })?;
            Ok(u64::from_le(word.load(Ordering::Acquire)))
        }

        fn store_u64(&self, at: PhysAddr, value: u64) -> Result<(), BusError> {
            let word = self.word(at).ok_or(BusError { at })?;
            word.store(value.to_le(), Ordering::Release);
            Ok(())
        }

        fn fetch_or_u64(&self, at: PhysAddr, bits: u64) -> Result<u64, BusError> {
            let word = self.word(at).ok_or(BusError { at })?;
            Ok(u64::from_le(word.fetch_or(bits.to_le(), Ordering::AcqRel)))
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn allocations_are_aligned_zero_and_distinct() {
            let pages = HeapPages::new();
            let mut seen = std::collections::HashSet::new();
            for bytes in [4096, 8192, 4096, 1 << 21, 16384, 4096] {
                let at = pages.alloc(bytes).unwrap();
                assert!(at.is_aligned(bytes));
                for page in 0..bytes / 4096 {
                    assert!(seen.insert(at.get() + page * 4096));
                }
                let words = pages.words(at, usize::try_from(bytes / 8).unwrap());
                assert!(words.iter().all(|word| word.swap(7, Ordering::Relaxed) == 0));
            }
            assert_eq!(pages.live(), 6);
        }

        #[test]
        fn memory_ends_when_told() {
            let pages = HeapPages::new();
            pages.fail_after(1);
            let at = pages.alloc(4096).unwrap();
            assert_eq!(pages.alloc(4096), Err(OutOfMemory));
            pages.fail_after(usize::MAX);
            pages.free(at, 4096);
            assert_eq!(pages.alloc(4096), Ok(at));
        }
    }
}
