//! Who maps a file of ours.
//!
//! The kernel tells nobody of `munmap`, and to trap every one of them would cost all clients dear. So
//! nothing is counted: whoever wants to know asks, and the processes' maps are looked at then.

use std::os::fd::BorrowedFd;

use crate::process;
use crate::space;

/// Whether any process maps a byte of `len` bytes from `offset` of a file, as far as `/proc` shows
/// its mappings to us.
pub(crate) fn is_mapped(file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
    let Ok(stat) = rustix::fs::fstat(file) else { return false };
    let file = Some((stat.st_dev, stat.st_ino));
    let end = offset.saturating_add(len);
    process::all().into_iter().filter_map(process::maps).any(|text| {
        text.lines().filter_map(space::parse).any(|vma| {
            let last = vma.offset.saturating_add(vma.end.saturating_sub(vma.start));
            vma.file == file && vma.offset < end && offset < last
        })
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::MemfdFlags;
    use rustix::mm::{MapFlags, ProtFlags};

    use super::*;

    #[test]
    fn a_range_is_mapped_from_mmap_to_munmap() {
        let file = rustix::fs::memfd_create("mapped", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 0x4000).unwrap();
        assert!(!is_mapped(file.as_fd(), 0, 0x4000));
        // SAFETY: a new mapping, which nothing refers to.
        let at = unsafe {
            let rights = ProtFlags::READ;
            rustix::mm::mmap(std::ptr::null_mut(), 0x1000, rights, MapFlags::SHARED, &file, 0x1000)
        };
        let at = at.unwrap();
        assert!(is_mapped(file.as_fd(), 0x1000, 0x1000) && is_mapped(file.as_fd(), 0, 0x4000));
        assert!(!is_mapped(file.as_fd(), 0, 0x1000) && !is_mapped(file.as_fd(), 0x2000, 0x2000));
        // SAFETY: the mapping from above.
        unsafe { rustix::mm::munmap(at, 0x1000) }.unwrap();
        assert!(!is_mapped(file.as_fd(), 0, 0x4000));
    }
}
