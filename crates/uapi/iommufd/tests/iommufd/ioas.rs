//! IO address spaces without devices: every errno, in order.

use lychgate_iommufd::abi::iommufd as abi;
use lychgate_iommufd::{Event, OpenFile};
use lychgate_types::{Errno, Prot};

use crate::common::{FakeFile, PAGE, SCRATCH, VA, World};

const RW: u32 = abi::MAP_READABLE | abi::MAP_WRITEABLE;

#[test]
fn alloc_refuses_flags() {
    let world = World::new();
    let alloc = abi::IoasAlloc { flags: 1, ..Default::default() };
    assert_eq!(world.call(alloc), Err(Errno::EOPNOTSUPP));
}

#[test]
fn a_fresh_ioas_can_map_everything_at_any_byte() {
    let world = World::new();
    let ioas = world.ioas();
    assert_eq!(world.ranges(ioas), (vec![(0, u64::MAX)], 1));
    assert_eq!(world.map_fixed(ioas, VA + 3, 5, 7), Ok(7));
    assert_eq!(world.client.mm.pinned(), 0, "nothing is pinned without a domain");
    assert_eq!(world.map_fixed(ioas, 0x8000_0000, PAGE, 0x1000), Ok(0x1000), "nor looked at");
}

#[test]
fn iova_ranges_tells_how_many_there_are() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    bound.attach(ioas).unwrap();
    let at = SCRATCH + 0x1000;
    world.client.put(at, &[0xee; 16]);
    let ask = |num_iovas, allowed_iovas, reserved| {
        world.call_both(abi::IoasIovaRanges {
            ioas_id: ioas,
            num_iovas,
            allowed_iovas,
            reserved,
            ..Default::default()
        })
    };
    let (after, result) = ask(0, at, 0);
    assert_eq!((after.num_iovas, result.unwrap_err().errno), (1, Errno::EMSGSIZE));
    assert_eq!(world.client.get(at, 16), [0xee; 16]);
    assert_eq!(ask(1, 0, 0).1.unwrap_err().errno, Errno::EFAULT);
    assert_eq!(ask(1, at, 1).1.unwrap_err().errno, Errno::EOPNOTSUPP);
    assert_eq!(world.ranges(ioas), (vec![(0, (1 << 48) - 1)], PAGE));
    let absent = abi::IoasIovaRanges { ioas_id: bound.id(), ..Default::default() };
    assert_eq!(world.call(absent), Err(Errno::ENOENT), "a device is no IOAS");
}

#[test]
fn map_checks_in_linux_order() {
    let world = World::new();
    let ioas = world.ioas();
    let map = |flags, reserved, ioas_id, user_va, length, iova| {
        let size = 0;
        world
            .call(abi::IoasMap { size, flags, ioas_id, reserved, user_va, length, iova })
            .map(|map| map.iova)
    };
    let max = u64::MAX;
    assert_eq!(map(8, 0, 99, max, max, max), Err(Errno::EOPNOTSUPP));
    assert_eq!(map(RW, 1, 99, max, max, max), Err(Errno::EOPNOTSUPP));
    assert_eq!(map(1, 0, 99, max, max, max), Err(Errno::EINVAL), "neither R nor W");
    assert_eq!(map(RW, 0, 99, max, 1, max), Err(Errno::EOVERFLOW));
    assert_eq!(map(RW, 0, 99, max, max, 0), Err(Errno::EOVERFLOW));
    assert_eq!(map(RW, 0, 99, max, 1, 0), Err(Errno::ENOENT));
    assert_eq!(map(RW, 0, ioas, max, 1, 0), Err(Errno::EOVERFLOW), "the memory wraps");
    assert_eq!(map(RW, 0, ioas, VA, 0, 0), Err(Errno::EINVAL));
    assert_eq!(map(RW, 0, ioas, 0, max - 1, 0), Err(Errno::EINVAL), "too many pages");
    assert_eq!(map(RW | 1, 0, ioas, VA, 0x2000, max - 0xfff), Err(Errno::EOVERFLOW));
    assert_eq!(map(RW, 0, ioas, 0, max / 2, 0), Err(Errno::EOVERFLOW), "no such hole is sought");
    assert_eq!(map(RW | 1, 0, ioas, VA, PAGE, 0), Ok(0));
    assert_eq!(map(RW | 1, 0, ioas, VA, 1, PAGE - 1), Err(Errno::EEXIST));
}

