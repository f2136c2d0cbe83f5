//! An open device: `/dev/vfio/devices/vfioN`, or what `VFIO_GROUP_GET_DEVICE_FD` gave
//! (`device_cdev.c`, `vfio_main.c`).

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{Client, Context, MmapRequest, OpenFile, Reply};
use lychgate_types::{Errno, Pasid};

use crate::abi::*;
use crate::device::Device;
use crate::hot_reset;
use crate::user;
use crate::vfio::Registry;

/// One open file of a device.
pub(crate) struct DeviceFile {
    device: Arc<Device>,
    registry: Weak<Registry>,
    /// The number of the node; `None` for a file that came from the group.
    node: Option<(u32, u32)>,
    /// Whether more than binding is allowed: set once.
    granted: AtomicBool,
    /// Orders attempts to bind.
    binding: Mutex<()>,
}

impl DeviceFile {
    /// The file of a device that its group has just opened.
    pub(crate) fn by_group(device: Arc<Device>, registry: Weak<Registry>) -> Self {
        Self {
            device,
            registry,
            node: None,
            granted: AtomicBool::new(true),
            binding: Mutex::default(),
        }
    }

    /// An open of the device's own node.
    pub(crate) fn by_node(device: Arc<Device>, registry: Weak<Registry>, node: (u32, u32)) -> Self {
        Self {
            device,
            registry,
            node: Some(node),
            granted: AtomicBool::new(false),
            binding: Mutex::default(),
        }
    }

    /// `EINVAL` before the device is bound.
    fn require_granted(&self) -> Result<()> {
        if self.granted.load(Ordering::Acquire) {
            Ok(())
        } else {
            refuse(Errno::EINVAL, "the device is not bound")
        }
    }

    fn bind(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const MIN: usize = 16;
        const LEN: usize = size_of::<BindIommufd>();
        let mut argsz = [0; 4];
        user::read(client, argument, &mut argsz)?;
        let argsz = u32::from_le_bytes(argsz);
        user::check_argsz(argsz, MIN)?;
        let given = usize::try_from(argsz).unwrap_or(usize::MAX);
        let bind: BindIommufd = user::copy_in(client, argument, given.min(LEN))?;
        check_tail(client, argument, LEN, given)?;
        if bind.flags & !VFIO_DEVICE_BIND_FLAG_TOKEN != 0 || bind.iommufd < 0 {
            return refuse(Errno::EINVAL, "unknown flags, or a negative descriptor");
        }
        if self.node.is_none() {
            return refuse(Errno::EINVAL, "the device was opened through its group");
        }
        self.device.group.block()?;
        let bound = self.bind_blocked(client, argument, &bind);
        if bound.is_err() {
            self.device.group.unblock();
        }
        bound
    }

    /// Binds, with the group kept from being opened.
    fn bind_blocked(&self, client: &dyn Client, argument: u64, bind: &BindIommufd) -> Result<()> {
        const OUT_DEVID: u64 = 12;
        let _alone = self.binding.lock().unwrap_or_else(PoisonError::into_inner);
        if self.granted.load(Ordering::Acquire) {
            return refuse(Errno::EINVAL, "the device is bound");
        }
        if bind.flags & VFIO_DEVICE_BIND_FLAG_TOKEN != 0 {
            // A function without SR-IOV takes any token: it has nothing to compare it with.
            user::read(client, bind.token_uuid_ptr, &mut [0; 16])?;
        }
        let Some(file) = client.file(bind.iommufd) else {
            return Err(user::foreign_descriptor(client, bind.iommufd, Errno::EBADFD));
        };
        let Some(context) = Context::from_file(&*file) else {
            return refuse(Errno::EBADFD, "the descriptor is no iommufd");
        };
        let id = self.device.open_by_cdev(&context)?;
        if let Err(refusal) = user::write(client, user::at(argument, OUT_DEVID)?, &id.to_le_bytes())
        {
            self.device.close();
            return Err(refusal);
        }
        self.granted.store(true, Ordering::Release);
        Ok(())
    }

    fn attach(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const MIN: usize = 12;
        const LEN: usize = size_of::<AttachIommufdPt>();
        const PT_ID: u64 = 8;
        let attach: AttachIommufdPt = user::copy_in(client, argument, MIN)?;
        user::check_argsz(attach.argsz, MIN)?;
        let pasid = if wants_pasid(attach.flags)? {
            user::check_argsz(attach.argsz, LEN)?;
            pasid(user::copy_in::<AttachIommufdPt>(client, argument, LEN)?.pasid)?
        } else {
            Pasid::NONE
        };
        let pt_id = self.device.attach(pasid, attach.pt_id)?;
        let reply = user::write(client, user::at(argument, PT_ID)?, &pt_id.to_le_bytes());
        if reply.is_err() {
            self.device.detach(pasid);
        }
        reply
    }

