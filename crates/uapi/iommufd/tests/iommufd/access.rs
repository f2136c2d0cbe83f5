//! Access objects: what kernel users of an IOAS pin, read and write.

use std::sync::{Arc, Mutex, OnceLock, Weak};

use lychgate_iommufd::{Access, AccessOps, Client};
use lychgate_types::{Errno, PhysAddr, PhysRun};

use crate::common::{FakeClient, FakeFile, FakeMm, PAGE, PHYS, SCRATCH, VA, World};
use lychgate_iommufd::abi::iommufd as abi;
use lychgate_iommufd::{Accounting, OpenFile};

/// A kernel user that lets go of what it is asked for, and writes down what that was.
#[derive(Default)]
struct Driver {
    access: OnceLock<Weak<Access>>,
    pinned: Mutex<Vec<(u64, u64)>>,
    told: Mutex<Vec<(u64, u64)>>,
    /// Whether it keeps what it has.
    stubborn: bool,
}

impl AccessOps for Driver {
    fn unmap(&self, iova: u64, len: u64) {
        self.told.lock().unwrap().push((iova, len));
        let Some(access) = self.access.get().and_then(Weak::upgrade).filter(|_| !self.stubborn)
        else {
            return;
        };
        let last = iova.saturating_add(len - 1);
        self.pinned.lock().unwrap().retain(|(start, len)| {
            let goes = *start <= last && iova < start + len;
            if goes {
                access.unpin_pages(*start, *len);
            }
            !goes
        });
    }
}

struct User {
    access: Arc<Access>,
    driver: Arc<Driver>,
}

impl User {
    fn new(world: &World, pins: bool) -> Self {
        Self::with(world, pins, Driver::default())
    }

    fn with(world: &World, pins: bool, driver: Driver) -> Self {
        let driver = Arc::new(driver);
        let access =
            Arc::new(world.reference().create_access(Arc::clone(&driver) as _, pins).unwrap());
        driver.access.set(Arc::downgrade(&access)).unwrap();
        Self { access, driver }
    }

    fn pin(&self, iova: u64, len: u64) -> Result<Vec<PhysRun>, Errno> {
        let runs = self.access.pin_pages(iova, len, true).map_err(|refusal| refusal.errno)?;
        self.driver.pinned.lock().unwrap().push((iova, len));
        Ok(runs)
    }

    fn unpin(&self, iova: u64, len: u64) {
        let mut pinned = self.driver.pinned.lock().unwrap();
        let index = pinned.iter().position(|item| *item == (iova, len)).unwrap();
        pinned.remove(index);
        self.access.unpin_pages(iova, len);
    }

    fn told(&self) -> Vec<(u64, u64)> {
        std::mem::take(&mut *self.driver.told.lock().unwrap())
    }
}

fn run(page: u64, pages: u64) -> PhysRun {
    PhysRun { start: PhysAddr::new(PHYS + page * PAGE), len: pages * PAGE }
}

fn errno<T>(result: lychgate_iommufd::Result<T>) -> Option<Errno> {
    result.err().map(|refusal| refusal.errno)
}

#[test]
fn pages_are_pinned_once_whoever_uses_them() {
    let world = World::new();
    let ioas = world.ioas();
    let user = User::new(&world, true);
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, 8 * PAGE, 0x10_0000).unwrap();
    let mm = &world.client.mm;
    assert_eq!(mm.pinned(), 0, "nobody needs them");
    assert_eq!(user.pin(0x10_1000, 2 * PAGE), Ok(vec![run(1, 2)]));
    assert_eq!(user.pin(0x10_1000, 2 * PAGE), Ok(vec![run(1, 2)]));
    assert_eq!(user.pin(0x10_2000, 3 * PAGE), Ok(vec![run(2, 3)]));
    assert_eq!(
        (0..8).map(|page| mm.pins(VA + page * PAGE)).collect::<Vec<_>>(),
        [0, 1, 1, 1, 1, 0, 0, 0]
    );
    assert_eq!(mm.charged(Accounting::User), 4);
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    bound.attach(ioas).unwrap();
    assert_eq!((mm.pinned(), mm.charged(Accounting::User)), (8, 8), "once for domain and access");
    assert_eq!(mm.pins(VA + PAGE), 1);
    assert_eq!(world.driver.domains()[0].pages().len(), 8);
    drop(bound);
    assert_eq!((mm.pinned(), mm.charged(Accounting::User)), (4, 4));
    user.unpin(0x10_1000, 2 * PAGE);
    assert_eq!(mm.pinned(), 4, "pinned twice, unpinned once");
    user.unpin(0x10_1000, 2 * PAGE);
    assert_eq!(mm.pinned(), 3);
    user.unpin(0x10_2000, 3 * PAGE);
    assert_eq!((mm.pinned(), mm.charged(Accounting::User)), (0, 0));
    assert!(user.told().is_empty());
}

