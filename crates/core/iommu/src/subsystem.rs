//! The core itself: the devices of a machine and their groups.

use alloc::collections::BTreeMap;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::fmt;

use lychgate_types::{Bdf, Errno, Pasid, RequesterId};

use crate::default_domain::{self, DefaultDomain};
use crate::domain::{Domain, PagingDomain};
use crate::driver::{
    AllocFlags, Capability, Driver, HwInfo, ReservedKind, ReservedRegion, UserData,
};
use crate::error::{AllocError, AttachError, ProbeError};
use crate::group::{Set, Topology};
use crate::handle::Attached;
use crate::nested::NestedDomain;
use crate::ownership::Claim;
use crate::page_fault::Partial;
use crate::pci::{PciFunctionInfo, PciKind};
use crate::reserved;
use crate::viommu::{NewViommu, ViommuHost, ViommuRequest};

/// A device that the core manages. Never reused in the life of an [`Iommu`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct DeviceId(u32);

/// A group of devices. The number is the one in `/sys/kernel/iommu_groups`; it is never reused in
/// the life of an [`Iommu`], and the group ends with its last device.
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

/// One IOMMU instance, which may outlive the devices behind it.
#[derive(Clone)]
pub struct Instance(Arc<dyn Driver>);

impl PartialEq for Instance {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Instance {}

impl fmt::Debug for Instance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Instance").field(&Arc::as_ptr(&self.0).cast::<()>()).finish()
    }
}

/// The devices of a machine, their groups, and what each group is attached to.
#[derive(Default)]
pub struct Iommu {
    policy: DefaultDomain,
    topology: Topology,
    pub(crate) devices: BTreeMap<DeviceId, Device>,
    pub(crate) groups: BTreeMap<GroupId, Group>,
    next_device: u32,
    next_group: u32,
}

/// What the core knows of a device.
pub(crate) struct Device {
    pub(crate) info: PciFunctionInfo,
    pub(crate) driver: Arc<dyn Driver>,
    pub(crate) group: GroupId,
    /// What its driver attached it to: the domain of the group, except for a device whose driver
    /// failed when there was no way back.
    pub(crate) domain: Domain,
    /// Attachments of the device that handle faults.
    pub(crate) fault_users: u32,
    /// Its faults whose groups are not closed.
    pub(crate) partial: Partial,
    /// Whether firmware demands a direct mapping (`require_direct`).
    pub(crate) needs_direct: bool,
    /// Claims of user space on this device.
    pub(crate) claims: u32,
    /// Kernel drivers that use the DMA API through this device.
    pub(crate) drivers: u32,
}

/// Devices that are attached together.
pub(crate) struct Group {
    set: Set,
    pub(crate) devices: Vec<DeviceId>,
    pub(crate) default: Domain,
    /// What requests without PASID are attached to.
    pub(crate) attached: Attached,
    /// What requests with a PASID are attached to (`pasid_array`).
    pub(crate) pasids: BTreeMap<Pasid, Attached>,
    pub(crate) claim: Claim,
}

impl Iommu {
    /// No device yet; groups get the identity domain by default.
    pub fn new() -> Self {
        Self::default()
    }

    /// No device yet; groups get the default domain that `policy` names.
    pub fn with_default_domain(policy: DefaultDomain) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Adds a function to the topology without an IOMMU driver: a bridge or a port, which only
    /// matters for grouping. Parents come before their children; a parent that does not is taken
    /// for a port that isolates nothing until it comes. A second function at one address is ignored.
    pub fn add_bridge(&mut self, info: PciFunctionInfo) {
        self.topology.add(info);
    }

    /// Adds a function behind the IOMMU that `driver` drives, forms or joins its group
    /// (`pci_device_group`), and attaches it to the group's current domain: the default one, unless
    /// an owner has the group.
    ///
    /// `Exists` when there is a function at its address. `Incompatible` when the device cannot be
    /// attached to what its group is attached to.
    pub fn add_pci(
        &mut self,
        info: PciFunctionInfo,
        driver: Arc<dyn Driver>,
    ) -> Result<DeviceId, ProbeError> {
        let (bdf, requester) = (info.bdf, info.bdf.requester);
        let aliases = self.topology.aliases(&info);
        let set = self.topology.add(info.clone()).ok_or(ProbeError::Exists)?;
        if let Err(error) = driver.probe(requester, &aliases) {
            self.topology.remove(bdf);
            return Err(error);
        }
        let result = self.enter(info, Arc::clone(&driver), set);
        if result.is_err() {
            driver.release(requester);
            self.topology.remove(bdf);
        }
        result
    }

