//! Accesses: files through which user space pins and copies.

use lychgate_iommufd::Mm;
use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;

use crate::common::{BASE, PAGE, SCRATCH, World};

const IOVA: u64 = abi::APERTURE_START;
const PINS: u32 = abi::ACCESS_CREATE_NEEDS_PIN_PAGES;

impl World {
    fn access(&self, ioas: u32, flags: u32) -> Result<u32, Errno> {
        let member = abi::CreateAccess { flags, ..Default::default() };
        self.test(op::CREATE_ACCESS, ioas, member).map(|member| member.out_access_fd)
    }

    fn pin(&self, fd: u32, iova: u64, length: u64, uptr: u64) -> Result<u32, Errno> {
        let member = abi::AccessPages { iova, length, uptr, ..Default::default() };
        self.test(op::ACCESS_PAGES, fd, member).map(|member| member.out_access_pages_id)
    }

    fn unpin(&self, fd: u32, access_pages_id: u32) -> Result<(), Errno> {
        let member = abi::DestroyAccessPages { access_pages_id };
        self.test(op::DESTROY_ACCESS_PAGES, fd, member).map(drop)
    }

    fn rw(&self, fd: u32, iova: u64, length: u64, uptr: u64, flags: u32) -> Result<(), Errno> {
        let member = abi::AccessRw { iova, length, uptr, flags, padding: 0 };
        self.test(op::ACCESS_RW, fd, member).map(drop)
    }
}

#[test]
fn an_access_pins_until_it_is_told_to_unpin() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, 8 * PAGE, IOVA).unwrap();
    let fd = world.access(ioas, PINS).unwrap();
    let first = world.pin(fd, IOVA + PAGE, 2 * PAGE, BASE + PAGE).unwrap();
    let second = world.pin(fd, IOVA + 2 * PAGE, PAGE, 0).unwrap();
    assert_ne!(first, second);
    world.check_refs(BASE + PAGE, 2 * PAGE, 1).unwrap();
    world.unpin(fd, first).unwrap();
    assert_eq!(world.unpin(fd, first), Err(Errno::ENOENT));
    world.check_refs(BASE + PAGE, PAGE, 0).unwrap();
    world.check_refs(BASE + 2 * PAGE, PAGE, 1).unwrap();
    world.close(fd);
    world.check_refs(BASE, 8 * PAGE, 0).unwrap();
}

#[test]
fn an_unmap_takes_away_what_an_access_has_pinned() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, 4 * PAGE, IOVA).unwrap();
    world.map(ioas, BASE + 4 * PAGE, 4 * PAGE, IOVA + 4 * PAGE).unwrap();
    let fd = world.access(ioas, PINS).unwrap();
    let gone = world.pin(fd, IOVA, PAGE, BASE).unwrap();
    let stays = world.pin(fd, IOVA + 4 * PAGE, PAGE, BASE + 4 * PAGE).unwrap();
    world.unmap(ioas, IOVA, 4 * PAGE).unwrap();
    assert_eq!(world.unpin(fd, gone), Err(Errno::ENOENT));
    world.unpin(fd, stays).unwrap();
    world.close(fd);
}

#[test]
fn an_access_compares_what_it_pins_with_the_callers_memory() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, 8 * PAGE, IOVA).unwrap();
    let fd = world.access(ioas, PINS).unwrap();
    assert_eq!(world.pin(fd, IOVA, PAGE, BASE + PAGE), Err(Errno::EBADE));
    assert_eq!(world.pin(fd, IOVA, PAGE, 0x1000), Err(Errno::EFAULT));
    world.set_read_only(true);
    assert_eq!(world.pin(fd, IOVA, PAGE, BASE), Err(Errno::EFAULT));
    world.set_read_only(false);
    world.check_refs(BASE, 8 * PAGE, 0).unwrap();
    // The last page may be a part of one.
    world.pin(fd, IOVA, 2 * PAGE + 1, BASE).unwrap();
    world.check_refs(BASE, 3 * PAGE, 1).unwrap();
    assert_eq!(world.pin(fd, IOVA + 100, PAGE, BASE), Err(Errno::EINVAL));
    world.close(fd);
}

#[test]
fn pinning_has_its_limits() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, PAGE, IOVA).unwrap();
    assert_eq!(world.access(ioas, 2), Err(Errno::EOPNOTSUPP));
    assert_eq!(world.access(99, PINS), Err(Errno::ENOENT));
    let copies = world.access(ioas, 0).unwrap();
    assert_eq!(world.pin(copies, IOVA, PAGE, 0), Err(Errno::EOPNOTSUPP));
    let fd = world.access(ioas, PINS).unwrap();
    assert_eq!(world.pin(fd, IOVA, (16 << 20) + 1, 0), Err(Errno::ENOMEM));
    assert_eq!(world.pin(fd, IOVA, 0, 0), Err(Errno::EINVAL));
    assert_eq!(world.pin(fd, IOVA + PAGE, PAGE, 0), Err(Errno::ENOENT));
    let member = abi::AccessPages { flags: 2, iova: IOVA, length: PAGE, ..Default::default() };
    assert_eq!(world.test(op::ACCESS_PAGES, fd, member).err(), Some(Errno::EOPNOTSUPP));
    for none in [3, 99, u32::MAX] {
        assert_eq!(world.pin(none, IOVA, PAGE, 0), Err(Errno::EBADFD));
        assert_eq!(world.unpin(none, 0), Err(Errno::EBADFD));
        assert_eq!(world.rw(none, IOVA, 1, SCRATCH, 0), Err(Errno::EBADFD));
    }
    let file = world.test_value(op::DMABUF_GET, 0, abi::DmabufGet { length: 1, open_flags: 0 });
    let other = u32::try_from(file.unwrap().1).unwrap();
    assert_eq!(world.pin(other, IOVA, PAGE, 0), Err(Errno::EBADFD));
    world.close(other);
    world.close(copies);
    world.close(fd);
}

