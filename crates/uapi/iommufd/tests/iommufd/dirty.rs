//! Which pages devices wrote.

use std::collections::BTreeSet;

use lychgate_iommu::Capability;
use lychgate_iommufd::BoundDevice;
use lychgate_iommufd::abi::iommufd as abi;
use lychgate_types::Errno;
use proptest::prelude::*;

use crate::common::{PAGE, SCRATCH, VA, World};

/// Where the bitmaps of these tests are.
const BITMAP: u64 = SCRATCH + 0x4000;

/// An IOAS with a page table that tracks dirty pages.
struct Tracked {
    world: World,
    bound: BoundDevice,
    ioas: u32,
    hwpt: u32,
}

impl Tracked {
    fn new() -> Self {
        let world = World::new();
        world.driver.plan(|plan| {
            plan.capabilities.insert(Capability::DirtyTracking);
        });
        let device = world.device(0x100);
        let bound = world.reference().bind(device).unwrap();
        let ioas = world.ioas();
        let alloc = abi::HwptAlloc {
            dev_id: bound.id(),
            pt_id: ioas,
            flags: abi::HWPT_ALLOC_DIRTY_TRACKING,
            ..Default::default()
        };
        let hwpt = world.call(alloc).unwrap().out_hwpt_id;
        Self { world, bound, ioas, hwpt }
    }

    fn enable(&self) -> Result<(), Errno> {
        set(&self.world, self.hwpt, abi::DIRTY_TRACKING_ENABLE)
    }

    fn write(&self, iova: u64) {
        self.world.driver.domains()[0].write(iova);
    }

    fn get(
        &self,
        iova: u64,
        length: u64,
        change: impl FnOnce(&mut abi::HwptGetDirtyBitmap),
    ) -> Result<(), Errno> {
        let mut get = abi::HwptGetDirtyBitmap {
            hwpt_id: self.hwpt,
            iova,
            length,
            page_size: PAGE,
            data: BITMAP,
            ..Default::default()
        };
        change(&mut get);
        self.world.call(get).map(|_| ())
    }

    /// The pages whose bit is set in a bitmap of `pages` at `at`, which is cleared.
    fn take(&self, at: u64, pages: u64) -> Vec<u64> {
        let bytes = self.world.client.get(at, usize::try_from(pages.div_ceil(8)).unwrap());
        self.world.client.put(at, &vec![0; bytes.len()]);
        (0..pages).filter(|page| bytes[(page / 8) as usize] >> (page % 8) & 1 != 0).collect()
    }
}

fn set(world: &World, hwpt_id: u32, flags: u32) -> Result<(), Errno> {
    world.call(abi::HwptSetDirtyTracking { hwpt_id, flags, ..Default::default() }).map(|_| ())
}

#[test]
fn written_pages_are_told_once() {
    let t = Tracked::new();
    // Frames that do not lie as the IOVAs do keep leaves small.
    t.world.map_fixed(t.ioas, VA + PAGE, 64 * PAGE, 0x10_0000).unwrap();
    t.write(0x10_3000);
    t.enable().unwrap();
    t.get(0x10_0000, 64 * PAGE, |_| {}).unwrap();
    assert!(t.take(BITMAP, 64).is_empty(), "what was written before does not count");
    t.write(0x10_0000);
    t.write(0x10_9fff);
    t.write(0x13_f000);
    t.get(0x10_0000, 64 * PAGE, |get| get.flags = abi::GET_DIRTY_BITMAP_NO_CLEAR).unwrap();
    assert_eq!(t.take(BITMAP, 64), [0, 9, 63]);
    t.get(0x10_8000, 8 * PAGE, |_| {}).unwrap();
    assert_eq!(t.take(BITMAP, 64), [1], "counted from the start of the range");
    t.get(0x10_0000, 64 * PAGE, |_| {}).unwrap();
    assert_eq!(t.take(BITMAP, 64), [0, 63]);
    t.get(0x10_0000, 64 * PAGE, |_| {}).unwrap();
    assert!(t.take(BITMAP, 64).is_empty());
}

#[test]
fn a_leaf_is_written_as_a_whole_but_only_the_range_is_told() {
    let t = Tracked::new();
    t.world.map_fixed(t.ioas, VA, 64 * PAGE, 0x10_0000).unwrap();
    t.enable().unwrap();
    t.write(0x10_0000);
    t.get(0x10_3000, 4 * PAGE, |_| {}).unwrap();
    assert_eq!(t.take(BITMAP, 64), [0, 1, 2, 3]);
    t.write(0x10_0000);
    t.get(0x10_0000, 64 * PAGE, |get| get.page_size = 16 * PAGE).unwrap();
    assert_eq!(t.take(BITMAP, 64), [0, 1, 2, 3], "one bit for 16 pages");
}

