//! Devices of a context, as VFIO binds and attaches them (`drivers/iommu/iommufd/device.c`).

use lychgate_iommu::{DeviceId, GroupId};
use lychgate_types::Errno;

use crate::context::{Context, ContextRef};
use crate::error::{Result, refuse};

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
        self.context.attach_device(self.id, pt_id)
    }

    /// Attaches the device's group to something else, without a moment in between in which it is
    /// attached to nothing (`iommufd_device_replace`). On an error the old attachment stays.
    ///
    /// `EINVAL` when the device is not attached; else as [`BoundDevice::attach`].
    pub fn replace(&self, pt_id: u32) -> Result<u32> {
        self.context.replace_device(self.id, pt_id)
    }

    /// Detaches the device; nothing happens when it is not attached (`iommufd_device_detach`).
    pub fn detach(&self) {
        self.context.detach_device(self.id);
    }

    /// Whether the device is attached to a page table.
    pub fn is_attached(&self) -> bool {
        self.context.device_is_attached(self.id)
    }
}

impl Drop for BoundDevice {
    fn drop(&mut self) {
        self.context.unbind_device(self.id);
    }
}

impl Context {
    /// Whether a device of the group is bound here (`iommufd_ctx_has_group`).
    pub fn has_group(&self, group: GroupId) -> bool {
        let _ = group;
        false
    }

    /// The object of a device that is bound here (`iommufd_device_to_id`).
    pub fn device_object(&self, device: DeviceId) -> Option<u32> {
        let _ = device;
        None
    }

    /// Makes sure that there is a compatibility IOAS, as a VFIO group does that is put into this
    /// container (`iommufd_vfio_compat_ioas_create`). `ENOMEM` when no object number is free.
    pub fn create_compat_ioas(&self) -> Result<u32> {
        self.compat_ioas()
    }

    /// The compatibility IOAS, to which the devices of containers are attached
    /// (`iommufd_vfio_compat_ioas_get_id`). `ENODEV` without one.
    pub fn compat_ioas(&self) -> Result<u32> {
        refuse(Errno::ENODEV, "there is no compatibility IOAS")
    }

    fn bind_device(&self, device: DeviceId) -> Result<u32> {
        let _ = device;
        refuse(Errno::ENODEV, "there is no such device")
    }

    fn attach_device(&self, id: u32, pt_id: u32) -> Result<u32> {
        let _ = (id, pt_id);
        refuse(Errno::ENOENT, "no object has this number")
    }

    fn replace_device(&self, id: u32, pt_id: u32) -> Result<u32> {
        let _ = (id, pt_id);
        refuse(Errno::EINVAL, "the device is not attached")
    }

    fn detach_device(&self, id: u32) {
        let _ = id;
    }

    fn device_is_attached(&self, id: u32) -> bool {
        let _ = id;
        false
    }

    fn unbind_device(&self, id: u32) {
        let _ = id;
    }
}
