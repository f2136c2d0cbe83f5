//! Signals that are sent to the supervisor, so that it can pass them on.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use libc::{c_int, c_void, siginfo_t};

/// What is passed on. A terminal sends the first three to the client itself, and then they are not.
const CAUGHT: [c_int; 6] =
    [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP, libc::SIGTERM, libc::SIGUSR1, libc::SIGUSR2];

/// Where the handler writes: the pipe of the one [`Signals`] there is, else -1.
static PIPE: AtomicI32 = AtomicI32::new(-1);

/// A signal that came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Caught {
    pub(crate) signal: c_int,
    /// Sent by the kernel, as a terminal does to its whole foreground process group.
    pub(crate) by_kernel: bool,
}

/// Catches signals for as long as it lives, for one run in a process; what was ignored stays
/// ignored, as `nohup` wants it.
pub(crate) struct Signals {
    read: OwnedFd,
    _write: OwnedFd,
    saved: Vec<(c_int, libc::sigaction)>,
}

impl Signals {
    /// `None` while another run in this process has them.
    pub(crate) fn catch() -> io::Result<Option<Self>> {
        let flags = rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK;
        let (read, write) = rustix::pipe::pipe_with(flags)?;
        let free = PIPE.compare_exchange(-1, write.as_raw_fd(), Ordering::SeqCst, Ordering::SeqCst);
        if free.is_err() {
            return Ok(None);
        }
        let mut signals = Self { read, _write: write, saved: Vec::new() };
        for signal in CAUGHT {
            // SAFETY: `sigaction` is plain data for which zero is a value.
            let mut old: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: reads the action of a valid signal into `old`.
            unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut old) };
            if old.sa_sigaction == libc::SIG_IGN {
                continue;
            }
            // SAFETY: as above.
            let mut new: libc::sigaction = unsafe { std::mem::zeroed() };
            new.sa_sigaction = handle as extern "C" fn(_, _, _) as *const () as usize;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
            // SAFETY: `handle` has the type that SA_SIGINFO asks for, and only does what
            // signal-safety(7) allows.
            if unsafe { libc::sigaction(signal, &raw const new, std::ptr::null_mut()) } != 0 {
                return Err(io::Error::last_os_error());
            }
            signals.saved.push((signal, old));
        }
        Ok(Some(signals))
    }

    /// The signal that came next, if one did.
    pub(crate) fn next(&self) -> Option<Caught> {
        let mut message = [0; 2];
        match rustix::io::read(&self.read, &mut message) {
            Ok(2) => Some(Caught { signal: c_int::from(message[0]), by_kernel: message[1] != 0 }),
            _ => None,
        }
    }

    /// What each caught signal did before, for a child to have it again.
    pub(crate) fn before(&self) -> &[(c_int, libc::sigaction)] {
        &self.saved
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (signal, old) in &self.saved {
            // SAFETY: gives a valid signal the action that it had.
            unsafe { libc::sigaction(*signal, &raw const *old, std::ptr::null_mut()) };
        }
        PIPE.store(-1, Ordering::SeqCst);
    }
}

extern "C" fn handle(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo; errno's location is always valid and is restored;
    // write(2) on two bytes of the stack is signal-safe.
    unsafe {
        let errno = *libc::__errno_location();
        let by_kernel = (*info).si_code == libc::SI_KERNEL;
        let message = [signal.to_le_bytes()[0], u8::from(by_kernel)];
        libc::write(PIPE.load(Ordering::SeqCst), message.as_ptr().cast(), message.len());
        *libc::__errno_location() = errno;
    }
}

/// All signals of this thread are held back while it lives.
pub(crate) struct Blocked(libc::sigset_t);

impl Blocked {
    pub(crate) fn all() -> Self {
        // SAFETY: `sigset_t` is plain data, filled by sigfillset; pthread_sigmask reads one set
        // and fills the other.
        unsafe {
            let mut all: libc::sigset_t = std::mem::zeroed();
            let mut old: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            Self(old)
        }
    }

    /// What was held back before.
    pub(crate) fn before(&self) -> &libc::sigset_t {
        &self.0
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: a set that pthread_sigmask filled.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut())
        };
    }
}
