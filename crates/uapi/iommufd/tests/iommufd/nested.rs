//! Nested page tables, and what guests tell of them.

use std::sync::Arc;

use lychgate_iommu::DomainKind;
use lychgate_iommufd::BoundDevice;
use lychgate_iommufd::abi::iommufd as abi;
use lychgate_types::Errno;

use crate::common::{BAD_REQUEST, FakeNested, KIND, PAGE, SCRATCH, VA, World};

/// Where vendor data and requests are put.
const DATA: u64 = SCRATCH + 0x800;

/// A machine with nesting, and a device of it in an IOAS.
pub(crate) fn nesting() -> (World, BoundDevice, u32) {
    let world = World::new();
    world.driver.plan(|plan| {
        plan.nesting.supported = true;
        plan.nesting.max_pasids = 1 << 16;
        plan.nesting.page_requests = true;
    });
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    (world, bound, ioas)
}

/// `IOMMU_HWPT_ALLOC` with flags, of a page table of an IOAS.
pub(crate) fn paging(world: &World, dev_id: u32, pt_id: u32, flags: u32) -> Result<u32, Errno> {
    let alloc = abi::HwptAlloc { dev_id, pt_id, flags, ..Default::default() };
    world.call(alloc).map(|alloc| alloc.out_hwpt_id)
}

/// The call for a nested page table.
pub(crate) fn nested_call(dev_id: u32, pt_id: u32) -> abi::HwptAlloc {
    abi::HwptAlloc {
        dev_id,
        pt_id,
        data_type: KIND,
        data_len: 4,
        data_uptr: DATA,
        ..Default::default()
    }
}

pub(crate) fn nested(world: &World, dev_id: u32, pt_id: u32, flags: u32) -> Result<u32, Errno> {
    let call = abi::HwptAlloc { flags, ..nested_call(dev_id, pt_id) };
    world.call(call).map(|alloc| alloc.out_hwpt_id)
}

fn domains(world: &World) -> Vec<Arc<FakeNested>> {
    let plan = world.driver.plan.lock().unwrap();
    plan.nesting.domains.iter().filter_map(std::sync::Weak::upgrade).collect()
}

#[test]
fn alloc_on_a_page_table_checks_in_linux_order() {
    let (world, bound, ioas) = nesting();
    let dev = bound.id();
    let parent = paging(&world, dev, ioas, abi::HWPT_ALLOC_NEST_PARENT).unwrap();
    let other = paging(&world, dev, ioas, 0).unwrap();
    let auto = bound.attach(ioas).unwrap();
    let alloc = |call: abi::HwptAlloc| world.call(call).map(|call| call.out_hwpt_id);
    let good = nested_call(dev, parent);
    let flags = |flags| alloc(abi::HwptAlloc { flags, pt_id: other, ..good });
    assert_eq!(flags(abi::HWPT_ALLOC_NEST_PARENT), Err(Errno::EOPNOTSUPP));
    assert_eq!(flags(abi::HWPT_ALLOC_DIRTY_TRACKING), Err(Errno::EOPNOTSUPP));
    let none = abi::HwptAlloc { data_type: 0, data_len: 0, ..good };
    assert_eq!(alloc(none), Err(Errno::EOPNOTSUPP), "no vendor data");
    assert_eq!(alloc(abi::HwptAlloc { pt_id: other, ..good }), Err(Errno::EINVAL));
    assert_eq!(alloc(abi::HwptAlloc { pt_id: auto, ..good }), Err(Errno::EINVAL));
    assert_eq!(alloc(abi::HwptAlloc { data_uptr: 0, ..good }), Err(Errno::EFAULT));
    assert_eq!(alloc(abi::HwptAlloc { data_len: 3, ..good }), Err(Errno::EINVAL), "the driver's");
    assert_eq!(alloc(abi::HwptAlloc { data_type: 1, ..good }), Err(Errno::EOPNOTSUPP));
    let faults = abi::HwptAlloc { flags: abi::HWPT_FAULT_ID_VALID, fault_id: 99, ..good };
    assert_eq!(alloc(faults), Err(Errno::ENOENT));
    assert_eq!(domains(&world).len(), 0, "what failed left nothing behind");
    let nested = alloc(good).unwrap();
    assert_eq!(alloc(abi::HwptAlloc { pt_id: nested, ..good }), Err(Errno::EINVAL));
    assert_eq!(world.destroy(parent), Err(Errno::EBUSY));
    world.destroy(nested).unwrap();
    world.destroy(parent).unwrap();
    assert_eq!(domains(&world).len(), 0);
}

#[test]
fn a_device_goes_from_stage_to_stage() {
    let (world, bound, ioas) = nesting();
    let parent = paging(&world, bound.id(), ioas, abi::HWPT_ALLOC_NEST_PARENT).unwrap();
    let a = nested(&world, bound.id(), parent, 0).unwrap();
    let b = nested(&world, bound.id(), parent, 0).unwrap();
    let group = {
        let iommu = world.iommu.lock().unwrap();
        iommu.group(iommu.find("0000:01:00.0".parse().unwrap()).unwrap()).unwrap()
    };
    let kind = || world.iommu.lock().unwrap().group_domain(group).unwrap().kind();
    assert_eq!(bound.attach(a).unwrap(), a);
    assert_eq!(kind(), DomainKind::Nested);
    assert_eq!(world.destroy(a), Err(Errno::EBUSY));
    bound.replace(b).unwrap();
    assert_eq!(world.destroy(a), Ok(()));
    assert_eq!(bound.replace(ioas).map(|_| kind()).unwrap(), DomainKind::Paging);
    bound.replace(b).unwrap();
    bound.detach();
    assert_eq!(kind(), DomainKind::Blocked);
    assert_eq!(world.destroy(b), Ok(()));
}