#[test]
fn overlapping_areas_are_refused_in_every_shape() {
    let world = World::new();
    let ioas = world.ioas();
    world.map_fixed(ioas, VA, 4 * PAGE, 4 * PAGE).unwrap();
    for (first, pages) in [(4, 4), (3, 2), (7, 2), (5, 1), (0, 16)] {
        let result = world.map_fixed(ioas, VA, pages * PAGE, first * PAGE);
        assert_eq!(result, Err(Errno::EEXIST), "{first} {pages}");
    }
    world.map_fixed(ioas, VA, 4 * PAGE, 0).unwrap();
    world.map_fixed(ioas, VA, 4 * PAGE, 8 * PAGE).unwrap();
}

#[test]
fn a_chosen_iova_is_low_aligned_and_never_0() {
    let world = World::new();
    let ioas = world.ioas();
    assert_eq!(world.map_anywhere(ioas, VA, PAGE), Ok(PAGE));
    assert_eq!(world.map_anywhere(ioas, VA, 2 << 20), Ok(2 << 20));
    assert_eq!(world.map_anywhere(ioas, VA + PAGE, 2 << 20), Ok(4 << 20));
    assert_eq!(world.map_anywhere(ioas, VA + 0x10, 0x20), Ok(0x2010), "the offset is kept");
    assert_eq!(world.map_anywhere(ioas, 0x8000_0000, 0x4000), Ok(0x4000));
}

#[test]
fn allowed_ranges_bound_what_is_chosen_but_not_what_is_fixed() {
    let world = World::new();
    let ioas = world.ioas();
    world.allow(ioas, &[(0x10_0000, 0x10_1fff), (0x20_0000, 0x20_0fff)]).unwrap();
    let iovas: Vec<_> = (0..4).map(|_| world.map_anywhere(ioas, VA, PAGE)).collect();
    let expected = [Ok(0x10_0000), Ok(0x10_1000), Ok(0x20_0000), Err(Errno::ENOSPC)];
    assert_eq!(iovas, expected);
    world.map_fixed(ioas, VA, PAGE, 0x5000).unwrap();
    world.allow(ioas, &[]).unwrap();
    assert_eq!(world.map_anywhere(ioas, VA, PAGE), Ok(0x1000), "0 elements clear the list");
}

#[test]
fn allow_checks_the_list_and_keeps_the_old_one_on_an_error() {
    let world = World::new();
    let ioas = world.ioas();
    world.allow(ioas, &[(0x8000, 0x8fff)]).unwrap();
    let reserved = abi::IoasAllowIovas { reserved: 1, ioas_id: 99, ..Default::default() };
    assert_eq!(world.call(reserved), Err(Errno::EOPNOTSUPP));
    assert_eq!(world.allow(99, &[(2, 1)]), Err(Errno::ENOENT));
    assert_eq!(world.allow(ioas, &[(5, 5)]), Err(Errno::EINVAL));
    assert_eq!(world.allow(ioas, &[(0, 9), (20, 30), (9, 12)]), Err(Errno::EINVAL));
    let unreadable = abi::IoasAllowIovas { ioas_id: ioas, num_iovas: 1, ..Default::default() };
    assert_eq!(world.call(unreadable), Err(Errno::EFAULT));
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    bound.attach(ioas).unwrap();
    assert_eq!(world.allow(ioas, &[(0, 1 << 48)]), Err(Errno::EADDRINUSE));
    assert_eq!(world.map_anywhere(ioas, VA, PAGE), Ok(0x8000));
}

#[test]
fn unmap_checks_in_linux_order_and_takes_whole_areas_only() {
    let world = World::new();
    let ioas = world.ioas();
    let max = u64::MAX;
    assert_eq!(world.unmap(99, 0, max), Err(Errno::ENOENT));
    assert_eq!(world.unmap(ioas, 1, max), Err(Errno::EOVERFLOW));
    assert_eq!(world.unmap(ioas, max, 0), Err(Errno::EOVERFLOW));
    assert_eq!(world.unmap(ioas, PAGE, 0), Err(Errno::EINVAL));
    assert_eq!(world.unmap(ioas, max - 1, 3), Err(Errno::EOVERFLOW));
    assert_eq!(world.unmap(ioas, 0, PAGE), Err(Errno::ENOENT), "nothing there");
    assert_eq!(world.unmap(ioas, 0, max), Ok(0), "all of nothing");
    for page in [1, 2, 4] {
        world.map_fixed(ioas, VA, PAGE, page * PAGE).unwrap();
    }
    world.map_fixed(ioas, VA, 2 * PAGE, 6 * PAGE).unwrap();
    assert_eq!(world.unmap(ioas, 0, 4 * PAGE), Ok(2 * PAGE), "two areas");
    assert_eq!(world.unmap(ioas, 7 * PAGE, PAGE), Err(Errno::ENOENT), "part of an area");
    assert_eq!(world.unmap(ioas, 0, 7 * PAGE), Err(Errno::ENOENT), "part of the last area");
    assert_eq!(world.unmap(ioas, 4 * PAGE, PAGE), Err(Errno::ENOENT), "the area before went");
    assert_eq!(world.unmap(ioas, 0, max), Ok(2 * PAGE));
}

