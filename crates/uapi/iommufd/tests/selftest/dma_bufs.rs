//! The dma-buf of the selftest.

use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;

use crate::common::{PAGE, World};

const IOVA: u64 = abi::APERTURE_START;

impl World {
    fn dma_buf(&self, length: u32) -> Result<i32, Errno> {
        let member = abi::DmabufGet { length, open_flags: 0 };
        self.test_value(op::DMABUF_GET, 0, member).map(|(_, fd)| fd)
    }

    fn revoke(&self, dmabuf_fd: i32, revoked: bool) -> Result<(), Errno> {
        let member = abi::DmabufRevoke { dmabuf_fd, revoked: revoked.into() };
        self.test(op::DMABUF_REVOKE, 0, member).map(drop)
    }

    fn map_file(&self, ioas_id: u32, fd: i32, length: u64, iova: u64) -> Result<(), Errno> {
        let flags = linux::MAP_FIXED_IOVA | linux::MAP_READABLE | linux::MAP_WRITEABLE;
        let map = linux::IoasMapFile { flags, ioas_id, fd, length, iova, ..Default::default() };
        self.call(map).map(drop)
    }
}

#[test]
fn a_dma_buf_has_whole_pages_up_to_two_megabytes() {
    let world = World::new();
    let ioas = world.ioas();
    assert_eq!(world.dma_buf(0), Err(Errno::EINVAL));
    assert_eq!(world.dma_buf((2 << 20) + 1), Err(Errno::EINVAL));
    assert_eq!(world.dma_buf(u32::MAX), Err(Errno::EINVAL));
    for (length, size) in [(1, PAGE), (2 << 20, 2 << 20), (3 * 4096, 3 * PAGE)] {
        let fd = world.dma_buf(length).unwrap();
        assert_eq!(world.map_file(ioas, fd, size + 1, IOVA), Err(Errno::EINVAL));
        world.map_file(ioas, fd, size, IOVA).unwrap();
        world.unmap(ioas, IOVA, size).unwrap();
        world.process.close(fd);
    }
}

#[test]
fn a_revoked_dma_buf_leaves_every_page_table() {
    let world = World::new();
    let ioas = world.ioas();
    let mock = world.mock(ioas, 0).unwrap();
    let fd = world.dma_buf(2 * 4096).unwrap();
    world.map_file(ioas, fd, 2 * PAGE, IOVA).unwrap();
    world.revoke(fd, true).unwrap();
    assert_eq!(world.map_file(ioas, fd, PAGE, IOVA + 2 * PAGE), Err(Errno::ENODEV));
    // The area stays, and a page table that comes later does without it.
    world.hwpt(mock.idev, ioas, 0).unwrap();
    world.revoke(fd, false).unwrap();
    world.map_file(ioas, fd, PAGE, IOVA + 2 * PAGE).unwrap();
    world.unmap(ioas, IOVA, 2 * PAGE).unwrap();
    // Whoever maps it keeps it.
    world.process.close(fd);
    world.unmap(ioas, IOVA + 2 * PAGE, PAGE).unwrap();
}

#[test]
fn only_the_selftests_own_dma_bufs_can_be_revoked() {
    let world = World::new();
    let ioas = world.ioas();
    assert_eq!(world.revoke(-1, true), Err(Errno::EBADF));
    assert_eq!(world.revoke(3, true), Err(Errno::EINVAL));
    let access = abi::CreateAccess::default();
    let fd = world.test(op::CREATE_ACCESS, ioas, access).unwrap().out_access_fd;
    let fd = i32::try_from(fd).unwrap();
    assert_eq!(world.revoke(fd, true), Err(Errno::EINVAL));
    world.process.close(fd);
}
