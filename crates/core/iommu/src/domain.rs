//! Domains: what a group can be attached to.

use alloc::sync::Arc;
use core::any::Any;
use core::fmt;

use lychgate_types::{Errno, Iova, PhysAddr, PhysRun, Prot};

use crate::error::MapError;
use crate::nested::NestedDomain;

/// What stands between a group's DMA and memory (`include/linux/iommu.h`, `IOMMU_DOMAIN_*`).
///
/// Two values are the same domain when they are of the same kind and, for a paging or nested domain, the
/// same object: [`Domain::same`].
#[derive(Clone)]
#[non_exhaustive]
pub enum Domain {
    /// Every DMA is aborted.
    Blocked,
    /// Every DMA passes untranslated.
    Identity,
    /// DMA is translated by page tables that software maps into.
    Paging(Arc<dyn PagingDomain>),
    /// DMA is translated by tables of a guest, and then by a paging domain.
    Nested(Arc<dyn NestedDomain>),
}

impl Domain {
    /// Whether both name the same domain.
    pub fn same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Blocked, Self::Blocked) | (Self::Identity, Self::Identity) => true,
            (Self::Paging(a), Self::Paging(b)) => Arc::ptr_eq(a, b),
            (Self::Nested(a), Self::Nested(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }

    /// Whether it can be attached to a PASID.
    pub fn supports_pasid(&self) -> bool {
        match self {
            Self::Paging(domain) => domain.supports_pasid(),
            Self::Nested(domain) => domain.supports_pasid(),
            Self::Blocked | Self::Identity => false,
        }
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Blocked => "Blocked",
            Self::Identity => "Identity",
            Self::Paging(_) => "Paging",
            Self::Nested(_) => "Nested",
        })
    }
}

/// What a paging domain can translate, known when it is allocated
/// (`struct iommu_domain_geometry` and `pgsize_bitmap`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// First IOVA that can be mapped.
    pub first: Iova,
    /// Last IOVA that can be mapped, inclusive.
    pub last: Iova,
    /// Bit n set: a leaf of 2^n bytes exists. The lowest bit is the granule.
    pub page_sizes: u64,
}

impl Geometry {
    /// The smallest leaf in bytes: IOVA, physical address and length of every mapping are
    /// multiples of it.
    pub const fn granule(&self) -> u64 {
        self.page_sizes & self.page_sizes.wrapping_neg()
    }
}

/// A domain with page tables (`struct iommu_domain_ops`).
///
/// The caller excludes overlapping ranges; disjoint ones may be used from several threads at once.
pub trait PagingDomain: Send + Sync {
    /// What can be mapped.
    fn geometry(&self) -> Geometry;

    /// Maps the frames of `runs` at consecutive IOVAs from `iova`. On an error nothing of the range
    /// stays mapped. When it returns, every attached device can use the range.
    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError>;

    /// Unmaps the range and gives the bytes that were unmapped, from `iova` on: fewer than `len`
    /// where a hole ends the run, more where a leaf passes the end of the range. When it returns,
    /// no device reaches the frames, and every DMA that used them has completed.
    fn unmap(&self, iova: Iova, len: u64) -> u64;

    /// Where `iova` leads, or `None` when nothing is mapped there.
    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr>;

    /// Whether DMA through the domain snoops the caches whatever a device asks for; once true, it
    /// stays true (`enforce_cache_coherency`).
    fn enforce_cache_coherency(&self) -> bool;

    /// Whether the domain can be attached to a PASID (`set_dev_pasid`).
    fn supports_pasid(&self) -> bool {
        false
    }

    /// Dirty tracking; `None` for a domain that was not allocated for it (`dirty_ops`).
    fn dirty(&self) -> Option<&dyn DirtyTracking> {
        None
    }

    /// The driver's own type, for the driver to find it again.
    fn as_any(&self) -> &dyn Any;
}

/// Whether dirty bits are cleared as they are read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum DirtyBits {
    /// A later write is seen as a new one.
    Clear,
    /// `IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`.
    Keep,
}

/// Which pages devices wrote (`struct iommu_dirty_ops`).
pub trait DirtyTracking: Send + Sync {
    /// Switches recording on or off for every device that is or will be attached.
    fn set_dirty_tracking(&self, enable: bool) -> Result<(), Errno>;

    /// Calls `dirty` with each range in `len` bytes from `iova` that was written since its bits were
    /// last cleared, ascending, in units of leaves; holes are skipped. With [`DirtyBits::Clear`],
    /// when it returns no device can write one of these pages without its bit being set again.
    /// `EINVAL` while recording is off.
    fn read_and_clear_dirty(
        &self,
        iova: Iova,
        len: u64,
        bits: DirtyBits,
        dirty: &mut dyn FnMut(Iova, u64),
    ) -> Result<(), Errno>;
}
