//! `/dev/vfio/N`: containers, and devices opened by name.

use lychgate_iommu::{Domain, Owner};
use lychgate_iommufd::NodeKind;
use lychgate_types::{Errno, RequesterId};

use super::bus::Bus;
use super::client::{LEN, MEMORY};
use super::iommu::TestDriver;
use crate::abi::*;

const SET_IOMMU: u32 = 0x3b66;
const TYPE1V2: u64 = 3;
const DEVICE: RequesterId = RequesterId::new(0x100);

fn status(bus: &Bus, group: i32) -> Result<u32, Errno> {
    let status = GroupStatus { argsz: 8, flags: 0xff };
    bus.call(group, VFIO_GROUP_GET_STATUS, &status)?;
    Ok(bus.client.get::<GroupStatus>(MEMORY).flags)
}

fn device_fd(bus: &Bus, group: i32, name: &str) -> Result<i32, Errno> {
    let address = bus.client.put(0, format!("{name}\0").as_bytes());
    bus.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, address)
}

/// A bus with a function, its group, and a container that is set up and not yet joined.
fn one() -> (Bus, i32, i32) {
    let bus = Bus::with(&["0000:01:00.0"]);
    let container = bus.open_context(NodeKind::VfioContainer);
    let group = bus.open_group(bus.group_number()).unwrap();
    (bus, container, group)
}

fn join(bus: &Bus, group: i32, container: i32) {
    assert_eq!(bus.call(group, VFIO_GROUP_SET_CONTAINER, &container), Ok(0));
    assert_eq!(bus.ioctl(container, SET_IOMMU, TYPE1V2), Ok(0));
}

#[test]
fn a_group_is_opened_once() {
    let (bus, _, group) = one();
    assert_eq!(bus.open_group(bus.group_number()), Err(Errno::EBUSY));
    assert_eq!(bus.open_group(999), Err(Errno::ENODEV));
    bus.close(group);
    assert!(bus.open_group(bus.group_number()).is_ok());
}

#[test]
fn the_status_says_who_has_the_group() {
    let (bus, container, group) = one();
    assert_eq!(status(&bus, group), Ok(VFIO_GROUP_FLAGS_VIABLE));
    join(&bus, group, container);
    assert_eq!(status(&bus, group), Ok(VFIO_GROUP_FLAGS_VIABLE | VFIO_GROUP_FLAGS_CONTAINER_SET));
    assert_eq!(bus.ioctl(group, VFIO_GROUP_UNSET_CONTAINER, 0), Ok(0));
    let id = bus.iommu.lock().unwrap().groups()[0];
    bus.iommu.lock().unwrap().claim_group(id, Owner(999)).unwrap();
    assert_eq!(status(&bus, group), Ok(0), "somebody else does DMA");
    let short = GroupStatus { argsz: 7, flags: 0 };
    assert_eq!(bus.call(group, VFIO_GROUP_GET_STATUS, &short), Err(Errno::EINVAL));
    assert_eq!(bus.ioctl(group, VFIO_GROUP_GET_STATUS, 8), Err(Errno::EFAULT));
    assert_eq!(bus.ioctl(group, VFIO_DEVICE_GET_INFO, MEMORY), Err(Errno::ENOTTY));
}

#[test]
fn containers_are_joined_and_left_in_order() {
    let (bus, container, group) = one();
    let join = |fd: i32| bus.call(group, VFIO_GROUP_SET_CONTAINER, &fd);
    assert_eq!(bus.ioctl(group, VFIO_GROUP_SET_CONTAINER, 8), Err(Errno::EFAULT));
    assert_eq!(bus.ioctl(group, VFIO_GROUP_UNSET_CONTAINER, 0), Err(Errno::EINVAL));
    assert_eq!(join(99), Err(Errno::EBADF));
    assert_eq!(join(-1), Err(Errno::EBADF));
    assert_eq!(join(group), Err(Errno::EBADFD));
    bus.client.open_eventfd(10);
    assert_eq!(join(10), Err(Errno::EBADFD));
    assert_eq!(join(container), Ok(0));
    assert_eq!(join(container), Err(Errno::EINVAL));
    assert_eq!(join(10), Err(Errno::EINVAL), "that it is in a container is found first");
    assert_eq!(join(99), Err(Errno::EBADF), "but not before the descriptor is found");
    assert_eq!(bus.ioctl(group, VFIO_GROUP_UNSET_CONTAINER, 0), Ok(0));
    let iommufd = bus.open_context(NodeKind::Iommu);
    assert_eq!(join(iommufd), Ok(0), "an iommufd is a container too");
}

#[test]
fn devices_are_opened_by_name() {
    let (bus, container, group) = one();
    assert_eq!(device_fd(&bus, group, "0000:01:00.0"), Err(Errno::EINVAL), "no container");
    join(&bus, group, container);
    let uuid = "01234567-89ab-cdef-0123-456789abcdef";
    for (name, errno) in [
        ("", Errno::ENODEV),
        ("0000:01:00.1", Errno::ENODEV),
        ("0000:01:00.00", Errno::ENODEV),
        ("01:00.0", Errno::ENODEV),
        ("0000:01:00.0 x", Errno::EINVAL),
        ("0000:01:00.0 vf_token=1234", Errno::EINVAL),
        (&format!("0000:01:00.0 vf_token={}", uuid.replace('-', "_")), Errno::EINVAL),
        (&format!("0000:01:00.0 vf_token={uuid} vf_token={uuid}"), Errno::EINVAL),
    ] {
        assert_eq!(device_fd(&bus, group, name), Err(errno), "{name:?}");
    }
    assert_eq!(bus.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, 8), Err(Errno::EFAULT));
    let long = bus.client.put(0, &[b'x'; 5000]);
    assert_eq!(bus.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, long), Err(Errno::EINVAL));
    let last = bus.client.put(LEN - 13, b"0000:01:00.0\0");
    let device = bus.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, last).unwrap();
    assert_eq!(bus.file(device).name(), "vfio-device 0000:01:00.0");
    assert_eq!(bus.file(device).device_number(), None);
    assert!(device_fd(&bus, group, &format!("0000:01:00.0 vf_token={uuid}  ")).is_ok());
}

