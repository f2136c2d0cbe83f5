//! Writes of mock devices, and the bitmaps that tell of them.

use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;

use crate::common::{BASE, PAGE, SCRATCH, World};

const IOVA: u64 = abi::APERTURE_START;
const BITMAP: u64 = SCRATCH + 0x800;

impl World {
    fn write(&self, hwpt: u32, length: u64, page_size: u64, bits: &[u8]) -> Result<u64, Errno> {
        lychgate_iommufd::Mm::write(&*self.process.space, BITMAP, bits).unwrap();
        let member =
            abi::DirtyPages { iova: IOVA, length, page_size, uptr: BITMAP, ..Default::default() };
        self.test(op::DIRTY, hwpt, member).map(|member| member.out_nr_dirty)
    }

    fn dirty(&self, hwpt_id: u32, length: u64, flags: u32) -> [u8; 2] {
        lychgate_iommufd::Mm::write(&*self.process.space, BITMAP, &[0; 2]).unwrap();
        let get = linux::HwptGetDirtyBitmap {
            hwpt_id,
            flags,
            iova: IOVA,
            length,
            page_size: 2048,
            data: BITMAP,
            ..Default::default()
        };
        self.call(get).unwrap();
        let mut bits = [0; 2];
        lychgate_iommufd::Mm::read(&*self.process.space, BITMAP, &mut bits).unwrap();
        bits
    }

    fn track(&self, hwpt_id: u32, enable: bool) -> Result<(), Errno> {
        let flags = u32::from(enable);
        self.call(linux::HwptSetDirtyTracking { hwpt_id, flags, ..Default::default() }).map(drop)
    }

    fn tracking(&self) -> (u32, u32) {
        let ioas = self.ioas();
        let mock = self.mock(ioas, 0).unwrap();
        (ioas, self.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_DIRTY_TRACKING).unwrap())
    }
}

#[test]
fn a_write_marks_the_whole_page_that_maps_it() {
    let world = World::new();
    let (ioas, hwpt) = world.tracking();
    world.track(hwpt, true).unwrap();
    // One page of 4 KiB, and one of 8 KiB behind it.
    world.map(ioas, BASE + PAGE, PAGE, IOVA).unwrap();
    world.map(ioas, BASE + 2 * PAGE, 2 * PAGE, IOVA + 2 * PAGE).unwrap();
    assert_eq!(world.write(hwpt, 4 * PAGE, 2048, &[0b0100_0001]), Ok(2));
    assert_eq!(world.dirty(hwpt, 4 * PAGE, linux::GET_DIRTY_BITMAP_NO_CLEAR), [0b1111_0011, 0]);
    assert_eq!(world.dirty(hwpt, 4 * PAGE, 0), [0b1111_0011, 0]);
    assert_eq!(world.dirty(hwpt, 4 * PAGE, 0), [0, 0]);
    // Nothing is mapped there: nothing is written.
    assert_eq!(world.write(hwpt, 4 * PAGE, 2048, &[0b0000_1100]), Ok(2));
    assert_eq!(world.dirty(hwpt, 4 * PAGE, 0), [0, 0]);
}

#[test]
fn tracking_that_is_switched_on_again_forgets() {
    let world = World::new();
    let (ioas, hwpt) = world.tracking();
    world.map(ioas, BASE, PAGE, IOVA).unwrap();
    assert_eq!(world.write(hwpt, PAGE, 2048, &[1]), Err(Errno::EINVAL));
    world.track(hwpt, true).unwrap();
    assert_eq!(world.write(hwpt, PAGE, 2048, &[1]), Ok(1));
    world.track(hwpt, false).unwrap();
    assert_eq!(world.write(hwpt, PAGE, 2048, &[1]), Err(Errno::EINVAL));
    world.track(hwpt, true).unwrap();
    assert_eq!(world.dirty(hwpt, PAGE, 0), [0, 0]);
}

#[test]
fn huge_page_tables_tell_of_huge_pages() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let data = |pagetable_type| abi::HwptData { iotlb: 0, pagetable_type };
    let flags = linux::HWPT_ALLOC_DIRTY_TRACKING;
    let huge = world.hwpt_with(mock.idev, ioas, flags, data(abi::PAGE_TABLE_HUGE)).unwrap();
    world.hwpt_with(mock.idev, ioas, flags, data(abi::PAGE_TABLE_DEFAULT)).unwrap();
    assert_eq!(world.hwpt_with(mock.idev, ioas, flags, data(2)), Err(Errno::EOPNOTSUPP));
    world.track(huge, true).unwrap();
    // 4 KiB pages, for the memory is less than 1 MiB.
    world.map(ioas, BASE, 2 * PAGE, IOVA).unwrap();
    assert_eq!(world.write(huge, 2 * PAGE, 2048, &[0b0100]), Ok(1));
    assert_eq!(world.dirty(huge, 2 * PAGE, 0), [0b1100, 0]);
}

#[test]
fn writes_are_described_by_a_bitmap_of_whole_pages() {
    let world = World::new();
    let (ioas, hwpt) = world.tracking();
    world.map(ioas, BASE, PAGE, IOVA).unwrap();
    world.track(hwpt, true).unwrap();
    let write = |member: abi::DirtyPages| world.test(op::DIRTY, hwpt, member).map(drop);
    let good = abi::DirtyPages {
        iova: IOVA,
        length: PAGE,
        page_size: 2048,
        uptr: BITMAP,
        ..Default::default()
    };
    write(good).unwrap();
    for bad in [
        abi::DirtyPages { page_size: 0, ..good },
        abi::DirtyPages { length: 0, ..good },
        abi::DirtyPages { uptr: 0, ..good },
        abi::DirtyPages { iova: IOVA + 1024, ..good },
        abi::DirtyPages { length: 1024, ..good },
    ] {
        assert_eq!(write(bad), Err(Errno::EINVAL), "{bad:?}");
    }
    let many = abi::DirtyPages { page_size: 1, length: (16 << 23) + 1, ..good };
    assert_eq!(write(many), Err(Errno::EOVERFLOW));
    assert_eq!(write(abi::DirtyPages { uptr: 8, ..good }), Err(Errno::EFAULT));
    assert_eq!(world.test(op::DIRTY, 99, good).err(), Some(Errno::ENOENT));
}

#[test]
fn devices_without_tracking_do_not_mix_with_page_tables_that_track() {
    let world = World::new();
    let (ioas, hwpt) = world.tracking();
    world.mock(hwpt, 0).unwrap();
    assert_eq!(world.mock(hwpt, abi::DEVICE_NO_DIRTY).err(), Some(Errno::EINVAL));
    let plain = world.mock(ioas, abi::DEVICE_NO_DIRTY).unwrap();
    assert_eq!(
        world.hwpt(plain.idev, ioas, linux::HWPT_ALLOC_DIRTY_TRACKING),
        Err(Errno::EOPNOTSUPP)
    );
    let data = abi::HwptData::default();
    let flags = linux::HWPT_ALLOC_DIRTY_TRACKING;
    assert_eq!(world.hwpt_with(plain.idev, ioas, flags, data), Err(Errno::EOPNOTSUPP));
}
