//! The guardian: a small process between the supervisor and the client.
//!
//! A supervisor that is killed leaves no program behind. `PR_SET_PDEATHSIG` cannot see to that: it
//! is not inherited, so only the first process of the client would die. The guardian is the parent
//! of the client and the reaper of all it starts, daemons included (`PR_SET_CHILD_SUBREAPER`). It
//! holds a pipe whose other end is the supervisor's: when that end closes, it kills its children
//! until none comes any more. It blocks all signals, so Ctrl-C and Ctrl-Z pass it by; should it be
//! killed itself, the client has it for `PR_SET_PDEATHSIG`.
//!
//! It runs in a fork of a process with threads, so it makes system calls and nothing else.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::ptr;

use libc::{c_int, c_void, pid_t};

use super::remove::next_name;
use super::spawn::{self, Child};

/// The guardian's ends of the pipes to the supervisor.
pub(super) struct Ends {
    pub(super) control: RawFd,
    pub(super) messages: RawFd,
}

/// What the guardian tells the supervisor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Message {
    /// The process that becomes the client.
    Started(u32),
    /// The client's wait status.
    Ended(i32),
}

const MESSAGE_LENGTH: usize = 8;

impl Message {
    fn encode(self) -> [u8; MESSAGE_LENGTH] {
        let (kind, value) = match self {
            Self::Started(pid) => (0, pid),
            Self::Ended(status) => (1_u64, status.cast_unsigned()),
        };
        (kind << 32 | u64::from(value)).to_le_bytes()
    }

    /// Waits for the next one; `None` when the guardian is gone.
    pub(crate) fn read(messages: &OwnedFd) -> io::Result<Option<Self>> {
        let mut bytes = [0; MESSAGE_LENGTH];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(messages, &mut bytes))?;
        if length < MESSAGE_LENGTH {
            return Ok(None);
        }
        let [v0, v1, v2, v3, kind, ..] = bytes;
        let value = u32::from_le_bytes([v0, v1, v2, v3]);
        Ok(Some(if kind == 0 { Self::Started(value) } else { Self::Ended(value.cast_signed()) }))
    }
}

/// Starts the client, watches over it, and ends with the last of its processes.
///
/// # Safety
/// Only in a fresh child with one thread, all signals blocked.
pub(super) unsafe fn run(ends: &Ends, child: &mut Child<'_>) -> ! {
    // SAFETY: plain system calls on values of this frame or made before the fork.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"lychgate-guard".as_ptr());
        libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1);
        let own = libc::getpid();
        let client = libc::fork();
        if client == 0 {
            spawn::become_client(child, own);
        }
        if client < 0 {
            libc::_exit(127);
        }
        tell(ends, Message::Started(client.cast_unsigned()));
        close_all_but(ends);

        let mut signals: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut signals);
        libc::sigaddset(&raw mut signals, libc::SIGCHLD);
        let children = libc::signalfd(-1, &raw const signals, libc::SFD_NONBLOCK);
        let mut alone = false;
        loop {
            while let Some((pid, status)) = reap(libc::WNOHANG) {
                if pid == client {
                    tell(ends, Message::Ended(status));
                }
            }
            if alone {
                end_all(ends, own, client);
            }
            let mut polled = [
                libc::pollfd { fd: children, events: libc::POLLIN, revents: 0 },
                libc::pollfd { fd: ends.control, events: libc::POLLIN, revents: 0 },
            ];
            libc::poll(polled.as_mut_ptr(), 2, -1);
            let mut sink = [0_u8; 128];
            libc::read(children, sink.as_mut_ptr().cast(), sink.len());
            alone = polled[1].revents != 0;
        }
    }
}

/// Waits for a child; `None` when none ended yet. Ends the guardian when there is none at all.
unsafe fn reap(flags: c_int) -> Option<(pid_t, c_int)> {
    let mut status = 0;
    // SAFETY: waitpid stores one int.
    match unsafe { libc::waitpid(-1, &raw mut status, flags | libc::__WALL) } {
        // SAFETY: ends this process.
        -1 => unsafe { libc::_exit(0) },
        0 => None,
        pid => Some((pid, status)),
    }
}

/// Kills children until there is none; theirs become ours when they die.
unsafe fn end_all(ends: &Ends, own: pid_t, client: pid_t) -> ! {
    loop {
        // SAFETY: as `run`.
        unsafe {
            each_child(own, |pid| {
                libc::kill(pid, libc::SIGKILL);
            });
            // At least one child was killed, or there is none left and `reap` ends this process.
            if let Some((pid, status)) = reap(0)
                && pid == client
            {
                tell(ends, Message::Ended(status));
            }
        }
    }
}

