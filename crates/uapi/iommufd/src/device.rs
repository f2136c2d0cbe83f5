//! Devices of a context, as VFIO binds and attaches them (`drivers/iommu/iommufd/device.c`).

use lychgate_iommu::{Capability, DeviceId, GroupId};
use lychgate_types::{Errno, Pasid};

use crate::attach::Way;
use crate::context::{Context, ContextRef};
use crate::error::{Result, refuse};
use crate::objects::{DeviceObject, Object};
use crate::state::State;

/// A device that a context owns (`struct iommufd_device`): dropping it detaches and unbinds it.
pub struct BoundDevice {
    context: ContextRef,
    id: u32,
}

impl ContextRef {
    /// Binds a device: the context owns its group's DMA, and the device becomes an object
    /// (`iommufd_device_bind`).
    ///
    /// `EINVAL` without coherent DMA; `ENODEV` for an unknown device; `EPERM` when its interrupts
    /// are not isolated, unless [`crate::Config::allow_unsafe_interrupts`], and when the group has
    /// another owner; `EBUSY` when it is attached to something that is not its default domain.
    pub fn bind(&self, device: DeviceId) -> Result<BoundDevice> {
        let id = self.bind_device(device)?;
        Ok(BoundDevice { context: self.clone(), id })
    }
}

impl BoundDevice {
    /// The number of its object, `out_devid` of `VFIO_DEVICE_BIND_IOMMUFD`.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The context it is bound to.
    pub fn context(&self) -> &ContextRef {
        &self.context
    }

    /// Attaches the device to an IOAS or a page table, and gives the number of the page table
    /// (`iommufd_device_attach`).
    ///
    /// `ENOENT` when nothing has the number; `EINVAL` for another kind of object, for a page table
    /// that does not fit the device, and when another device of the group is attached to another
    /// one; `EBUSY` when the device is attached; `EADDRINUSE` when what is mapped collides with what
    /// the device reserves or the page table cannot hold; `EFAULT` and `ENOMEM` from pinning.
    pub fn attach(&self, pt_id: u32) -> Result<u32> {
        self.context.change_pt(&mut self.context.lock(), self.id, Pasid::NONE, pt_id, Way::Attach)
    }

    /// Attaches the device's group to something else, without a moment in between in which it is
    /// attached to nothing (`iommufd_device_replace`). On an error the old attachment stays.
    ///
    /// `EINVAL` when the device is not attached; else as [`BoundDevice::attach`].
    pub fn replace(&self, pt_id: u32) -> Result<u32> {
        self.context.change_pt(&mut self.context.lock(), self.id, Pasid::NONE, pt_id, Way::Replace)
    }

    /// Detaches the device; nothing happens when it is not attached (`iommufd_device_detach`).
    pub fn detach(&self) {
        self.context.detach(&mut self.context.lock(), self.id, Pasid::NONE);
    }

    /// Whether the device is attached to a page table.
    pub fn is_attached(&self) -> bool {
        Context::is_attached(&self.context.lock(), self.id)
    }
}

impl Drop for BoundDevice {
    fn drop(&mut self) {
        self.context.unbind_device(&mut self.context.lock(), self.id);
    }
}

impl Context {
    /// Whether a device of the group is bound here (`iommufd_ctx_has_group`).
    pub fn has_group(&self, group: GroupId) -> bool {
        self.lock().objects.devices().any(|(_, object)| object.group == group)
    }

    /// The object of a device that is bound here (`iommufd_device_to_id`).
    pub fn device_object(&self, device: DeviceId) -> Option<u32> {
        let state = self.lock();
        state.objects.devices().find(|(_, object)| object.device == device).map(|(id, _)| id)
    }

    /// As [`ContextRef::bind`], without a reference to the context; gives the number of the object.
    pub(crate) fn bind_device(&self, device: DeviceId) -> Result<u32> {
        let mut state = self.lock();
        let mut iommu = self.lock_iommu();
        let (Some(bdf), Some(group)) = (iommu.bdf(device), iommu.group(device)) else {
            return refuse(Errno::ENODEV, "no IOMMU translates for the device");
        };
        if !iommu.capable(device, Capability::CacheCoherency) {
            return refuse(Errno::EINVAL, format!("DMA of {bdf} is not coherent with the caches"));
        }
        let isolated = iommu.capable(device, Capability::IsolatedMsi);
        if !isolated && !self.config.allow_unsafe_interrupts {
            return refuse(Errno::EPERM, format!("the interrupts of {bdf} are not isolated"));
        }
        iommu.claim_dma_owner(device, self.owner)?;
        let enforces_coherency = iommu.capable(device, Capability::EnforceCacheCoherency);
        let object = DeviceObject { device, bdf, group, enforces_coherency };
        let id = state
            .objects
            .add(Object::Device(object))
            .inspect_err(|_| iommu.release_dma_owner(device))?;
        // Whoever bound it uses it: callers cannot destroy it.
        state.objects.hold(id);
        state.objects.publish(id);
        Ok(id)
    }

    /// Detaches and unbinds a device that [`Context::bind_device`] bound.
    pub(crate) fn unbind_device(&self, state: &mut State, id: u32) {
        self.detach(state, id, Pasid::NONE);
        if let Some(Object::Device(object)) = state.objects.remove(id) {
            self.lock_iommu().release_dma_owner(object.device);
        }
    }
}