    /// Adds a device that is no PCI function and has a group of its own (`generic_device_group`). The
    /// core and the driver know it under `at`, which no other device may have.
    ///
    /// Errors as for [`Iommu::add_pci`].
    pub fn add_generic(
        &mut self,
        at: Bdf,
        driver: Arc<dyn Driver>,
    ) -> Result<DeviceId, ProbeError> {
        let info = PciFunctionInfo {
            bdf: at,
            kind: PciKind::Endpoint,
            multifunction: false,
            acs: None,
            parent: None,
            secondary_bus: None,
            quirk_aliases: Vec::new(),
        };
        self.add_pci(info, driver)
    }

    /// Takes a device away, with the claims on it. Its DMA stays blocked. A group ends with its
    /// last device.
    pub fn remove(&mut self, device: DeviceId) {
        let Some(gone) = self.devices.remove(&device) else {
            return;
        };
        gone.driver.release(gone.info.bdf.requester);
        self.topology.remove(gone.info.bdf);
        self.leave(device, gone.group);
        self.drop_claims(gone.group, gone.claims.max(gone.drivers));
    }

    /// The device at a PCI address.
    pub fn find(&self, bdf: Bdf) -> Option<DeviceId> {
        let (id, _) = self.devices.iter().find(|(_, device)| device.info.bdf == bdf)?;
        Some(*id)
    }

    /// Where the device is.
    pub fn bdf(&self, device: DeviceId) -> Option<Bdf> {
        self.devices.get(&device).map(|device| device.info.bdf)
    }

    /// The device's group.
    pub fn group(&self, device: DeviceId) -> Option<GroupId> {
        self.devices.get(&device).map(|device| device.group)
    }

    /// The devices of a group, in the order in which they were added.
    pub fn group_devices(&self, group: GroupId) -> Vec<DeviceId> {
        self.groups.get(&group).map(|group| group.devices.clone()).unwrap_or_default()
    }

    /// All groups, ascending.
    pub fn groups(&self) -> Vec<GroupId> {
        self.groups.keys().copied().collect()
    }

    /// What the group's requests without PASID are attached to.
    pub fn group_domain(&self, group: GroupId) -> Option<Domain> {
        self.groups.get(&group).map(|group| group.attached.domain.clone())
    }

    /// The reserved regions of all devices of a group, sorted and merged per kind
    /// (`iommu_get_group_resv_regions`).
    pub fn reserved_regions(&self, group: GroupId) -> Vec<ReservedRegion> {
        let mut regions = Vec::new();
        for id in self.groups.get(&group).map_or(&[][..], |g| &g.devices) {
            if let Some(device) = self.devices.get(id) {
                let bdf = device.info.bdf;
                regions.extend(device.driver.reserved_regions(bdf.requester));
            }
        }
        reserved::merge(regions)
    }

    /// Whether the device's IOMMU has a capability; false for an unknown device.
    pub fn capable(&self, device: DeviceId, capability: Capability) -> bool {
        self.devices
            .get(&device)
            .is_some_and(|device| device.driver.capable(device.info.bdf.requester, capability))
    }

    /// What the device's IOMMU is. `kind` as in [`Driver::hw_info`].
    pub fn hw_info(&self, device: DeviceId, kind: u32) -> Option<HwInfo> {
        let device = self.devices.get(&device)?;
        device.driver.hw_info(device.info.bdf.requester, kind)
    }

    /// Allocates a paging domain that suits the device.
    pub fn alloc_paging(
        &mut self,
        device: DeviceId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        let device = self.devices.get(&device).ok_or(AllocError::NoDevice)?;
        device.driver.alloc_paging(device.info.bdf.requester, flags, data)
    }

    /// How the device's driver names it.
    pub fn requester(&self, device: DeviceId) -> Option<RequesterId> {
        self.devices.get(&device).map(|device| device.info.bdf.requester)
    }

    /// The IOMMU instance that the device is behind (`iommu_get_iommu_dev`).
    pub fn instance(&self, device: DeviceId) -> Option<Instance> {
        self.devices.get(&device).map(|device| Instance(Arc::clone(&device.driver)))
    }

