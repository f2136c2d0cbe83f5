//! Calls as text.

use lychgate_iommufd::abi::{iommufd as abi, type1};
use lychgate_iommufd::trace::describe;
use zerocopy::IntoBytes;

use crate::common::{SCRATCH, World};

#[test]
fn structures_are_shown_by_their_members() {
    let world = World::new();
    let text = |command: u32, bytes: &[u8]| {
        world.client.put(SCRATCH, bytes);
        describe(command, SCRATCH, &world.client).unwrap()
    };
    let map = abi::IoasMap {
        size: 40,
        flags: 0x17,
        ioas_id: 1,
        user_va: 0x7f00_0000_1000,
        length: 0x1000,
        ..Default::default()
    };
    assert_eq!(
        text(0x3b85, map.as_bytes()),
        "IOMMU_IOAS_MAP, {flags=FIXED_IOVA|WRITEABLE|READABLE|0x10, ioas_id=1, \
         user_va=0x7f0000001000, length=0x1000, iova=0}"
    );
    let option = abi::Option { size: 24, option_id: 1, op: 7, object_id: 3, ..Default::default() };
    assert_eq!(
        text(0x3b87, option.as_bytes()),
        "IOMMU_OPTION, {option_id=HUGE_PAGES, op=7, object_id=3, val64=0}"
    );
    let range = abi::IovaRange { start: 0, last: 0xfff };
    world.client.put(SCRATCH + 0x800, range.as_bytes());
    let allow = abi::IoasAllowIovas {
        size: 24,
        ioas_id: 1,
        num_iovas: 1,
        allowed_iovas: SCRATCH + 0x800,
        ..Default::default()
    };
    assert_eq!(
        text(0x3b82, allow.as_bytes()),
        "IOMMU_IOAS_ALLOW_IOVAS, {ioas_id=1, num_iovas=1, allowed_iovas=[0x0..=0xfff]}"
    );
    let unmap = type1::DmaUnmap { argsz: 24, flags: 2, iova: 0, size: 0x2000 };
    assert_eq!(
        text(type1::IOMMU_UNMAP_DMA, unmap.as_bytes()),
        "VFIO_IOMMU_UNMAP_DMA, {argsz=24, flags=ALL, iova=0, size=0x2000}"
    );
}

#[test]
fn members_beyond_the_callers_structure_are_not_read() {
    let world = World::new();
    world.client.put(SCRATCH, &[0xee; 48]);
    world.client.put(SCRATCH, &[24, 0, 0, 0, 0, 0, 0, 0]);
    let text = describe(0x3b89, SCRATCH, &world.client).unwrap();
    assert!(text.ends_with("data_type=NONE, data_len=0, data_uptr=0, fault_id=0}"), "{text}");
}

#[test]
fn numbers_without_a_structure_are_shown_by_name() {
    let world = World::new();
    let text = |command, argument| describe(command, argument, &world.client);
    assert_eq!(text(type1::SET_IOMMU, 3).unwrap(), "VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU");
    assert_eq!(text(type1::CHECK_EXTENSION, 77).unwrap(), "VFIO_CHECK_EXTENSION, 77");
    assert_eq!(text(0x3b99, 0), None);
    assert_eq!(text(0x3b85, 0), None, "its memory cannot be read");
}
