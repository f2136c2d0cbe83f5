//! A context as a VFIO container.

use std::collections::BTreeSet;

use lychgate_iommu::{Capability, ReservedKind, ReservedRegion};
use lychgate_iommufd::abi::{iommufd as abi, type1};
use lychgate_iommufd::{Accounting, NodeKind, OpenFile};
use lychgate_types::{Errno, Iova, Prot};
use proptest::prelude::*;
use zerocopy::{FromBytes, IntoBytes};

use crate::common::{PAGE, PHYS, SCRATCH, VA, World};

fn map(world: &World, vaddr: u64, iova: u64, size: u64) -> Result<i32, Errno> {
    let map = type1::DmaMap { argsz: 32, flags: 3, vaddr, iova, size };
    world.client.put(SCRATCH, map.as_bytes());
    world.raw(type1::IOMMU_MAP_DMA, SCRATCH)
}

fn unmap(world: &World, flags: u32, iova: u64, size: u64) -> Result<u64, Errno> {
    let unmap = type1::DmaUnmap { argsz: 24, flags, iova, size };
    world.client.put(SCRATCH, unmap.as_bytes());
    world.raw(type1::IOMMU_UNMAP_DMA, SCRATCH)?;
    let after = world.client.get(SCRATCH, 24);
    Ok(type1::DmaUnmap::read_from_bytes(&after).unwrap().size)
}

#[test]
fn without_a_compatibility_ioas_only_questions_are_answered() {
    let world = World::new();
    assert_eq!(world.raw(type1::GET_API_VERSION, 0), Ok(0));
    let check = |extension| world.raw(type1::CHECK_EXTENSION, extension);
    assert_eq!([1, 3, 9].map(check), [Ok(1); 3]);
    assert_eq!([0, 2, 5, 6, 7, 8, 10, u64::MAX].map(check), [Ok(0); 8]);
    assert_eq!(check(type1::DMA_CC_IOMMU), Err(Errno::ENODEV));
    assert_eq!(world.raw(type1::SET_IOMMU, 8), Err(Errno::EINVAL));
    assert_eq!(world.raw(type1::SET_IOMMU, 1), Err(Errno::ENODEV));
    for (command, size) in
        [(type1::IOMMU_GET_INFO, 16), (type1::IOMMU_MAP_DMA, 32), (type1::IOMMU_UNMAP_DMA, 24)]
    {
        assert_eq!(world.raw(command, 0), Err(Errno::EFAULT));
        world.client.put(SCRATCH, &[0; 32]);
        world.client.put(SCRATCH, &[size - 1]);
        assert_eq!(world.raw(command, SCRATCH), Err(Errno::EINVAL));
        world.client.put(SCRATCH, &[size]);
        assert_eq!(world.raw(command, SCRATCH), Err(Errno::ENODEV));
        world.client.put(SCRATCH + 7, &[0x80]);
        let flags_matter = command != type1::IOMMU_GET_INFO;
        let expected = if flags_matter { Errno::EINVAL } else { Errno::ENODEV };
        assert_eq!(world.raw(command, SCRATCH), Err(expected));
    }
}

