//! What a hardware driver offers to the core (`struct iommu_ops`).

use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;

use lychgate_types::{Errno, Iova, Pasid, Prot, RequesterId};

use crate::default_domain::DefaultDomain;
use crate::domain::{Domain, PagingDomain};
use crate::error::{AllocError, AttachError, ProbeError};
use crate::nested::NestedDomain;
use crate::page_fault::{PageFault, PageResponse};
use crate::viommu::{NewViommu, ViommuHost, ViommuRequest};

/// What a device's IOMMU can do (`enum iommu_cap`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Capability {
    /// DMA is coherent with the processor's caches.
    CacheCoherency,
    /// No-snoop transactions can be made to snoop.
    EnforceCacheCoherency,
    /// Dirty tracking of the page tables.
    DirtyTracking,
    /// Mappings can be made non-executable.
    NoExec,
    /// Interrupts are isolated by remapping (`msi_device_has_isolated_msi`).
    IsolatedMsi,
    /// The IOMMU supports ATS for the device.
    PciAts,
}

/// What a domain is needed for; the driver picks the format (`IOMMU_HWPT_ALLOC_*`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AllocFlags {
    /// The domain must be attachable to a PASID, or to a RID while PASIDs are attached.
    pub pasid: bool,
    /// The domain will be the second stage of nested domains.
    pub nest_parent: bool,
    /// The domain must record dirty pages.
    pub dirty: bool,
}

/// Vendor data of an allocation, as user space gave it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UserData<'a> {
    /// `IOMMU_HWPT_DATA_*`.
    pub kind: u32,
    /// The structure that `kind` names.
    pub bytes: &'a [u8],
}

/// What the hardware of a device's IOMMU is (`IOMMU_GET_HW_INFO`).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct HwInfo {
    /// `IOMMU_HW_INFO_TYPE_*`.
    pub kind: u32,
    /// The structure that `kind` names, in its memory layout.
    pub bytes: Vec<u8>,
    /// Width of the PASIDs that device and IOMMU can use together, in bits; 0 for none.
    pub max_pasid_log2: u8,
}

/// Why a range of IOVA cannot be mapped freely (`enum iommu_resv_type`).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ReservedKind {
    /// Must be identity-mapped while the device works (IVMD unity map, RMRR).
    Direct,
    /// As `Direct`, but user space may take the device without it.
    DirectRelaxable,
    /// Never translated, or used by the platform.
    Reserved,
    /// The window of hardware interrupts.
    Msi,
    /// A window in which software maps interrupt doorbells.
    SwMsi,
}

/// A range that a device's IOVA allocation must leave alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ReservedRegion {
    /// First byte.
    pub first: Iova,
    /// Last byte, inclusive.
    pub last: Iova,
    /// Permissions, for a direct region.
    pub prot: Prot,
    /// Why.
    pub kind: ReservedKind,
}

/// A driver of one IOMMU. Devices are named by their requester id; every method but `probe` is
/// called only for a device that was probed and not released.
pub trait Driver: Send + Sync {
    /// Takes a device over. `aliases` are the other requester ids that its transactions may carry.
    /// Afterwards the device is blocked. Devices of one group may share requester ids, a device's
    /// own included; such an id goes with the device that was attached last, and a probe leaves it.
    fn probe(&self, device: RequesterId, aliases: &[RequesterId]) -> Result<(), ProbeError>;

    /// Lets a device go; its DMA stays blocked.
    fn release(&self, device: RequesterId);

    /// Whether the IOMMU has `capability` for the device.
    fn capable(&self, device: RequesterId, capability: Capability) -> bool;

    /// Describes the hardware. `kind` 0 asks for the default type; another type that the driver
    /// does not have gives `None`.
    fn hw_info(&self, device: RequesterId, kind: u32) -> Option<HwInfo>;

    /// The default domain that the device must have, whatever the policy of the machine
    /// (`iommu_ops::default_domain`, `def_domain_type`); `None` where any will do.
    fn default_domain(&self, device: RequesterId) -> Option<DefaultDomain> {
        let _ = device;
        None
    }

    /// The ranges that allocation must leave alone, besides what the geometry excludes.
    fn reserved_regions(&self, device: RequesterId) -> Vec<ReservedRegion>;

    /// Allocates a paging domain that suits the device.
    fn alloc_paging(
        &self,
        device: RequesterId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError>;

    /// Moves the device's requests from `old` to `domain`. On an error the device is still attached
    /// to `old`. `Blocked` cannot fail.
    fn attach(&self, device: RequesterId, domain: &Domain, old: &Domain)
    -> Result<(), AttachError>;

    /// PASIDs that device and IOMMU can use together are below it; 0 for none (`max_pasids`).
    fn max_pasids(&self, device: RequesterId) -> u32 {
        let _ = device;
        0
    }

    /// Moves the device's requests with `pasid` from `old` to `domain` (`set_dev_pasid`); both are
    /// `Blocked` for a PASID that is attached to nothing. Never called for PASID 0, for one at or
    /// above [`Driver::max_pasids`], or for a domain that does not support PASIDs, except `Blocked`.
    /// On an error the PASID is still attached to `old`. `Blocked` cannot fail.
    fn attach_pasid(
        &self,
        device: RequesterId,
        pasid: Pasid,
        domain: &Domain,
        old: &Domain,
    ) -> Result<(), AttachError> {
        let _ = (device, pasid, domain, old);
        Err(AttachError::Unsupported)
    }

    /// Whether the PASID table of a device on a nested domain is the guest's (`user_pasid_table`).
    fn user_pasid_table(&self, device: RequesterId) -> bool {
        let _ = device;
        false
    }

    /// Lets the device ask for pages (`iopf_queue_add_device`). `NoDevice` when it cannot.
    fn enable_page_requests(&self, device: RequesterId) -> Result<(), AttachError> {
        let _ = device;
        Err(AttachError::NoDevice)
    }

    /// Undoes [`Driver::enable_page_requests`].
    fn disable_page_requests(&self, device: RequesterId) {
        let _ = device;
    }

    /// Answers the group that `last` closed. May be called from any thread, with the locks of a
    /// caller held, and after the device has gone.
    fn page_response(&self, device: RequesterId, last: &PageFault, response: PageResponse) {
        let _ = (device, last, response);
    }

    /// Allocates a nested domain on `parent`, a nest parent, without a vIOMMU
    /// (`domain_alloc_nested`). `pasid` is `IOMMU_HWPT_ALLOC_PASID`. `InvalidData` when another
    /// driver made the parent.
    fn alloc_nested(
        &self,
        device: RequesterId,
        parent: &Arc<dyn PagingDomain>,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        let _ = (device, parent, pasid, data);
        Err(AllocError::Unsupported)
    }

    /// Whether there are vIOMMUs of a type (`get_viommu_size`).
    fn supports_viommu(&self, device: RequesterId, kind: u32) -> bool {
        let _ = (device, kind);
        false
    }

    /// Makes a vIOMMU of a type that [`Driver::supports_viommu`] (`viommu_init`). `host` lives as long
    /// as the vIOMMU; the driver keeps no strong reference to it beyond that.
    fn viommu_init(
        &self,
        device: RequesterId,
        request: &ViommuRequest<'_>,
        host: Weak<dyn ViommuHost>,
    ) -> Result<NewViommu, Errno> {
        let _ = (device, request, host);
        Err(Errno::EOPNOTSUPP)
    }
}
