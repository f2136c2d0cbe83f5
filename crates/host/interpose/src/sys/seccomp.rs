//! `seccomp(2)`: what the kernel offers, and the installation of a filter.

use std::os::fd::RawFd;

use libc::{c_int, c_long, sock_filter, sock_fprog};

const SET_MODE_FILTER: c_long = 1;
const GET_ACTION_AVAIL: c_long = 2;
const FLAG_NEW_LISTENER: c_long = 1 << 3;
const FLAG_WAIT_KILLABLE_RECV: c_long = 1 << 5;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;

/// What a kernel lacks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Lack {
    /// `SECCOMP_RET_USER_NOTIF`, Linux 5.0, or all of seccomp.
    Notification,
    /// `SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV`, Linux 5.19.
    WaitKillable,
}

/// Asks the kernel, without a change to this process.
pub(crate) fn probe() -> Result<(), Lack> {
    let action = RET_USER_NOTIF;
    // SAFETY: GET_ACTION_AVAIL reads one u32 that lives through the call.
    if unsafe { libc::syscall(libc::SYS_seccomp, GET_ACTION_AVAIL, 0, &raw const action) } != 0 {
        return Err(Lack::Notification);
    }
    let flags = FLAG_NEW_LISTENER | FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: without a program the call fails: with EFAULT where it knows the flags, with EINVAL
    // where it does not. Nothing is installed.
    unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, std::ptr::null::<u8>()) };
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EINVAL) => Err(Lack::WaitKillable),
        _ => Ok(()),
    }
}

/// Installs a filter for the calling thread and what it starts, and gives its listener; a negative
/// errno otherwise. Allocates nothing: it runs between `fork` and `exec`.
///
/// # Safety
/// `program` must hold instructions that are valid for the length of the call; the caller must have
/// set `PR_SET_NO_NEW_PRIVS`.
pub(crate) unsafe fn install(program: &[sock_filter]) -> RawFd {
    let program = sock_fprog {
        // The kernel takes 4096 instructions at most; a longer program is cut, and refused for it.
        len: u16::try_from(program.len()).unwrap_or(u16::MAX),
        filter: program.as_ptr().cast_mut(),
    };
    let flags = FLAG_NEW_LISTENER | FLAG_WAIT_KILLABLE_RECV;
    // SAFETY: `program` points to `len` instructions, by this function's contract.
    let r = unsafe { libc::syscall(libc::SYS_seccomp, SET_MODE_FILTER, flags, &raw const program) };
    match c_int::try_from(r) {
        Ok(fd) if fd >= 0 => fd,
        // SAFETY: the location of errno is always valid.
        _ => -unsafe { *libc::__errno_location() },
    }
}