#[test]
fn an_unmap_asks_for_what_is_pinned_and_for_nothing_else() {
    let world = World::new();
    let ioas = world.ioas();
    let (user, reader) = (User::new(&world, true), User::new(&world, false));
    user.access.attach(ioas).unwrap();
    reader.access.attach(ioas).unwrap();
    for area in 0..4 {
        world.map_fixed(ioas, VA + area * 4 * PAGE, 4 * PAGE, area * 0x10_0000).unwrap();
    }
    user.pin(0x10_1000, PAGE).unwrap();
    user.pin(0x10_2000, 2 * PAGE).unwrap();
    user.pin(0x30_0000, 4 * PAGE).unwrap();
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(16 * PAGE));
    assert_eq!(user.told(), [(0x10_0000, 4 * PAGE), (0x30_0000, 4 * PAGE)]);
    assert_eq!(reader.told().len(), 2, "everyone is asked, not only those who pin");
    assert_eq!(world.client.mm.pinned(), 0);
}

#[test]
fn whoever_never_lets_go_is_asked_a_hundred_times() {
    let world = World::new();
    let ioas = world.ioas();
    let user = User::with(&world, true, Driver { stubborn: true, ..Driver::default() });
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, PAGE, 0).unwrap();
    world.map_fixed(ioas, VA, 4 * PAGE, 0x10_0000).unwrap();
    user.pin(0x10_0000, PAGE).unwrap();
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Err(Errno::EDEADLOCK));
    assert_eq!(user.told().len(), 101);
    assert_eq!(
        errno(user.access.pin_pages(0x10_1000, PAGE, false)),
        Some(Errno::EINVAL),
        "no more"
    );
    assert_eq!(errno(user.access.read(0x10_1000, &mut [0; 8], None)), Some(Errno::EINVAL));
    assert_eq!(errno(user.access.read(0, &mut [0; 8], None)), Some(Errno::ENOENT), "this one went");
    user.unpin(0x10_0000, PAGE);
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(4 * PAGE));
    assert!(user.told().is_empty());
}

#[test]
fn pins_are_refused_as_linux_does() {
    let world = World::new();
    let ioas = world.ioas();
    let user = User::new(&world, true);
    assert_eq!(user.pin(0, PAGE), Err(Errno::ENOENT), "no IOAS");
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, 2 * PAGE, 0).unwrap();
    world.map_fixed(ioas, VA + 8 * PAGE, 2 * PAGE, 2 * PAGE).unwrap();
    let map = abi::IoasMap {
        flags: abi::MAP_FIXED_IOVA | abi::MAP_READABLE,
        ioas_id: ioas,
        user_va: VA,
        length: PAGE,
        iova: 0x10_0000,
        ..Default::default()
    };
    world.call(map).unwrap();
    assert_eq!(user.pin(0, 0), Err(Errno::EINVAL));
    assert_eq!(user.pin(u64::MAX, 2), Err(Errno::EOVERFLOW));
    assert_eq!(user.pin(0x800, PAGE), Err(Errno::EINVAL), "the middle of a page");
    assert_eq!(user.pin(0, 5 * PAGE), Err(Errno::ENOENT), "a hole behind");
    assert_eq!(user.pin(0x10_0000, PAGE), Err(Errno::EPERM), "read only");
    let reads = user.access.pin_pages(0x10_0000, PAGE, false).unwrap();
    assert_eq!(reads, [run(0, 1)]);
    user.access.unpin_pages(0x10_0000, PAGE);
    assert_eq!(world.client.mm.pinned(), 0, "what came before an error is let go");
    assert_eq!(user.pin(PAGE, 2 * PAGE), Ok(vec![run(1, 1), run(8, 1)]), "over two areas");
    user.access.unpin_pages(PAGE, PAGE);
    assert_eq!(world.client.mm.pinned(), 1, "what is left is still pinned");
    user.access.unpin_pages(PAGE, PAGE);
    assert_eq!(world.client.mm.pinned(), 1, "unpinned once already");
    user.access.unpin_pages(2 * PAGE, PAGE);
    let reader = User::new(&world, false);
    reader.access.attach(ioas).unwrap();
    assert_eq!(reader.pin(0, PAGE), Err(Errno::EINVAL), "it does not pin");
}

