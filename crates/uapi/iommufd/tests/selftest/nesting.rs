//! Nested page tables without a vIOMMU.

use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;

use crate::common::World;

const CACHED: u32 = 0x0bad_beef;

impl World {
    fn check_iotlb(&self, hwpt: u32, expected: [u32; 4]) -> Result<(), Errno> {
        for (id, iotlb) in (0..).zip(expected) {
            self.test(op::MD_CHECK_IOTLB, hwpt, abi::CheckIotlb { id, iotlb })?;
        }
        Ok(())
    }

    fn invalidate_nested(&self, hwpt: u32, requests: &[u32]) -> (u32, Result<(), Errno>) {
        self.invalidate(hwpt, requests, 8, abi::HWPT_INVALIDATE_DATA)
    }
}

#[test]
fn a_nested_page_table_has_cached_what_it_was_made_with() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
    let nested = world.nested(mock.idev, parent, 0, CACHED).unwrap();
    world.check_iotlb(nested, [CACHED; 4]).unwrap();
    let check = |hwpt, id| {
        world.test(op::MD_CHECK_IOTLB, hwpt, abi::CheckIotlb { id, iotlb: CACHED }).map(drop)
    };
    assert_eq!(check(nested, 4), Err(Errno::EINVAL));
    assert_eq!(check(parent, 0), Err(Errno::ENOENT));
    assert_eq!(check(mock.idev, 0), Err(Errno::ENOENT));
    assert_eq!(world.check_iotlb(nested, [0; 4]), Err(Errno::EINVAL));
    // It is nothing that memory is mapped in.
    assert_eq!(world.check_map(nested, abi::APERTURE_START, 2048, 0), Err(Errno::ENOENT));
    assert_eq!(world.destroy(parent), Err(Errno::EBUSY));
}

#[test]
fn a_nested_page_table_needs_the_mocks_data_and_a_parent() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
    let plain = world.hwpt(mock.idev, ioas, 0).unwrap();
    let data_uptr = world.put(&abi::HwptData { iotlb: CACHED, pagetable_type: 0 });
    let alloc = |pt_id, data_type, data_len| {
        let alloc = linux::HwptAlloc {
            dev_id: mock.idev,
            pt_id,
            data_type,
            data_len,
            data_uptr,
            ..Default::default()
        };
        world.call(alloc).map(|(alloc, _)| alloc.out_hwpt_id)
    };
    let nested = alloc(parent, abi::HWPT_DATA, 4).unwrap();
    world.check_iotlb(nested, [CACHED; 4]).unwrap();
    world.put(&abi::HwptData { iotlb: CACHED, pagetable_type: 0 });
    assert_eq!(alloc(parent, abi::HWPT_DATA + 1, 8), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(parent, abi::HWPT_DATA, 3), Err(Errno::EINVAL));
    assert_eq!(alloc(parent, abi::HWPT_DATA, 9), Err(Errno::EINVAL));
    assert_eq!(alloc(plain, abi::HWPT_DATA, 8), Err(Errno::EINVAL));
    assert_eq!(alloc(nested, abi::HWPT_DATA, 8), Err(Errno::EINVAL));
    assert_eq!(
        world.nested(mock.idev, parent, linux::HWPT_ALLOC_DIRTY_TRACKING, 0),
        Err(Errno::EOPNOTSUPP)
    );
}

#[test]
fn an_invalidation_forgets_what_its_requests_name_up_to_the_first_bad_one() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
    let nested = world.nested(mock.idev, parent, 0, CACHED).unwrap();
    let invalidate = |requests: &[u32]| world.invalidate_nested(nested, requests);
    assert_eq!(invalidate(&[0, 1, u32::MAX, 2]), (1, Err(Errno::EOPNOTSUPP)));
    world.check_iotlb(nested, [CACHED, 0, CACHED, CACHED]).unwrap();
    assert_eq!(invalidate(&[0, 2, 0, 4]), (1, Err(Errno::EINVAL)));
    world.check_iotlb(nested, [CACHED, 0, 0, CACHED]).unwrap();
    assert_eq!(invalidate(&[abi::INVALIDATE_ALL, 0]), (1, Ok(())));
    world.check_iotlb(nested, [0; 4]).unwrap();
    assert_eq!(invalidate(&[]), (0, Ok(())));
}

#[test]
fn an_invalidation_has_its_own_structure() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
    let nested = world.nested(mock.idev, parent, 0, CACHED).unwrap();
    let invalidate = |len, kind| world.invalidate(nested, &[0; 3], len, kind);
    for (len, kind) in
        [(4, abi::HWPT_INVALIDATE_DATA), (12, abi::HWPT_INVALIDATE_DATA), (8, 0x00da_dbee)]
    {
        assert_eq!(invalidate(len, kind), (0, Err(Errno::EINVAL)), "{len} {kind:#x}");
    }
    let on_parent = world.invalidate(parent, &[0; 2], 8, abi::HWPT_INVALIDATE_DATA);
    assert_eq!(on_parent, (0, Err(Errno::EINVAL)));
    world.check_iotlb(nested, [CACHED; 4]).unwrap();
}

#[test]
fn a_device_can_be_attached_to_a_nested_page_table() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
    let nested = world.nested(mock.idev, parent, 0, CACHED).unwrap();
    world.replace(mock.stdev, nested).unwrap();
    assert_eq!(world.destroy(nested), Err(Errno::EBUSY));
    world.replace(mock.stdev, ioas).unwrap();
    world.destroy(nested).unwrap();
    world.destroy(parent).unwrap();
}
