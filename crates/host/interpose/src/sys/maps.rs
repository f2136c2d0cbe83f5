//! `PROCMAP_QUERY` on `/proc/PID/maps` (`linux/fs.h`, Linux 6.11): one mapping, without the text of
//! all.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use lychgate_machine::Vma;

/// `_IOWR('f', 17, struct procmap_query)`.
const PROCMAP_QUERY: u64 = 3 << 30 | (size_of::<Query>() as u64) << 16 | (b'f' as u64) << 8 | 17;

const READABLE: u64 = 0x01;
const WRITABLE: u64 = 0x02;
const SHARED: u64 = 0x08;
const COVERING_OR_NEXT: u64 = 0x10;

/// The longest name with its terminating zero (`PATH_MAX`).
const NAME_LENGTH: usize = 4096;

/// `struct procmap_query`.
#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

/// What a query finds.
pub(crate) enum Found {
    /// This mapping.
    Vma(Vma),
    /// No mapping there or behind.
    Nothing,
    /// The kernel does not know the query.
    Unknown,
}

/// The mapping at `address`, or the first behind it.
pub(crate) fn query(maps: &File, address: u64) -> io::Result<Found> {
    let mut name = [0_u8; NAME_LENGTH];
    let mut query = Query {
        size: size_of::<Query>() as u64,
        query_flags: COVERING_OR_NEXT,
        query_addr: address,
        vma_name_size: u32::try_from(name.len()).unwrap_or(0),
        vma_name_addr: name.as_mut_ptr().expose_provenance() as u64,
        ..Query::default()
    };
    // SAFETY: the command reads and writes one `struct procmap_query` of the size that it names, and
    // stores at most `vma_name_size` bytes at `vma_name_addr`; both live through the call.
    let r = unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) };
    if r != 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOENT) => Ok(Found::Nothing),
            Some(libc::ENOTTY | libc::EINVAL) => Ok(Found::Unknown),
            _ => Err(error),
        };
    }
    // The length counts the terminating zero; there is none for a mapping without a name.
    let length = usize::try_from(query.vma_name_size).unwrap_or(0).saturating_sub(1);
    let name = name.get(..length).unwrap_or_default();
    let device = rustix::fs::makedev(query.dev_major, query.dev_minor);
    Ok(Found::Vma(Vma {
        start: query.vma_start,
        end: query.vma_end,
        read: query.vma_flags & READABLE != 0,
        write: query.vma_flags & WRITABLE != 0,
        shared: query.vma_flags & SHARED != 0,
        offset: query.vma_offset,
        file: (query.inode != 0).then_some((device, query.inode)),
        name: String::from_utf8_lossy(name).into_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_is_the_kernels() {
        assert_eq!(PROCMAP_QUERY, 0xc068_6611);
    }
}