    /// PASIDs of the device are below it; 0 for none.
    pub fn max_pasids(&self, device: DeviceId) -> u32 {
        self.devices
            .get(&device)
            .map_or(0, |device| device.driver.max_pasids(device.info.bdf.requester))
    }

    /// Allocates a nested domain on a nest parent, without a vIOMMU (`domain_alloc_nested`).
    pub fn alloc_nested(
        &mut self,
        device: DeviceId,
        parent: &Arc<dyn PagingDomain>,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        let device = self.devices.get(&device).ok_or(AllocError::NoDevice)?;
        device.driver.alloc_nested(device.info.bdf.requester, parent, pasid, data)
    }

    /// Whether the device's IOMMU has vIOMMUs of a type; none has type 0.
    pub fn supports_viommu(&self, device: DeviceId, kind: u32) -> bool {
        let supports =
            |device: &Device| device.driver.supports_viommu(device.info.bdf.requester, kind);
        kind != 0 && self.devices.get(&device).is_some_and(supports)
    }

    /// Makes a vIOMMU on the IOMMU of the device. `EOPNOTSUPP` for a type that it does not have.
    pub fn viommu_init(
        &mut self,
        device: DeviceId,
        request: &ViommuRequest<'_>,
        host: Weak<dyn ViommuHost>,
    ) -> Result<NewViommu, Errno> {
        let device = self.devices.get(&device).ok_or(Errno::ENODEV)?;
        let requester = device.info.bdf.requester;
        if request.kind == 0 || !device.driver.supports_viommu(requester, request.kind) {
            return Err(Errno::EOPNOTSUPP);
        }
        device.driver.viommu_init(requester, request, host)
    }

    /// Makes a probed function a device of its group.
    fn enter(
        &mut self,
        info: PciFunctionInfo,
        driver: Arc<dyn Driver>,
        set: Set,
    ) -> Result<DeviceId, ProbeError> {
        let regions = driver.reserved_regions(info.bdf.requester);
        let needs_direct = regions.iter().any(|region| region.kind == ReservedKind::Direct);
        let joined = self.groups.iter().find(|(_, group)| group.set == set);
        let (group, default) = match joined {
            Some((id, group)) => (*id, group.default.clone()),
            None => {
                let requester = info.bdf.requester;
                let default = self.policy.for_group(driver.as_ref(), requester, needs_direct)?;
                (self.new_group(set, default.clone()), default)
            }
        };
        let id = DeviceId(self.next_device);
        self.next_device = self.next_device.wrapping_add(1);
        let device = Device {
            info,
            driver,
            group,
            domain: Domain::Blocked,
            fault_users: 0,
            partial: Partial::default(),
            needs_direct,
            claims: 0,
            drivers: 0,
        };
        self.devices.insert(id, device);
        if let Some(state) = self.groups.get_mut(&group) {
            state.devices.push(id);
        }
        let mapped = match &default {
            Domain::Paging(domain) => default_domain::map_direct(domain, &regions),
            _ => Ok(()),
        };
        let attached = mapped.and_then(|()| self.join(id, group).map_err(probe_error));
        if let Err(error) = attached {
            self.devices.remove(&id);
            self.leave(id, group);
            return Err(error);
        }
        Ok(id)
    }

    fn new_group(&mut self, set: Set, default: Domain) -> GroupId {
        let id = GroupId(self.next_group);
        self.next_group = self.next_group.wrapping_add(1);
        let group = Group {
            set,
            devices: Vec::new(),
            attached: Attached { domain: default.clone(), handle: None },
            pasids: BTreeMap::new(),
            default,
            claim: Claim::Free,
        };
        self.groups.insert(id, group);
        id
    }

    /// Takes a device off its group, and the group away with its last device.
    fn leave(&mut self, device: DeviceId, group: GroupId) {
        if let Some(state) = self.groups.get_mut(&group) {
            state.devices.retain(|id| *id != device);
            if state.devices.is_empty() {
                self.groups.remove(&group);
            }
        }
    }
}

fn probe_error(error: AttachError) -> ProbeError {
    match error {
        AttachError::Incompatible
        | AttachError::Unsupported
        | AttachError::NoVirtualDevice
        | AttachError::Busy => ProbeError::Incompatible,
        AttachError::OutOfMemory => ProbeError::OutOfMemory,
        AttachError::Hardware => ProbeError::Hardware,
        AttachError::NoDevice => ProbeError::NoIommu,
    }
}
