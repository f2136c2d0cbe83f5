//! Queues of a vIOMMU's events.

use lychgate_iommufd::abi::iommufd as abi;
use lychgate_types::Errno;
use zerocopy::FromBytes;

use crate::common::{EVENTS, SCRATCH, World};
use crate::nested::nesting;
use crate::viommu::{viommu, viommus};

const BUFFER: u64 = SCRATCH + 0x2000;
/// A header, and 4 bytes of data.
const EVENT: u64 = 12;

fn alloc(world: &World, viommu_id: u32, depth: u32) -> Result<(u32, u32), Errno> {
    let call =
        abi::VeventqAlloc { viommu_id, kind: EVENTS, veventq_depth: depth, ..Default::default() };
    world.call(call).map(|alloc| (alloc.out_veventq_id, alloc.out_veventq_fd))
}

/// Flags and sequence number of each record, and the data of events.
fn read(world: &World, fd: u32, count: u64) -> Result<Vec<(u32, u32, Option<u32>)>, Errno> {
    let read = world.files.get(fd).read_at(&world.client, BUFFER, count, 0);
    let bytes = read.map_err(|refusal| refusal.errno)?;
    let bytes = world.client.get(BUFFER, usize::try_from(bytes).unwrap());
    let mut rest = &bytes[..];
    let mut records = Vec::new();
    while !rest.is_empty() {
        let (header, behind) = abi::VeventHeader::read_from_prefix(rest).unwrap();
        let lost = header.flags & abi::VEVENTQ_FLAG_LOST_EVENTS != 0;
        let (data, behind) = behind.split_at(if lost { 0 } else { 4 });
        let data = data.try_into().map(u32::from_le_bytes).ok();
        records.push((header.flags, header.sequence, data));
        rest = behind;
    }
    Ok(records)
}

#[test]
fn alloc_checks_in_linux_order() {
    let (world, bound, ioas) = nesting();
    let id = viommu(&world, bound.id(), ioas);
    let call = abi::VeventqAlloc { viommu_id: 99, ..Default::default() };
    let fails = |call, errno| assert_eq!(world.call::<abi::VeventqAlloc>(call), Err(errno));
    fails(abi::VeventqAlloc { kind: 1, flags: 1, ..call }, Errno::EOPNOTSUPP);
    fails(abi::VeventqAlloc { kind: 1, reserved: 1, ..call }, Errno::EOPNOTSUPP);
    fails(call, Errno::EOPNOTSUPP);
    fails(abi::VeventqAlloc { kind: 1, ..call }, Errno::EINVAL);
    fails(abi::VeventqAlloc { kind: 1, veventq_depth: (1 << 19) + 1, ..call }, Errno::EINVAL);
    fails(abi::VeventqAlloc { kind: 1, veventq_depth: 1, ..call }, Errno::ENOENT);
    let here = abi::VeventqAlloc { viommu_id: id, kind: 1, veventq_depth: 1, ..call };
    fails(here, Errno::EOPNOTSUPP);
    fails(abi::VeventqAlloc { viommu_id: bound.id(), ..here }, Errno::ENOENT);
    let (queue, fd) = alloc(&world, id, 1 << 19).unwrap();
    assert_eq!(alloc(&world, id, 1), Err(Errno::EEXIST));
    assert_eq!(world.destroy(id), Err(Errno::EBUSY));
    assert_eq!(world.destroy(queue), Err(Errno::EBUSY), "its descriptor is open");
    world.files.close(fd);
    world.destroy(queue).unwrap();
    alloc(&world, id, 1).unwrap();
}

#[test]
fn events_are_numbered_and_lost_ones_told() {
    let (world, bound, ioas) = nesting();
    let id = viommu(&world, bound.id(), ioas);
    let host = viommus(&world)[0].host.upgrade().unwrap();
    let report = |data: u32| host.report_event(EVENTS, &data.to_le_bytes());
    assert_eq!(report(1), Err(Errno::EOPNOTSUPP), "no queue");
    let (_, fd) = alloc(&world, id, 2).unwrap();
    assert_eq!(host.report_event(EVENTS + 1, &[]), Err(Errno::EOPNOTSUPP), "of another type");
    report(10).unwrap();
    assert!(world.files.is_readable(fd));
    assert_eq!(read(&world, fd, 4 * EVENT), Ok(vec![(0, 0, Some(10))]));
    assert!(!world.files.is_readable(fd));
    for data in 11..15 {
        report(data).unwrap();
    }
    let lost = abi::VEVENTQ_FLAG_LOST_EVENTS;
    let records = read(&world, fd, 4 * EVENT);
    assert_eq!(records, Ok(vec![(0, 1, Some(11)), (0, 2, Some(12)), (lost, 4, None)]));
    report(15).unwrap();
    assert_eq!(read(&world, fd, EVENT), Ok(vec![(0, 5, Some(15))]));
    // Once there is room again, the next event's number tells it.
    for data in 16..20 {
        report(data).unwrap();
    }
    assert_eq!(read(&world, fd, EVENT), Ok(vec![(0, 6, Some(16))]));
    report(20).unwrap();
    assert_eq!(read(&world, fd, 4 * EVENT), Ok(vec![(0, 7, Some(17)), (0, 10, Some(20))]));
}

#[test]
fn records_are_read_whole() {
    let (world, bound, ioas) = nesting();
    let id = viommu(&world, bound.id(), ioas);
    let (_, fd) = alloc(&world, id, 2).unwrap();
    assert_eq!(read(&world, fd, 0), Err(Errno::EINVAL));
    assert_eq!(read(&world, fd, 7), Err(Errno::EINVAL), "also an empty one");
    assert_eq!(read(&world, fd, 8), Ok(vec![]));
    let host = viommus(&world)[0].host.upgrade().unwrap();
    host.report_event(EVENTS, &[1, 0, 0, 0]).unwrap();
    host.report_event(EVENTS, &[2, 0, 0, 0]).unwrap();
    assert_eq!(read(&world, fd, 8), Err(Errno::EINVAL));
    assert_eq!(read(&world, fd, 2 * EVENT - 1), Ok(vec![(0, 0, Some(1))]));
    let file = world.files.get(fd);
    let errno = |result: lychgate_iommufd::Result<u64>| result.unwrap_err().errno;
    assert_eq!(errno(file.read_at(&world.client, BUFFER, EVENT, 1)), Errno::ESPIPE);
    assert_eq!(errno(file.read_at(&world.client, 8, EVENT, 0)), Errno::EFAULT);
    assert_eq!(errno(file.write_at(&world.client, BUFFER, EVENT, 0)), Errno::EINVAL);
    assert_eq!(read(&world, fd, EVENT), Ok(vec![(0, 1, Some(2))]));
}
