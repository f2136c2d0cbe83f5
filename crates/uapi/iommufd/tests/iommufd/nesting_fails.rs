//! Calls that have to do with nesting, of which the n-th step fails on purpose: each leaves
//! everything as it was.

use lychgate_iommufd::abi::iommufd as abi;
use lychgate_types::{Errno, Pasid};

use crate::common::{EVENTS, KIND, PAGE, QUEUES, SCRATCH, VA, World};
use crate::fail_nth::each_step;
use crate::nested::{nested, nested_call, nesting, paging};

const DATA: u64 = SCRATCH + 0x800;

/// The number that the next object gets: what failed has left none behind.
fn free(world: &World) -> u32 {
    let id = world.ioas();
    world.destroy(id).unwrap();
    id
}

/// Lets each step of a call fail, and then none; gives what it made.
fn made<R>(world: &World, mut call: impl FnMut() -> Result<R, Errno>) -> R {
    let (before, mut last) = (free(world), None);
    let steps = each_step(
        || call().map(|made| last = Some(made)),
        || assert_eq!(free(world), before, "a number is taken"),
    );
    assert!(steps >= 1, "nothing of it can fail");
    last.unwrap()
}

#[test]
fn every_object_is_made_whole_or_not_at_all() {
    let (world, bound, ioas) = nesting();
    let dev_id = bound.id();
    world.map_fixed(ioas, VA, PAGE, 0x10_0000).unwrap();
    let flags = abi::HWPT_ALLOC_NEST_PARENT | abi::HWPT_ALLOC_PASID;
    let hwpt_id = made(&world, || paging(&world, dev_id, ioas, flags));
    let viommu = abi::ViommuAlloc {
        kind: KIND,
        dev_id,
        hwpt_id,
        data_len: 8,
        data_uptr: DATA,
        ..Default::default()
    };
    let viommu_id = made(&world, || world.call(viommu)).out_viommu_id;
    let vdevice = abi::VdeviceAlloc { viommu_id, dev_id, virt_id: 7, ..Default::default() };
    made(&world, || world.call(vdevice));
    made(&world, || nested(&world, dev_id, viommu_id, 0));
    let queue = abi::HwQueueAlloc {
        viommu_id,
        kind: QUEUES,
        nesting_parent_iova: 0x10_0000,
        length: PAGE,
        ..Default::default()
    };
    made(&world, || world.call(queue));
    let events =
        abi::VeventqAlloc { viommu_id, kind: EVENTS, veventq_depth: 1, ..Default::default() };
    made(&world, || world.call(events));
    let fault_id = made(&world, || world.call(abi::FaultQueueAlloc::default())).out_fault_id;
    let flags = abi::HWPT_FAULT_ID_VALID | abi::HWPT_ALLOC_PASID;
    let call = abi::HwptAlloc { flags, fault_id, ..nested_call(dev_id, hwpt_id) };
    made(&world, || world.call(call));
}

#[test]
fn attaching_moves_or_does_not() {
    let (world, bound, ioas) = nesting();
    let flags = abi::HWPT_ALLOC_NEST_PARENT | abi::HWPT_ALLOC_PASID;
    let parent = paging(&world, bound.id(), ioas, flags).unwrap();
    let guest = nested(&world, bound.id(), parent, abi::HWPT_ALLOC_PASID).unwrap();
    let errno = |result: lychgate_iommufd::Result<u32>| result.map_err(|refusal| refusal.errno);
    let pasid = Pasid::new(9).unwrap();
    made(&world, || {
        let attached = errno(bound.attach(guest));
        assert_eq!(attached.is_ok(), bound.is_attached());
        attached
    });
    made(&world, || errno(bound.replace(parent)));
    assert_eq!(world.destroy(parent), Err(Errno::EBUSY));
    made(&world, || {
        let attached = errno(bound.attach_pasid(pasid, guest));
        assert_eq!(attached.is_ok(), bound.is_pasid_attached(pasid));
        attached
    });
    made(&world, || errno(bound.replace_pasid(pasid, parent)));
    world.destroy(guest).unwrap();
}
