//! `/dev/vfio/devices/vfioN`: binding and attaching.

use lychgate_iommu::Domain;
use lychgate_iommufd::abi::Argument;
use lychgate_iommufd::abi::iommufd::{HWPT_ALLOC_PASID, HwptAlloc};
use lychgate_iommufd::{MmapRequest, NodeKind};
use lychgate_types::{Errno, RequesterId};
use zerocopy::IntoBytes;

use super::bus::Bus;
use super::client::MEMORY;
use super::iommu::TestDriver;
use crate::abi::*;

const IOAS_ALLOC: u32 = 0x3b81;
const DEVICE: RequesterId = RequesterId::new(0x100);

fn bind(iommufd: i32) -> BindIommufd {
    BindIommufd { argsz: 24, iommufd, ..BindIommufd::default() }
}

fn attach(pt_id: u32) -> AttachIommufdPt {
    AttachIommufdPt { argsz: 16, pt_id, ..AttachIommufdPt::default() }
}

/// A bus with one function, an iommufd with an IOAS, and the function's node.
fn one() -> (Bus, i32, u32, i32) {
    let bus = Bus::with(&["0000:01:00.0"]);
    let iommufd = bus.open_context(NodeKind::Iommu);
    assert_eq!(bus.call(iommufd, IOAS_ALLOC, &[12u32, 0, 0]), Ok(0));
    let ioas = bus.client.get(MEMORY + 8);
    let device = bus.open_cdev(0);
    (bus, iommufd, ioas, device)
}

#[test]
fn nothing_works_before_binding() {
    let (bus, _, _, device) = one();
    for command in (VFIO_DEVICE_GET_INFO..VFIO_DEVICE_BIND_IOMMUFD).chain([
        VFIO_DEVICE_ATTACH_IOMMUFD_PT,
        VFIO_DEVICE_DETACH_IOMMUFD_PT,
        0x1234,
    ]) {
        assert_eq!(bus.ioctl(device, command, MEMORY), Err(Errno::EINVAL), "{command:#x}");
    }
    let file = bus.file(device);
    let request =
        MmapRequest { offset: 0, len: 4096, read: true, write: true, exec: false, shared: true };
    assert_eq!(file.mmap(&request).unwrap_err().errno, Errno::EINVAL);
    assert_eq!(file.read_at(&bus.client, MEMORY, 0, 0).unwrap_err().errno, Errno::EINVAL);
    assert_eq!(file.write_at(&bus.client, MEMORY, 4, 0).unwrap_err().errno, Errno::EINVAL);
}

#[test]
fn binding_checks_in_order() {
    let (bus, iommufd, _, device) = one();
    let call = |argument: &BindIommufd| bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, argument);
    let good = bind(iommufd);
    for (refused, errno) in [
        (BindIommufd { argsz: 15, ..good }, Errno::EINVAL),
        (BindIommufd { flags: 2, ..good }, Errno::EINVAL),
        (BindIommufd { iommufd: -1, ..good }, Errno::EINVAL),
        (BindIommufd { iommufd: 99, ..good }, Errno::EBADF),
        (BindIommufd { iommufd: device, ..good }, Errno::EBADFD),
        (BindIommufd { flags: 1, token_uuid_ptr: 8, ..good }, Errno::EFAULT),
    ] {
        assert_eq!(call(&refused), Err(errno), "{refused:?}");
    }
    bus.client.open_eventfd(10);
    assert_eq!(call(&bind(10)), Err(Errno::EBADFD), "a descriptor of another kind");
    assert_eq!(bus.ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, 8), Err(Errno::EFAULT));

    let longer = BindIommufd { argsz: 32, ..good };
    bus.client.put(24, &[0, 0, 0, 0, 0, 0, 0, 1]);
    assert_eq!(call(&longer), Err(Errno::E2BIG));
    bus.client.put(24, &[0; 8]);
    assert_eq!(call(&longer), Ok(0));
    assert_eq!(call(&good), Err(Errno::EINVAL), "it is bound");

    let second = bus.open_cdev(0);
    let refused = bus.call(second, VFIO_DEVICE_BIND_IOMMUFD, &good);
    assert_eq!(refused, Err(Errno::EINVAL), "it is open");
}

#[test]
fn the_smallest_structure_binds_and_learns_the_object() {
    let (bus, iommufd, ioas, device) = one();
    let argument = bus.client.argument(&BindIommufd { argsz: 16, ..bind(iommufd) });
    assert_eq!(bus.ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, argument), Ok(0));
    let bound: BindIommufd = bus.client.get(argument);
    assert_ne!(bound.out_devid, 0);
    assert_ne!(bound.out_devid, ioas);
    assert!(matches!(bus.driver.attached(DEVICE), Domain::Blocked), "bound, but not attached");
}