#[test]
fn copy_checks_in_linux_order() {
    let world = World::new();
    let (from, to) = (world.ioas(), world.ioas());
    world.map_fixed(from, VA, PAGE, PAGE).unwrap();
    world.map_fixed(from, VA, PAGE, 2 * PAGE).unwrap();
    let copy = |flags, src_ioas_id, dst_ioas_id, length, src_iova, dst_iova| {
        let size = 0;
        world
            .call(abi::IoasCopy {
                size,
                flags,
                dst_ioas_id,
                src_ioas_id,
                length,
                dst_iova,
                src_iova,
            })
            .map(|copy| copy.dst_iova)
    };
    let max = u64::MAX;
    assert_eq!(copy(8, 98, 99, max, max, max), Err(Errno::EOPNOTSUPP));
    assert_eq!(copy(1, 98, 99, 0, 0, max), Err(Errno::EOVERFLOW));
    assert_eq!(copy(1, 98, 99, 0, 0, 0), Err(Errno::EINVAL));
    assert_eq!(copy(RW, 98, 99, 0, 0, 0), Err(Errno::ENOENT));
    assert_eq!(copy(RW, from, 99, 0, 0, 0), Err(Errno::EINVAL), "length 0");
    assert_eq!(copy(RW, from, 99, 3, max - 1, 0), Err(Errno::EOVERFLOW));
    assert_eq!(copy(RW, from, 99, PAGE, 0, 0), Err(Errno::ENOENT));
    assert_eq!(copy(RW, from, 99, 2 * PAGE, PAGE + 1, 0), Err(Errno::ENOENT), "a byte too far");
    assert_eq!(copy(RW, from, 99, PAGE, PAGE, 0), Err(Errno::ENOENT), "no destination");
    assert_eq!(copy(RW | 1, from, to, 2 * PAGE, PAGE, 0), Ok(0), "two areas");
    assert_eq!(copy(RW | 1, from, to, 9, PAGE + 17, 0x8005), Ok(0x8005), "any bytes of one");
    assert_eq!(copy(RW | 1, from, to, PAGE, PAGE, 0), Err(Errno::EEXIST));
    assert_eq!(copy(RW | 1, from, from, PAGE, PAGE, 3 * PAGE), Ok(3 * PAGE), "into itself");
}

#[test]
fn memory_mapped_for_reading_cannot_be_copied_for_writing() {
    let world = World::new();
    let ioas = world.ioas();
    let map = abi::IoasMap {
        flags: abi::MAP_READABLE | abi::MAP_FIXED_IOVA,
        ioas_id: ioas,
        user_va: VA,
        length: PAGE,
        ..Default::default()
    };
    world.call(map).unwrap();
    assert_eq!(world.copy((ioas, 0), (ioas, PAGE), PAGE), Err(Errno::EPERM));
}

