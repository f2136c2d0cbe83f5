//! Binding, attaching, replacing and detaching, as VFIO does it.

use std::sync::Arc;

use lychgate_iommu::{AttachError, Capability, DeviceId, Domain, ReservedKind, ReservedRegion};
use lychgate_iommufd::{BoundDevice, Context, Event, OpenFile, Result};
use lychgate_types::{Errno, Iova, Prot};

use crate::common::{PAGE, VA, World};

fn errno<T>(result: Result<T>) -> Errno {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(refusal) => refusal.errno,
    }
}

/// Whether the device's group is attached to a paging domain.
fn translated(world: &World, device: DeviceId) -> bool {
    let iommu = world.iommu.lock().unwrap();
    let domain = iommu.group_domain(iommu.group(device).unwrap()).unwrap();
    matches!(domain, Domain::Paging(_))
}

fn reserve(world: &World, requester: u16, first: u64, last: u64, kind: ReservedKind) {
    let (first, last) = (Iova::new(first), Iova::new(last));
    let region = ReservedRegion { first, last, prot: Prot::NONE, kind };
    world.driver.plan(|plan| plan.reserved.entry(requester).or_default().push(region));
}

#[test]
fn bind_checks_in_linux_order() {
    let world = World::new();
    let device = world.device(0x100);
    let context = world.reference();
    world.driver.plan(|plan| plan.capabilities.clear());
    assert_eq!(errno(context.bind(device)), Errno::EINVAL, "no coherent DMA");
    world.driver.plan(|plan| {
        plan.capabilities.insert(Capability::CacheCoherency);
    });
    assert_eq!(errno(context.bind(device)), Errno::EPERM, "interrupts are not isolated");
    let trusting = world.another(true);
    let trusting = Context::from_file(trusting.as_ref()).unwrap();
    let bound = trusting.bind(device).unwrap();
    assert!(!trusting.same(&context) && bound.context().same(&trusting));
    world.driver.plan(|plan| {
        plan.capabilities.insert(Capability::IsolatedMsi);
    });
    assert_eq!(errno(context.bind(device)), Errno::EPERM, "another file owns it");
    drop(bound);
    let bound = context.bind(device).unwrap();
    let group = world.iommu.lock().unwrap().group(device).unwrap();
    assert!(context.has_group(group) && !trusting.has_group(group));
    assert_eq!(context.device_object(device), Some(bound.id()));
    assert_eq!(world.destroy(bound.id()), Err(Errno::EBUSY));
    drop(bound);
    assert_eq!(context.device_object(device), None);
    world.iommu.lock().unwrap().remove(device);
    assert_eq!(errno(context.bind(device)), Errno::ENODEV);
}

#[test]
fn attaching_to_an_ioas_makes_a_page_table_that_goes_with_its_last_device() {
    let world = World::new();
    let (a, b) = (world.device(0x100), world.device(0x200));
    let context = world.reference();
    let (a, b) = (context.bind(a).unwrap(), context.bind(b).unwrap());
    let ioas = world.ioas();
    world.map_fixed(ioas, VA, PAGE, 0).unwrap();
    assert_eq!(errno(a.attach(99)), Errno::ENOENT);
    assert_eq!(errno(a.attach(b.id())), Errno::EINVAL, "a device");
    let hwpt = a.attach(ioas).unwrap();
    assert!(a.is_attached() && !b.is_attached());
    assert_eq!(errno(a.attach(ioas)), Errno::EBUSY);
    assert_eq!(errno(a.attach(hwpt)), Errno::EBUSY);
    assert_eq!(b.attach(ioas).unwrap(), hwpt, "shared by whom it fits");
    assert_eq!(world.driver.domains().len(), 1);
    assert_eq!(world.destroy(ioas), Err(Errno::EBUSY));
    assert_eq!(world.destroy(hwpt), Err(Errno::EBUSY));
    a.detach();
    a.detach();
    assert_eq!(world.client.mm.pinned(), 1);
    drop(b);
    assert_eq!(world.client.mm.pinned(), 0);
    assert_eq!(world.driver.domains().len(), 0);
    assert_eq!(world.destroy(hwpt), Err(Errno::ENOENT));
    world.destroy(ioas).unwrap();
}

#[test]
fn a_device_that_no_page_table_fits_gets_its_own() {
    let world = World::new();
    let (a, b) = (world.device(0x100), world.device(0x200));
    let context = world.reference();
    let (a, b) = (context.bind(a).unwrap(), context.bind(b).unwrap());
    world.driver.plan(|plan| {
        plan.picky.insert(0x200);
    });
    let ioas = world.ioas();
    let hwpt = a.attach(ioas).unwrap();
    assert_ne!(b.attach(ioas).unwrap(), hwpt);
    b.detach();
    assert_eq!(errno(b.attach(hwpt)), Errno::EINVAL);
    world.driver.plan(|plan| {
        plan.attach_error.insert(0x200, AttachError::OutOfMemory);
    });
    assert_eq!(errno(b.attach(ioas)), Errno::ENOMEM);
    world.driver.plan(|plan| {
        plan.attach_error.insert(0x200, AttachError::Incompatible);
    });
    assert_eq!(errno(b.attach(ioas)), Errno::EINVAL, "not even a new one");
    assert_eq!(world.driver.domains().len(), 1);
}

#[test]
fn explicit_page_tables_are_not_searched_and_stay() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let hwpt = world.hwpt(bound.id(), ioas).unwrap();
    let auto = bound.attach(ioas).unwrap();
    assert_ne!(auto, hwpt);
    bound.detach();
    assert_eq!(bound.attach(hwpt).unwrap(), hwpt);
    bound.detach();
    world.destroy(hwpt).unwrap();
}