#[test]
fn what_the_iommu_forbids_cannot_be_bound() {
    let driver = TestDriver::unisolated();
    let bus = Bus::with_driver(&["0000:01:00.0"], driver);
    let iommufd = bus.open_context(NodeKind::Iommu);
    let device = bus.open_cdev(0);
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind(iommufd)), Err(Errno::EPERM));
    assert_eq!(bus.functions[0].resets(), 0, "the function was left alone");
    // The group was blocked only for the attempt.
    assert!(bus.open_group(bus.group_number()).is_ok());
}

#[test]
fn devices_of_a_group_have_one_owner() {
    let bus = Bus::with(&["0000:01:00.0", "0000:01:00.1"]);
    assert_eq!(bus.vfio.groups().len(), 1);
    let [first, second] = [(); 2].map(|()| bus.open_context(NodeKind::Iommu));
    let [a, b] = [0, 1].map(|index| bus.open_cdev(index));
    assert_eq!(bus.call(a, VFIO_DEVICE_BIND_IOMMUFD, &bind(first)), Ok(0));
    assert_eq!(bus.call(b, VFIO_DEVICE_BIND_IOMMUFD, &bind(second)), Err(Errno::EPERM));
    assert_eq!(bus.call(b, VFIO_DEVICE_BIND_IOMMUFD, &bind(first)), Ok(0));
}

#[test]
fn attaching_replaces_and_detaching_blocks() {
    let (bus, iommufd, ioas, device) = one();
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind(iommufd)), Ok(0));
    let call =
        |argument: &AttachIommufdPt| bus.call(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, argument);
    let good = attach(ioas);
    for (refused, errno) in [
        (AttachIommufdPt { argsz: 11, ..good }, Errno::EINVAL),
        (AttachIommufdPt { flags: 2, ..good }, Errno::EINVAL),
        (AttachIommufdPt { flags: 1, argsz: 15, ..good }, Errno::EINVAL),
        (AttachIommufdPt { flags: 1, pasid: 1 << 20, ..good }, Errno::EINVAL),
        (AttachIommufdPt { flags: 1, pasid: 1, ..good }, Errno::EINVAL),
        (attach(0xdead), Errno::ENOENT),
    ] {
        assert_eq!(call(&refused), Err(errno), "{refused:?}");
    }
    assert_eq!(call(&good), Ok(0));
    let hwpt = bus.client.get::<AttachIommufdPt>(MEMORY).pt_id;
    assert_ne!(hwpt, ioas, "the number of the page table comes back");
    let Domain::Paging(first) = bus.driver.attached(DEVICE) else { panic!("not attached") };
    assert_eq!(call(&attach(hwpt)), Ok(0), "the same again");

    assert_eq!(bus.call(iommufd, IOAS_ALLOC, &[12u32, 0, 0]), Ok(0));
    let other: u32 = bus.client.get(MEMORY + 8);
    assert_eq!(call(&attach(other)), Ok(0), "replaced");
    let replaced = bus.driver.attached(DEVICE);
    assert!(!replaced.same(&Domain::Paging(first)));
    assert_eq!(call(&attach(0xdead)), Err(Errno::ENOENT));
    assert!(bus.driver.attached(DEVICE).same(&replaced), "a failure leaves what there was");

    let detach = DetachIommufdPt { argsz: 8, ..DetachIommufdPt::default() };
    let call =
        |argument: &DetachIommufdPt| bus.call(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, argument);
    assert_eq!(call(&DetachIommufdPt { argsz: 7, ..detach }), Err(Errno::EINVAL));
    assert_eq!(call(&DetachIommufdPt { flags: 4, ..detach }), Err(Errno::EINVAL));
    assert_eq!(call(&DetachIommufdPt { flags: 1, ..detach }), Err(Errno::EINVAL));
    assert_eq!(call(&detach), Ok(0));
    assert!(matches!(bus.driver.attached(DEVICE), Domain::Blocked));
    assert_eq!(call(&detach), Ok(0), "nothing to detach is fine");
}

