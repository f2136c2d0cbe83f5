//! Calls of which the n-th step fails on purpose: each leaves everything as it was.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lychgate_iommufd::abi::iommufd as abi;
use lychgate_iommufd::fault_injection::{FaultInjection, Step, decide_by};
use lychgate_iommufd::{AccessOps, Accounting, BoundDevice};
use lychgate_types::Errno;

use crate::common::{FakeFile, PAGE, VA, World};

/// Lets the step fail that is so many steps ahead.
struct Nth(AtomicU32);

impl FaultInjection for Nth {
    fn should_fail(&self, _: Step) -> bool {
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
            == Ok(1)
    }
}

struct Keeper;

impl AccessOps for Keeper {
    fn unmap(&self, _: u64, _: u64) {}
}

/// Runs `call` again and again, each time with a later step that fails, until none does. After every
/// failure `unchanged` looks whether it left a trace. Gives the number of steps.
pub(crate) fn each_step<R>(
    mut call: impl FnMut() -> Result<R, Errno>,
    mut unchanged: impl FnMut(),
) -> u32 {
    for step in 1..1000 {
        let nth = Arc::new(Nth(AtomicU32::new(step)));
        decide_by(Some(Arc::clone(&nth) as _));
        let result = call();
        decide_by(None);
        let reached = nth.0.load(Ordering::Relaxed) == 0;
        match result {
            Ok(_) if !reached => return step - 1,
            Ok(_) => panic!("step {step} failed, and the call did not notice"),
            Err(errno) => {
                assert!(reached, "step {step} was not reached: {errno}");
                let known = matches!(errno, Errno::ENOMEM | Errno::EFAULT | Errno::EINVAL);
                assert!(known, "step {step}: {errno}");
                unchanged();
            }
        }
    }
    panic!("it never ends");
}

fn bound(world: &World) -> BoundDevice {
    let device = world.device(0x100);
    world.reference().bind(device).unwrap()
}

fn errno<T>(result: lychgate_iommufd::Result<T>) -> Result<T, Errno> {
    result.map_err(|refusal| refusal.errno)
}

#[test]
fn a_map_fails_as_a_whole() {
    let world = World::new();
    let (bound, ioas) = (bound(&world), world.ioas());
    world.hwpt(bound.id(), ioas).unwrap();
    world.hwpt(bound.id(), ioas).unwrap();
    let steps = each_step(
        || world.map_fixed(ioas, VA, 4 * PAGE, 0x10_0000),
        || {
            assert_eq!(world.client.mm.pinned(), 0);
            assert_eq!(world.client.mm.charged(Accounting::User), 0);
            assert!(world.driver.domains().iter().all(|domain| domain.pages().is_empty()));
        },
    );
    assert!(steps >= 3, "memory, area and pin: {steps}");
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(4 * PAGE));
}

#[test]
fn a_map_of_a_file_fails_as_a_whole() {
    let world = World::new();
    let (bound, ioas) = (bound(&world), world.ioas());
    world.hwpt(bound.id(), ioas).unwrap();
    let file = FakeFile::new(8 * PAGE);
    world.client.files.lock().unwrap().insert(5, Some(Arc::clone(&file)));
    let map = abi::IoasMapFile {
        flags: abi::MAP_READABLE,
        ioas_id: ioas,
        fd: 5,
        length: 8 * PAGE,
        ..Default::default()
    };
    each_step(
        || world.call(map),
        || assert!(file.books.lock().unwrap().pins.is_empty() && Arc::strong_count(&file) == 2),
    );
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(8 * PAGE));
}

#[test]
fn a_copy_fails_as_a_whole() {
    let world = World::new();
    let (bound, from, to) = (bound(&world), world.ioas(), world.ioas());
    world.hwpt(bound.id(), to).unwrap();
    for area in 0..3 {
        world.map_fixed(from, VA + area * 8 * PAGE, 2 * PAGE, area * 2 * PAGE).unwrap();
    }
    each_step(
        || world.copy((from, 0), (to, 0x10_0000), 6 * PAGE),
        || assert_eq!((world.client.mm.pinned(), world.driver.domains()[0].pages().len()), (0, 0)),
    );
    assert_eq!(world.driver.domains()[0].pages().len(), 6);
}

#[test]
fn a_page_table_fails_as_a_whole() {
    let world = World::new();
    let (bound, ioas) = (bound(&world), world.ioas());
    for area in 0..3 {
        world.map_fixed(ioas, VA + area * 8 * PAGE, 2 * PAGE, area * 0x10_0000).unwrap();
    }
    let nothing = || {
        assert_eq!((world.client.mm.pinned(), world.driver.domains().len()), (0, 0));
        assert_eq!(world.ranges(ioas), (vec![(0, u64::MAX)], 1));
    };
    each_step(|| world.hwpt(bound.id(), ioas), nothing);
    let hwpt = world.hwpt(bound.id(), ioas).unwrap();
    world.destroy(hwpt).unwrap();
    world.destroy(hwpt - 1).unwrap();
    nothing();
    each_step(
        || errno(bound.attach(ioas)),
        || {
            assert!(!bound.is_attached());
            nothing();
        },
    );
    assert_eq!(world.client.mm.pinned(), 6);
}

#[test]
fn a_pin_of_an_access_fails_as_a_whole() {
    let world = World::new();
    let ioas = world.ioas();
    let access = world.reference().create_access(Arc::new(Keeper), true).unwrap();
    each_step(|| errno(access.attach(ioas)), || assert_eq!(world.ranges(ioas).1, 1));
    for area in 0..3 {
        world.map_fixed(ioas, VA + area * 8 * PAGE, 2 * PAGE, area * 2 * PAGE).unwrap();
    }
    let unpinned = || assert_eq!(world.client.mm.pinned(), 0);
    each_step(|| errno(access.pin_pages(PAGE, 4 * PAGE, true)), unpinned);
    assert_eq!(world.client.mm.pinned(), 4);
    access.unpin_pages(PAGE, 4 * PAGE);
    unpinned();
    each_step(|| errno(access.read(0xffc, &mut [0; 0x2000], None)), unpinned);
    each_step(|| errno(access.write(0xffc, &[0; 0x2000], None)), unpinned);
    unpinned();
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(6 * PAGE), "nothing is left that is asked for");
}

#[test]
fn what_is_made_fails_as_a_whole() {
    let world = World::new();
    let ids = || (world.ioas(), world.reference());
    each_step(|| world.call(abi::IoasAlloc::default()), || ());
    let (ioas, context) = ids();
    world.destroy(ioas).unwrap();
    let next = ioas;
    let made = std::cell::RefCell::new(Vec::new());
    each_step(
        || {
            errno(context.create_access(Arc::new(Keeper), false))
                .map(|access| made.borrow_mut().push(access))
        },
        || assert!(made.borrow().is_empty()),
    );
    assert_eq!(made.borrow()[0].id(), next, "no number is lost");
}
