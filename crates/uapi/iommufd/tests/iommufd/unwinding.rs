//! Whatever fails in the middle leaves no trace.

use lychgate_types::Errno;

use crate::common::{PAGE, VA, World};

#[test]
fn a_map_that_fails_in_any_domain_is_undone_in_all() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    for _ in 0..3 {
        world.hwpt(bound.id(), ioas).unwrap();
    }
    for left in 0..3 {
        world.driver.plan(|plan| plan.maps_left = Some(left));
        assert_eq!(world.map_fixed(ioas, VA, 4 * PAGE, 0), Err(Errno::ENOMEM));
        assert_eq!(world.client.mm.pinned(), 0);
        assert!(world.driver.domains().iter().all(|domain| domain.pages().is_empty()));
    }
    world.driver.plan(|plan| plan.maps_left = None);
    assert_eq!(world.map_fixed(ioas, VA, 4 * PAGE, 0), Ok(0), "nothing is in the way");
}

#[test]
fn memory_that_is_not_there_is_not_mapped() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    world.hwpt(bound.id(), ioas).unwrap();
    world.client.mm.books.lock().unwrap().end = Some(VA + 2 * PAGE);
    assert_eq!(world.map_fixed(ioas, VA, 4 * PAGE, 0), Err(Errno::EFAULT));
    assert_eq!(world.map_fixed(ioas, u64::MAX - 0xffff, PAGE, 0), Err(Errno::EFAULT));
    assert_eq!(world.map_fixed(ioas, u64::MAX - 0xfff, 0xfff, 0), Err(Errno::EINVAL));
    assert_eq!(world.map_fixed(ioas, VA, 2 * PAGE, 0), Ok(0));
}

#[test]
fn a_page_table_that_cannot_hold_everything_is_not_made() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    for area in 0..4 {
        world.map_fixed(ioas, VA + area * 0x10_0000, 4 * PAGE, area * 0x10_0000).unwrap();
    }
    let unchanged = |world: &World, pinned| {
        assert_eq!(world.client.mm.pinned(), pinned);
        assert_eq!(world.ranges(ioas), (vec![(0, u64::MAX)], 1));
    };
    for left in 0..4 {
        world.driver.plan(|plan| plan.maps_left = Some(left));
        assert_eq!(world.hwpt(bound.id(), ioas), Err(Errno::ENOMEM));
        unchanged(&world, 0);
        assert_eq!(bound.attach(ioas).unwrap_err().errno, Errno::ENOMEM);
        assert!(!bound.is_attached());
        unchanged(&world, 0);
    }
    world.driver.plan(|plan| plan.maps_left = None);
    for left in 0..4 {
        world.client.mm.books.lock().unwrap().pins_left = Some(left);
        assert_eq!(world.hwpt(bound.id(), ioas), Err(Errno::EFAULT));
        unchanged(&world, 0);
        assert_eq!(bound.attach(ioas).unwrap_err().errno, Errno::EFAULT);
        unchanged(&world, 0);
    }
    world.client.mm.books.lock().unwrap().pins_left = None;
    bound.attach(ioas).unwrap();
    assert_eq!(world.client.mm.pinned(), 16);
    for left in 0..4 {
        world.driver.plan(|plan| plan.maps_left = Some(left));
        assert_eq!(world.hwpt(bound.id(), ioas), Err(Errno::ENOMEM));
        assert_eq!(world.client.mm.pinned(), 16, "what the first one pinned stays");
        assert_eq!(world.driver.domains()[0].pages().len(), 16);
    }
    drop(bound);
    unchanged(&world, 0);
}

#[test]
fn a_replacement_that_cannot_hold_everything_leaves_the_old_page_table() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let (a, b) = (world.ioas(), world.ioas());
    world.map_fixed(a, VA, PAGE, 0).unwrap();
    world.map_fixed(b, VA, PAGE, 0).unwrap();
    world.map_fixed(b, VA + PAGE, PAGE, 0x10_0000).unwrap();
    let hwpt = bound.attach(a).unwrap();
    world.driver.plan(|plan| plan.maps_left = Some(1));
    assert_eq!(bound.replace(b).unwrap_err().errno, Errno::ENOMEM);
    assert_eq!(world.client.mm.pinned(), 1);
    assert_eq!(bound.replace(hwpt).unwrap(), hwpt);
    assert_eq!(world.destroy(b), Ok(()));
}

#[test]
fn a_page_by_page_map_is_undone_page_by_page() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    world.huge_pages(ioas, 0).unwrap();
    bound.attach(ioas).unwrap();
    world.driver.plan(|plan| plan.maps_left = Some(5));
    assert_eq!(world.map_fixed(ioas, VA, 8 * PAGE, 0), Err(Errno::ENOMEM));
    assert!(world.driver.domains()[0].pages().is_empty());
    assert_eq!(world.client.mm.pinned(), 0);
}
