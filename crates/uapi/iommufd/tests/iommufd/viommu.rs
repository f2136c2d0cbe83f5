//! vIOMMUs: virtual ids, memory that is mapped, queues that hardware reads.

use std::sync::{Arc, Weak};

use lychgate_iommufd::abi::iommufd as abi;
use lychgate_iommufd::{MmapRequest, OpenFile};
use lychgate_types::Errno;
use rustix::io::{pread, pwrite};

use crate::common::{BAD_REQUEST, FakeDriver, FakeViommu, KIND, MMAP_BYTES, QUEUES, SCRATCH};
use crate::common::{PAGE, PHYS, VA, World};
use crate::nested::{nested, nesting, paging};

const DATA: u64 = SCRATCH + 0x800;

fn alloc(world: &World, call: abi::ViommuAlloc) -> Result<u32, Errno> {
    world.call(call).map(|call| call.out_viommu_id)
}

/// A vIOMMU on a new nesting parent.
pub(crate) fn viommu(world: &World, dev_id: u32, ioas: u32) -> u32 {
    let hwpt_id = paging(world, dev_id, ioas, abi::HWPT_ALLOC_NEST_PARENT).unwrap();
    alloc(world, abi::ViommuAlloc { kind: KIND, dev_id, hwpt_id, ..Default::default() }).unwrap()
}

/// The vIOMMUs that are still there, oldest first.
pub(crate) fn viommus(world: &World) -> Vec<Arc<FakeViommu>> {
    let plan = world.driver.plan.lock().unwrap();
    plan.nesting.viommus.iter().filter_map(Weak::upgrade).collect()
}

fn vdevice(world: &World, viommu_id: u32, dev_id: u32, virt_id: u64) -> Result<u32, Errno> {
    let call = abi::VdeviceAlloc { viommu_id, dev_id, virt_id, ..Default::default() };
    world.call(call).map(|call| call.out_vdevice_id)
}

#[test]
fn alloc_checks_in_linux_order() {
    let (world, bound, ioas) = nesting();
    let dev_id = bound.id();
    let none = abi::ViommuAlloc { dev_id: 99, hwpt_id: 99, ..Default::default() };
    let fails = |call, errno| assert_eq!(alloc(&world, call), Err(errno));
    fails(none, Errno::EOPNOTSUPP);
    fails(abi::ViommuAlloc { kind: KIND, flags: 1, ..none }, Errno::EOPNOTSUPP);
    fails(abi::ViommuAlloc { kind: KIND, ..none }, Errno::ENOENT);
    let device = abi::ViommuAlloc { dev_id, ..none };
    fails(abi::ViommuAlloc { kind: KIND + 1, ..device }, Errno::EOPNOTSUPP);
    fails(abi::ViommuAlloc { kind: KIND, ..device }, Errno::ENOENT);
    let plain = paging(&world, dev_id, ioas, 0).unwrap();
    fails(abi::ViommuAlloc { kind: KIND, hwpt_id: plain, ..device }, Errno::EINVAL);
    let hwpt_id = paging(&world, dev_id, ioas, abi::HWPT_ALLOC_NEST_PARENT).unwrap();
    let good = abi::ViommuAlloc { kind: KIND, hwpt_id, ..device };
    fails(abi::ViommuAlloc { data_len: 8, ..good }, Errno::EFAULT);
    fails(abi::ViommuAlloc { data_len: 1, data_uptr: DATA, ..good }, Errno::EINVAL);
    fails(abi::ViommuAlloc { data_len: 1 << 20, data_uptr: DATA, ..good }, Errno::EINVAL);
    assert!(viommus(&world).is_empty());
    let id = alloc(&world, good).unwrap();
    assert_eq!(world.destroy(hwpt_id), Err(Errno::EBUSY));
    let on_viommu = nested(&world, dev_id, id, 0).unwrap();
    assert_eq!(nested(&world, dev_id, id, abi::HWPT_ALLOC_NEST_PARENT), Err(Errno::EOPNOTSUPP));
    assert_eq!(world.hwpt(dev_id, id), Err(Errno::EOPNOTSUPP), "no vendor data");
    assert_eq!(world.destroy(id), Err(Errno::EBUSY));
    world.destroy(on_viommu).unwrap();
    world.destroy(id).unwrap();
    world.destroy(hwpt_id).unwrap();
    assert!(viommus(&world).is_empty());
}

