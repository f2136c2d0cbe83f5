//! Operations that look at an IOAS and its page tables.

use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;

use crate::common::{BASE, PAGE, PAGES, World};

const IOVA: u64 = abi::APERTURE_START;
const GRANULE: u64 = 1 << abi::PAGE_SHIFT;

#[test]
fn a_page_table_leads_to_the_very_frames() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    world.map(ioas, BASE + GRANULE, 5 * GRANULE, IOVA + 3 * GRANULE).unwrap();
    let check = |iova, len, at| world.check_map(mock.hwpt, iova, len, at);
    check(IOVA + 3 * GRANULE, 5 * GRANULE, BASE + GRANULE).unwrap();
    check(IOVA + 4 * GRANULE, GRANULE, BASE + 2 * GRANULE).unwrap();
    check(IOVA, 0, BASE).unwrap();
    // Another frame, another half of the frame, nothing mapped.
    assert_eq!(check(IOVA + 3 * GRANULE, GRANULE, BASE + PAGE + GRANULE), Err(Errno::EINVAL));
    assert_eq!(check(IOVA + 3 * GRANULE, GRANULE, BASE), Err(Errno::EINVAL));
    assert_eq!(check(IOVA + 8 * GRANULE, GRANULE, BASE + 6 * GRANULE), Err(Errno::EINVAL));
    assert_eq!(check(IOVA + 3 * GRANULE, 6 * GRANULE, BASE + GRANULE), Err(Errno::EINVAL));
}

#[test]
fn a_page_table_is_compared_in_granules_with_memory_that_is_there() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let check = |iova, len, at| world.check_map(mock.hwpt, iova, len, at);
    for (iova, len, at) in [
        (IOVA + 1, GRANULE, BASE),
        (IOVA, GRANULE + 1, BASE),
        (IOVA, GRANULE, BASE + 1),
        (IOVA, GRANULE, u64::MAX - GRANULE + 1),
        (u64::MAX - GRANULE + 1, GRANULE, BASE),
    ] {
        assert_eq!(check(iova, len, at), Err(Errno::EINVAL), "{iova:#x} {len:#x} {at:#x}");
    }
    assert_eq!(check(IOVA, GRANULE, BASE + PAGES * PAGE), Err(Errno::EFAULT));
    for id in [ioas, mock.idev, mock.stdev, 99] {
        assert_eq!(world.check_map(id, IOVA, GRANULE, BASE), Err(Errno::ENOENT));
    }
}

#[test]
fn huge_page_tables_hold_iovas_that_the_default_ones_do_not() {
    let world = World::new();
    let mock = world.mock(world.ioas(), 0).unwrap();
    let ioas = world.ioas();
    let data = |pagetable_type| abi::HwptData { iotlb: 0, pagetable_type };
    let huge = world.hwpt_with(mock.idev, ioas, 0, data(abi::PAGE_TABLE_HUGE)).unwrap();
    // Each needs more levels than the one before.
    for (page, shift) in (0..).zip([12, 34, 35, 42, 43, 50, 55]) {
        let (iova, at) = (1 << shift, BASE + page * PAGE);
        world.map(ioas, at, PAGE, iova).unwrap();
        world.check_map(huge, iova, PAGE, at).unwrap();
    }
    for (page, shift) in (0..).zip([12, 34, 35, 42, 43, 50, 55]) {
        world.check_map(huge, 1 << shift, PAGE, BASE + page * PAGE).unwrap();
    }
    assert_eq!(world.map(ioas, BASE, PAGE, 1 << 56), Err(Errno::EINVAL));
    assert_eq!(world.map(ioas, BASE, 2048, 1 << 20), Err(Errno::EINVAL));
    // What is mapped below the default ones' aperture is in their way.
    assert_eq!(world.hwpt(mock.idev, ioas, 0), Err(Errno::EADDRINUSE));
}

#[test]
fn pins_are_counted_page_by_page() {
    let world = World::new();
    let ioas = world.ioas();
    world.check_refs(BASE, PAGES * PAGE, 0).unwrap();
    let mock = world.mock(ioas, 0).unwrap();
    world.map(ioas, BASE + GRANULE, PAGE, IOVA).unwrap();
    world.check_refs(BASE, 2 * PAGE, 1).unwrap();
    assert_eq!(world.check_refs(BASE, 3 * PAGE, 1), Err(Errno::EIO));
    assert_eq!(world.check_refs(BASE, PAGE, 0), Err(Errno::EIO));
    // What several page tables hold is pinned once.
    let other = world.mock(ioas, abi::DEVICE_NO_DIRTY).unwrap();
    world.check_refs(BASE, 2 * PAGE, 1).unwrap();
    world.map(ioas, BASE, PAGE, IOVA + PAGE).unwrap();
    world.check_refs(BASE, PAGE, 2).unwrap();
    world.destroy(mock.stdev).unwrap();
    world.destroy(other.stdev).unwrap();
    world.check_refs(BASE, PAGES * PAGE, 0).unwrap();
}

#[test]
fn pins_are_counted_of_whole_pages_that_are_there() {
    let world = World::new();
    for (at, len) in [(BASE + 1, PAGE), (BASE, PAGE + 1), (u64::MAX - PAGE + 1, PAGE)] {
        assert_eq!(world.check_refs(at, len, 0), Err(Errno::EINVAL));
    }
    assert_eq!(world.check_refs(BASE + PAGES * PAGE, PAGE, 0), Err(Errno::EFAULT));
}

#[test]
fn what_is_reserved_cannot_be_mapped() {
    let world = World::new();
    let ioas = world.ioas();
    let reserve = |id, start, length| {
        world.test(op::ADD_RESERVED, id, abi::AddReserved { start, length }).map(drop)
    };
    reserve(ioas, 2 * PAGE, PAGE).unwrap();
    assert_eq!(world.map(ioas, BASE, 2 * PAGE, PAGE), Err(Errno::EINVAL));
    world.map(ioas, BASE, PAGE, PAGE).unwrap();
    assert_eq!(reserve(ioas, PAGE, 1), Err(Errno::EADDRINUSE));
    assert_eq!(reserve(ioas, 0, 0), Err(Errno::EINVAL));
    assert_eq!(reserve(ioas, 2, u64::MAX), Err(Errno::EOVERFLOW));
    assert_eq!(reserve(99, 0, 1), Err(Errno::ENOENT));
    reserve(ioas, 1 << 20, u64::MAX - (1 << 20) + 1).unwrap();
}

#[test]
fn a_memory_limit_holds_a_page_at_least() {
    let world = World::new();
    let set =
        |limit| world.test(op::SET_TEMP_MEMORY_LIMIT, 0, abi::MemoryLimit { limit }).map(drop);
    assert_eq!(set(11), Err(Errno::EINVAL));
    set(12).unwrap();
    set(65536).unwrap();
}