#[test]
fn a_device_without_an_iommu_set_up_is_attached_all_the_same() {
    // SET_IOMMU only says which rules hold; the IOAS is there since the group joined.
    let (bus, container, group) = one();
    assert_eq!(bus.call(group, VFIO_GROUP_SET_CONTAINER, &container), Ok(0));
    assert!(device_fd(&bus, group, "0000:01:00.0").is_ok());
    assert!(matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
}

#[test]
fn cdev_calls_are_not_for_devices_of_a_group() {
    let (bus, container, group) = one();
    join(&bus, group, container);
    let device = device_fd(&bus, group, "0000:01:00.0").unwrap();
    let attach = AttachIommufdPt { argsz: 12, pt_id: 1, ..AttachIommufdPt::default() };
    assert_eq!(bus.call(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach), Err(Errno::ENOTTY));
    assert_eq!(bus.call(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, &attach), Err(Errno::ENOTTY));
    let bind = BindIommufd { argsz: 24, iommufd: container, ..BindIommufd::default() };
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind), Err(Errno::EINVAL));
    let node = bus.open_cdev(0);
    assert_eq!(bus.call(node, VFIO_DEVICE_BIND_IOMMUFD, &bind), Err(Errno::EBUSY));
}

#[test]
fn a_device_is_shared_by_all_that_open_it() {
    let (bus, container, group) = one();
    join(&bus, group, container);
    let first = device_fd(&bus, group, "0000:01:00.0").unwrap();
    let resets = bus.functions[0].resets();
    let second = device_fd(&bus, group, "0000:01:00.0").unwrap();
    assert_eq!(bus.functions[0].resets(), resets, "only the first open resets");
    let command = region_offset(VFIO_PCI_CONFIG_REGION_INDEX) + 4;
    bus.client.put(0, &[6, 0]);
    assert_eq!(bus.file(first).write_at(&bus.client, MEMORY, 2, command), Ok(2));
    assert_eq!(bus.file(second).read_at(&bus.client, MEMORY + 8, 2, command), Ok(2));
    assert_eq!(bus.client.bytes(MEMORY + 8, 2), [6, 0]);
    bus.close(first);
    assert_eq!(bus.functions[0].hardware16(4), 6, "still open");
    assert!(matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
    bus.close(second);
    assert_eq!(bus.functions[0].resets(), resets + 1);
    assert!(!matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
}

#[test]
fn open_devices_keep_the_group_and_its_container() {
    let (bus, container, group) = one();
    join(&bus, group, container);
    let device = device_fd(&bus, group, "0000:01:00.0").unwrap();
    assert_eq!(bus.ioctl(group, VFIO_GROUP_UNSET_CONTAINER, 0), Err(Errno::EBUSY));
    bus.close(group);
    bus.close(container);
    assert_eq!(bus.open_group(bus.group_number()), Err(Errno::EBUSY), "its device is open");
    assert!(matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
    bus.close(device);
    assert!(!matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
    let group = bus.open_group(bus.group_number()).unwrap();
    assert_eq!(status(&bus, group), Ok(VFIO_GROUP_FLAGS_VIABLE), "in no container");
}

#[test]
fn a_device_that_cannot_be_bound_is_not_opened() {
    let driver = TestDriver::unisolated();
    let bus = Bus::with_driver(&["0000:01:00.0"], driver);
    let container = bus.open_context(NodeKind::VfioContainer);
    let group = bus.open_group(bus.group_number()).unwrap();
    join(&bus, group, container);
    assert_eq!(device_fd(&bus, group, "0000:01:00.0"), Err(Errno::EPERM));
    assert_eq!(bus.ioctl(group, VFIO_GROUP_UNSET_CONTAINER, 0), Ok(0), "nothing is open");
}

#[test]
fn devices_without_coherent_dma_or_twice_are_not_registered() {
    let bus = Bus::with(&["0000:01:00.0"]);
    let add = |bus: &Bus, id| {
        let device = super::function::Bench::closed(
            id,
            "0000:01:00.0".parse().unwrap(),
            super::function::Controller::default(),
        );
        bus.vfio.add(std::sync::Arc::new(device.device)).map_err(|refusal| refusal.errno)
    };
    let id = |bus: &Bus| bus.iommu.lock().unwrap().find("0000:01:00.0".parse().unwrap()).unwrap();
    assert_eq!(add(&bus, id(&bus)), Err(Errno::EINVAL), "twice");
    let incoherent = Bus::with_driver(&[], TestDriver::incoherent());
    let bdf = "0000:01:00.0".parse().unwrap();
    let unknown = super::iommu::add(&mut incoherent.iommu.lock().unwrap(), &incoherent.driver, bdf);
    assert_eq!(add(&incoherent, unknown), Err(Errno::EINVAL), "not coherent");
}
