//! Every step of making a mock device and of pinning through an access can fail, and leaves nothing
//! behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lychgate_iommufd::FaultInjection;
use lychgate_iommufd::fault_injection::{Step, decide_by};
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;

use crate::common::{BASE, PAGE, World};

const IOVA: u64 = abi::APERTURE_START;

struct Nth(AtomicU32);

impl FaultInjection for Nth {
    fn should_fail(&self, _: Step) -> bool {
        let count = |left: u32| left.checked_sub(1);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count) == Ok(1)
    }
}

/// Runs `body` with the first, the second, ... step failing, until no step fails any more; gives how
/// often one did.
fn each_step(body: impl Fn(&World) -> Result<(), Errno>) -> u32 {
    for nth in 1.. {
        let world = World::new();
        let faults = Arc::new(Nth(AtomicU32::new(nth)));
        decide_by(Some(Arc::<Nth>::clone(&faults)));
        let result = body(&world);
        decide_by(None);
        if faults.0.load(Ordering::Relaxed) != 0 {
            result.unwrap();
            return nth - 1;
        }
        if let Err(errno) = result {
            assert!(matches!(errno, Errno::ENOMEM | Errno::EFAULT), "step {nth}: {errno}");
        }
    }
    unreachable!("some n is beyond the last step")
}

#[test]
fn making_and_attaching_a_mock_device_fails_at_each_step_without_a_trace() {
    let failed = each_step(|world| {
        let ioas = world.ioas_or()?;
        world.map(ioas, BASE, 4 * PAGE, IOVA)?;
        let mock = world.mock(ioas, 0)?;
        world.check_refs(BASE, 4 * PAGE, 1)?;
        world.destroy(mock.stdev)
    });
    assert!(failed >= 5, "{failed} steps failed");
}

#[test]
fn pinning_through_an_access_fails_at_each_step_without_a_trace() {
    let failed = each_step(|world| {
        let ioas = world.ioas_or()?;
        world.map(ioas, BASE, 4 * PAGE, IOVA)?;
        let access =
            abi::CreateAccess { flags: abi::ACCESS_CREATE_NEEDS_PIN_PAGES, ..Default::default() };
        let fd = world.test(op::CREATE_ACCESS, ioas, access)?.out_access_fd;
        let pin = abi::AccessPages { iova: IOVA, length: PAGE, uptr: BASE, ..Default::default() };
        let pinned = world.test(op::ACCESS_PAGES, fd, pin).map(drop);
        world.process.close(i32::try_from(fd).unwrap());
        pinned
    });
    assert!(failed >= 3, "{failed} steps failed");
}