#[test]
fn pasids_are_attached_beside_the_device() {
    let (bus, iommufd, ioas, device) = one();
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind(iommufd)), Ok(0));
    let dev_id = bus.client.get::<BindIommufd>(MEMORY).out_devid;
    let new_hwpt = || {
        let alloc = HwptAlloc {
            size: 48,
            flags: HWPT_ALLOC_PASID,
            dev_id,
            pt_id: ioas,
            ..HwptAlloc::default()
        };
        assert_eq!(bus.call(iommufd, HwptAlloc::COMMAND, &alloc), Ok(0));
        bus.client.get::<HwptAlloc>(MEMORY).out_hwpt_id
    };
    let (first, second) = (new_hwpt(), new_hwpt());
    let call = |pt_id, pasid| {
        let argument = AttachIommufdPt { flags: VFIO_DEVICE_ATTACH_PASID, pasid, ..attach(pt_id) };
        bus.call(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &argument)
    };
    let at = |pasid| bus.driver.pasid_attached(DEVICE, pasid).unwrap();
    assert_eq!(call(first, 1 << 8), Err(Errno::EINVAL), "past what the device can use");
    assert_eq!(call(first, 5), Ok(0));
    assert_eq!(bus.client.get::<AttachIommufdPt>(MEMORY).pt_id, first);
    let before = at(5);
    assert_eq!(call(second, 5), Ok(0), "replaced");
    assert!(!at(5).same(&before));
    assert!(matches!(bus.driver.attached(DEVICE), Domain::Blocked), "the device is not");
    assert_eq!(call(first, 6), Ok(0));
    let detach = |pasid| {
        let flags = VFIO_DEVICE_DETACH_PASID;
        let argument = DetachIommufdPt { argsz: 12, flags, pasid };
        bus.call(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, &argument)
    };
    assert_eq!(detach(5), Ok(0));
    assert!(matches!(at(5), Domain::Blocked));
    assert_eq!((detach(5), detach(u32::MAX)), (Ok(0), Ok(0)), "nothing to detach is fine");
    bus.close(device);
    assert!(matches!(at(6), Domain::Blocked), "closing detaches");
}

#[test]
fn closing_gives_everything_back() {
    let (bus, iommufd, ioas, device) = one();
    let before = bus.driver.attached(DEVICE);
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind(iommufd)), Ok(0));
    assert_eq!(bus.call(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach(ioas)), Ok(0));
    let file = bus.file(device);
    bus.client.put(0, &[6, 0]);
    assert_eq!(file.write_at(&bus.client, MEMORY, 2, region_offset(7) + 4), Ok(2));
    assert_eq!(bus.functions[0].hardware16(4), 6);
    let resets = bus.functions[0].resets();
    assert_eq!(bus.open_group(bus.group_number()), Err(Errno::EBUSY));

    bus.close(device);
    assert_eq!(bus.functions[0].resets(), resets + 1);
    assert_eq!(bus.functions[0].hardware16(4) & 4, 0, "no bus mastering");
    assert!(bus.driver.attached(DEVICE).same(&before), "the group has its default domain");
    let group = bus.open_group(bus.group_number());
    assert!(group.is_ok());
    bus.close(group.unwrap());
    let again = bus.open_cdev(0);
    assert_eq!(bus.call(again, VFIO_DEVICE_BIND_IOMMUFD, &bind(iommufd)), Ok(0));
}

#[test]
fn a_bound_device_keeps_its_iommufd() {
    let (bus, iommufd, ioas, device) = one();
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind(iommufd)), Ok(0));
    assert_eq!(bus.call(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach(ioas)), Ok(0));
    bus.close(iommufd);
    assert!(matches!(bus.driver.attached(DEVICE), Domain::Paging(_)), "mappings stay");
    bus.close(device);
    assert!(!matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
}

#[test]
fn a_reply_that_cannot_be_written_undoes_the_binding() {
    let (bus, iommufd, _, device) = one();
    // The structure ends with the memory, just before what comes back.
    let end = super::client::LEN - 12;
    let argument = bus.client.put(end, &bind(iommufd).as_bytes()[..12]);
    assert_eq!(bus.ioctl(device, VFIO_DEVICE_BIND_IOMMUFD, argument), Err(Errno::EFAULT));
    assert!(bus.open_group(bus.group_number()).is_ok());
}

#[test]
fn nodes_have_names_and_numbers() {
    let bus = Bus::with(&["0000:01:00.0", "0000:02:00.0"]);
    let devices = bus.vfio.devices();
    assert_eq!(devices[1].bdf.to_string(), "0000:02:00.0");
    assert_eq!((devices[1].index, devices[1].device_number), (1, (511, 1)));
    let file = bus.vfio.open_cdev(1).unwrap();
    assert_eq!(file.name(), "/dev/vfio/devices/vfio1");
    assert_eq!(file.device_number(), Some((511, 1)));
    assert_eq!(bus.vfio.open_cdev(2).err().unwrap().errno, Errno::ENODEV);
    let groups = bus.vfio.groups();
    assert_eq!(groups.len(), 2);
    assert_eq!(groups[1].device_number, (243, 1));
}