#[test]
fn bits_of_the_caller_stay_and_its_bitmap_may_lie_anywhere() {
    let t = Tracked::new();
    t.world.map_fixed(t.ioas, VA + PAGE, 64 * PAGE, 0x10_0000).unwrap();
    t.enable().unwrap();
    for at in [BITMAP + 1, BITMAP + 0xff1] {
        t.write(0x10_1000);
        t.world.client.put(at - 1, &[0xff, 0x80, 0, 0, 0, 0, 0, 0, 0x40, 0xff]);
        t.get(0x10_0000, 64 * PAGE, |get| get.data = at).unwrap();
        assert_eq!(t.world.client.get(at - 1, 10), [0xff, 0x82, 0, 0, 0, 0, 0, 0, 0x40, 0xff]);
    }
    t.write(0x10_1000);
    assert_eq!(t.get(0x10_0000, 64 * PAGE, |get| get.data = 1), Err(Errno::EFAULT));
}

#[test]
fn holes_are_not_dirty_and_areas_behind_them_are_told() {
    let t = Tracked::new();
    t.enable().unwrap();
    assert_eq!(t.get(0, 1 << 40, |_| {}), Ok(()), "nothing is mapped");
    t.world.map_fixed(t.ioas, VA, PAGE, 0x10_0000).unwrap();
    t.world.map_fixed(t.ioas, VA, PAGE, 0x10_4000).unwrap();
    t.write(0x10_0000);
    t.write(0x10_4000);
    assert_eq!(t.get(0x20_0000, PAGE, |_| {}), Ok(()));
    t.get(0xf_f000, 16 * PAGE, |_| {}).unwrap();
    assert_eq!(t.take(BITMAP, 16), [1, 5]);
}

#[test]
fn dirty_tracking_is_refused_as_linux_does() {
    let t = Tracked::new();
    t.world.map_fixed(t.ioas, VA, 4 * PAGE, 0x10_0000).unwrap();
    let plain = t.world.hwpt(t.bound.id(), t.ioas).unwrap();
    assert_eq!(set(&t.world, t.hwpt, 2), Err(Errno::EOPNOTSUPP));
    assert_eq!(set(&t.world, 99, 2), Err(Errno::EOPNOTSUPP), "flags come first");
    assert_eq!(set(&t.world, 99, 1), Err(Errno::ENOENT));
    assert_eq!(set(&t.world, t.ioas, 1), Err(Errno::ENOENT));
    assert_eq!(set(&t.world, plain, 1), Err(Errno::EOPNOTSUPP));
    let at = 0x10_0000;
    assert_eq!(t.get(at, PAGE, |get| get.flags = 2), Err(Errno::EOPNOTSUPP));
    assert_eq!(t.get(at, PAGE, |get| get.reserved = 1), Err(Errno::EOPNOTSUPP));
    assert_eq!(t.get(at, PAGE, |get| get.hwpt_id = 99), Err(Errno::ENOENT));
    assert_eq!(t.get(at, PAGE, |get| get.hwpt_id = plain), Err(Errno::EOPNOTSUPP));
    assert_eq!(t.get(at, 0, |_| {}), Err(Errno::EINVAL));
    assert_eq!(t.get(at, PAGE, |get| get.page_size = 0), Err(Errno::EINVAL));
    assert_eq!(t.get(at, PAGE, |get| get.page_size = 2 * PAGE), Err(Errno::EINVAL));
    assert_eq!(t.get(at + 0x800, PAGE, |_| {}), Err(Errno::EINVAL));
    assert_eq!(t.get(at, 0x1800, |_| {}), Err(Errno::EINVAL));
    assert_eq!(t.get(u64::MAX - 0xfff, 2 * PAGE, |_| {}), Err(Errno::EOVERFLOW));
    assert_eq!(t.get(at, PAGE, |_| {}), Ok(()), "not switched on: the error is dropped");
    t.enable().unwrap();
    t.write(at);
    assert_eq!(set(&t.world, t.hwpt, 0), Ok(()));
    assert_eq!(t.get(at, PAGE, |_| {}), Ok(()));
    assert!(t.take(BITMAP, 4).is_empty());
}

proptest! {
    #[test]
    fn a_bitmap_is_the_set_of_written_pages(
        written in prop::collection::btree_set(0..2000_u64, 0..40),
        misaligned in 0..16_u64,
        first in 0..2000_u64,
        pages in 1..2000_u64,
    ) {
        let t = Tracked::new();
        t.world.client.mm.books.lock().unwrap().scattered = true;
        let base = 0x10_0000;
        t.world.map_fixed(t.ioas, VA, 2000 * PAGE, base).unwrap();
        t.enable().unwrap();
        written.iter().for_each(|page| t.write(base + page * PAGE));
        let at = BITMAP + misaligned;
        let get = |first: u64, pages| {
            t.get(base + first * PAGE, pages * PAGE, |get| get.data = at).unwrap();
            t.take(at, pages).into_iter().map(|page| page + first).collect::<BTreeSet<_>>()
        };
        let inside: BTreeSet<u64> = written.range(first..first + pages).copied().collect();
        prop_assert_eq!(get(first, pages), inside.clone());
        let rest: BTreeSet<u64> = written.difference(&inside).copied().collect();
        prop_assert_eq!(get(0, 2000), rest);
    }
}
