//! A device between its files: how often it is open, by which way, and what it is bound to
//! (`vfio_main.c`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommu::GroupId;
use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{BoundDevice, ContextRef};
use lychgate_types::{Errno, Pasid};

use crate::group::Group;
use crate::pci_device::VfioPciDevice;

/// A registered device.
pub(crate) struct Device {
    /// The driver.
    pub(crate) pci: Arc<VfioPciDevice>,
    /// The number in `/dev/vfio/devices/vfioN`.
    pub(crate) index: u32,
    /// Its group.
    pub(crate) group: Arc<Group>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    /// Files that have it open.
    files: u32,
    /// Whether the one file is the device's own rather than the group's.
    cdev: bool,
    bound: Option<BoundDevice>,
}

impl Device {
    pub(crate) fn new(pci: Arc<VfioPciDevice>, index: u32, group: Arc<Group>) -> Self {
        Self { pci, index, group, open: Mutex::default() }
    }

    /// Opens it through its group, which is in `container`: the first open binds it and attaches it to
    /// the compatibility IOAS.
    pub(crate) fn open_by_group(&self, container: &ContextRef) -> Result<()> {
        let mut open = self.lock();
        if open.files == 0 {
            let bound = container.bind(self.pci.device_id())?;
            self.pci.enable();
            if let Err(refusal) = container.compat_ioas().and_then(|ioas| bound.attach(ioas)) {
                self.pci.disable();
                return Err(refusal);
            }
            open.bound = Some(bound);
        }
        open.files += 1;
        Ok(())
    }

    /// Opens it by its own node: binds it, and gives the number of its object.
    pub(crate) fn open_by_cdev(&self, context: &ContextRef) -> Result<u32> {
        let mut open = self.lock();
        if open.files != 0 {
            return refuse(Errno::EINVAL, "the device is open");
        }
        let bound = context.bind(self.pci.device_id())?;
        self.pci.enable();
        let id = bound.id();
        *open = Open { files: 1, cdev: true, bound: Some(bound) };
        Ok(id)
    }

    /// One file less; the last one stops the function, and only then detaches and unbinds it.
    pub(crate) fn close(&self) {
        let mut open = self.lock();
        open.files = open.files.saturating_sub(1);
        if open.files == 0 {
            self.pci.disable();
            *open = Open::default();
        }
    }

    /// Attaches a PASID of it, or its requests without one, or moves them from what they are attached
    /// to; gives the page table.
    pub(crate) fn attach(&self, pasid: Pasid, pt_id: u32) -> Result<u32> {
        match &self.lock().bound {
            Some(bound) if bound.is_pasid_attached(pasid) => bound.replace_pasid(pasid, pt_id),
            Some(bound) => bound.attach_pasid(pasid, pt_id),
            None => refuse(Errno::EINVAL, "the device is not bound"),
        }
    }

    /// Detaches a PASID of it, or its requests without one, if they are attached.
    pub(crate) fn detach(&self, pasid: Pasid) {
        if let Some(bound) = &self.lock().bound {
            bound.detach_pasid(pasid);
        }
    }

    /// Whether it is open by its own node.
    pub(crate) fn is_cdev_open(&self) -> bool {
        self.lock().cdev
    }

    /// The context that it is bound to.
    pub(crate) fn context(&self) -> Option<ContextRef> {
        self.lock().bound.as_ref().map(|bound| bound.context().clone())
    }

    pub(crate) fn group_id(&self) -> GroupId {
        self.group.id
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