#[test]
fn devices_of_a_group_go_to_one_page_table() {
    let world = World::new();
    let (a, b) = (world.function(0x100), world.function(0x101));
    let context = world.reference();
    let (a, b) = (context.bind(a).unwrap(), context.bind(b).unwrap());
    let (x, y) = (world.ioas(), world.ioas());
    let hwpt = world.hwpt(a.id(), x).unwrap();
    a.attach(hwpt).unwrap();
    let other = world.hwpt(a.id(), y).unwrap();
    assert_eq!(errno(b.attach(other)), Errno::EINVAL);
    assert_eq!(errno(b.attach(y)), Errno::EINVAL);
    assert_eq!(errno(b.attach(x)), Errno::EINVAL, "an automatic one is another one");
    assert_eq!(errno(b.replace(other)), Errno::EINVAL, "b is not attached");
    b.attach(hwpt).unwrap();
    a.replace(other).unwrap();
    assert_eq!(world.destroy(hwpt), Ok(()), "both have moved");
    a.detach();
    assert_eq!(world.destroy(other), Err(Errno::EBUSY), "b is still there");
    b.detach();
    assert_eq!(world.destroy(other), Ok(()));
}

#[test]
fn replace_moves_without_a_gap_or_not_at_all() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let (x, y) = (world.ioas(), world.ioas());
    assert_eq!(errno(bound.replace(x)), Errno::EINVAL);
    let hwpt = bound.attach(x).unwrap();
    assert_eq!(bound.replace(x).unwrap(), hwpt, "where it is");
    world.driver.plan(|plan| {
        plan.attach_error.insert(0x100, AttachError::Hardware);
    });
    assert_eq!(errno(bound.replace(y)), Errno::EIO);
    assert!(bound.is_attached() && translated(&world, device));
    world.driver.plan(|plan| plan.attach_error.clear());
    reserve(&world, 0x100, 0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi);
    world.map_fixed(y, VA, PAGE, 0xfee0_0000).unwrap();
    assert_eq!(errno(bound.replace(y)), Errno::EADDRINUSE);
    world.unmap(y, 0, u64::MAX).unwrap();
    bound.replace(y).unwrap();
    assert_eq!(world.ranges(x).0, [(0, u64::MAX)]);
    assert_eq!(world.ranges(y).0, [(0, 0xfedf_ffff), (0xfef0_0000, (1 << 48) - 1)]);
    assert_eq!(world.driver.domains().len(), 1);
    assert_eq!(world.destroy(x), Ok(()));
}

#[test]
fn what_devices_reserve_cannot_be_mapped() {
    let world = World::new();
    let device = world.device(0x100);
    reserve(&world, 0x100, 0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi);
    reserve(&world, 0x100, 0x1000, 0x1fff, ReservedKind::DirectRelaxable);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    world.map_fixed(ioas, VA, PAGE, 0xfeef_f000).unwrap();
    assert_eq!(errno(bound.attach(ioas)), Errno::EADDRINUSE);
    assert!(!bound.is_attached() && !translated(&world, device));
    assert_eq!(world.driver.domains().len(), 0);
    world.unmap(ioas, 0, u64::MAX).unwrap();
    world.allow(ioas, &[(0, 0xffff_ffff)]).unwrap();
    assert_eq!(errno(bound.attach(ioas)), Errno::EADDRINUSE, "allowed");
    world.allow(ioas, &[]).unwrap();
    bound.attach(ioas).unwrap();
    assert_eq!(world.map_fixed(ioas, VA, PAGE, 0xfeef_f000), Err(Errno::EINVAL));
    assert_eq!(world.map_fixed(ioas, VA, PAGE, 0x1000), Ok(0x1000), "relaxable");
    bound.detach();
    assert_eq!(world.ranges(ioas).0, [(0, u64::MAX)]);
}

#[test]
fn the_journal_tells_what_is_attached_where() {
    let world = World::new();
    let device = world.device(0x100);
    let bdf = world.iommu.lock().unwrap().bdf(device).unwrap();
    let bound = world.reference().bind(device).unwrap();
    bound.attach(world.ioas()).unwrap();
    bound.replace(world.ioas()).unwrap();
    drop(bound);
    let events = world.journal.take();
    let [Event::Attached { ioas: x, .. }, Event::Attached { ioas: y, .. }, end] = events[..] else {
        panic!("{events:?}");
    };
    assert_ne!(x, y);
    assert_eq!(end, Event::Detached { device: bdf });
}

#[test]
fn a_closed_file_lasts_until_its_last_device_is_let_go() {
    let world = World::new();
    let device = world.device(0x100);
    let bound: BoundDevice = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    bound.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, PAGE, 0).unwrap();
    world.context.release();
    assert_eq!(world.client.mm.pinned(), 1);
    assert!(translated(&world, device));
    drop(bound);
    assert_eq!(world.client.mm.pinned(), 0);
    assert!(!translated(&world, device));
    assert_eq!(world.driver.domains().len(), 0);
    let events = world.journal.take();
    assert!(matches!(events.last(), Some(Event::Unmapped { iova: 0, len: PAGE, .. })));
    assert_eq!(Arc::strong_count(&world.context), 1);
}

#[test]
fn closing_takes_page_tables_before_what_they_map() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let (a, b) = (world.ioas(), world.ioas());
    world.hwpt(bound.id(), b).unwrap();
    world.hwpt(bound.id(), a).unwrap();
    world.map_fixed(a, VA, 3 * PAGE, 0).unwrap();
    world.copy((a, PAGE), (b, 0), PAGE).unwrap();
    drop(bound);
    assert_eq!(world.client.mm.pinned(), 3);
    world.context.release();
    assert_eq!(world.client.mm.pinned(), 0);
    assert_eq!(world.driver.domains().len(), 0);
}