#[test]
fn the_compatibility_ioas_is_got_set_and_cleared() {
    let world = World::new();
    let vfio_ioas = |op, ioas_id, reserved| {
        let call = abi::VfioIoas { op, ioas_id, reserved, ..Default::default() };
        world.call(call).map(|call| call.ioas_id)
    };
    assert_eq!(vfio_ioas(3, 0, 1), Err(Errno::EOPNOTSUPP));
    assert_eq!(vfio_ioas(3, 0, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(vfio_ioas(0, 0, 0), Err(Errno::ENODEV));
    assert_eq!(vfio_ioas(1, 0, 0), Err(Errno::ENOENT));
    assert_eq!(vfio_ioas(2, 0, 0), Ok(0));
    let context = world.reference();
    assert_eq!(context.compat_ioas().unwrap_err().errno, Errno::ENODEV);
    assert_eq!(context.create_compat_ioas().unwrap(), 1);
    assert_eq!(context.create_compat_ioas().unwrap(), 1, "once");
    assert_eq!(vfio_ioas(0, 0, 0), Ok(1));
    let other = world.ioas();
    vfio_ioas(1, other, 0).unwrap();
    assert_eq!(context.compat_ioas().unwrap(), other);
    world.destroy(other).unwrap();
    assert_eq!(vfio_ioas(0, 0, 0), Err(Errno::ENODEV), "it went with its object");
}

#[test]
fn type1v2_unmaps_whole_mappings() {
    let world = World::open(NodeKind::VfioContainer);
    assert_eq!(world.context.name(), "/dev/vfio/vfio");
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.reference().create_compat_ioas().unwrap();
    bound.attach(ioas).unwrap();
    world.raw(type1::SET_IOMMU, type1::TYPE1V2_IOMMU).unwrap();
    assert_eq!(map(&world, VA, 0x1000_0000, 4 * PAGE), Ok(0));
    assert_eq!(world.client.mm.charged(Accounting::Mm), 4);
    assert_eq!(map(&world, VA, 0x1000_0000, PAGE), Err(Errno::EEXIST));
    assert_eq!(map(&world, VA, u64::MAX - 0xfff, 2 * PAGE), Err(Errno::EOVERFLOW));
    assert_eq!(map(&world, VA, 0, 0), Err(Errno::EINVAL));
    assert_eq!(unmap(&world, 0, 0x1000_1000, PAGE), Err(Errno::ENOENT));
    assert_eq!(unmap(&world, 0, 0, PAGE), Ok(0), "nothing there is fine");
    assert_eq!(unmap(&world, 0, 0, 0), Err(Errno::EINVAL));
    assert_eq!(unmap(&world, 0, u64::MAX - 0xfff, 2 * PAGE), Err(Errno::EOVERFLOW));
    assert_eq!(unmap(&world, 2, 0, PAGE), Err(Errno::EINVAL));
    assert_eq!(unmap(&world, 1, 0, PAGE), Err(Errno::EINVAL));
    assert_eq!(unmap(&world, 2, 0, 0), Ok(4 * PAGE));
    assert_eq!(unmap(&world, 2, 0, 0), Ok(0));
}

#[test]
fn type1_cuts_mappings_anywhere() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.reference().create_compat_ioas().unwrap();
    bound.attach(ioas).unwrap();
    world.raw(type1::SET_IOMMU, type1::TYPE1_IOMMU).unwrap();
    world.raw(type1::SET_IOMMU, type1::TYPE1_IOMMU).unwrap();
    map(&world, VA, 0, 1 << 20).unwrap();
    assert_eq!(unmap(&world, 0, 16 * PAGE, 8 * PAGE), Ok(8 * PAGE));
    assert_eq!(unmap(&world, 0, 0, PAGE), Ok(PAGE));
    assert_eq!(unmap(&world, 0, 255 * PAGE, PAGE), Ok(PAGE));
    assert_eq!(unmap(&world, 0, 17 * PAGE, PAGE), Ok(0), "unmapped before");
    assert_eq!(unmap(&world, 0, 10 * PAGE, 20 * PAGE), Ok(12 * PAGE), "across the hole");
    assert_eq!(unmap(&world, 0, 100 * PAGE + 1, PAGE), Err(Errno::EINVAL));
    assert_eq!(world.client.mm.pinned(), 256 - 8 - 2 - 12);
    assert_eq!(world.driver.domains()[0].pages().len(), 256 - 8 - 2 - 12);
    assert_eq!(unmap(&world, 2, 0, 0), Ok((256 - 8 - 2 - 12) * PAGE));
    assert_eq!(world.client.mm.pinned(), 0);
}

#[test]
fn type1_cannot_be_chosen_once_there_are_mappings() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.reference().create_compat_ioas().unwrap();
    bound.attach(ioas).unwrap();
    map(&world, VA, 0, PAGE).unwrap();
    assert_eq!(world.raw(type1::SET_IOMMU, type1::TYPE1_IOMMU), Err(Errno::EINVAL));
    assert_eq!(world.raw(type1::SET_IOMMU, type1::TYPE1V2_IOMMU), Ok(0));
}

#[test]
fn info_never_passes_what_the_caller_gives() {
    let world = World::new();
    let ioas = world.reference().create_compat_ioas().unwrap();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    bound.attach(ioas).unwrap();
    let all = 24 + 16 + 16 + 16;
    for argsz in 16..=all + 40 {
        world.client.put(SCRATCH, &[0xee; 256]);
        world.client.put(SCRATCH, &u32::to_le_bytes(argsz));
        world.raw(type1::IOMMU_GET_INFO, SCRATCH).unwrap();
        let bytes = world.client.get(SCRATCH, 256);
        let end = (argsz as usize).max(16);
        assert!(bytes[end..].iter().all(|byte| *byte == 0xee), "{argsz}");
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let quad = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((word(0), word(4), quad(8)), (all, 3, PAGE));
        if argsz >= 20 {
            assert_eq!(word(16), if argsz >= all { 24 } else { 0 }, "{argsz}");
        }
        if argsz >= all {
            assert_eq!((word(24), word(28), word(32)), (3 | 1 << 16, 40, u32::MAX));
            assert_eq!((word(40), word(44), word(48)), (1 | 1 << 16, 0, 1));
            assert_eq!((quad(56), quad(64)), (0, (1 << 48) - 1));
        }
    }
}

