//! The janitor: a small process that removes a directory after this one, however it ends.
//!
//! `SIGKILL` runs no destructor. The janitor holds the read end of a pipe whose write end this
//! process keeps: a byte sends it home, the end of the pipe alone means that this process died. It
//! is in a session of its own and blocks all signals, so that what is sent to a terminal's or a
//! shell's process group passes it by.
//!
//! It runs in a fork of a process that may have threads, so it makes system calls and nothing else.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use libc::pid_t;
use rustix::pipe::PipeFlags;

use super::guardian::close_range;
use super::remove::remove;
use super::signals::Blocked;

/// A janitor at work. When it is dropped, the directory is its owner's again.
pub(crate) struct Janitor {
    control: OwnedFd,
    process: pid_t,
}

impl Janitor {
    /// Has the directory `path`, an absolute path that need not be there yet, removed when this
    /// process ends without dropping the value.
    pub(crate) fn start(path: &CStr) -> io::Result<Self> {
        let (read, control) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let _blocked = Blocked::all();
        // SAFETY: the child runs `wait` alone, which only makes system calls on what was made
        // before, and never returns.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            // SAFETY: this is the only thread of a fresh child, with all signals blocked.
            0 => unsafe { wait(read.as_raw_fd(), path) },
            process => Ok(Self { control, process }),
        }
    }
}

impl Drop for Janitor {
    fn drop(&mut self) {
        // One that is gone already needs no word.
        let _ = rustix::io::write(&self.control, &[0]);
        if let Some(process) = rustix::process::Pid::from_raw(self.process) {
            let _ = rustix::io::retry_on_intr(|| {
                rustix::process::waitpid(Some(process), rustix::process::WaitOptions::empty())
            });
        }
    }
}

/// # Safety
/// Only in a fresh child with one thread, all signals blocked.
unsafe fn wait(control: RawFd, path: &CStr) -> ! {
    // SAFETY: plain system calls on values of this frame or made before the fork.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"lychgate-clean".as_ptr());
        libc::setsid();
        libc::chdir(c"/".as_ptr());
        close_range(0, control.saturating_sub(1));
        close_range(control.saturating_add(1), libc::c_int::MAX);
        let mut byte = 0_u8;
        // All signals are blocked, so it is not interrupted.
        if libc::read(control, (&raw mut byte).cast(), 1) != 1 {
            remove(path);
        }
        libc::_exit(0)
    }
}
