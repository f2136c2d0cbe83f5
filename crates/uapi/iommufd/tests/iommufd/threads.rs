//! Calls from several threads at once.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use lychgate_iommufd::abi::{Argument, iommufd as abi};
use lychgate_iommufd::{Access, AccessOps, Context, OpenFile};

use crate::common::{FakeClient, FakeMm, PAGE, SCRATCH, VA, World};

const ROUNDS: u64 = 300;

/// Calls with a structure of the thread's own.
fn call<A: Argument>(context: &Context, client: &FakeClient, argument: A) -> A {
    client.put(SCRATCH, argument.as_bytes());
    client.put(SCRATCH, &u32::try_from(size_of::<A>()).unwrap().to_le_bytes());
    context.ioctl(client, A::COMMAND, SCRATCH).map(|_| ()).unwrap();
    A::read_from_bytes(&client.get(SCRATCH, size_of::<A>())).unwrap()
}

/// Maps, copies and unmaps pages that no other thread names.
fn map_and_unmap(context: &Context, mm: Arc<FakeMm>, ioas_id: u32, thread: u64) {
    let client = FakeClient::with_mm(mm);
    let flags = abi::MAP_READABLE | abi::MAP_WRITEABLE;
    for round in 0..ROUNDS {
        let pages = 1 + round % 5;
        let user_va = VA + (thread * 3 + round % 7) * PAGE;
        let length = pages * PAGE;
        let map = abi::IoasMap { flags, ioas_id, user_va, length, ..Default::default() };
        let src_iova = call(context, &client, map).iova;
        let copy = abi::IoasCopy {
            flags,
            dst_ioas_id: ioas_id,
            src_ioas_id: ioas_id,
            length: PAGE,
            src_iova,
            ..Default::default()
        };
        let dst_iova = call(context, &client, copy).dst_iova;
        for (iova, length) in [(src_iova, length), (dst_iova, PAGE)] {
            let unmap = abi::IoasUnmap { ioas_id, iova, length, ..Default::default() };
            assert_eq!(call(context, &client, unmap).length, length);
        }
    }
}

#[test]
fn maps_go_on_while_devices_come_and_go() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    world.map_fixed(ioas, VA, 16 * PAGE, 1 << 32).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (context, mm) = (&world.context, Arc::clone(&world.client.mm));
            scope.spawn(move || map_and_unmap(context, mm, ioas, thread));
        }
        for _ in 0..ROUNDS {
            bound.attach(ioas).unwrap();
            bound.detach();
        }
    });
    assert_eq!(world.client.mm.pinned(), 0);
    bound.attach(ioas).unwrap();
    assert_eq!(world.client.mm.pinned(), 16);
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(16 * PAGE));
}

/// What a kernel user has pinned, and how it unpins: first IOVA and length in bytes.
#[derive(Default)]
struct Pinned {
    access: OnceLock<Weak<Access>>,
    ranges: Mutex<Vec<(u64, u64)>>,
}

impl AccessOps for Pinned {
    fn unmap(&self, iova: u64, len: u64) {
        let last = iova.saturating_add(len - 1);
        let access = self.access.get().and_then(Weak::upgrade).unwrap();
        self.ranges.lock().unwrap().retain(|(start, len)| {
            let goes = *start <= last && iova < start + len;
            if goes {
                access.unpin_pages(*start, *len);
            }
            !goes
        });
    }
}

#[test]
fn unmaps_take_pages_from_a_user_that_goes_on_pinning() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let pinned = Arc::new(Pinned::default());
    let access = world.reference().create_access(Arc::clone(&pinned) as _, true).unwrap();
    let access = Arc::new(access);
    pinned.access.set(Arc::downgrade(&access)).unwrap();
    access.attach(ioas).unwrap();
    let base = 0x10_0000;
    std::thread::scope(|scope| {
        let (access, pinned) = (&access, &pinned);
        scope.spawn(move || {
            for round in 0..10 * ROUNDS {
                let range = (base + round % 4 * PAGE, (1 + round % 3) * PAGE);
                // Held until it is in the list, so that an unmap finds it.
                let mut ranges = pinned.ranges.lock().unwrap();
                if access.pin_pages(range.0, range.1, true).is_ok() {
                    ranges.push(range);
                }
                if round % 5 == 0
                    && let Some((iova, len)) = ranges.pop()
                {
                    access.unpin_pages(iova, len);
                }
            }
        });
        scope.spawn(|| {
            for _ in 0..ROUNDS {
                bound.attach(ioas).unwrap();
                bound.detach();
            }
        });
        for _ in 0..ROUNDS {
            world.map_fixed(ioas, VA, 8 * PAGE, base).unwrap();
            assert_eq!(world.unmap(ioas, base, 8 * PAGE), Ok(8 * PAGE));
        }
    });
    access.detach();
    assert_eq!(world.client.mm.pinned(), 0);
}