#[test]
fn a_virtual_id_leads_to_its_device_and_back() {
    let (world, bound, ioas) = nesting();
    let second = world.device(0x200);
    let second = world.reference().bind(second).unwrap();
    let id = viommu(&world, bound.id(), ioas);
    let other = viommu(&world, bound.id(), ioas);
    assert_eq!(vdevice(&world, 99, 98, 1), Err(Errno::ENOENT));
    assert_eq!(vdevice(&world, id, 99, 1), Err(Errno::ENOENT));
    assert_eq!(vdevice(&world, id, ioas, 1), Err(Errno::ENOENT));
    let refused = vdevice(&world, id, bound.id(), BAD_REQUEST.into());
    assert_eq!(refused, Err(Errno::EIO), "the driver's");
    let vdev = vdevice(&world, id, bound.id(), 0x99).unwrap();
    assert_eq!(vdevice(&world, id, bound.id(), 0x98), Err(Errno::EEXIST), "it has one");
    assert_eq!(vdevice(&world, other, bound.id(), 0x98), Err(Errno::EEXIST), "anywhere");
    assert_eq!(vdevice(&world, id, second.id(), 0x99), Err(Errno::EEXIST), "the id is taken");
    vdevice(&world, id, second.id(), u64::MAX).unwrap();
    let driver = &viommus(&world)[0];
    let host = driver.host.upgrade().unwrap();
    let devices = host.devices();
    let first = devices.find(0x99).unwrap();
    assert_eq!((first.get(), devices.virtual_id(first)), (0x100, Some(0x99)));
    assert_eq!(devices.find(u64::MAX).map(|device| device.get()), Some(0x200));
    assert_eq!(world.destroy(id), Err(Errno::EBUSY));
    world.destroy(vdev).unwrap();
    assert_eq!((devices.find(0x99), devices.virtual_id(first)), (None, None));
    vdevice(&world, id, bound.id(), 0x88).unwrap();
}

#[test]
fn another_iommu_has_nothing_to_do_with_a_viommu() {
    let (mut world, bound, ioas) = nesting();
    let id = viommu(&world, bound.id(), ioas);
    let first = std::mem::replace(&mut world.driver, FakeDriver::new());
    let foreign = world.device(0x300);
    let foreign = world.reference().bind(foreign).unwrap();
    assert_eq!(vdevice(&world, id, foreign.id(), 1), Err(Errno::EINVAL));
    assert_eq!(nested(&world, foreign.id(), id, 0), Err(Errno::EINVAL));
    world.driver = first;
    vdevice(&world, id, bound.id(), 1).unwrap();
}

#[test]
fn a_device_is_attached_under_its_virtual_id_and_keeps_it() {
    let (world, bound, ioas) = nesting();
    let id = viommu(&world, bound.id(), ioas);
    let hwpt = nested(&world, bound.id(), id, abi::HWPT_ALLOC_PASID).unwrap();
    assert_eq!(bound.attach(hwpt).unwrap_err().errno, Errno::ENOENT, "it has none");
    let vdev = vdevice(&world, id, bound.id(), 0x99).unwrap();
    bound.attach(hwpt).unwrap();
    assert_eq!(world.destroy(vdev), Err(Errno::EBUSY));
    bound.replace(ioas).unwrap();
    bound.replace(hwpt).unwrap();
    assert_eq!(world.destroy(vdev), Err(Errno::EBUSY));
    bound.detach();
    world.destroy(vdev).unwrap();
}

