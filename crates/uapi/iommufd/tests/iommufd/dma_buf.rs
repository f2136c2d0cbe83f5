//! Memory of devices, mapped through dma-bufs.

use std::sync::Arc;

use lychgate_iommufd::abi::iommufd as abi;
use lychgate_iommufd::{AccessOps, Accounting, Event};
use lychgate_types::{Errno, Prot};

use crate::common::{BAR, FakeDmaBuf, FakeDmaBufFile, PAGE, SCRATCH, World};

struct Nobody;

impl AccessOps for Nobody {
    fn unmap(&self, _: u64, _: u64) {}
}

fn export(world: &World, fd: i32, size: u64) -> Arc<FakeDmaBuf> {
    let buffer = FakeDmaBuf::new(size);
    world.client.ours.lock().unwrap().insert(fd, Arc::new(FakeDmaBufFile(Arc::clone(&buffer))));
    buffer
}

fn map(world: &World, ioas_id: u32, start: u64, length: u64, iova: u64) -> Result<u64, Errno> {
    let map = abi::IoasMapFile {
        flags: abi::MAP_FIXED_IOVA | abi::MAP_READABLE | abi::MAP_WRITEABLE,
        ioas_id,
        fd: 7,
        start,
        length,
        iova,
        ..Default::default()
    };
    world.call(map).map(|map| map.iova)
}

#[test]
fn device_memory_is_mapped_as_such_and_counts_nothing() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let buffer = export(&world, 7, 16 * PAGE);
    map(&world, ioas, PAGE, 4 * PAGE, 0x10_0000).unwrap();
    bound.attach(ioas).unwrap();
    map(&world, ioas, 0, 16 * PAGE, 0x20_0000).unwrap();
    let domains = world.driver.domains();
    let pages = domains[0].pages();
    assert_eq!(pages.len(), 20);
    assert_eq!((pages[&0x10_0000], pages[&0x10_3000]), (BAR + PAGE, BAR + 4 * PAGE));
    assert_eq!(pages[&0x20_f000], BAR + 15 * PAGE);
    let prot = Prot::READ | Prot::WRITE | Prot::MMIO;
    assert!(domains[0].leaves.lock().unwrap().values().all(|leaf| leaf.2 == prot));
    assert_eq!(world.client.mm.charged(Accounting::User), 0);
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(20 * PAGE));
    assert_eq!((domains[0].pages().len(), buffer.users()), (0, 0));
}

#[test]
fn ranges_beyond_the_buffer_are_refused() {
    let world = World::new();
    let ioas = world.ioas();
    let buffer = export(&world, 7, 4 * PAGE);
    assert_eq!(map(&world, ioas, 0, 0, 0), Err(Errno::EINVAL));
    assert_eq!(map(&world, ioas, 4 * PAGE, 4 * PAGE, 0), Err(Errno::EINVAL));
    assert_eq!(map(&world, ioas, 0, 4 * PAGE + 1, 0), Err(Errno::EINVAL));
    assert_eq!(map(&world, ioas, 4, u64::MAX - 1, 0), Err(Errno::EOVERFLOW));
    assert_eq!(map(&world, 99, 0, PAGE, 0), Err(Errno::ENOENT));
    assert_eq!(buffer.users(), 0);
    assert_eq!(map(&world, ioas, 0, 4 * PAGE, 0), Ok(0));
}

#[test]
fn what_is_revoked_leads_nowhere_for_good() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let (ioas, other) = (world.ioas(), world.ioas());
    let buffer = export(&world, 7, 4 * PAGE);
    map(&world, ioas, 0, 4 * PAGE, 0x10_0000).unwrap();
    world.copy((ioas, 0x10_1000), (other, 0x30_0000), 2 * PAGE).unwrap();
    for ioas in [ioas, ioas, other] {
        world.hwpt(bound.id(), ioas).unwrap();
    }
    let mapped =
        || world.driver.domains().iter().map(|domain| domain.pages().len()).collect::<Vec<_>>();
    assert_eq!(mapped(), [4, 4, 2]);
    world.journal.take();
    buffer.revoke();
    assert_eq!(mapped(), [0, 0, 0]);
    let gone = world.journal.take();
    assert!(matches!(
        gone[..],
        [
            Event::Unmapped { iova: 0x10_0000, len: 0x4000, .. },
            Event::Unmapped { iova: 0x30_0000, len: 0x2000, .. },
        ]
    ));
    assert_eq!(map(&world, ioas, 0, PAGE, 0), Err(Errno::ENODEV), "also without a domain");
    world.hwpt(bound.id(), ioas).unwrap();
    buffer.restore();
    assert_eq!(mapped(), [0, 0, 0, 0], "it does not come back");
    assert_eq!(
        map(&world, ioas, 0, PAGE, 0x10_0000),
        Err(Errno::EEXIST),
        "the area is still there"
    );
    map(&world, ioas, 0, PAGE, 0x20_0000).unwrap();
    assert_eq!(mapped(), [1, 1, 0, 1]);
    assert_eq!(world.unmap(ioas, 0x10_0000, 4 * PAGE), Ok(4 * PAGE));
    map(&world, ioas, 0, 4 * PAGE, 0x10_0000).unwrap();
    assert_eq!(mapped(), [5, 5, 0, 5]);
}

#[test]
fn a_map_that_fails_lets_go_of_the_buffer() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let buffer = export(&world, 7, 4 * PAGE);
    world.hwpt(bound.id(), ioas).unwrap();
    world.hwpt(bound.id(), ioas).unwrap();
    world.driver.plan(|plan| plan.maps_left = Some(1));
    assert_eq!(map(&world, ioas, 0, 4 * PAGE, 0), Err(Errno::ENOMEM));
    assert!(world.driver.domains().iter().all(|domain| domain.pages().is_empty()));
    assert_eq!(buffer.users(), 0);
}

#[test]
fn processors_do_not_reach_it_and_it_belongs_to_no_process() {
    let world = World::new();
    let ioas = world.ioas();
    export(&world, 7, 4 * PAGE);
    map(&world, ioas, 0, 4 * PAGE, 0).unwrap();
    let access = world.reference().create_access(Arc::new(Nobody), true).unwrap();
    access.attach(ioas).unwrap();
    assert_eq!(access.pin_pages(0, PAGE, false).unwrap_err().errno, Errno::EINVAL);
    assert_eq!(access.read(0, &mut [0], None).unwrap_err().errno, Errno::EINVAL);
    let change = abi::IoasChangeProcess::default();
    assert_eq!(world.call(change).map(|_| ()), Err(Errno::EINVAL));
}

#[test]
fn it_cannot_be_cut() {
    let world = World::new();
    let ioas = world.ioas();
    export(&world, 7, 4 * PAGE);
    let vfio = abi::VfioIoas { ioas_id: ioas, op: abi::VFIO_IOAS_SET, ..Default::default() };
    world.call(vfio).unwrap();
    world.raw(0x3b66, 1).unwrap();
    map(&world, ioas, 0, 4 * PAGE, 0x10_0000).unwrap();
    world.client.put(SCRATCH, &[24, 0, 0, 0, 0, 0, 0, 0]);
    world.client.put(SCRATCH + 8, &0x10_0000_u64.to_le_bytes());
    world.client.put(SCRATCH + 16, &PAGE.to_le_bytes());
    assert_eq!(world.raw(0x3b72, SCRATCH), Err(Errno::EOPNOTSUPP));
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(4 * PAGE));
}