/// Calls `act` for each process whose parent is `own`, by `/proc/PID/stat`.
unsafe fn each_child(own: pid_t, mut act: impl FnMut(pid_t)) {
    // SAFETY: buffers of this frame with their lengths.
    unsafe {
        let proc = libc::open(c"/proc".as_ptr(), libc::O_RDONLY | libc::O_DIRECTORY);
        if proc < 0 {
            return;
        }
        let mut entries = [0_u8; 4096];
        loop {
            let length =
                libc::syscall(libc::SYS_getdents64, proc, entries.as_mut_ptr(), entries.len());
            let Some(mut rest) = usize::try_from(length).ok().and_then(|n| entries.get(..n)) else {
                break;
            };
            if rest.is_empty() {
                break;
            }
            while let Some(name) = next_name(&mut rest) {
                if let Some(pid) = number(name)
                    && parent_of(proc, name) == Some(own)
                {
                    act(pid);
                }
            }
        }
        libc::close(proc);
    }
}

/// A decimal number up to the first byte that is no digit, which must be the terminating 0.
fn number(text: &[u8]) -> Option<pid_t> {
    let mut value: pid_t = 0;
    for byte in text {
        match byte {
            b'0'..=b'9' => {
                value = value.checked_mul(10)?.checked_add(pid_t::from(byte - b'0'))?;
            }
            0 if value > 0 => return Some(value),
            _ => return None,
        }
    }
    None
}

/// The parent of the process with the directory `name` in `proc`.
unsafe fn parent_of(proc: RawFd, name: &[u8]) -> Option<pid_t> {
    let mut path = [0_u8; 24];
    let digits = name.iter().position(|byte| *byte == 0)?;
    path.get_mut(..digits)?.copy_from_slice(name.get(..digits)?);
    path.get_mut(digits..digits + 5)?.copy_from_slice(b"/stat");
    let mut text = [0_u8; 256];
    // SAFETY: `path` ends with 0, because it has more room than name and "/stat"; `text` is as
    // long as told.
    let length = unsafe {
        let file = libc::openat(proc, path.as_ptr().cast(), libc::O_RDONLY);
        if file < 0 {
            return None;
        }
        let length = libc::read(file, text.as_mut_ptr().cast::<c_void>(), text.len());
        libc::close(file);
        usize::try_from(length).ok()?
    };
    // "PID (NAME) STATE PARENT ...", where NAME may hold anything.
    let text = text.get(..length)?;
    let close = text.iter().rposition(|byte| *byte == b')')?;
    let parent = text.get(close + 4..)?;
    let end = parent.iter().position(|byte| *byte == b' ')?;
    let mut digits = [0_u8; 16];
    digits.get_mut(..end)?.copy_from_slice(parent.get(..end)?);
    number(&digits)
}

unsafe fn tell(ends: &Ends, message: Message) {
    let bytes = message.encode();
    // SAFETY: bytes of this frame.
    unsafe { libc::write(ends.messages, bytes.as_ptr().cast(), bytes.len()) };
}

/// Closes what the supervisor had open, so that nothing waits for the guardian to end.
unsafe fn close_all_but(ends: &Ends) {
    let (low, high) = if ends.control < ends.messages {
        (ends.control, ends.messages)
    } else {
        (ends.messages, ends.control)
    };
    // SAFETY: descriptors that nothing in this process uses any more.
    unsafe {
        close_range(0, low.saturating_sub(1));
        close_range(low.saturating_add(1), high.saturating_sub(1));
        close_range(high.saturating_add(1), c_int::MAX);
    }
}

/// Closes the descriptors `from` to `to`, both included.
///
/// # Safety
/// Nothing in the process may use them any more.
pub(super) unsafe fn close_range(from: c_int, to: c_int) {
    if from > to {
        return;
    }
    // SAFETY: as `close_all_but`; the system call takes no memory.
    unsafe {
        if libc::syscall(libc::SYS_close_range, from, to, 0) != 0 {
            let mut limit = libc::rlimit { rlim_cur: 1024, rlim_max: 0 };
            libc::getrlimit(libc::RLIMIT_NOFILE, ptr::from_mut(&mut limit));
            let last = c_int::try_from(limit.rlim_cur).unwrap_or(c_int::MAX);
            for fd in from..=to.min(last) {
                libc::close(fd);
            }
        }
    }
}