#[test]
fn a_vdevice_goes_with_its_device_and_leaves_a_tombstone() {
    let (world, bound, ioas) = nesting();
    let id = viommu(&world, bound.id(), ioas);
    let hwpt = nested(&world, bound.id(), id, 0).unwrap();
    let vdev = vdevice(&world, id, bound.id(), 0x99).unwrap();
    bound.attach(hwpt).unwrap();
    drop(bound);
    assert_eq!(world.destroy(vdev), Err(Errno::ENOENT));
    assert!(viommus(&world)[0].devices.lock().unwrap().is_empty());
    let numbers = [world.ioas(), world.ioas(), world.ioas()];
    assert!(!numbers.contains(&vdev), "never given out again");
    world.destroy(hwpt).unwrap();
    world.destroy(id).unwrap();
}

#[test]
fn closing_takes_everything_from_the_leaves_on() {
    let (world, bound, ioas) = nesting();
    let id = viommu(&world, bound.id(), ioas);
    nested(&world, bound.id(), id, 0).unwrap();
    vdevice(&world, id, bound.id(), 0x99).unwrap();
    world.map_fixed(ioas, VA, PAGE, 0).unwrap();
    drop(bound);
    world.context.release();
    assert!(viommus(&world).is_empty());
    assert_eq!(world.driver.domains().len(), 0);
    assert_eq!(world.client.mm.pinned(), 0);
}

#[test]
fn a_client_maps_the_whole_of_what_a_driver_shares() {
    let (world, bound, ioas) = nesting();
    let hwpt_id = paging(&world, bound.id(), ioas, abi::HWPT_ALLOC_NEST_PARENT).unwrap();
    world.client.put(DATA, &[0xee; 24]);
    let call = abi::ViommuAlloc {
        kind: KIND,
        dev_id: bound.id(),
        hwpt_id,
        data_len: 24,
        data_uptr: DATA,
        ..Default::default()
    };
    let id = alloc(&world, call).unwrap();
    let data = world.client.get(DATA, 24);
    let offset = u64::from_le_bytes(data[..8].try_into().unwrap());
    assert_eq!((offset, &data[8..]), (PAGE, &[0xee; 16][..]));
    let good =
        MmapRequest { offset, len: MMAP_BYTES, read: true, write: true, exec: false, shared: true };
    let map = |request| world.context.mmap(&request).map_err(|refusal| refusal.errno);
    assert_eq!(map(MmapRequest { shared: false, ..good }), Err(Errno::EINVAL));
    assert_eq!(map(MmapRequest { offset: offset + 8, ..good }), Err(Errno::EINVAL));
    assert_eq!(map(MmapRequest { exec: true, ..good }), Err(Errno::EPERM));
    assert_eq!(map(MmapRequest { offset: offset + PAGE, ..good }), Err(Errno::ENXIO));
    assert_eq!(map(MmapRequest { offset: 0, ..good }), Err(Errno::ENXIO));
    assert_eq!(map(MmapRequest { len: MMAP_BYTES / 2, ..good }), Err(Errno::ENXIO));
    assert_eq!(map(MmapRequest { len: 2 * MMAP_BYTES, ..good }), Err(Errno::ENXIO));
    assert_eq!(map(MmapRequest { len: u64::MAX, ..good }), Err(Errno::ENXIO));
    world.client.set_mapped(true);
    assert_eq!(world.client.asked_for_mappings(), 0);
    map(MmapRequest { len: MMAP_BYTES - 1, ..good }).unwrap();
    assert_eq!(world.destroy(id), Err(Errno::EBUSY));

    let memory = Arc::clone(viommus(&world)[0].memory.as_ref().unwrap());
    let backing = world.context.backing().unwrap();
    memory.write(MMAP_BYTES - 4, &[1, 2, 3, 4]).unwrap();
    let mut seen = [0; 4];
    assert_eq!(pread(backing, &mut seen, offset + MMAP_BYTES - 4), Ok(4));
    assert_eq!(seen, [1, 2, 3, 4]);
    assert_eq!(pwrite(backing, &[9], offset), Ok(1));
    memory.read(0, &mut seen).unwrap();
    assert_eq!(seen, [9, 0, 0, 0]);
    assert_eq!(memory.read(MMAP_BYTES - 3, &mut seen), Err(Errno::EFAULT));
    assert_eq!(memory.write(u64::MAX, &[0]), Err(Errno::EFAULT));

    world.client.set_mapped(false);
    world.destroy(id).unwrap();
    assert_eq!(map(good), Err(Errno::ENXIO));
    let id = alloc(&world, call).unwrap();
    assert_ne!(viommus(&world)[0].memory.as_ref().unwrap().offset(), offset, "never again");
    world.destroy(id).unwrap();
}

