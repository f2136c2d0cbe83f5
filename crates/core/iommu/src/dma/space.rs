//! A domain and what is free in it, as all threads share them.

use alloc::sync::Arc;
use core::fmt;
use core::sync::atomic::{AtomicBool, Ordering};

use lychgate_types::{Iova, Locks};

use super::error::DmaSpaceError;
use crate::domain::PagingDomain;
use crate::driver::{ReservedKind, ReservedRegion};
use crate::iova::{AllocError, IovaCache, IovaSpace};

const BELOW_4G: Iova = Iova::new(u32::MAX as u64);

/// What a device can use (Linux, `dma_get_mask` and `struct device_dma_parameters`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Reach {
    /// Last IOVA that the device can emit.
    pub limit: Iova,
    /// Most bytes of one segment of a list.
    pub max_segment: u64,
}

impl Reach {
    /// Of a device that emits addresses of `bits` bits, 64 or more for any, and takes segments of any
    /// length.
    pub const fn of_bits(bits: u32) -> Self {
        let limit = match 1_u64.checked_shl(bits) {
            Some(end) => end - 1,
            None => u64::MAX,
        };
        Self { limit: Iova::new(limit), max_segment: u64::MAX }
    }
}

/// A paging domain whose IOVAs are given by an allocator (Linux, `struct iommu_dma_cookie`).
///
/// Nobody else may map into the domain, but in ranges that are reserved.
pub struct DmaSpace<D: PagingDomain + ?Sized, L: Locks> {
    iovas: Arc<IovaSpace<L>>,
    below_4g_first: AtomicBool,
    domain: Arc<D>,
}

impl<D: PagingDomain + ?Sized, L: Locks> DmaSpace<D, L> {
    /// The IOVAs of `domain`'s geometry, but 0 and `reserved`: what the devices that are attached to it
    /// must leave alone. Windows in which software maps interrupt doorbells are not among that.
    ///
    /// # Errors
    /// [`DmaSpaceError`].
    pub fn new(domain: Arc<D>, reserved: &[ReservedRegion]) -> Result<Self, DmaSpaceError> {
        let geometry = domain.geometry();
        let iovas = IovaSpace::new(geometry.first, geometry.last, geometry.granule())
            .map_err(DmaSpaceError::Geometry)?;
        for region in reserved.iter().filter(|region| region.kind != ReservedKind::SwMsi) {
            iovas.reserve(region.first..=region.last).map_err(DmaSpaceError::Reserved)?;
        }
        Ok(Self { iovas: Arc::new(iovas), below_4g_first: AtomicBool::new(false), domain })
    }

    /// Looks below 4 GiB first, whatever devices reach, until there is nothing left: PCI needs no
    /// dual address cycle then, and many devices that claim 64 bits were never tried with them (Linux does
    /// that for PCI devices, but with `iommu.forcedac`).
    #[must_use]
    pub fn below_4g_first(mut self) -> Self {
        *self.below_4g_first.get_mut() = true;
        self
    }

    /// The domain.
    pub const fn domain(&self) -> &Arc<D> {
        &self.domain
    }

    /// What is free in it.
    pub const fn iovas(&self) -> &Arc<IovaSpace<L>> {
        &self.iovas
    }

    /// Allocates `len` bytes that a device of that limit reaches.
    #[inline]
    pub(super) fn alloc(
        &self,
        iovas: &mut IovaCache<L>,
        len: u64,
        limit: Iova,
    ) -> Result<Iova, AllocError> {
        if limit > BELOW_4G
            && self.below_4g_first.load(Ordering::Relaxed)
            && let Some(iova) = self.alloc_below_4g(iovas, len)
        {
            return Ok(iova);
        }
        iovas.alloc(len, limit)
    }

    #[inline(never)]
    fn alloc_below_4g(&self, iovas: &mut IovaCache<L>, len: u64) -> Option<Iova> {
        let iova = iovas.alloc(len, BELOW_4G);
        if iova.is_err() {
            self.below_4g_first.store(false, Ordering::Relaxed);
        }
        iova.ok()
    }
}

impl<D: PagingDomain + ?Sized, L: Locks> fmt::Debug for DmaSpace<D, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaSpace")
            .field("geometry", &self.domain.geometry())
            .field("iovas", &self.iovas)
            .finish_non_exhaustive()
    }
}
