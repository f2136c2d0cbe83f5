//! Domains that are a page table and no hardware.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_io_pgtable::{Config, Error, Format, Gather, PageTable};
use lychgate_iommu::dma::LazyDomain;
use lychgate_iommu::{Geometry, MapError, PagingDomain};
use lychgate_types::{Iova, OutOfMemory, Pages, PhysAddr, PhysRun, Prot};

const PAGE: u64 = 4096;

/// Table memory for one thread, as a kernel has per processor: a flat array, and a stack of free pages.
/// Pages come back unzeroed.
struct Pool {
    words: Box<[AtomicU64]>,
    /// Words before the first page.
    skip: usize,
    free: Box<[AtomicU64]>,
    free_count: AtomicU64,
}

impl Pool {
    fn new(pages: u64) -> Self {
        let words: Box<[_]> = (0..(pages + 1) * 512).map(|_| AtomicU64::new(0)).collect();
        // Address 0 is left out.
        let free: Box<[_]> = (1..pages).rev().map(|n| AtomicU64::new(n * PAGE)).collect();
        Self {
            skip: words.as_ptr().align_offset(index(PAGE)),
            words,
            free_count: AtomicU64::new(free.len() as u64),
            free,
        }
    }
}

impl Pages for Pool {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let at = self.alloc_uninit(bytes)?;
        for word in self.words(at, 512) {
            word.store(0, Ordering::Relaxed);
        }
        Ok(at)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let count = self.free_count.load(Ordering::Relaxed);
        let left = count.checked_sub(1).ok_or(OutOfMemory)?;
        if bytes != PAGE {
            return Err(OutOfMemory);
        }
        self.free_count.store(left, Ordering::Relaxed);
        let slot = self.free.get(index(left)).ok_or(OutOfMemory)?;
        Ok(PhysAddr::new(slot.load(Ordering::Relaxed)))
    }

    fn free(&self, at: PhysAddr, _bytes: u64) {
        let count = self.free_count.load(Ordering::Relaxed);
        if let Some(slot) = self.free.get(index(count)) {
            slot.store(at.get(), Ordering::Relaxed);
            self.free_count.store(count + 1, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        let first = self.skip + index(at.get() / 8);
        self.words.get(first..first + count).unwrap_or(&[])
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// A page table as a domain. Whatever it unmaps, no hardware has cached.
pub(crate) struct Tables<F: Format> {
    table: PageTable<F, Pool>,
}

impl<F: Format> Tables<F> {
    /// Empty, with memory for 256 tables.
    pub(crate) fn new(config: Config<F>) -> Result<Self, Error> {
        Ok(Self { table: PageTable::new(Pool::new(256), config)? })
    }
}

impl<F: Format + 'static> PagingDomain for Tables<F> {
    fn geometry(&self) -> Geometry {
        let aperture = self.table.aperture();
        Geometry {
            first: *aperture.start(),
            last: *aperture.end(),
            page_sizes: self.table.page_sizes(),
        }
    }

    #[inline(never)]
    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError> {
        let mut gather = Gather::new();
        let mapped = self.table.map_batch(iova, runs, prot, &mut gather);
        if !gather.is_empty() {
            gather.release(self.table.pages());
        }
        mapped.map(|_| ()).map_err(|_| MapError::OutOfRange)
    }

    #[inline(never)]
    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let mut gather = Gather::new();
        let unmapped = self.table.unmap(iova, len, &mut gather);
        gather.release(self.table.pages());
        unmapped.map_or(0, |unmapped| unmapped.bytes)
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        self.table.walk(iova).map(|there| there.phys)
    }

    fn enforce_cache_coherency(&self) -> bool {
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl<F: Format + 'static> LazyDomain for Tables<F> {
    /// Hardly ever anything: most unmaps take no table out.
    type Dead = Option<Box<Gather>>;

    #[inline(never)]
    fn unmap_lazily(&self, iova: Iova, len: u64) -> (u64, Self::Dead) {
        let mut gather = Gather::new();
        let unmapped = self.table.unmap(iova, len, &mut gather);
        let dead = (gather.dead_tables() != 0).then(|| Box::new(gather));
        (unmapped.map_or(0, |unmapped| unmapped.bytes), dead)
    }

    fn flush(&self) -> Result<(), MapError> {
        Ok(())
    }

    fn free(&self, dead: Self::Dead) {
        if let Some(mut dead) = dead {
            dead.release(self.table.pages());
        }
    }
}
