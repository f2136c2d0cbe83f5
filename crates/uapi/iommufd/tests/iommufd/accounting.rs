//! Whose limit pinned memory counts against.

use lychgate_iommufd::abi::iommufd as abi;
use lychgate_iommufd::{Accounting, BoundDevice, Cap, NodeKind, OpenFile};
use lychgate_types::Errno;

use crate::common::{FakeClient, FakeFile, FakeMm, PAGE, SCRATCH, VA, World};

/// An IOAS with a device attached.
fn attached(world: &World) -> (u32, BoundDevice) {
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    bound.attach(ioas).unwrap();
    (ioas, bound)
}

#[test]
fn pages_count_while_they_are_pinned_and_once() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    *world.client.limit.lock().unwrap() = 3 * PAGE;
    world.map_fixed(ioas, VA, 4 * PAGE, 0).unwrap();
    let mm = &world.client.mm;
    assert_eq!(mm.charged(Accounting::User), 0);
    assert_eq!(bound.attach(ioas).unwrap_err().errno, Errno::ENOMEM);
    assert_eq!((mm.charged(Accounting::User), mm.pinned()), (0, 0));
    world.unmap(ioas, 0, u64::MAX).unwrap();
    bound.attach(ioas).unwrap();
    assert_eq!(world.map_fixed(ioas, VA + 0x800, 3 * PAGE, 0), Err(Errno::EINVAL));
    assert_eq!(world.map_fixed(ioas, VA, 4 * PAGE, 0), Err(Errno::ENOMEM));
    assert_eq!(mm.pinned(), 0, "what was pinned before it was counted is let go");
    world.map_fixed(ioas, VA, 3 * PAGE, 0).unwrap();
    world.copy((ioas, 0), (ioas, 0x10_0000), 3 * PAGE).unwrap();
    assert_eq!(mm.charged(Accounting::User), 3, "a copy counts nothing");
    world.unmap(ioas, 0, 3 * PAGE).unwrap();
    assert_eq!(mm.charged(Accounting::User), 3);
    world.unmap(ioas, 0x10_0000, 3 * PAGE).unwrap();
    assert_eq!(mm.charged(Accounting::User), 0);
}

#[test]
fn the_mode_is_the_nodes_unless_the_caller_may_lock_memory() {
    for (node, mode) in
        [(NodeKind::Iommu, Accounting::User), (NodeKind::VfioContainer, Accounting::Mm)]
    {
        let world = World::open(node);
        let (ioas, bound) = attached(&world);
        world.map_fixed(ioas, VA, PAGE, 0).unwrap();
        assert_eq!(world.client.mm.charged(mode), 1);
        world.client.caps.lock().unwrap().insert(Cap::IpcLock);
        *world.client.limit.lock().unwrap() = 0;
        world.map_fixed(ioas, VA, 2 * PAGE, 0x10_0000).unwrap();
        assert_eq!(world.client.mm.charged(Accounting::None), 2, "shown, not limited");
        world.client.caps.lock().unwrap().clear();
        drop(bound);
        assert_eq!(world.client.mm.charged(mode), 0);
        assert_eq!(world.client.mm.charged(Accounting::None), 0, "undone as it was done");
    }
}

#[test]
fn pins_of_files_move_to_another_process_all_or_none() {
    let world = World::new();
    let (ioas, _bound) = attached(&world);
    let file = FakeFile::new(16 * PAGE);
    world.client.files.lock().unwrap().insert(5, Some(file));
    let map = |length| {
        world.call(abi::IoasMapFile {
            flags: abi::MAP_READABLE,
            ioas_id: ioas,
            fd: 5,
            length,
            ..Default::default()
        })
    };
    let first = map(2 * PAGE).unwrap().iova;
    map(3 * PAGE).unwrap();
    world
        .call(abi::IoasCopy {
            flags: abi::MAP_READABLE,
            dst_ioas_id: ioas,
            src_ioas_id: ioas,
            length: 2 * PAGE,
            src_iova: first,
            ..Default::default()
        })
        .unwrap();
    world.map_fixed(ioas, VA, PAGE, 0x100_0000).unwrap();
    let child = FakeClient::with_mm(FakeMm::new(2));
    let change = |reserved: u8| {
        child.put(SCRATCH, &[8, 0, 0, 0, reserved, 0, 0, 0]);
        let result = world.context.ioctl(&child, 0x3b92, SCRATCH);
        result.map(|_| ()).map_err(|refusal| refusal.errno)
    };
    let charged =
        || (world.client.mm.charged(Accounting::User), child.mm.charged(Accounting::User));
    assert_eq!(change(1), Err(Errno::EOPNOTSUPP));
    assert_eq!(change(0), Err(Errno::EINVAL), "memory of a process is mapped");
    world.unmap(ioas, 0x100_0000, PAGE).unwrap();
    *child.limit.lock().unwrap() = 4 * PAGE;
    assert_eq!(change(0), Err(Errno::ENOMEM));
    assert_eq!(charged(), (5, 0));
    *child.limit.lock().unwrap() = 5 * PAGE;
    assert_eq!(change(0), Ok(()));
    assert_eq!(charged(), (0, 5));
    world.unmap(ioas, 0, u64::MAX).unwrap();
    assert_eq!(charged(), (0, 0));
}

#[test]
fn whoever_pays_already_pays_no_more_and_what_nobody_pays_stays() {
    let world = World::new();
    let (ioas, _bound) = attached(&world);
    let file = FakeFile::new(16 * PAGE);
    world.client.files.lock().unwrap().insert(5, Some(file));
    let map = |length| {
        let flags = abi::MAP_READABLE;
        world.call(abi::IoasMapFile { flags, ioas_id: ioas, fd: 5, length, ..Default::default() })
    };
    *world.client.limit.lock().unwrap() = 3 * PAGE;
    map(3 * PAGE).unwrap();
    world.call(abi::IoasChangeProcess::default()).unwrap();
    let charged = |mode| world.client.mm.charged(mode);
    assert_eq!(charged(Accounting::User), 3, "not once more in between");
    world.client.caps.lock().unwrap().insert(Cap::IpcLock);
    map(5 * PAGE).unwrap();
    let child = FakeClient::with_mm(FakeMm::new(2));
    child.put(SCRATCH, &[8, 0, 0, 0, 0, 0, 0, 0]);
    assert!(world.context.ioctl(&child, 0x3b92, SCRATCH).is_ok());
    assert_eq!((charged(Accounting::User), child.mm.charged(Accounting::User)), (0, 3));
    assert_eq!((charged(Accounting::None), child.mm.charged(Accounting::None)), (5, 0));
    world.unmap(ioas, 0, u64::MAX).unwrap();
    assert_eq!(charged(Accounting::None), 0);
}
