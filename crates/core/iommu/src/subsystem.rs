//! The core itself: devices, groups, attachment, ownership.

use alloc::sync::Arc;
use alloc::vec::Vec;

use lychgate_types::Bdf;

use crate::domain::{Domain, PagingDomain};
use crate::driver::{AllocFlags, Capability, Driver, HwInfo, ReservedRegion, UserData};
use crate::error::{AllocError, AttachError, ClaimError, ProbeError};
use crate::pci::PciFunctionInfo;

/// A device that the core manages. Never reused in the life of an [`Iommu`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceId(u32);

/// A group of devices. The number is the one in `/sys/kernel/iommu_groups`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GroupId(u32);

impl GroupId {
    /// The number in `/sys/kernel/iommu_groups`.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Who in user space owns a group's DMA: one number per open iommufd or VFIO group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Owner(pub u64);

/// The devices of a machine, their groups, and what each group is attached to.
#[derive(Default)]
pub struct Iommu {
    _private: (),
}

impl Iommu {
    /// No device yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a function to the topology without an IOMMU driver: a bridge or a port, which only
    /// matters for grouping. Parents come before their children.
    pub fn add_bridge(&mut self, info: PciFunctionInfo) {
        todo!()
    }

    /// Adds a function behind the IOMMU that `driver` drives, forms or joins its group
    /// (`pci_device_group`), and attaches it to the group's default domain.
    pub fn add_pci(
        &mut self,
        info: PciFunctionInfo,
        driver: Arc<dyn Driver>,
    ) -> Result<DeviceId, ProbeError> {
        todo!()
    }

    /// Takes a device away. Its DMA stays blocked.
    pub fn remove(&mut self, device: DeviceId) {
        todo!()
    }

    /// The device at a PCI address.
    pub fn find(&self, bdf: Bdf) -> Option<DeviceId> {
        todo!()
    }

    /// Where the device is.
    pub fn bdf(&self, device: DeviceId) -> Option<Bdf> {
        todo!()
    }

    /// The device's group.
    pub fn group(&self, device: DeviceId) -> Option<GroupId> {
        todo!()
    }

    /// The devices of a group, in the order in which they were added.
    pub fn group_devices(&self, group: GroupId) -> Vec<DeviceId> {
        todo!()
    }

    /// All groups, ascending.
    pub fn groups(&self) -> Vec<GroupId> {
        todo!()
    }

    /// What the group's requests without PASID are attached to.
    pub fn group_domain(&self, group: GroupId) -> Option<Domain> {
        todo!()
    }

    /// The reserved regions of all devices of a group, sorted and merged per kind
    /// (`iommu_get_group_resv_regions`).
    pub fn reserved_regions(&self, group: GroupId) -> Vec<ReservedRegion> {
        todo!()
    }

    /// Whether the device's IOMMU has a capability; false for an unknown device.
    pub fn capable(&self, device: DeviceId, capability: Capability) -> bool {
        todo!()
    }

    /// What the device's IOMMU is. `kind` as in [`Driver::hw_info`].
    pub fn hw_info(&self, device: DeviceId, kind: u32) -> Option<HwInfo> {
        todo!()
    }

    /// Allocates a paging domain that suits the device.
    pub fn alloc_paging(
        &mut self,
        device: DeviceId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        todo!()
    }

    /// Attaches the device's whole group to `domain`, from whatever an owner had attached before:
    /// attach and replace in one (`iommu_attach_group`, `iommu_group_replace_domain`). Devices that
    /// had moved when one fails are put back, and the group keeps its old domain.
    ///
    /// `Busy` unless the group's DMA is claimed by `owner`.
    pub fn attach_group(
        &mut self,
        group: GroupId,
        owner: Owner,
        domain: Domain,
    ) -> Result<(), AttachError> {
        todo!()
    }

    /// Detaches the group: blocked while it has an owner. Cannot fail.
    pub fn detach_group(&mut self, group: GroupId) {
        todo!()
    }

    /// Claims the DMA of the device's group for user space and blocks it
    /// (`iommu_device_claim_dma_owner`). The same owner may claim once per device.
    pub fn claim_dma_owner(&mut self, device: DeviceId, owner: Owner) -> Result<(), ClaimError> {
        todo!()
    }

    /// Undoes one claim; the last one puts the group back to its default domain.
    pub fn release_dma_owner(&mut self, device: DeviceId) {
        todo!()
    }

    /// Claims a whole group for an owner that opened it as a group
    /// (`iommu_group_claim_dma_owner`): `Owned` if anybody, `owner` too, uses it.
    pub fn claim_group(&mut self, group: GroupId, owner: Owner) -> Result<(), ClaimError> {
        todo!()
    }

    /// Undoes [`Iommu::claim_group`].
    pub fn release_group(&mut self, group: GroupId) {
        todo!()
    }

    /// Whether somebody owns the group's DMA: a kernel driver through the DMA API or user space
    /// (`iommu_group_dma_owner_claimed`).
    pub fn group_owned(&self, group: GroupId) -> bool {
        todo!()
    }

    /// A kernel driver binds to the device and wants the DMA API (`iommu_device_use_default_domain`).
    pub fn use_default_domain(&mut self, device: DeviceId) -> Result<(), ClaimError> {
        todo!()
    }

    /// Undoes [`Iommu::use_default_domain`].
    pub fn unuse_default_domain(&mut self, device: DeviceId) {
        todo!()
    }
}