#[test]
fn hardware_reads_queues_that_stay_where_they_are() {
    let (world, bound, ioas) = nesting();
    let viommu_id = viommu(&world, bound.id(), ioas);
    let iova = 0x10_0000;
    let good = abi::HwQueueAlloc {
        viommu_id,
        kind: QUEUES,
        nesting_parent_iova: iova,
        length: PAGE,
        ..Default::default()
    };
    let alloc = |call: abi::HwQueueAlloc| world.call(call).map(|call| call.out_hw_queue_id);
    let fails = |call, errno| assert_eq!(alloc(call), Err(errno));
    fails(abi::HwQueueAlloc { flags: 1, viommu_id: 99, ..good }, Errno::EOPNOTSUPP);
    fails(abi::HwQueueAlloc { kind: 0, viommu_id: 99, ..good }, Errno::EOPNOTSUPP);
    fails(abi::HwQueueAlloc { length: 0, viommu_id: 99, ..good }, Errno::EINVAL);
    let end = abi::HwQueueAlloc { nesting_parent_iova: u64::MAX, viommu_id: 99, ..good };
    fails(end, Errno::EOVERFLOW);
    fails(abi::HwQueueAlloc { viommu_id: 99, ..good }, Errno::ENOENT);
    fails(abi::HwQueueAlloc { kind: QUEUES + 1, ..good }, Errno::EOPNOTSUPP);
    fails(good, Errno::ENOENT);
    world.map_fixed(ioas, VA, PAGE, iova).unwrap();
    world.map_fixed(ioas, VA + 3 * PAGE, PAGE, iova + PAGE).unwrap();
    fails(abi::HwQueueAlloc { length: 2 * PAGE, ..good }, Errno::EFAULT);
    fails(abi::HwQueueAlloc { index: 1, ..good }, Errno::EIO);
    fails(abi::HwQueueAlloc { index: 2, ..good }, Errno::EINVAL);
    assert_eq!(world.client.mm.pins(VA), 1, "what failed left nothing behind");
    let first = alloc(good).unwrap();
    fails(good, Errno::EEXIST);
    assert_eq!(world.unmap(ioas, iova, PAGE), Err(Errno::EBUSY));
    world.unmap(ioas, iova + PAGE, PAGE).unwrap();
    let half = abi::HwQueueAlloc {
        index: 1,
        nesting_parent_iova: iova + PAGE / 2,
        length: PAGE / 2,
        ..good
    };
    let second = alloc(half).unwrap();
    let request = viommus(&world)[0].queues.lock().unwrap()[&1];
    assert_eq!((request.base.get(), request.len), (PHYS + PAGE / 2, PAGE / 2));
    assert_eq!(request.iova.get(), iova + PAGE / 2);
    assert_eq!(world.destroy(first), Err(Errno::EBUSY), "the second needs it");
    assert_eq!(world.destroy(viommu_id), Err(Errno::EBUSY));
    world.destroy(second).unwrap();
    world.destroy(first).unwrap();
    world.unmap(ioas, iova, PAGE).unwrap();
    let map = abi::IoasMap {
        flags: abi::MAP_FIXED_IOVA | abi::MAP_WRITEABLE,
        ioas_id: ioas,
        user_va: VA,
        length: PAGE,
        iova,
        ..Default::default()
    };
    world.call(map).unwrap();
    fails(good, Errno::EPERM);
}
