//! Resets of a whole bus: which functions go along, and who must own them.

use std::sync::{Arc, Weak};

use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{Client, OpenFile};
use lychgate_types::Errno;
use zerocopy::IntoBytes;

use crate::abi::*;
use crate::device::Device;
use crate::group::{Group, GroupFile};
use crate::user;
use crate::vfio::Registry;

/// `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`: the functions on the device's bus. `ENODEV` on the root bus,
/// which nothing resets; `ENOSPC` with the count when they do not fit.
pub(crate) fn info(
    device: &Device,
    registry: &Weak<Registry>,
    client: &dyn Client,
    argument: u64,
) -> Result<()> {
    const LEN: usize = size_of::<HotResetInfo>();
    let mut info: HotResetInfo = user::copy_in(client, argument, LEN)?;
    user::check_argsz(info.argsz, LEN)?;
    let affected = on_same_bus(device, registry)?;
    let by_id = device.is_cdev_open();
    let mut owned = true;
    let mut entries = Vec::new();
    for other in &affected {
        let bdf = other.pci.bdf();
        let id = if by_id { object_id(device, other) } else { other.group_id().get() };
        owned &= !(by_id && id == VFIO_PCI_DEVID_NOT_OWNED);
        let [_, devfn] = bdf.requester.get().to_be_bytes();
        let entry = DependentDevice { id, segment: bdf.segment, bus: bdf.requester.bus(), devfn };
        entries.extend_from_slice(entry.as_bytes());
    }
    info.count = u32::try_from(affected.len()).unwrap_or(u32::MAX);
    info.flags = match (by_id, owned) {
        (true, true) => VFIO_PCI_HOT_RESET_FLAG_DEV_ID | VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED,
        (true, false) => VFIO_PCI_HOT_RESET_FLAG_DEV_ID,
        (false, _) => 0,
    };
    let fits = user::check_argsz(info.argsz, LEN + entries.len()).is_ok();
    user::copy_out(client, argument, &info, LEN)?;
    if !fits {
        return refuse(Errno::ENOSPC, format!("there are {} functions", affected.len()));
    }
    user::write(client, user::at(argument, LEN as u64)?, &entries)
}

/// `VFIO_DEVICE_PCI_HOT_RESET`: ownership is proved by group descriptors, or by the iommufd for a
/// device that is bound by its own node.
pub(crate) fn reset(
    device: &Device,
    registry: &Weak<Registry>,
    client: &dyn Client,
    argument: u64,
) -> Result<()> {
    const LEN: usize = size_of::<HotReset>();
    let call: HotReset = user::copy_in(client, argument, LEN)?;
    user::check_argsz(call.argsz, LEN)?;
    if call.flags != 0 {
        return refuse(Errno::EINVAL, "unknown flags");
    }
    let by_id = device.is_cdev_open();
    if (call.count == 0) != by_id {
        return refuse(Errno::EINVAL, "groups are given for devices that were opened by group");
    }
    let affected = on_same_bus(device, registry)?;
    let count = usize::try_from(call.count).unwrap_or(usize::MAX);
    if count > affected.len() {
        return refuse(Errno::EINVAL, "there are more groups than functions on the bus");
    }
    let mut groups = Vec::new();
    for fd in descriptors(client, user::at(argument, LEN as u64)?, count)? {
        groups.push(group_of(client, fd)?);
    }
    let owned = |other: &Arc<Device>| {
        if by_id {
            object_id(device, other) != VFIO_PCI_DEVID_NOT_OWNED
        } else {
            groups.iter().any(|group| Arc::ptr_eq(group, &other.group))
        }
    };
    if !affected.iter().all(owned) {
        return refuse(Errno::EINVAL, "a function on the bus belongs to somebody else");
    }
    for other in &affected {
        other.pci.bus_reset();
    }
    Ok(())
}

/// The functions that a reset of the bus takes along. The root bus cannot be reset: `ENODEV`.
fn on_same_bus(device: &Device, registry: &Weak<Registry>) -> Result<Vec<Arc<Device>>> {
    const ROOT_BUS: u8 = 0;
    let bdf = device.pci.bdf();
    let bus = bdf.requester.bus();
    if bus == ROOT_BUS {
        return refuse(Errno::ENODEV, "the function is on the root bus");
    }
    let devices = registry.upgrade().map(|registry| registry.devices()).unwrap_or_default();
    Ok(devices
        .into_iter()
        .filter(|other| {
            let other = other.pci.bdf();
            other.segment == bdf.segment && other.requester.bus() == bus
        })
        .collect())
}

/// The object of `other` in the iommufd that `device` is bound to (`vfio_iommufd_get_dev_id`).
fn object_id(device: &Device, other: &Device) -> u32 {
    let Some(context) = device.context() else { return VFIO_PCI_DEVID_NOT_OWNED };
    match context.device_object(other.pci.device_id()) {
        Some(id) => id,
        None if context.has_group(other.group_id()) => VFIO_PCI_DEVID_OWNED,
        None => VFIO_PCI_DEVID_NOT_OWNED,
    }
}

fn descriptors(client: &dyn Client, from: u64, count: usize) -> Result<Vec<i32>> {
    let mut bytes = vec![0; count * 4];
    if !bytes.is_empty() {
        user::read(client, from, &mut bytes)?;
    }
    Ok(bytes.as_chunks().0.iter().map(|fd| i32::from_le_bytes(*fd)).collect())
}

/// The group behind a descriptor: `EBADF`, or `EINVAL` for another kind of file.
fn group_of(client: &dyn Client, fd: i32) -> Result<Arc<Group>> {
    let Some(file) = client.file(fd) else {
        return Err(user::foreign_descriptor(client, fd, Errno::EINVAL));
    };
    let file: &dyn OpenFile = &*file;
    match file.as_any().downcast_ref::<GroupFile>() {
        Some(file) => Ok(Arc::clone(&file.group)),
        None => refuse(Errno::EINVAL, "the descriptor is no VFIO group"),
    }
}
