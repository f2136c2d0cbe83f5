//! Page tables and what the hardware is.

use lychgate_iommu::{AllocError, Capability, Geometry, HwInfo};
use lychgate_iommufd::abi::iommufd as abi;
use lychgate_types::{Errno, Iova};

use crate::common::{PAGE, SCRATCH, VA, World};

#[test]
fn alloc_checks_in_linux_order() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let (dev, ioas) = (bound.id(), world.ioas());
    let alloc = |call: abi::HwptAlloc| world.call(call).map(|call| call.out_hwpt_id);
    let none = abi::HwptAlloc { dev_id: 99, pt_id: 98, ..Default::default() };
    assert_eq!(alloc(abi::HwptAlloc { flags: 16, data_len: 1, ..none }), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(abi::HwptAlloc { reserved: 1, data_len: 1, ..none }), Err(Errno::EOPNOTSUPP));
    assert_eq!(alloc(abi::HwptAlloc { data_len: 1, ..none }), Err(Errno::EINVAL));
    assert_eq!(alloc(abi::HwptAlloc { data_type: 1, ..none }), Err(Errno::EINVAL));
    assert_eq!(alloc(none), Err(Errno::ENOENT));
    assert_eq!(alloc(abi::HwptAlloc { dev_id: ioas, ..none }), Err(Errno::ENOENT));
    let device = abi::HwptAlloc { dev_id: dev, ..none };
    assert_eq!(alloc(device), Err(Errno::EINVAL), "not ENOENT");
    assert_eq!(alloc(abi::HwptAlloc { pt_id: dev, ..device }), Err(Errno::EINVAL));
    let good = abi::HwptAlloc { pt_id: ioas, ..device };
    let flags = |flags| alloc(abi::HwptAlloc { flags, ..good });
    assert_eq!(flags(abi::HWPT_ALLOC_DIRTY_TRACKING), Err(Errno::EOPNOTSUPP));
    let both = abi::HWPT_FAULT_ID_VALID | abi::HWPT_ALLOC_NEST_PARENT;
    assert_eq!(flags(both), Err(Errno::EOPNOTSUPP));
    assert_eq!(flags(abi::HWPT_ALLOC_NEST_PARENT), Err(Errno::EOPNOTSUPP), "the driver's");
    assert_eq!(flags(abi::HWPT_FAULT_ID_VALID), Err(Errno::ENOENT));
    assert_eq!(world.driver.domains().len(), 0, "what failed left nothing behind");
    let hwpt = flags(abi::HWPT_ALLOC_PASID).unwrap();
    assert_eq!(world.destroy(ioas), Err(Errno::EBUSY));
    let nested = abi::HwptAlloc { pt_id: hwpt, ..good };
    assert_eq!(alloc(nested), Err(Errno::EOPNOTSUPP));
    world.destroy(hwpt).unwrap();
    world.destroy(ioas).unwrap();
    world.driver.plan(|plan| plan.alloc_error = Some(AllocError::NoIdentifier));
    let ioas = world.ioas();
    assert_eq!(world.hwpt(dev, ioas), Err(Errno::ENOSPC));
    assert_eq!(world.destroy(ioas), Ok(()));
}

#[test]
fn vendor_data_reaches_the_driver() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let at = SCRATCH + 0x800;
    world.client.put(at, &[1, 2, 3]);
    let alloc = |data_len, data_uptr| {
        world.call(abi::HwptAlloc {
            dev_id: bound.id(),
            pt_id: 2,
            data_type: 7,
            data_len,
            data_uptr,
            ..Default::default()
        })
    };
    world.ioas();
    assert_eq!(alloc(3, 0), Err(Errno::EFAULT));
    assert_eq!(alloc(1 << 20, at), Err(Errno::EINVAL));
    alloc(3, at).unwrap();
    world.driver.plan(|plan| assert_eq!(plan.last_data, Some((7, vec![1, 2, 3]))));
}

#[test]
fn a_page_table_that_could_not_be_told_is_gone() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    *world.client.read_only_from.lock().unwrap() = 0;
    assert_eq!(world.hwpt(bound.id(), ioas), Err(Errno::EFAULT));
    assert_eq!(world.driver.domains().len(), 0);
    assert_eq!(world.destroy(ioas), Ok(()));
}

#[test]
fn a_page_table_restricts_its_ioas() {
    let world = World::new();
    world.driver.plan(|plan| {
        plan.geometry = Geometry {
            first: Iova::new(1 << 24),
            last: Iova::new((1 << 31) - 1),
            page_sizes: 0x800 | 1 << 20,
        };
    });
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let hwpt = world.hwpt(bound.id(), ioas).unwrap();
    assert_eq!(world.ranges(ioas), (vec![(1 << 24, (1 << 31) - 1)], 0x800));
    assert_eq!(world.map_fixed(ioas, VA, PAGE, 0), Err(Errno::EINVAL), "reserved");
    assert_eq!(world.map_fixed(ioas, VA, 0x801, 1 << 24), Err(Errno::EINVAL));
    assert_eq!(world.map_fixed(ioas, VA, 0x800, (1 << 24) + 1), Err(Errno::EINVAL));
    assert_eq!(world.map_fixed(ioas, VA + 1, 0x800, 1 << 24), Err(Errno::EINVAL));
    assert_eq!(world.map_anywhere(ioas, VA + 0x400, 0x800), Err(Errno::EINVAL));
    assert_eq!(world.map_anywhere(ioas, VA + 0x800, 0x800), Ok((1 << 24) + 0x800));
    assert_eq!(world.driver.domains()[0].pages().len(), 1);
    assert_eq!(world.client.mm.pinned(), 1);
    world.destroy(hwpt).unwrap();
    assert_eq!(world.client.mm.pinned(), 0);
    assert_eq!(world.ranges(ioas), (vec![(0, u64::MAX)], 1));
    world.map_fixed(ioas, VA, PAGE, 0).unwrap();
    assert_eq!(world.hwpt(bound.id(), ioas), Err(Errno::EADDRINUSE), "outside of the aperture");
    world.unmap(ioas, 0, PAGE).unwrap();
    world.map_fixed(ioas, VA, 0x401, 1 << 25).unwrap();
    assert_eq!(world.hwpt(bound.id(), ioas), Err(Errno::EADDRINUSE), "not aligned");
    world.driver.plan(|plan| plan.geometry.page_sizes = 1 << 16);
    assert_eq!(world.hwpt(bound.id(), ioas), Err(Errno::EINVAL), "pages of 64 KiB only");
    assert_eq!(world.driver.domains().len(), 0);
}