#[test]
fn pages_that_cannot_be_pinned_leave_no_trace() {
    let world = World::new();
    let ioas = world.ioas();
    let user = User::new(&world, true);
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, 4 * PAGE, 0).unwrap();
    world.map_fixed(ioas, VA + 8 * PAGE, 4 * PAGE, 4 * PAGE).unwrap();
    world.client.mm.books.lock().unwrap().pins_left = Some(1);
    assert_eq!(user.pin(0, 8 * PAGE), Err(Errno::EFAULT));
    world.client.mm.books.lock().unwrap().pins_left = None;
    *world.client.limit.lock().unwrap() = 6 * PAGE;
    world.unmap(ioas, 4 * PAGE, 4 * PAGE).unwrap();
    world.map_fixed(ioas, VA + 8 * PAGE, 8 * PAGE, 4 * PAGE).unwrap();
    assert_eq!(user.pin(0, 12 * PAGE), Err(Errno::ENOMEM), "beyond the limit of the second");
    let mm = &world.client.mm;
    assert_eq!((mm.pinned(), mm.charged(Accounting::User)), (0, 0));
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(12 * PAGE));
    assert!(user.told().is_empty(), "nothing was left pinned");
}

#[test]
fn an_access_that_pins_needs_whole_pages() {
    let world = World::new();
    let ioas = world.ioas();
    let user = User::new(&world, true);
    world.map_fixed(ioas, VA, PAGE / 2, 0).unwrap();
    assert_eq!(errno(user.access.attach(ioas)), Some(Errno::EADDRINUSE));
    world.unmap(ioas, 0, u64::MAX).unwrap();
    user.access.attach(ioas).unwrap();
    assert_eq!(world.ranges(ioas).1, PAGE);
    assert_eq!(world.map_fixed(ioas, VA, PAGE / 2, 0), Err(Errno::EINVAL));
    user.access.detach();
    assert_eq!(world.ranges(ioas).1, 1);
    let reader = User::new(&world, false);
    reader.access.attach(ioas).unwrap();
    assert_eq!(world.ranges(ioas).1, 1, "reading needs no pages");
}

#[test]
fn an_access_is_in_one_ioas_and_keeps_it() {
    let world = World::new();
    let (a, b) = (world.ioas(), world.ioas());
    let user = User::new(&world, true);
    assert_eq!(errno(user.access.replace(a)), Some(Errno::ENOENT));
    assert_eq!(errno(user.access.attach(99)), Some(Errno::ENOENT));
    user.access.attach(a).unwrap();
    assert_eq!(errno(user.access.attach(b)), Some(Errno::EINVAL));
    assert_eq!(world.destroy(a), Err(Errno::EBUSY));
    assert_eq!(world.destroy(user.access.id()), Err(Errno::EBUSY));
    world.map_fixed(a, VA, PAGE, 0).unwrap();
    world.map_fixed(b, VA + PAGE, PAGE, 0).unwrap();
    user.pin(0, PAGE).unwrap();
    user.access.replace(b).unwrap();
    assert_eq!(user.told(), [(0, u64::MAX)]);
    assert_eq!(world.client.mm.pinned(), 0);
    assert_eq!(user.pin(0, PAGE), Ok(vec![run(1, 1)]));
    user.access.replace(b).unwrap();
    assert!(user.told().is_empty(), "it stays where it is");
    assert_eq!(world.destroy(a), Ok(()));
    user.access.detach();
    assert_eq!(user.told(), [(0, u64::MAX)]);
    assert_eq!(world.destroy(b), Ok(()));
    let id = user.access.id();
    drop(user);
    assert_eq!(world.destroy(id), Err(Errno::ENOENT));
}