#[test]
fn files_are_mapped_by_their_bytes() {
    let world = World::new();
    let ioas = world.ioas();
    let file = FakeFile::new(8 * PAGE);
    world.client.files.lock().unwrap().extend([(5, Some(file.clone())), (6, None)]);
    let map = |flags, fd, start, length| {
        let map =
            abi::IoasMapFile { flags, ioas_id: ioas, fd, start, length, ..Default::default() };
        world.call(map).map(|map| map.iova)
    };
    assert_eq!(map(8, 5, 0, PAGE), Err(Errno::EOPNOTSUPP));
    assert_eq!(map(1, 5, 0, PAGE), Err(Errno::EINVAL));
    assert_eq!(map(RW, 5, 0, u64::MAX), Err(Errno::EOVERFLOW));
    assert_eq!(map(RW, 4, 0, 0), Err(Errno::EINVAL));
    assert_eq!(map(RW, 4, u64::MAX, 2), Err(Errno::EOVERFLOW));
    assert_eq!(map(RW, 4, 0, PAGE), Err(Errno::EBADF));
    assert_eq!(map(RW, 6, 0, PAGE), Ok(PAGE), "no memfd: that shows when it is pinned");
    assert_eq!(map(RW, 5, 8 * PAGE, PAGE), Ok(2 * PAGE), "and so does the end of the file");
    world.unmap(ioas, 0, u64::MAX).unwrap();

    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    bound.attach(ioas).unwrap();
    assert_eq!(map(RW, 6, 0, PAGE), Err(Errno::EINVAL));
    assert_eq!(map(RW, 5, 8 * PAGE, PAGE), Err(Errno::EINVAL));
    let iova = map(RW, 5, PAGE, 2 * PAGE).unwrap();
    assert_eq!(file.books.lock().unwrap().pins.len(), 2);
    world.unmap(ioas, iova, 2 * PAGE).unwrap();
    assert!(file.books.lock().unwrap().pins.is_empty());
}

