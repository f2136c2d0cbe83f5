//! Attaching PASIDs.

use lychgate_iommu::{AttachError, DomainKind};
use lychgate_iommufd::abi::iommufd as abi;
use lychgate_types::{Errno, Pasid};

use crate::common::World;
use crate::nested::{nested, nesting, paging};

fn pasid(number: u32) -> Pasid {
    Pasid::new(number).unwrap()
}

fn kind(world: &World, pasid: u32) -> Option<DomainKind> {
    world.driver.plan.lock().unwrap().nesting.pasids.get(&(0x100, pasid)).copied()
}

fn errno<T>(result: lychgate_iommufd::Result<T>) -> Errno {
    result.map(|_| ()).unwrap_err().errno
}

#[test]
fn page_tables_beside_pasids_are_allocated_for_that() {
    let (world, bound, ioas) = nesting();
    let dev = bound.id();
    let plain = paging(&world, dev, ioas, 0).unwrap();
    let able = paging(&world, dev, ioas, abi::HWPT_ALLOC_PASID).unwrap();
    assert_eq!(errno(bound.attach_pasid(pasid(5), 99)), Errno::ENOENT);
    assert_eq!(errno(bound.attach_pasid(pasid(5), dev)), Errno::EINVAL);
    assert_eq!(errno(bound.attach_pasid(pasid(5), plain)), Errno::EINVAL);
    assert_eq!(errno(bound.attach_pasid(pasid(5), ioas)), Errno::EINVAL, "automatic ones are not");
    assert_eq!(world.driver.domains().len(), 2);
    bound.attach(plain).unwrap();
    assert_eq!(errno(bound.attach_pasid(pasid(5), able)), Errno::EINVAL);
    bound.replace(able).unwrap();
    bound.attach_pasid(pasid(5), able).unwrap();
    assert_eq!(errno(bound.replace(plain)), Errno::EINVAL);
    assert_eq!(errno(bound.replace(ioas)), Errno::EINVAL);
    bound.detach();
    assert_eq!(errno(bound.attach(plain)), Errno::EINVAL, "5 is still there");
    bound.attach(able).unwrap();
    bound.detach_pasid(pasid(5));
    bound.replace(plain).unwrap();
    bound.detach();
    bound.attach_pasid(pasid(6), able).unwrap();
    assert_eq!(bound.attached_pasids(), [pasid(6)], "without anything beside it");
}

#[test]
fn a_pasid_is_attached_once_and_replaced_whole() {
    let (world, bound, ioas) = nesting();
    let dev = bound.id();
    let flags = abi::HWPT_ALLOC_PASID | abi::HWPT_ALLOC_NEST_PARENT;
    let parent = paging(&world, dev, ioas, flags).unwrap();
    let first = nested(&world, dev, parent, abi::HWPT_ALLOC_PASID).unwrap();
    let plain = nested(&world, dev, parent, 0).unwrap();
    bound.detach_pasid(pasid(5));
    assert_eq!(errno(bound.replace_pasid(pasid(5), parent)), Errno::EINVAL, "not attached");
    assert_eq!(bound.attach_pasid(pasid(5), parent).unwrap(), parent);
    assert_eq!(errno(bound.attach_pasid(pasid(5), parent)), Errno::EBUSY);
    assert_eq!(errno(bound.attach_pasid(pasid(5), first)), Errno::EBUSY);
    assert_eq!(bound.replace_pasid(pasid(5), parent).unwrap(), parent, "where it is");
    assert_eq!(errno(bound.replace_pasid(pasid(5), plain)), Errno::EINVAL);
    world.driver.plan(|plan| plan.nesting.pasid_error = Some(AttachError::OutOfMemory));
    assert_eq!(errno(bound.replace_pasid(pasid(5), first)), Errno::ENOMEM);
    assert_eq!(errno(bound.attach_pasid(pasid(6), first)), Errno::ENOMEM);
    assert_eq!(bound.attached_pasids(), [pasid(5)]);
    assert_eq!(kind(&world, 5), Some(DomainKind::Paging), "the old one");
    assert_eq!(world.destroy(first), Ok(()), "nothing holds it");
    world.driver.plan(|plan| plan.nesting.pasid_error = None);
    let first = nested(&world, dev, parent, abi::HWPT_ALLOC_PASID).unwrap();
    bound.replace_pasid(pasid(5), first).unwrap();
    assert_eq!(kind(&world, 5), Some(DomainKind::Nested));
    assert_eq!(world.destroy(first), Err(Errno::EBUSY));
    bound.detach_pasid(pasid(5));
    assert_eq!(kind(&world, 5), Some(DomainKind::Blocked));
    assert_eq!(world.destroy(first), Ok(()));
}

#[test]
fn a_pasid_that_the_device_cannot_use_is_refused() {
    let (world, bound, ioas) = nesting();
    let able = paging(&world, bound.id(), ioas, abi::HWPT_ALLOC_PASID).unwrap();
    assert_eq!(errno(bound.attach_pasid(pasid(1 << 16), able)), Errno::EINVAL);
    bound.attach_pasid(pasid((1 << 16) - 1), able).unwrap();
    bound.detach_pasid(pasid((1 << 16) - 1));
    world.driver.plan(|plan| plan.nesting.max_pasids = 0);
    assert_eq!(errno(bound.attach_pasid(pasid(1), able)), Errno::EOPNOTSUPP);
}

#[test]
fn unbinding_detaches_pasids_too() {
    let (world, bound, ioas) = nesting();
    let able = paging(&world, bound.id(), ioas, abi::HWPT_ALLOC_PASID).unwrap();
    bound.attach_pasid(pasid(7), able).unwrap();
    bound.attach(able).unwrap();
    bound.attach_pasid(pasid(3), able).unwrap();
    assert_eq!(bound.attached_pasids(), [pasid(3), pasid(7)]);
    drop(bound);
    assert_eq!(kind(&world, 3), Some(DomainKind::Blocked));
    assert_eq!(kind(&world, 7), Some(DomainKind::Blocked));
    assert_eq!(world.destroy(able), Ok(()));
}
