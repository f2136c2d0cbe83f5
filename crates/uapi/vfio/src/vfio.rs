//! The devices and groups of a machine, and their nodes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lychgate_iommu::Capability;
use lychgate_iommufd::OpenFile;
use lychgate_iommufd::context::SharedIommu;
use lychgate_iommufd::error::{Result, refuse};
use lychgate_types::{Bdf, Errno};

use crate::device::Device;
use crate::device_file::DeviceFile;
use crate::group::Group;
use crate::pci_device::VfioPciDevice;

/// Major number of group nodes.
const GROUP_MAJOR: u32 = 243;
/// Major number of device nodes.
const CDEV_MAJOR: u32 = 511;

/// A node `/dev/vfio/N`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GroupNode {
    /// The group's number, its name in `/dev/vfio` and `/sys/kernel/iommu_groups`.
    pub number: u32,
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
}

/// A node `/dev/vfio/devices/vfioN`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CdevNode {
    /// The number behind `vfio` in its name.
    pub index: u32,
    /// The function behind it.
    pub bdf: Bdf,
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
}

/// What VFIO has: the devices that are bound to vfio-pci, and their groups.
pub struct Vfio {
    registry: Arc<Registry>,
}

impl Vfio {
    /// Major and minor number of `/dev/vfio/vfio`, which iommufd serves.
    pub const CONTAINER_DEVICE_NUMBER: (u32, u32) = (10, 196);

    /// Nothing yet. `iommu` knows the devices' groups.
    pub fn new(iommu: SharedIommu) -> Self {
        Self { registry: Arc::new(Registry { iommu, state: Mutex::default() }) }
    }

    /// Registers a device, and its group if it is the first of it. Gives the number in
    /// `/dev/vfio/devices/vfioN`.
    ///
    /// `EINVAL` for a device without a group or without coherent DMA, or one that is there already.
    pub fn add(&self, device: Arc<VfioPciDevice>) -> Result<u32> {
        self.registry.add(device)
    }

    /// The group nodes, ascending.
    pub fn groups(&self) -> Vec<GroupNode> {
        let state = self.registry.lock();
        let node = |(number, group): (&u32, &Arc<Group>)| GroupNode {
            number: *number,
            device_number: (GROUP_MAJOR, group.minor),
        };
        state.groups.iter().map(node).collect()
    }

    /// The device nodes, ascending.
    pub fn devices(&self) -> Vec<CdevNode> {
        let node = |device: Arc<Device>| CdevNode {
            index: device.index,
            bdf: device.pci.bdf(),
            device_number: (CDEV_MAJOR, device.index),
        };
        self.registry.devices().into_iter().map(node).collect()
    }

    /// Opens `/dev/vfio/NUMBER`. `ENODEV` without such a group; `EBUSY` while it is open, or one of its
    /// devices is bound by its own node.
    pub fn open_group(&self, number: u32) -> Result<Arc<dyn OpenFile>> {
        let group = self.registry.lock().groups.get(&number).cloned();
        let Some(group) = group else {
            return refuse(Errno::ENODEV, "there is no such group");
        };
        let device_number = (GROUP_MAJOR, group.minor);
        Ok(group.open(self.weak(), device_number)?)
    }

    /// Opens `/dev/vfio/devices/vfioINDEX`. `ENODEV` without such a device.
    pub fn open_cdev(&self, index: u32) -> Result<Arc<dyn OpenFile>> {
        let device = self.registry.devices().into_iter().find(|device| device.index == index);
        let Some(device) = device else {
            return refuse(Errno::ENODEV, "there is no such device");
        };
        Ok(Arc::new(DeviceFile::by_node(device, self.weak(), (CDEV_MAJOR, index))))
    }

    fn weak(&self) -> Weak<Registry> {
        Arc::downgrade(&self.registry)
    }
}

/// What files look other devices up in.
pub(crate) struct Registry {
    iommu: SharedIommu,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    groups: BTreeMap<u32, Arc<Group>>,
    devices: Vec<Arc<Device>>,
}

impl Registry {
    /// All devices, in the order of their numbers.
    pub(crate) fn devices(&self) -> Vec<Arc<Device>> {
        self.lock().devices.clone()
    }

    fn add(&self, pci: Arc<VfioPciDevice>) -> Result<u32> {
        let (id, coherent) = {
            let iommu = self.iommu.lock().unwrap_or_else(PoisonError::into_inner);
            let device = pci.device_id();
            (iommu.group(device), iommu.capable(device, Capability::CacheCoherency))
        };
        let Some(id) = id else {
            return refuse(Errno::EINVAL, "the device has no group");
        };
        if !coherent {
            return refuse(Errno::EINVAL, "the device's DMA is not coherent");
        }
        let mut state = self.lock();
        if state.devices.iter().any(|device| device.pci.bdf() == pci.bdf()) {
            return refuse(Errno::EINVAL, "the device is there already");
        }
        let minor = u32::try_from(state.groups.len()).unwrap_or(u32::MAX);
        let group = state
            .groups
            .entry(id.get())
            .or_insert_with(|| Arc::new(Group::new(id, minor, Arc::clone(&self.iommu))));
        let group = Arc::clone(group);
        let index = u32::try_from(state.devices.len()).unwrap_or(u32::MAX);
        state.devices.push(Arc::new(Device::new(pci, index, group)));
        Ok(index)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
