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

    /// Attaches the device's requests without PASID to an IOAS or a page table, and gives the number of
    /// the page table (`iommufd_device_attach`).
    ///
    /// `ENOENT` when nothing has the number; `EINVAL` for another kind of object, for a page table
    /// that does not fit the device, when another device of the group is attached to another
    /// one, and when PASIDs are attached and the page table is not allocated for that; `EBUSY` when
    /// the device is attached; `EADDRINUSE` when what is mapped collides with what the device
    /// reserves or the page table cannot hold; `ENODEV` when the page table has a fault queue and the
    /// device cannot ask for pages; `EFAULT` and `ENOMEM` from pinning. For a nested page table of a
    /// vIOMMU, `ENOENT` also when the device has no virtual id there that it needs.
    pub fn attach(&self, pt_id: u32) -> Result<u32> {
        self.attach_pasid(Pasid::NONE, pt_id)
    }

    /// As [`BoundDevice::attach`], for its requests with a PASID; `pasid` may be [`Pasid::NONE`].
    ///
    /// `EINVAL` also for a page table that is not allocated for PASIDs, or beside one; for an IOAS,
    /// whose automatic page tables are not; and for a PASID that passes what the device can use.
    /// `EOPNOTSUPP` when the IOMMU attaches no PASIDs.
    pub fn attach_pasid(&self, pasid: Pasid, pt_id: u32) -> Result<u32> {
        let mut state = self.context.lock();
        self.context.change_pt(&mut state, self.id, pasid, pt_id, Way::Attach)
    }

    /// Attaches the device's group to something else, without a moment in between in which it is
    /// attached to nothing (`iommufd_device_replace`). On an error the old attachment stays. Faults
    /// that came through it and are not answered are answered `Invalid`.
    ///
    /// `EINVAL` when the device is not attached; else as [`BoundDevice::attach`].
    pub fn replace(&self, pt_id: u32) -> Result<u32> {
        self.replace_pasid(Pasid::NONE, pt_id)
    }

    /// As [`BoundDevice::replace`], for its requests with a PASID.
    pub fn replace_pasid(&self, pasid: Pasid, pt_id: u32) -> Result<u32> {
        let mut state = self.context.lock();
        self.context.change_pt(&mut state, self.id, pasid, pt_id, Way::Replace)
    }

    /// Detaches the device's requests without PASID; nothing happens when they are not attached
    /// (`iommufd_device_detach`). Faults that are not answered are answered `Invalid`.
    pub fn detach(&self) {
        self.detach_pasid(Pasid::NONE);
    }

    /// As [`BoundDevice::detach`], for its requests with a PASID.
    pub fn detach_pasid(&self, pasid: Pasid) {
        self.context.detach(&mut self.context.lock(), self.id, pasid);
    }

    /// The PASIDs of the device that are attached, ascending.
    pub fn attached_pasids(&self) -> Vec<Pasid> {
        Context::attached_pasids(&self.context.lock(), self.id)
    }

    /// Whether the device's requests without PASID are attached to a page table.
    pub fn is_attached(&self) -> bool {
        self.is_pasid_attached(Pasid::NONE)
    }

    /// As [`BoundDevice::is_attached`], for its requests with a PASID.
    pub fn is_pasid_attached(&self, pasid: Pasid) -> bool {
        Context::is_attached(&self.context.lock(), self.id, pasid)
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
        let object = DeviceObject { device, bdf, group, enforces_coherency, vdevice: None };
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
        self.detach_all(state, id);
        self.bury_vdevice(state, id);
        if let Some(Object::Device(object)) = state.objects.remove(id) {
            self.lock_iommu().release_dma_owner(object.device);
        }
    }
}
