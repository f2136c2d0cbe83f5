//! The listener of a filter: `SECCOMP_IOCTL_NOTIF_*` (`linux/seccomp.h`, `seccomp_unotify(2)`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use lychgate_types::Errno;

const fn ioc(direction: u64, number: u64, size: u64) -> u64 {
    direction << 30 | size << 16 | (b'!' as u64) << 8 | number
}
const RECV: u64 = ioc(3, 0, 80);
const SEND: u64 = ioc(3, 1, 24);
const ID_VALID: u64 = ioc(1, 2, 8);
const ADDFD: u64 = ioc(1, 3, 24);
const SET_FLAGS: u64 = ioc(1, 4, 8);

const USER_NOTIF_FD_SYNC_WAKE_UP: u64 = 1;
const USER_NOTIF_FLAG_CONTINUE: u32 = 1;
const ADDFD_FLAG_SETFD: u32 = 1;
const ADDFD_FLAG_SEND: u32 = 2;

/// `struct seccomp_notif`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Notification {
    pub(crate) id: u64,
    /// The thread, as our PID namespace numbers it; 0 if it is not visible there.
    pub(crate) pid: u32,
    flags: u32,
    pub(crate) nr: i32,
    pub(crate) arch: u32,
    pub(crate) instruction: u64,
    pub(crate) args: [u64; 6],
}

#[repr(C)]
struct Response {
    id: u64,
    val: i64,
    error: i32,
    flags: u32,
}

#[repr(C)]
struct AddFd {
    id: u64,
    flags: u32,
    srcfd: u32,
    newfd: u32,
    newfd_flags: u32,
}

/// Where a new descriptor goes in the client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum At {
    /// The lowest free number.
    Lowest,
    /// This number; what it was is closed.
    Number(u32),
}

/// The client of a notification is gone, or stopped waiting.
#[derive(Debug)]
pub(crate) struct Gone;

/// The descriptor through which a filter's notifications come.
#[derive(Debug)]
pub(crate) struct Listener(OwnedFd);

impl Listener {
    /// Takes the descriptor that `seccomp` gave, and asks for wake-ups on the same CPU where the
    /// kernel has them (6.6).
    pub(crate) fn new(fd: OwnedFd) -> Self {
        // SAFETY: SET_FLAGS takes its flags by value; no memory is passed.
        let told = unsafe { libc::ioctl(fd.as_raw_fd(), SET_FLAGS, USER_NOTIF_FD_SYNC_WAKE_UP) };
        tracing::debug!(sync_wake_up = told == 0, "listener");
        Self(fd)
    }

    /// Waits for a call. `None` when the one that woke us went away again.
    pub(crate) fn receive(&self) -> io::Result<Option<Notification>> {
        let mut notification = Notification::default();
        // SAFETY: RECV fills one `struct seccomp_notif`, which `Notification` lays out; it is
        // zeroed as the kernel demands and lives through the call.
        let r = unsafe { libc::ioctl(self.raw(), RECV, &raw mut notification) };
        if r == 0 {
            return Ok(Some(notification));
        }
        match io::Error::last_os_error() {
            error if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINTR)) => Ok(None),
            error => Err(error),
        }
    }

    /// Ends a call with a value or an error.
    pub(crate) fn answer(&self, id: u64, result: Result<i64, Errno>) -> Result<(), Gone> {
        let (val, error) = match result {
            Ok(value) => (value, 0),
            Err(errno) => (0, -errno.get()),
        };
        self.send(&Response { id, val, error, flags: 0 })
    }

    /// Lets the kernel go on with a call as if nothing had been.
    pub(crate) fn go_on(&self, id: u64) -> Result<(), Gone> {
        self.send(&Response { id, val: 0, error: 0, flags: USER_NOTIF_FLAG_CONTINUE })
    }

    /// Gives the client of a call a descriptor of the file behind `file`; with `end` its number is
    /// also the result of the call, in one step. `Ok(Err(_))` when the client's table refuses it.
    pub(crate) fn add_file(
        &self,
        id: u64,
        file: BorrowedFd<'_>,
        at: At,
        close_on_exec: bool,
        end: bool,
    ) -> Result<Result<i32, Errno>, Gone> {
        let (newfd, set) = match at {
            At::Lowest => (0, 0),
            At::Number(number) => (number, ADDFD_FLAG_SETFD),
        };
        let request = AddFd {
            id,
            flags: set | if end { ADDFD_FLAG_SEND } else { 0 },
            srcfd: file.as_raw_fd().cast_unsigned(),
            newfd,
            newfd_flags: if close_on_exec { libc::O_CLOEXEC.cast_unsigned() } else { 0 },
        };
        loop {
            // SAFETY: ADDFD reads one `struct seccomp_notif_addfd`, which `AddFd` lays out and
            // which lives through the call.
            let r = unsafe { libc::ioctl(self.raw(), ADDFD, &raw const request) };
            if r >= 0 {
                return Ok(Ok(r));
            }
            match io::Error::last_os_error().raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::ENOENT | libc::EINPROGRESS) => return Err(Gone),
                // SETFD past the client's RLIMIT_NOFILE gives EBADF, which is no answer to `open`.
                Some(libc::EBADF) => return Ok(Err(Errno::EMFILE)),
                other => return Ok(Err(Errno::new(other.unwrap_or(libc::EIO)))),
            }
        }
    }

    /// Whether the client still waits: what was learnt by its number before this was about it.
    pub(crate) fn waits(&self, id: u64) -> bool {
        // SAFETY: ID_VALID reads one u64 that lives through the call.
        unsafe { libc::ioctl(self.raw(), ID_VALID, &raw const id) == 0 }
    }

    fn send(&self, response: &Response) -> Result<(), Gone> {
        loop {
            // SAFETY: SEND reads one `struct seccomp_notif_resp`, which `Response` lays out and
            // which lives through the call.
            let r = unsafe { libc::ioctl(self.raw(), SEND, &raw const *response) };
            if r == 0 {
                return Ok(());
            }
            if io::Error::last_os_error().raw_os_error() != Some(libc::EINTR) {
                return Err(Gone);
            }
        }
    }

    fn raw(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
