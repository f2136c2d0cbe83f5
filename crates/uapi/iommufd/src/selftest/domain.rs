//! Paging domains of the mock IOMMU: AMD's host page tables in Linux's mock shape, with pages of
//! 2 KiB.

use core::any::Any;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Dirty, Error, Gather, PageTable};
use lychgate_iommu::{
    AllocError, AllocFlags, DirtyBits, DirtyTracking, Geometry, MapError, PagingDomain,
};
use lychgate_types::{Errno, Iova, Pages, PhysAddr, PhysRun, Prot};

use super::abi;
use super::pages::MockPages;
use crate::mm::PAGE_SIZE;

type Format = AmdV1<{ abi::PAGE_SHIFT }>;

/// Bits of an IOVA that the mock hardware decodes.
const IOVA_BITS: u32 = 56;

/// "D" of a leaf, which hardware sets when a device writes (AMD 48882 Table 18).
const DIRTY: u64 = 1 << 6;

/// Which page tables the mock hardware walks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Shape {
    /// `MOCK_IOMMUPT_DEFAULT`: every page size, in an aperture.
    Default,
    /// `MOCK_IOMMUPT_HUGE`: pages of 4 KiB and 1 MiB, in all IOVAs.
    Huge,
}

/// A page table of the mock IOMMU.
pub(super) struct MockDomain {
    table: PageTable<Format, MockPages>,
    growth: Mutex<()>,
    flags: AllocFlags,
    tracks: AtomicBool,
}

impl MockDomain {
    /// An empty page table.
    pub(super) fn new(
        pages: MockPages,
        shape: Shape,
        flags: AllocFlags,
    ) -> Result<Self, AllocError> {
        let mut config = Config::<Format>::new(IOVA_BITS, AmdV1Options::default());
        match shape {
            Shape::Default => {
                config.aperture = Iova::new(abi::APERTURE_START)..=Iova::new(abi::APERTURE_LAST);
            }
            // iommufd takes no page table without pages of 4 KiB.
            Shape::Huge => config.page_sizes = abi::HUGE_PAGE_SIZE | PAGE_SIZE,
        }
        let table = PageTable::new(pages, config).map_err(|error| match error {
            Error::OutOfMemory => AllocError::OutOfMemory,
            _ => AllocError::Unsupported,
        })?;
        Ok(Self { table, growth: Mutex::new(()), flags, tracks: AtomicBool::new(false) })
    }

    /// What it was allocated for.
    pub(super) fn flags(&self) -> AllocFlags {
        self.flags
    }

    /// Whether dirty pages are tracked now.
    pub(super) fn tracks_dirty(&self) -> bool {
        self.tracks.load(Ordering::Relaxed)
    }

    /// A device writes at `iova`: hardware sets the dirty bit of the entry that it has read, if it
    /// tracks dirty pages.
    pub(super) fn device_writes(&self, iova: Iova) {
        if !self.tracks_dirty() {
            return;
        }
        let path = self.table.path(iova);
        if let Some(leaf) = path.steps().last().filter(|_| path.translation.is_some())
            && let Some(word) = self.table.pages().words(leaf.at(), 1).first()
        {
            word.fetch_or(DIRTY.to_le(), Ordering::Relaxed);
        }
    }

    /// Puts levels on top of the table. Nothing has the old root: the mock hardware caches nothing.
    fn grow(&self, last: Iova) -> Result<(), Error> {
        let _alone = self.growth.lock().unwrap_or_else(PoisonError::into_inner);
        self.table.grow(last, |_| {})
    }
}

impl PagingDomain for MockDomain {
    fn geometry(&self) -> Geometry {
        let aperture = self.table.aperture();
        Geometry {
            first: *aperture.start(),
            last: *aperture.end(),
            page_sizes: self.table.page_sizes(),
        }
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError> {
        let mut gather = Gather::new();
        let mut mapped = self.table.map_batch(iova, runs, prot, &mut gather);
        if let Err(Error::BeyondTop { .. }) = mapped {
            // The sum was checked: the table said what is missing.
            let len = runs.iter().fold(0, |sum: u64, run| sum.wrapping_add(run.len));
            mapped = self
                .grow(iova.wrapping_add(len.wrapping_sub(1)))
                .and_then(|()| self.table.map_batch(iova, runs, prot, &mut gather));
        }
        gather.release(self.table.pages());
        mapped.map(drop).map_err(map_error)
    }

    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let mut gather = Gather::new();
        let unmapped = self.table.unmap_whole_leaves(iova, len, &mut gather);
        gather.release(self.table.pages());
        unmapped.unwrap_or(0)
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        self.table.walk(iova).map(|translation| translation.phys)
    }

    fn enforce_cache_coherency(&self) -> bool {
        false
    }

    fn supports_pasid(&self) -> bool {
        self.flags.pasid
    }

    fn dirty(&self) -> Option<&dyn DirtyTracking> {
        if self.flags.dirty { Some(self) } else { None }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DirtyTracking for MockDomain {
    fn set_dirty_tracking(&self, enable: bool) -> Result<(), Errno> {
        self.tracks.store(enable, Ordering::Relaxed);
        Ok(())
    }

    fn read_and_clear_dirty(
        &self,
        iova: Iova,
        len: u64,
        bits: DirtyBits,
        dirty: &mut dyn FnMut(Iova, u64),
    ) -> Result<(), Errno> {
        if !self.tracks_dirty() {
            return Err(Errno::EINVAL);
        }
        let then = match bits {
            DirtyBits::Clear => Dirty::Clear,
            DirtyBits::Keep => Dirty::Keep,
        };
        let mut gather = Gather::new();
        let read = self.table.read_dirty(iova, len, then, &mut gather, dirty);
        gather.release(self.table.pages());
        Ok(read?)
    }
}

fn map_error(error: Error) -> MapError {
    match error {
        Error::Empty | Error::Misaligned { .. } => MapError::Misaligned,
        Error::AlreadyMapped { at } => MapError::AlreadyMapped { at },
        Error::OutOfMemory => MapError::OutOfMemory,
        Error::Growing | Error::Corrupt => MapError::Hardware,
        _ => MapError::OutOfRange,
    }
}
