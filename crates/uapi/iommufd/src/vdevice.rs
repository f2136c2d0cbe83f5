//! vDEVICEs: a device's number on a vIOMMU (`iommufd_vdevice_alloc_ioctl`).

use lychgate_iommu::VirtualDevice;
use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection::allocation;
use crate::objects::Object;
use crate::state::State;

/// A device on a vIOMMU (`struct iommufd_vdevice`). It goes with its device at the latest.
pub(crate) struct Vdevice {
    /// The number of the vIOMMU.
    pub(crate) viommu: u32,
    /// The number of the device.
    device: u32,
    virtual_id: u64,
    driver: Option<Box<dyn VirtualDevice>>,
}

impl Context {
    /// `IOMMU_VDEVICE_ALLOC`.
    pub(crate) fn vdevice_alloc(&self, command: &mut Command<'_, abi::VdeviceAlloc>) -> Result<()> {
        let abi::VdeviceAlloc { viommu_id, dev_id, virt_id, .. } = command.argument;
        let mut state = self.lock();
        let viommu = state.objects.viommu(viommu_id)?;
        let device = state.objects.device(dev_id)?;
        let iommu = self.lock_iommu();
        let Some(requester) = iommu.requester(device.device) else {
            return refuse(Errno::ENOENT, format!("device {dev_id} is gone"));
        };
        if iommu.instance(device.device).as_ref() != Some(&viommu.instance) {
            return refuse(Errno::EINVAL, "the device is behind another IOMMU than the vIOMMU");
        }
        drop(iommu);
        if device.vdevice.is_some() {
            return refuse(Errno::EEXIST, format!("device {dev_id} has a vDEVICE already"));
        }
        allocation()?;
        viommu.host.add_device(virt_id, requester)?;
        let driver = allocation().and_then(|()| {
            viommu.driver.vdevice_init(requester, virt_id).map_err(|errno| {
                Refusal::new(errno, "the driver does not take the device onto the vIOMMU")
            })
        });
        let driver = driver.inspect_err(|_| viommu.host.remove_device(virt_id))?;
        let host = std::sync::Arc::clone(&viommu.host);
        let object = Vdevice { viommu: viommu_id, device: dev_id, virtual_id: virt_id, driver };
        let id = state.objects.add(Object::Vdevice(object));
        let id = id.inspect_err(|_| host.remove_device(virt_id))?;
        state.objects.hold(viommu_id);
        state.objects.device_mut(dev_id)?.vdevice = Some(id);
        drop(state);
        command.argument.out_vdevice_id = id;
        self.finish(command, id)
    }

    /// Destroys the vDEVICE of a device that is about to go. Its number stands for nothing from then
    /// on: user space may still mean to destroy it (`iommufd_device_remove_vdev`).
    pub(crate) fn bury_vdevice(&self, state: &mut State, device: u32) {
        let vdevice = state.objects.device(device).ok().and_then(|device| device.vdevice);
        if let Some(id) = vdevice
            && let Some(object) = state.objects.bury(id)
        {
            self.end_object(state, id, object);
        }
    }
}

impl Vdevice {
    /// It was destroyed.
    pub(crate) fn end(self, state: &mut State) {
        let Self { viommu, device, virtual_id, driver } = self;
        drop(driver);
        if let Ok(viommu) = state.objects.viommu(viommu) {
            viommu.host.remove_device(virtual_id);
        }
        if let Ok(device) = state.objects.device_mut(device) {
            device.vdevice = None;
        }
        state.objects.put(viommu);
    }
}
