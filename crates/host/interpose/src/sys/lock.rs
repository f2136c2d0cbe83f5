//! Locks of open file descriptions (`F_OFD_SETLK`, `fcntl(2)`).
//!
//! Such a lock lives exactly as long as its open file description: through `dup`, `fork`, passing
//! over a socket and memory mappings, until the last reference in any process is gone. Each file
//! that a client gets carries a lock on a byte of its own, its mark. A mark tells two descriptions
//! of one inode apart (`/proc/PID/fdinfo/N` shows it), and whether one is still in use anywhere.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Puts `mark` on the description of `file`; `writable` tells how it is open.
pub(crate) fn put(file: BorrowedFd<'_>, mark: u64, writable: bool) -> io::Result<()> {
    let kind = if writable { libc::F_WRLCK } else { libc::F_RDLCK };
    let mut lock = description(kind, mark)?;
    fcntl(file, libc::F_OFD_SETLK, &mut lock)
}

/// Whether a description with `mark` is in use; `probe` is another description of the same inode,
/// open for writing.
pub(crate) fn is_held(probe: BorrowedFd<'_>, mark: u64) -> io::Result<bool> {
    let mut lock = description(libc::F_WRLCK, mark)?;
    fcntl(probe, libc::F_OFD_GETLK, &mut lock)?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

fn fcntl(file: BorrowedFd<'_>, command: i32, lock: &mut libc::flock) -> io::Result<()> {
    // SAFETY: both commands read and write one `struct flock`, which lives through the call.
    let r = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut *lock) };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn description(kind: i32, mark: u64) -> io::Result<libc::flock> {
    let narrow = |value: i32| i16::try_from(value).map_err(io::Error::other);
    Ok(libc::flock {
        l_type: narrow(kind)?,
        l_whence: narrow(libc::SEEK_SET)?,
        l_start: i64::try_from(mark).map_err(io::Error::other)?,
        l_len: 1,
        l_pid: 0,
    })
}
