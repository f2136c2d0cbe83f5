//! Mock devices: how they come and go, and what they are.

use lychgate_iommu::Iommu;
use lychgate_iommufd::abi::Argument;
use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, TestCmd, op};
use lychgate_iommufd::{Context, Event, Observer, OpenFile};
use lychgate_types::Errno;
use std::sync::{Arc, Mutex};

use crate::common::{Process, SCRATCH, World, config};

struct Deaf;

impl Observer for Deaf {
    fn event(&self, _: &Event) {}
}

#[test]
fn without_a_mock_iommu_there_is_no_such_ioctl() {
    let context = Context::open(Arc::new(Mutex::new(Iommu::new())), Arc::new(Deaf), config());
    let refused = context.ioctl(&Process::new(), TestCmd::COMMAND, SCRATCH);
    assert_eq!(refused.err().unwrap().errno, Errno::ENOTTY);
}

#[test]
fn an_operation_that_does_not_exist_is_not_supported() {
    let world = World::new();
    for op in [0, 24, u32::MAX] {
        assert_eq!(world.test(op, 0, 0_u32), Err(Errno::EOPNOTSUPP));
    }
}

#[test]
fn a_trace_names_the_operation() {
    let world = World::new();
    let _ = world.test(op::DIRTY, 7, abi::DirtyPages::default());
    let text = world.context.describe(&world.process, TestCmd::COMMAND, SCRATCH);
    assert_eq!(text.unwrap(), "IOMMU_TEST_CMD, {op=DIRTY, id=7}");
}

#[test]
fn a_mock_device_is_attached_to_an_ioas_as_it_is_made() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    assert_eq!(world.destroy(ioas), Err(Errno::EBUSY));
    assert_eq!(world.destroy(mock.hwpt), Err(Errno::EBUSY));
    assert_eq!(world.destroy(mock.idev), Err(Errno::EBUSY));
    world.destroy(mock.stdev).unwrap();
    for gone in [mock.stdev, mock.hwpt, mock.idev] {
        assert_eq!(world.destroy(gone), Err(Errno::ENOENT));
    }
    world.destroy(ioas).unwrap();
}

#[test]
fn a_mock_device_needs_known_flags_and_something_to_be_attached_to() {
    let world = World::new();
    let ioas = world.ioas();
    assert_eq!(world.mock(ioas, 1 << 1).err(), Some(Errno::EINVAL));
    assert_eq!(world.mock(77, 0).err(), Some(Errno::ENOENT));
    let mock = world.mock(ioas, 0).unwrap();
    assert_eq!(world.mock(mock.idev, 0).err(), Some(Errno::EINVAL));
    assert_eq!(world.iommu.lock().unwrap().groups().len(), 1);
}

#[test]
fn a_mock_device_whose_numbers_cannot_be_told_does_not_stay() {
    let world = World::new();
    let ioas = world.ioas();
    world.set_read_only(true);
    assert_eq!(world.mock(ioas, 0).err(), Some(Errno::EFAULT));
    world.set_read_only(false);
    assert!(world.iommu.lock().unwrap().groups().is_empty());
    world.destroy(ioas).unwrap();
}

#[test]
fn replacing_changes_over_and_frees_the_automatic_page_table() {
    let world = World::new();
    let (first, second) = (world.ioas(), world.ioas());
    let mock = world.mock(first, 0).unwrap();
    let replace = |id, pt_id| world.replace(id, pt_id);
    let other = replace(mock.stdev, second).unwrap();
    assert_eq!(replace(mock.stdev, second), Ok(other));
    assert_eq!(replace(mock.stdev, mock.hwpt), Err(Errno::ENOENT));
    assert_eq!(replace(mock.idev, second), Err(Errno::ENOENT));
    assert_eq!(replace(mock.stdev, mock.idev), Err(Errno::EINVAL));
    world.destroy(first).unwrap();
}

#[test]
fn the_mock_hardware_describes_itself() {
    let world = World::new();
    let ioas = world.ioas();
    let info = |dev_id, flags, data_type| {
        let info = linux::HwInfo {
            dev_id,
            flags,
            data_type,
            data_len: 8,
            data_uptr: SCRATCH + 0x800,
            ..Default::default()
        };
        world.call(info).map(|(info, _)| info)
    };
    let plain = world.mock(ioas, abi::DEVICE_NO_DIRTY).unwrap();
    let pasid = world.mock(ioas, abi::DEVICE_PASID).unwrap();
    let told = info(plain.idev, 0, 0).unwrap();
    assert_eq!((told.data_type, told.data_len), (abi::HW_INFO_TYPE, 8));
    assert_eq!((told.out_max_pasid_log2, told.out_capabilities & 1), (0, 0));
    let told = info(pasid.idev, 0, 0).unwrap();
    assert_eq!(told.out_max_pasid_log2, abi::PASID_WIDTH);
    assert_eq!(told.out_capabilities & 1, 1);
    let mut data = [0; 8];
    lychgate_iommufd::Mm::read(&*world.process.space, SCRATCH + 0x800, &mut data).unwrap();
    assert_eq!(data, [0, 0, 0, 0, 0xef, 0xbe, 0xad, 0xde]);
}

#[test]
fn what_a_device_has_cached_can_be_looked_at() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let check = |dev, id, cache| {
        world.test(op::DEV_CHECK_CACHE, dev, abi::CheckDevCache { id, cache }).map(drop)
    };
    for id in 0..4 {
        check(mock.idev, id, abi::DEVICE_CACHE_DEFAULT).unwrap();
    }
    assert_eq!(check(mock.idev, 0, 0), Err(Errno::EINVAL));
    assert_eq!(check(mock.idev, 4, abi::DEVICE_CACHE_DEFAULT), Err(Errno::EINVAL));
    assert_eq!(check(mock.stdev, 0, abi::DEVICE_CACHE_DEFAULT), Err(Errno::ENOENT));
}

#[test]
fn a_device_on_no_viommu_has_nobody_to_tell_events() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let trigger =
        |dev_id| world.test(op::TRIGGER_VEVENT, 0, abi::TriggerVevent { dev_id }).map(drop);
    assert_eq!(trigger(mock.idev), Err(Errno::ENOENT));
    assert_eq!(trigger(99), Err(Errno::ENOENT));
}
