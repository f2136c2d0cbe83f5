//! Resets of a bus, by groups and by iommufd.

use lychgate_iommufd::NodeKind;
use lychgate_types::Errno;
use zerocopy::IntoBytes;

use super::bus::Bus;
use super::client::MEMORY;
use crate::abi::*;

/// Two functions of one group on bus 1, one on bus 2, one on the root bus.
const FUNCTIONS: [&str; 4] = ["0000:01:00.0", "0000:01:00.1", "0000:02:00.0", "0000:00:04.0"];

fn info(bus: &Bus, device: i32, argsz: u32) -> Result<i32, Errno> {
    let info = HotResetInfo { argsz, ..HotResetInfo::default() };
    bus.call(device, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, &info)
}

fn reset(bus: &Bus, device: i32, fds: &[i32]) -> Result<i32, Errno> {
    bus.client.put(12, fds.as_bytes());
    let call = HotReset { argsz: 64, flags: 0, count: u32::try_from(fds.len()).unwrap() };
    bus.call(device, VFIO_DEVICE_PCI_HOT_RESET, &call)
}

fn by_group(bus: &Bus, number: u32, name: &str) -> (i32, i32) {
    let container = bus.open_context(NodeKind::VfioContainer);
    let group = bus.open_group(number).unwrap();
    assert_eq!(bus.call(group, VFIO_GROUP_SET_CONTAINER, &container), Ok(0));
    let address = bus.client.put(0, format!("{name}\0").as_bytes());
    (group, bus.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address).unwrap())
}

#[test]
fn a_group_proves_what_it_owns() {
    let bus = Bus::with(&FUNCTIONS);
    let numbers: Vec<u32> = bus.vfio.groups().iter().map(|group| group.number).collect();
    let (group, device) = by_group(&bus, numbers[0], FUNCTIONS[0]);
    assert_eq!(info(&bus, device, 11), Err(Errno::EINVAL));
    assert_eq!(info(&bus, device, 27), Err(Errno::ENOSPC));
    assert_eq!(bus.client.get::<HotResetInfo>(MEMORY).count, 2, "how many there are");
    assert_eq!(info(&bus, device, 28), Ok(0));
    assert_eq!(bus.client.get::<HotResetInfo>(MEMORY).flags, 0);
    let entry = |devfn| DependentDevice { id: numbers[0], segment: 0, bus: 1, devfn };
    assert_eq!(bus.client.get::<[DependentDevice; 2]>(MEMORY + 12), [entry(0), entry(1)]);

    let before: Vec<u32> = bus.functions.iter().map(|function| function.resets()).collect();
    let (other_group, _) = by_group(&bus, numbers[1], FUNCTIONS[2]);
    let after_open = bus.functions[2].resets();
    bus.client.open_eventfd(10);
    for (fds, errno) in [
        (&[][..], Errno::EINVAL),
        (&[group, group, group], Errno::EINVAL),
        (&[99], Errno::EBADF),
        (&[10], Errno::EINVAL),
        (&[device], Errno::EINVAL),
        (&[other_group], Errno::EINVAL),
    ] {
        assert_eq!(reset(&bus, device, fds), Err(errno), "{fds:?}");
    }
    let flags = HotReset { argsz: 12, flags: 1, count: 1 };
    assert_eq!(bus.call(device, VFIO_DEVICE_PCI_HOT_RESET, &flags), Err(Errno::EINVAL));
    assert_eq!(reset(&bus, device, &[group]), Ok(0));
    let after: Vec<u32> = bus.functions.iter().map(|function| function.resets()).collect();
    assert_eq!(after, [before[0] + 1, before[1] + 1, after_open, 0]);
}

#[test]
fn an_iommufd_proves_what_it_owns() {
    let bus = Bus::with(&FUNCTIONS);
    let iommufd = bus.open_context(NodeKind::Iommu);
    let bind = BindIommufd { argsz: 24, iommufd, ..BindIommufd::default() };
    let device = bus.open_cdev(0);
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind), Ok(0));
    let id = bus.client.get::<BindIommufd>(MEMORY).out_devid;
    assert_eq!(info(&bus, device, 64), Ok(0));
    assert_eq!(bus.client.get::<HotResetInfo>(MEMORY).flags, 3, "ids, and all are owned");
    let entries: [DependentDevice; 2] = bus.client.get(MEMORY + 12);
    assert_eq!(entries.map(|entry| entry.id), [id, VFIO_PCI_DEVID_OWNED], "one by its group");
    assert_eq!(reset(&bus, device, &[device]), Err(Errno::EINVAL), "no groups here");
    let before = bus.functions[1].resets();
    assert_eq!(reset(&bus, device, &[]), Ok(0));
    assert_eq!(bus.functions[1].resets(), before + 1);
}

#[test]
fn nothing_resets_the_root_bus() {
    let bus = Bus::with(&FUNCTIONS);
    let numbers: Vec<u32> = bus.vfio.groups().iter().map(|group| group.number).collect();
    let (group, device) = by_group(&bus, numbers[2], FUNCTIONS[3]);
    assert_eq!(info(&bus, device, 64), Err(Errno::ENODEV));
    assert_eq!(reset(&bus, device, &[group]), Err(Errno::ENODEV));
}