#[test]
fn an_access_copies_bytes_both_ways() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, 4 * PAGE, IOVA).unwrap();
    let fd = world.access(ioas, 0).unwrap();
    let (from, to) = (BASE + 10 * PAGE, BASE + 12 * PAGE);
    let bytes: Vec<u8> = (0..=255).cycle().take(5000).collect();
    for flags in [0, abi::ACCESS_RW_SLOW_PATH] {
        Mm::write(&*world.process.space, from, &bytes).unwrap();
        let write = flags | abi::ACCESS_RW_WRITE;
        world.rw(fd, IOVA + PAGE - 7, 5000, from, write).unwrap();
        let mut there = vec![0; 5000];
        Mm::read(&*world.process.space, BASE + PAGE - 7, &mut there).unwrap();
        assert_eq!(there, bytes);
        world.rw(fd, IOVA + PAGE - 7, 5000, to, flags).unwrap();
        Mm::read(&*world.process.space, to, &mut there).unwrap();
        assert_eq!(there, bytes);
        Mm::write(&*world.process.space, to, &[0; 5000]).unwrap();
        Mm::write(&*world.process.space, BASE, &[0; 8192]).unwrap();
    }
    world.check_refs(BASE, 4 * PAGE, 0).unwrap();
    world.close(fd);
}

#[test]
fn copying_has_its_limits() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, PAGE, IOVA).unwrap();
    let fd = world.access(ioas, 0).unwrap();
    let at = BASE + 10 * PAGE;
    assert_eq!(world.rw(fd, IOVA, (16 << 20) + 1, at, 0), Err(Errno::ENOMEM));
    assert_eq!(world.rw(fd, IOVA, 1, at, 2), Err(Errno::EOPNOTSUPP));
    assert_eq!(world.rw(fd, IOVA, 1, 0x1000, 0), Err(Errno::EFAULT));
    assert_eq!(world.rw(fd, IOVA, 1, 0x1000, abi::ACCESS_RW_WRITE), Err(Errno::EFAULT));
    assert_eq!(world.rw(fd, IOVA, 0, at, 0), Err(Errno::EINVAL));
    assert_eq!(world.rw(fd, IOVA + PAGE - 1, 2, at, 0), Err(Errno::ENOENT));
    world.close(fd);
}

#[test]
fn an_access_that_changes_over_lets_go_of_what_it_had_pinned() {
    let world = World::new();
    let (first, second) = (world.ioas(), world.ioas());
    world.map(first, BASE, PAGE, IOVA).unwrap();
    world.map(second, BASE + PAGE, PAGE, IOVA).unwrap();
    let fd = world.access(first, PINS).unwrap();
    world.pin(fd, IOVA, PAGE, BASE).unwrap();
    let replace = |fd, ioas_id| {
        world.test(op::ACCESS_REPLACE_IOAS, fd, abi::AccessReplaceIoas { ioas_id }).map(drop)
    };
    assert_eq!(replace(fd, 99), Err(Errno::ENOENT));
    assert_eq!(replace(98, second), Err(Errno::EBADFD));
    replace(fd, second).unwrap();
    world.check_refs(BASE, PAGE, 0).unwrap();
    world.destroy(first).unwrap();
    world.pin(fd, IOVA, PAGE, BASE + PAGE).unwrap();
    assert_eq!(world.destroy(second), Err(Errno::EBUSY));
    world.close(fd);
    world.destroy(second).unwrap();
}

#[test]
fn a_fuzzer_names_areas_by_number() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, PAGE, IOVA).unwrap();
    world.map(ioas, BASE + PAGE, 2 * PAGE, IOVA + 8 * PAGE).unwrap();
    let fd = world.access(ioas, PINS).unwrap();
    let pin = |iova, uptr| {
        let flags = abi::ACCESS_SYZ;
        let member = abi::AccessPages { flags, iova, length: PAGE, uptr, ..Default::default() };
        world.test(op::ACCESS_PAGES, fd, member).map(drop)
    };
    pin(1 | PAGE << 32, BASE + 2 * PAGE).unwrap();
    pin(0, BASE).unwrap();
    assert_eq!(pin(2, 0), Err(Errno::ENOENT));
    world.close(fd);
    let copy = linux::IoasCopy {
        flags: abi::ACCESS_SYZ | linux::MAP_FIXED_IOVA | linux::MAP_READABLE,
        dst_ioas_id: ioas,
        src_ioas_id: ioas,
        length: PAGE,
        dst_iova: IOVA + 16 * PAGE,
        src_iova: 1 | PAGE << 32,
        ..Default::default()
    };
    let (after, _) = world.call(copy).unwrap();
    assert_eq!((after.src_iova, after.flags & abi::ACCESS_SYZ), (IOVA + 9 * PAGE, 0));
}

#[test]
fn an_access_keeps_its_context_open() {
    let world = World::new();
    let ioas = world.ioas();
    world.map(ioas, BASE, PAGE, IOVA).unwrap();
    let fd = world.access(ioas, PINS).unwrap();
    world.pin(fd, IOVA, PAGE, BASE).unwrap();
    lychgate_iommufd::OpenFile::release(&*world.context);
    world.check_refs(BASE, PAGE, 1).unwrap();
    world.close(fd);
    assert_eq!(world.process.space.pinned(), 0);
}