#[test]
fn bytes_are_copied_at_any_offset() {
    for scattered in [false, true] {
        let world = World::new();
        world.client.mm.books.lock().unwrap().scattered = scattered;
        let ioas = world.ioas();
        let user = User::new(&world, false);
        user.access.attach(ioas).unwrap();
        // In the middle of a page, and in two areas.
        world.map_fixed(ioas, VA + 0x800, 2 * PAGE, 0x10_0000).unwrap();
        world.map_fixed(ioas, VA + 6 * PAGE, 2 * PAGE, 0x10_2000).unwrap();
        let other = FakeClient::with_mm(FakeMm::new(2));
        let callers: [Option<&dyn Client>; 3] = [Some(&world.client), None, Some(&other)];
        let mut expected = vec![0; 4 << 12];
        let mut value = 0_u8;
        for (at, len) in [(0, 1), (0x7ff, 2), (0xfff, 0x1001), (0x1f00, 0x200), (0, 0x4000)] {
            for caller in callers {
                let bytes: Vec<u8> = (0..len)
                    .map(|_| {
                        value = value.wrapping_mul(5).wrapping_add(1);
                        value
                    })
                    .collect();
                user.access.write(0x10_0000 + at as u64, &bytes, caller).unwrap();
                expected[at..at + len].copy_from_slice(&bytes);
                for caller in callers {
                    let mut all = vec![0; expected.len()];
                    user.access.read(0x10_0000, &mut all, caller).unwrap();
                    assert!(all == expected, "{at:#x} {len:#x}");
                }
            }
        }
        assert_eq!(world.client.mm.pinned(), 0);
        assert_eq!(world.client.mm.charged(Accounting::User), 0);
    }
}

#[test]
fn copies_are_refused_as_linux_does() {
    let world = World::new();
    let ioas = world.ioas();
    let user = User::new(&world, false);
    assert_eq!(errno(user.access.read(0, &mut [0], None)), Some(Errno::ENOENT));
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, PAGE, 0).unwrap();
    for (flags, iova) in [(abi::MAP_READABLE, 0x1000), (abi::MAP_WRITEABLE, 0x2000)] {
        let map = abi::IoasMap {
            flags: abi::MAP_FIXED_IOVA | flags,
            ioas_id: ioas,
            user_va: VA,
            length: PAGE,
            iova,
            ..Default::default()
        };
        world.call(map).unwrap();
    }
    let read = |iova, len| errno(user.access.read(iova, &mut vec![0; len], None));
    let write = |iova, len| errno(user.access.write(iova, &vec![0; len], None));
    assert_eq!(read(0, 0), Some(Errno::EINVAL));
    assert_eq!(read(u64::MAX, 2), Some(Errno::EOVERFLOW));
    assert_eq!(read(0x5000, 1), Some(Errno::ENOENT));
    assert_eq!(read(0x1fff, 2), Some(Errno::EPERM), "not readable");
    assert_eq!(write(0xfff, 2), Some(Errno::EPERM), "not writable");
    assert_eq!(write(0x2fff, 2), Some(Errno::ENOENT));
    assert_eq!((read(0, 0x2000), write(0x2000, 0x1000)), (None, None));
    world.client.mm.exit();
    assert_eq!(read(0, 1), Some(Errno::EFAULT));
    let gone = user.access.read(0, &mut [0], Some(&world.client));
    assert_eq!(errno(gone), Some(Errno::EFAULT));
}