#[test]
fn dma_is_coherent_when_every_page_table_is() {
    let world = World::new();
    let ioas = world.reference().create_compat_ioas().unwrap();
    let check = || world.raw(type1::CHECK_EXTENSION, type1::DMA_CC_IOMMU);
    assert_eq!(check(), Ok(1), "no page table is not coherent");
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    bound.attach(ioas).unwrap();
    assert_eq!(check(), Ok(1));
    drop(bound);
    world.driver.plan(|plan| {
        plan.capabilities.remove(&Capability::EnforceCacheCoherency);
    });
    let bound = world.reference().bind(device).unwrap();
    bound.attach(ioas).unwrap();
    assert_eq!(check(), Ok(0));
}

proptest! {
    /// Type1 has no borders between mappings: unmapping takes exactly the pages of the range.
    #[test]
    fn type1_unmaps_exactly_the_range(
        calls in prop::collection::vec((any::<bool>(), 0..64_u64, 1..32_u64), 1..40)
    ) {
        let world = World::new();
        let device = world.device(0x100);
        let bound = world.reference().bind(device).unwrap();
        bound.attach(world.reference().create_compat_ioas().unwrap()).unwrap();
        world.raw(type1::SET_IOMMU, type1::TYPE1_IOMMU).unwrap();
        let mut mapped = BTreeSet::new();
        for (maps, first, pages) in calls {
            let range = first..first + pages;
            let (iova, size) = (first * PAGE, pages * PAGE);
            if maps {
                let free = mapped.range(range.clone()).next().is_none();
                let expected = if free { Ok(0) } else { Err(Errno::EEXIST) };
                prop_assert_eq!(map(&world, VA + iova, iova, size), expected);
                if free {
                    mapped.extend(range);
                }
            } else {
                let there = mapped.range(range.clone()).count() as u64;
                prop_assert_eq!(unmap(&world, 0, iova, size), Ok(there * PAGE));
                mapped.retain(|page| !range.contains(page));
            }
            let pages = world.driver.domains()[0].pages();
            let expected = mapped.iter().map(|page| (page * PAGE, PHYS + page * PAGE));
            prop_assert!(pages.into_iter().eq(expected));
            prop_assert_eq!(world.client.mm.pinned(), mapped.len());
        }
    }
}

#[test]
fn a_group_limits_its_container_from_the_moment_it_is_in_until_it_leaves() {
    let world = World::new();
    let device = world.device(0x100);
    let group = world.iommu.lock().unwrap().group(device).unwrap();
    let [first, last] = [0xfee0_0000, 0xfeef_ffff].map(Iova::new);
    let region = ReservedRegion { first, last, prot: Prot::NONE, kind: ReservedKind::Msi };
    world.driver.plan(|plan| plan.reserved.entry(0x100).or_default().push(region));

    let context = world.reference();
    context.add_group(group).unwrap();
    let compat = context.compat_ioas().unwrap();
    let limited = vec![(0, 0xfedf_ffff), (0xfef0_0000, (1 << 48) - 1)];
    assert_eq!(world.ranges(compat).0, limited);
    assert_eq!(map(&world, VA, 0xfee0_0000, PAGE), Err(Errno::EINVAL));

    // Another IOAS takes its place: the first one is free again when the group leaves.
    let other = world.ioas();
    world.call(abi::VfioIoas { op: 1, ioas_id: other, ..Default::default() }).unwrap();
    context.remove_group(group);
    assert_eq!(world.ranges(compat).0, [(0, u64::MAX)]);
}

#[test]
fn a_group_does_not_enter_a_container_that_maps_what_it_cannot_use() {
    let world = World::new();
    let device = world.device(0x100);
    let group = world.iommu.lock().unwrap().group(device).unwrap();
    let context = world.reference();
    let compat = context.create_compat_ioas().unwrap();
    map(&world, VA, 1 << 48, PAGE).unwrap();
    assert_eq!(context.add_group(group).unwrap_err().errno, Errno::EADDRINUSE);
    assert_eq!(world.ranges(compat).0, [(0, u64::MAX)]);
    assert_eq!(unmap(&world, 0, 1 << 48, PAGE), Ok(PAGE));
    context.add_group(group).unwrap();
}