#[test]
fn options_are_checked_in_linux_order() {
    let world = World::new();
    let option = |option_id, op, reserved, object_id, val64| {
        let size = 0;
        world
            .call(abi::Option { size, option_id, op, reserved, object_id, val64 })
            .map(|option| option.val64)
    };
    let (set, get) = (abi::OPTION_OP_SET, abi::OPTION_OP_GET);
    assert_eq!(option(0, get, 1, 0, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(2, get, 0, 0, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(0, get, 0, 1, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(0, 2, 0, 0, 0), Err(Errno::EOPNOTSUPP));
    assert_eq!(option(0, get, 0, 0, 7), Ok(0));
    assert_eq!(option(0, set, 0, 0, 2), Err(Errno::EPERM));
    world.client.caps.lock().unwrap().insert(lychgate_iommufd::Cap::SysResource);
    assert_eq!(option(0, set, 0, 0, 2), Err(Errno::EINVAL));
    assert_eq!(option(0, set, 0, 0, 1), Ok(1));
    assert_eq!(option(0, get, 0, 0, 0), Ok(1));
    assert_eq!(option(1, get, 0, 0, 0), Err(Errno::ENOENT));
    let ioas = world.ioas();
    assert_eq!(option(0, set, 0, 0, 2), Err(Errno::EBUSY));
    assert_eq!(option(1, get, 0, ioas, 0), Ok(1));
    assert_eq!(option(1, set, 0, ioas, 2), Err(Errno::EINVAL));
    assert_eq!(option(1, 2, 0, ioas, 0), Err(Errno::EOPNOTSUPP));
    world.map_fixed(ioas, VA, PAGE / 2, 0).unwrap();
    assert_eq!(option(1, set, 0, ioas, 0), Err(Errno::EADDRINUSE), "half a page is mapped");
    world.unmap(ioas, 0, PAGE).unwrap();
    assert_eq!(option(1, set, 0, ioas, 0), Ok(0));
    assert_eq!(world.ranges(ioas).1, PAGE);
    assert_eq!(world.map_fixed(ioas, VA, PAGE / 2, 0), Err(Errno::EINVAL));
    assert_eq!(option(1, set, 0, ioas, 1), Ok(1));
    assert_eq!(world.ranges(ioas).1, 1);
}

#[test]
fn areas_do_not_keep_an_ioas_from_being_destroyed() {
    let world = World::new();
    let ioas = world.ioas();
    world.map_fixed(ioas, VA, PAGE, 0x5000).unwrap();
    world.destroy(ioas).unwrap();
    let events = world.journal.take();
    let [Event::Mapped { ioas: a, iova: 0x5000, len: PAGE, prot }, unmapped] = events[..] else {
        panic!("{events:?}");
    };
    assert_eq!(prot, Prot::READ | Prot::WRITE | Prot::CACHE);
    assert_eq!(unmapped, Event::Unmapped { ioas: a, iova: 0x5000, len: PAGE });
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Err(Errno::ENOENT));
}

#[test]
fn what_no_iommu_here_has_is_refused_as_linux_refuses_it() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let hwpt = world.hwpt(bound.id(), ioas).unwrap();
    let refused = |result: Result<(), Errno>| result.unwrap_err();

    let dirty = |flags, hwpt_id| {
        let call = abi::HwptSetDirtyTracking { flags, hwpt_id, ..Default::default() };
        refused(world.call(call).map(|_| ()))
    };
    assert_eq!(
        [dirty(2, 99), dirty(1, 99), dirty(1, ioas)],
        [Errno::EOPNOTSUPP, Errno::ENOENT, Errno::ENOENT]
    );
    assert_eq!(dirty(1, hwpt), Errno::EOPNOTSUPP);

    let bitmap = |flags, hwpt_id, iova, length, page_size| {
        let call = abi::HwptGetDirtyBitmap {
            flags,
            hwpt_id,
            iova,
            length,
            page_size,
            ..Default::default()
        };
        refused(world.call(call).map(|_| ()))
    };
    assert_eq!(bitmap(2, 99, 0, 0, 0), Errno::EOPNOTSUPP);
    assert_eq!(bitmap(0, 99, 0, 0, 0), Errno::ENOENT);
    assert_eq!(bitmap(0, hwpt, 0, 0, 0), Errno::EINVAL);
    assert_eq!(bitmap(0, hwpt, 2, u64::MAX, 0), Errno::EOVERFLOW);
    assert_eq!(bitmap(0, hwpt, 0, 17, PAGE), Errno::EINVAL);
    assert_eq!(bitmap(0, hwpt, 0, PAGE, 0), Errno::EINVAL);
    assert_eq!(bitmap(0, hwpt, PAGE, PAGE, 2 * PAGE), Errno::EINVAL);
    assert_eq!(bitmap(0, hwpt, 0, PAGE, PAGE), Errno::EOPNOTSUPP);

    let invalidate = |hwpt_id, data_uptr, entry_len, entry_num, reserved| {
        let (after, result) = world.call_both(abi::HwptInvalidate {
            hwpt_id,
            data_uptr,
            entry_len,
            entry_num,
            reserved,
            ..Default::default()
        });
        assert_eq!(after.entry_num, 0, "nothing was handled");
        result.unwrap_err().errno
    };
    assert_eq!(invalidate(99, 0, 0, 1, 1), Errno::EOPNOTSUPP);
    assert_eq!(invalidate(99, 0, 16, 1, 0), Errno::EINVAL);
    assert_eq!(invalidate(99, 16, 5000, 1, 0), Errno::EINVAL);
    assert_eq!(invalidate(99, 16, 16, 1 << 20, 0), Errno::EINVAL);
    assert_eq!(invalidate(99, 16, 16, 1, 0), Errno::ENOENT);
    assert_eq!(invalidate(hwpt, 16, 16, 1, 0), Errno::EINVAL);

    let fault = abi::FaultQueueAlloc { flags: 1, ..Default::default() };
    assert_eq!(refused(world.call(fault).map(|_| ())), Errno::EOPNOTSUPP);
    let viommu = |kind, dev_id| {
        let call = abi::ViommuAlloc { kind, dev_id, hwpt_id: hwpt, ..Default::default() };
        refused(world.call(call).map(|_| ()))
    };
    assert_eq!(
        [viommu(0, 99), viommu(1, 99), viommu(1, bound.id())],
        [Errno::EOPNOTSUPP, Errno::ENOENT, Errno::EOPNOTSUPP]
    );
    let vdevice = abi::VdeviceAlloc { viommu_id: hwpt, ..Default::default() };
    assert_eq!(refused(world.call(vdevice).map(|_| ())), Errno::ENOENT);
    let events = |kind, veventq_depth| {
        let call = abi::VeventqAlloc { kind, veventq_depth, ..Default::default() };
        refused(world.call(call).map(|_| ()))
    };
    assert_eq!(
        [events(0, 0), events(1, 0), events(1, 1 << 20), events(1, 2)],
        [Errno::EOPNOTSUPP, Errno::EINVAL, Errno::EINVAL, Errno::ENOENT]
    );
    let queue = |kind, nesting_parent_iova, length| {
        let call = abi::HwQueueAlloc { kind, nesting_parent_iova, length, ..Default::default() };
        refused(world.call(call).map(|_| ()))
    };
    assert_eq!(
        [queue(0, 0, 0), queue(1, 0, 0), queue(1, 2, u64::MAX), queue(1, 0, 1)],
        [Errno::EOPNOTSUPP, Errno::EINVAL, Errno::EOVERFLOW, Errno::ENOENT]
    );
    let pa = world.call(abi::IoasNoiommuGetPa::default()).map(|_| ());
    assert_eq!(refused(pa), Errno::EOPNOTSUPP);
    assert!(world.context.read_at(&world.client, 0, 1, 0).is_err());
}