#[test]
fn memory_of_a_process_that_ended_is_there_while_it_is_pinned() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let user = User::new(&world, false);
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, 2 * PAGE, 0).unwrap();
    user.access.write(0xffe, &[1, 2, 3, 4], Some(&world.client)).unwrap();
    bound.attach(ioas).unwrap();
    world.client.mm.exit();
    assert!(world.hwpt(bound.id(), ioas).is_ok(), "copied from the other domain");
    let mut bytes = [0; 4];
    user.access.read(0xffe, &mut bytes, None).unwrap();
    assert_eq!(bytes, [1, 2, 3, 4]);
    world.map_fixed(ioas, VA, PAGE, 0x10_0000).unwrap_err();
    world.unmap(ioas, 0, u64::MAX).unwrap();
    assert_eq!(world.client.mm.pinned(), 0);
}

#[test]
fn files_are_copied_by_their_frames() {
    let world = World::new();
    let file = FakeFile::new(4 * PAGE);
    world.client.files.lock().unwrap().insert(5, Some(Arc::clone(&file)));
    let ioas = world.ioas();
    let user = User::new(&world, true);
    user.access.attach(ioas).unwrap();
    let map = abi::IoasMapFile {
        flags: abi::MAP_READABLE | abi::MAP_WRITEABLE | abi::MAP_FIXED_IOVA,
        ioas_id: ioas,
        fd: 5,
        start: PAGE,
        length: 2 * PAGE,
        iova: 0,
        ..Default::default()
    };
    world.call(map).unwrap();
    user.access.write(PAGE - 1, &[7, 8], Some(&world.client)).unwrap();
    let mut bytes = [0; 2];
    user.access.read(PAGE - 1, &mut bytes, None).unwrap();
    assert_eq!(bytes, [7, 8]);
    assert_eq!(user.pin(0, 2 * PAGE), Ok(vec![run(1, 2)]));
    assert_eq!(world.client.mm.charged(Accounting::User), 2);
    assert_eq!(world.unmap(ioas, 0, 2 * PAGE), Ok(2 * PAGE));
    assert!(file.books.lock().unwrap().pins.is_empty());
}

#[test]
fn areas_that_are_pinned_are_not_cut() {
    let world = World::new();
    let ioas = world.ioas();
    let vfio = abi::VfioIoas { ioas_id: ioas, op: abi::VFIO_IOAS_SET, ..Default::default() };
    world.call(vfio).unwrap();
    world.raw(0x3b66, 1).unwrap();
    let user = User::new(&world, true);
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, 4 * PAGE, 0x10_0000).unwrap();
    user.pin(0x10_3000, PAGE).unwrap();
    let unmap = |iova: u64, size: u64| {
        world.client.put(SCRATCH, &[24, 0, 0, 0, 0, 0, 0, 0]);
        world.client.put(SCRATCH + 8, &iova.to_le_bytes());
        world.client.put(SCRATCH + 16, &size.to_le_bytes());
        world.raw(0x3b72, SCRATCH)
    };
    assert_eq!(unmap(0x10_0000, PAGE), Err(Errno::EINVAL));
    user.unpin(0x10_3000, PAGE);
    assert_eq!(unmap(0x10_0000, PAGE), Ok(0));
    assert_eq!(world.unmap(ioas, 0, u64::MAX), Ok(3 * PAGE));
}

#[test]
fn a_closed_file_lets_everything_go_after_its_kernel_users() {
    let world = World::new();
    let ioas = world.ioas();
    let user = User::new(&world, true);
    user.access.attach(ioas).unwrap();
    world.map_fixed(ioas, VA, PAGE, 0).unwrap();
    user.pin(0, PAGE).unwrap();
    world.context.release();
    assert_eq!(world.client.mm.pinned(), 1);
    assert_eq!(user.pin(0, PAGE), Ok(vec![run(0, 1)]));
    user.access.detach();
    drop(user);
    assert_eq!(world.client.mm.pinned(), 0);
}