#[test]
fn every_page_table_of_an_ioas_maps_all_of_it_and_pages_are_pinned_once() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let (a, b) = (world.ioas(), world.ioas());
    world.map_fixed(a, VA, 8 * PAGE, 0x10_0000).unwrap();
    let first = world.hwpt(bound.id(), a).unwrap();
    let second = world.hwpt(bound.id(), a).unwrap();
    world.map_fixed(a, VA + 4 * PAGE, 8 * PAGE, 0x20_0000).unwrap();
    let [one, two] = &world.driver.domains()[..] else { panic!("two domains") };
    assert_eq!(one.pages().len(), 16);
    assert_eq!(one.pages(), two.pages());
    assert_eq!(world.client.mm.pins(VA), 1, "one area of it, whatever the domains");
    assert_eq!(world.client.mm.pins(VA + 4 * PAGE), 2, "two mappings of their own");

    world.copy((a, 0x10_0000 + PAGE), (b, 0), 2 * PAGE).unwrap();
    let third = world.hwpt(bound.id(), b).unwrap();
    assert_eq!(world.client.mm.pins(VA + PAGE), 1, "a copy shares the pin");
    world.unmap(a, 0x10_0000, 8 * PAGE).unwrap();
    assert_eq!(world.client.mm.pins(VA), 0);
    assert_eq!([1, 2, 3].map(|page| world.client.mm.pins(VA + page * PAGE)), [1, 1, 0]);
    world.destroy(first).unwrap();
    world.destroy(second).unwrap();
    world.destroy(third).unwrap();
    assert_eq!(world.client.mm.pinned(), 0);
}

#[test]
fn large_pages_are_used_unless_ruled_out() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    world.hwpt(bound.id(), ioas).unwrap();
    let domain = &world.driver.domains()[0];
    world.map_fixed(ioas, VA, 4 << 20, 4 << 20).unwrap();
    assert_eq!(domain.leaf_sizes(), [4 << 20]);
    assert_eq!(world.huge_pages(ioas, 0), Err(Errno::EINVAL), "mapped already");
    world.unmap(ioas, 0, u64::MAX).unwrap();
    world.huge_pages(ioas, 0).unwrap();
    world.map_fixed(ioas, VA, 4 << 20, 4 << 20).unwrap();
    assert_eq!(domain.leaf_sizes(), [PAGE; 1024]);
    world.unmap(ioas, 0, u64::MAX).unwrap();
}

#[test]
fn hardware_is_described_in_as_much_room_as_there_is() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let at = SCRATCH + 0x800;
    let ask = |call: abi::HwInfo| {
        world.client.put(at, &[0xee; 16]);
        let call = abi::HwInfo { dev_id: bound.id(), data_uptr: at, ..call };
        world.call(call).map(|info| (info, world.client.get(at, 16)))
    };
    let (none, _) = ask(abi::HwInfo::default()).unwrap();
    assert_eq!((none.data_type, none.data_len), (0, 0));
    assert_eq!(none.out_capabilities, abi::HW_CAP_PCI_ATS_NOT_SUPPORTED);
    world.driver.plan(|plan| {
        plan.capabilities.extend([Capability::DirtyTracking, Capability::PciAts]);
        plan.hw_info = Some(HwInfo { kind: 5, bytes: vec![1, 2, 3, 4], max_pasid_log2: 16 });
    });
    let room = |data_len| ask(abi::HwInfo { data_len, ..Default::default() }).unwrap();
    let (info, bytes) = room(8);
    assert_eq!((info.data_type, info.data_len, info.out_max_pasid_log2), (5, 4, 16));
    assert_eq!(info.out_capabilities, abi::HW_CAP_DIRTY_TRACKING);
    assert_eq!(bytes, [1, 2, 3, 4, 0, 0, 0, 0, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee, 0xee]);
    let (info, bytes) = room(2);
    assert_eq!((info.data_len, &bytes[..4]), (4, &[1, 2, 0xee, 0xee][..]));
    let typed = |data_type| ask(abi::HwInfo { flags: 1, data_type, ..Default::default() });
    assert_eq!(typed(5).unwrap().0.data_type, 5);
    assert_eq!(typed(6).unwrap_err(), Errno::EOPNOTSUPP);
    let bad = |call: abi::HwInfo| world.call(call).unwrap_err();
    assert_eq!(bad(abi::HwInfo { flags: 2, ..Default::default() }), Errno::EOPNOTSUPP);
    assert_eq!(bad(abi::HwInfo { reserved: [0, 1, 0], ..Default::default() }), Errno::EOPNOTSUPP);
    assert_eq!(bad(abi::HwInfo { dev_id: 99, ..Default::default() }), Errno::ENOENT);
    assert_eq!(
        bad(abi::HwInfo { dev_id: bound.id(), data_len: 1, ..Default::default() }),
        Errno::EFAULT
    );
}