    fn detach(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const MIN: usize = 8;
        const LEN: usize = size_of::<DetachIommufdPt>();
        let detach: DetachIommufdPt = user::copy_in(client, argument, MIN)?;
        user::check_argsz(detach.argsz, MIN)?;
        let pasid = if wants_pasid(detach.flags)? {
            user::check_argsz(detach.argsz, LEN)?;
            Pasid::new(user::copy_in::<DetachIommufdPt>(client, argument, LEN)?.pasid)
        } else {
            Some(Pasid::NONE)
        };
        // Nothing is attached to a PASID that no device has.
        if let Some(pasid) = pasid {
            self.device.detach(pasid);
        }
        Ok(())
    }
}

impl OpenFile for DeviceFile {
    fn name(&self) -> String {
        match self.node {
            Some(_) => format!("/dev/vfio/devices/vfio{}", self.device.index),
            None => format!("vfio-device {}", self.device.pci.bdf()),
        }
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        self.node
    }

    fn ioctl(&self, client: &dyn Client, command: u32, argument: u64) -> Result<Reply> {
        let pci = &self.device.pci;
        if command == VFIO_DEVICE_BIND_IOMMUFD {
            return self.bind(client, argument).map(|()| Reply::Value(0));
        }
        self.require_granted()?;
        match command {
            VFIO_DEVICE_ATTACH_IOMMUFD_PT if self.node.is_some() => self.attach(client, argument),
            VFIO_DEVICE_DETACH_IOMMUFD_PT if self.node.is_some() => self.detach(client, argument),
            VFIO_DEVICE_GET_INFO => pci.get_info(client, argument),
            VFIO_DEVICE_GET_REGION_INFO => pci.get_region_info(client, argument),
            VFIO_DEVICE_GET_IRQ_INFO => pci.get_irq_info(client, argument),
            VFIO_DEVICE_SET_IRQS => return pci.set_irqs(client, argument).map(Reply::Value),
            VFIO_DEVICE_RESET => pci.reset(),
            VFIO_DEVICE_GET_PCI_HOT_RESET_INFO => {
                hot_reset::info(&self.device, &self.registry, client, argument)
            }
            VFIO_DEVICE_PCI_HOT_RESET => {
                hot_reset::reset(&self.device, &self.registry, client, argument)
            }
            VFIO_DEVICE_IOEVENTFD => pci.ioeventfd(client, argument),
            VFIO_DEVICE_FEATURE => pci.feature(client, argument),
            _ => refuse(Errno::ENOTTY, "a VFIO device does not have this ioctl"),
        }?;
        Ok(Reply::Value(0))
    }

    fn describe(&self, client: &dyn Client, command: u32, argument: u64) -> Option<String> {
        crate::trace::describe(command, argument, client)
    }

    fn read_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        self.require_granted()?;
        self.device.pci.read_region(client, buffer, count, offset)
    }

    fn write_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        self.require_granted()?;
        self.device.pci.write_region(client, buffer, count, offset)
    }

    fn mmap(&self, request: &MmapRequest) -> Result<()> {
        self.require_granted()?;
        self.device.pci.check_mmap(request)
    }

    fn backing(&self) -> Option<BorrowedFd<'_>> {
        self.device.pci.backing()
    }

    fn release(&self) {
        if !self.granted.swap(false, Ordering::AcqRel) {
            return;
        }
        if self.node.is_some() {
            self.device.close();
            self.device.group.unblock();
        } else {
            self.device.group.device_file_closed(&self.device);
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Whether the flags of an attach or a detach name a PASID. Others are unknown: `EINVAL`.
fn wants_pasid(flags: u32) -> Result<bool> {
    match flags {
        0 => Ok(false),
        VFIO_DEVICE_ATTACH_PASID => Ok(true),
        _ => refuse(Errno::EINVAL, "unknown flags"),
    }
}

/// A PASID as a client gives it: `EINVAL` above 20 bits.
fn pasid(number: u32) -> Result<Pasid> {
    match Pasid::new(number) {
        Some(pasid) => Ok(pasid),
        None => refuse(Errno::EINVAL, format!("no device has the PASID {number:#x}")),
    }
}

/// A structure that is longer than it is known here ends in zeros: `E2BIG` (`copy_struct_from_user`).
fn check_tail(client: &dyn Client, argument: u64, known: usize, given: usize) -> Result<()> {
    let mut at = known;
    while at < given {
        let mut block = [0; 256];
        let len = (given - at).min(block.len());
        let Some(block) = block.get_mut(..len) else { break };
        user::read(client, user::at(argument, at as u64)?, block)?;
        if block.iter().any(|byte| *byte != 0) {
            return refuse(Errno::E2BIG, "the structure ends in what is not known here");
        }
        at += len;
    }
    Ok(())
}