#[test]
fn what_devices_reserve_is_reserved_in_the_second_stage() {
    use lychgate_iommu::{ReservedKind, ReservedRegion};
    use lychgate_types::{Iova, Prot};
    let (world, bound, ioas) = nesting();
    let region = ReservedRegion {
        first: Iova::new(0xfee0_0000),
        last: Iova::new(0xfeef_ffff),
        prot: Prot::WRITE,
        kind: ReservedKind::Msi,
    };
    world.driver.plan(|plan| {
        plan.reserved.insert(0x100, vec![region]);
    });
    let parent = paging(&world, bound.id(), ioas, abi::HWPT_ALLOC_NEST_PARENT).unwrap();
    let nested = nested(&world, bound.id(), parent, 0).unwrap();
    world.map_fixed(ioas, VA, PAGE, 0xfee0_0000).unwrap();
    assert_eq!(bound.attach(nested).map_err(|refusal| refusal.errno), Err(Errno::EADDRINUSE));
    world.unmap(ioas, 0xfee0_0000, PAGE).unwrap();
    bound.attach(nested).unwrap();
    assert_eq!(world.map_fixed(ioas, VA, PAGE, 0xfee0_0000), Err(Errno::EINVAL));
    bound.replace(parent).unwrap();
    assert_eq!(world.map_fixed(ioas, VA, PAGE, 0xfee0_0000), Err(Errno::EINVAL), "still there");
    bound.detach();
    assert_eq!(world.map_fixed(ioas, VA, PAGE, 0xfee0_0000), Ok(0xfee0_0000));
}

#[test]
fn invalidations_tell_how_far_they_came() {
    let (world, bound, ioas) = nesting();
    let parent = paging(&world, bound.id(), ioas, abi::HWPT_ALLOC_NEST_PARENT).unwrap();
    let hwpt_id = nested(&world, bound.id(), parent, 0).unwrap();
    let domain = domains(&world).remove(0);
    let good = abi::HwptInvalidate {
        hwpt_id,
        data_uptr: DATA,
        data_type: KIND,
        entry_len: 4,
        entry_num: 2,
        ..Default::default()
    };
    let ask = |call: abi::HwptInvalidate| {
        let (after, result) = world.call_both(call);
        (after.entry_num, result.map_err(|refusal| refusal.errno))
    };
    let words = |words: &[u32]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        world.client.put(DATA, &bytes);
    };
    words(&[1, 2]);
    let fails = |call, errno| assert_eq!(ask(call), (0, Err(errno)));
    fails(abi::HwptInvalidate { reserved: 1, ..good }, Errno::EOPNOTSUPP);
    fails(abi::HwptInvalidate { data_uptr: 0, hwpt_id: 99, ..good }, Errno::EINVAL);
    fails(abi::HwptInvalidate { entry_len: 0, hwpt_id: 99, ..good }, Errno::EINVAL);
    fails(abi::HwptInvalidate { entry_len: 4097, hwpt_id: 99, ..good }, Errno::EINVAL);
    fails(abi::HwptInvalidate { entry_num: (1 << 19) + 1, hwpt_id: 99, ..good }, Errno::EINVAL);
    fails(abi::HwptInvalidate { hwpt_id: 99, ..good }, Errno::ENOENT);
    fails(abi::HwptInvalidate { hwpt_id: parent, ..good }, Errno::EINVAL);
    fails(abi::HwptInvalidate { data_type: KIND + 1, ..good }, Errno::EINVAL);
    fails(abi::HwptInvalidate { entry_len: 1, ..good }, Errno::EINVAL);
    fails(abi::HwptInvalidate { data_uptr: 8, ..good }, Errno::EFAULT);
    assert!(domain.invalidated.lock().unwrap().is_empty());
    let none = abi::HwptInvalidate { entry_num: 0, data_uptr: 0, entry_len: 0, ..good };
    assert_eq!(ask(none), (0, Ok(())), "asks whether the type is known");
    assert_eq!(ask(good), (2, Ok(())));
    words(&[3, BAD_REQUEST]);
    assert_eq!(ask(good), (1, Err(Errno::EIO)));
    // Longer structures than the driver knows are zero at their end, shorter ones are filled up.
    words(&[4, 0, 5, 1]);
    let long = abi::HwptInvalidate { entry_len: 8, ..good };
    assert_eq!(ask(long), (1, Err(Errno::E2BIG)));
    assert_eq!(ask(abi::HwptInvalidate { entry_len: 2, ..good }), (2, Ok(())));
    assert_eq!(*domain.invalidated.lock().unwrap(), [1, 2, 3, 4, 4, 0]);
    *world.client.read_only_from.lock().unwrap() = 0;
    words(&[6, 7]);
    assert_eq!(ask(good).1, Err(Errno::EFAULT), "whatever came of it");
}
