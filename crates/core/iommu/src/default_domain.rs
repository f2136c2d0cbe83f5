//! The domain of a group whose DMA nobody in user space owns.

use alloc::sync::Arc;

use lychgate_types::{Iova, PhysAddr, PhysRun, RequesterId};

use crate::domain::{Domain, PagingDomain};
use crate::driver::{AllocFlags, Driver, ReservedKind, ReservedRegion};
use crate::error::{AllocError, MapError, ProbeError};

/// Which domain a group gets when it is formed and whenever no owner holds it: what Linux takes
/// from `iommu.passthrough` and its Kconfig default.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum DefaultDomain {
    /// DMA passes untranslated (`IOMMU_DOMAIN_IDENTITY`, `iommu.passthrough=1`).
    #[default]
    Identity,
    /// A paging domain of the group's own (`IOMMU_DOMAIN_DMA`). The core maps the direct regions of
    /// the group's devices into it; the embedder's DMA API maps the rest.
    Dma,
    /// DMA is aborted: for an embedder without any driver of its own. A group whose first device
    /// needs a direct mapping gets the identity domain instead; a later one that does is refused.
    Blocked,
}

impl DefaultDomain {
    /// The default domain of a new group whose first device is `device`. What the driver demands goes
    /// before the policy.
    pub(crate) fn for_group(
        self,
        driver: &dyn Driver,
        device: RequesterId,
        needs_direct: bool,
    ) -> Result<Domain, ProbeError> {
        match driver.default_domain(device).unwrap_or(self) {
            Self::Identity => Ok(Domain::Identity),
            Self::Blocked if needs_direct => Ok(Domain::Identity),
            Self::Blocked => Ok(Domain::Blocked),
            Self::Dma => driver
                .alloc_paging(device, AllocFlags::default(), None)
                .map(Domain::Paging)
                .map_err(|error| match error {
                    AllocError::OutOfMemory | AllocError::NoIdentifier => ProbeError::OutOfMemory,
                    AllocError::NoDevice => ProbeError::NoIommu,
                    AllocError::Unsupported | AllocError::InvalidData => ProbeError::Incompatible,
                }),
        }
    }
}

/// Maps the direct regions among `regions` one to one, page by page where something is mapped
/// already (Linux, `iommu_create_device_direct_mappings`).
pub(crate) fn map_direct(
    domain: &Arc<dyn PagingDomain>,
    regions: &[ReservedRegion],
) -> Result<(), ProbeError> {
    let granule = domain.geometry().granule().max(1);
    for region in regions.iter().filter(|region| is_direct(region.kind)) {
        let first = region.first.align_down(granule);
        let last = region.last.get() | (granule - 1);
        map_holes(domain, first, last, granule, region).map_err(|error| match error {
            MapError::OutOfMemory => ProbeError::OutOfMemory,
            MapError::Hardware => ProbeError::Hardware,
            MapError::Misaligned | MapError::OutOfRange | MapError::AlreadyMapped { .. } => {
                ProbeError::Incompatible
            }
        })?;
    }
    Ok(())
}

/// Whether firmware asks for a one-to-one mapping.
fn is_direct(kind: ReservedKind) -> bool {
    matches!(kind, ReservedKind::Direct | ReservedKind::DirectRelaxable)
}

/// Maps each maximal hole of `first..=last` with one call.
fn map_holes(
    domain: &Arc<dyn PagingDomain>,
    first: Iova,
    last: u64,
    granule: u64,
    region: &ReservedRegion,
) -> Result<(), MapError> {
    let flush = |hole: Option<Iova>, bytes: u64| match hole {
        Some(at) => {
            let run = PhysRun { start: PhysAddr::new(at.get()), len: bytes };
            domain.map(at, &[run], region.prot)
        }
        None => Ok(()),
    };
    let mut hole = None;
    let mut at = first;
    loop {
        if domain.iova_to_phys(at).is_some() {
            let start = hole.take();
            let bytes = start.and_then(|start| at.checked_offset_from(start));
            flush(start, bytes.unwrap_or(0))?;
        } else if hole.is_none() {
            hole = Some(at);
        }
        match at.checked_add(granule) {
            Some(next) if next.get() <= last => at = next,
            _ => {
                let bytes = hole.map_or(0, |start| at.get() - start.get() + granule);
                return flush(hole, bytes);
            }
        }
    }
}
