//! From the supervisor to the client: two forks, the filter, `exec`.
//!
//! The first child is the guardian ([`super::guardian`]), its child becomes the client. Between
//! `fork` and `exec` nothing is allocated and no lock is taken: all that is needed is made before.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::ptr;
use std::sync::{Arc, Mutex, PoisonError};

use libc::{c_char, c_int, pid_t, sock_filter};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;

use super::signals::{Blocked, Signals};
use super::{guardian, seccomp};

/// What is to be started.
pub(crate) struct Plan<'a> {
    /// The paths to try, in order.
    pub(crate) candidates: &'a [CString],
    /// The arguments, the name first.
    pub(crate) arguments: &'a [CString],
    /// `NAME=value` of each variable.
    pub(crate) environment: &'a [CString],
    /// The filter.
    pub(crate) filter: &'a [sock_filter],
    /// Soft `RLIMIT_NOFILE` of the client.
    pub(crate) open_files: u64,
    /// The highest number of a descriptor of ours.
    pub(crate) last_number: c_int,
    /// The signals that are caught, for the client not to inherit that.
    pub(crate) signals: Option<&'a Signals>,
}

/// What was started, as the supervisor holds it.
pub(crate) struct Spawned {
    /// The guardian's process.
    pub(crate) guardian: pid_t,
    /// The guardian ends all when this closes.
    pub(crate) leash: Arc<Leash>,
    /// [`guardian::Message`]s.
    pub(crate) messages: OwnedFd,
    /// The listener comes here; its end means that the child failed.
    pub(crate) socket: OwnedFd,
    /// A [`Failure`], or its end once the program runs.
    pub(crate) report: OwnedFd,
}

/// What keeps the client's processes alive.
pub(crate) struct Leash(Mutex<Option<OwnedFd>>);

impl Leash {
    /// Has the guardian kill all that is left.
    pub(crate) fn let_go(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// How far the child came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    Prepare,
    Filter,
    Listener,
    Exec,
}

/// Why there is no client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Failure {
    pub(crate) stage: Stage,
    pub(crate) errno: i32,
}

/// Length of a [`Failure`] in the pipe.
const FAILURE_LENGTH: usize = 8;

impl Failure {
    fn encode(self) -> [u8; FAILURE_LENGTH] {
        let stage: u32 = match self.stage {
            Stage::Prepare => 0,
            Stage::Filter => 1,
            Stage::Listener => 2,
            Stage::Exec => 3,
        };
        (u64::from(stage) << 32 | u64::from(self.errno.cast_unsigned())).to_le_bytes()
    }

    /// Reads what the child reported; `None` at the end of the pipe: the program runs, or the child
    /// was killed.
    pub(crate) fn read(report: &OwnedFd) -> io::Result<Option<Self>> {
        let mut bytes = [0; FAILURE_LENGTH];
        let length = rustix::io::retry_on_intr(|| rustix::io::read(report, &mut bytes))?;
        if length < FAILURE_LENGTH {
            return Ok(None);
        }
        let [e0, e1, e2, e3, s0, ..] = bytes;
        let stage = match s0 {
            0 => Stage::Prepare,
            1 => Stage::Filter,
            2 => Stage::Listener,
            _ => Stage::Exec,
        };
        Ok(Some(Self { stage, errno: i32::from_le_bytes([e0, e1, e2, e3]) }))
    }
}

/// A null-terminated array of C strings, as `execve` takes it.
struct Vector(Vec<*const c_char>);

impl Vector {
    fn new<'a>(strings: impl Iterator<Item = &'a CStr>) -> Self {
        Self(strings.map(CStr::as_ptr).chain([ptr::null()]).collect())
    }
}

/// All that the client's side of the fork needs.
pub(super) struct Child<'a> {
    plan: &'a Plan<'a>,
    arguments: Vector,
    /// `/bin/sh`, a free place for the script, and the arguments: for scripts without `#!`.
    shell: Vector,
    environment: Vector,
    socket: OwnedFd,
    report: OwnedFd,
    /// The supervisor's end of the leash.
    leash: RawFd,
    mask: libc::sigset_t,
}

/// Starts the guardian and the client.
pub(crate) fn spawn(plan: &Plan<'_>) -> io::Result<Spawned> {
    let (control_read, control) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (messages, messages_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (report, report_write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    let (socket, child_socket) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let blocked = Blocked::all();
    let arguments = || plan.arguments.iter().map(CString::as_c_str);
    let mut child = Child {
        plan,
        arguments: Vector::new(arguments()),
        shell: Vector::new([c"/bin/sh", c""].into_iter().chain(arguments().skip(1))),
        environment: Vector::new(plan.environment.iter().map(CString::as_c_str)),
        socket: child_socket,
        report: report_write,
        leash: control.as_raw_fd(),
        mask: *blocked.before(),
    };
    let ends =
        guardian::Ends { control: control_read.as_raw_fd(), messages: messages_write.as_raw_fd() };
    // SAFETY: the child runs `guardian::run` alone, which only makes system calls on what was made
    // before, and never returns.
    let guardian = match unsafe { libc::fork() } {
        -1 => return Err(io::Error::last_os_error()),
        // SAFETY: this is the only thread of a fresh child, with all signals blocked.
        0 => unsafe { guardian::run(&ends, &mut child) },
        pid => pid,
    };
    drop(blocked);
    let leash = Arc::new(Leash(Mutex::new(Some(control))));
    Ok(Spawned { guardian, leash, messages, socket, report })
}

/// Becomes the client. Signals are blocked.
///
/// # Safety
/// Only in a fresh child with one thread, whose parent is `parent`.
pub(super) unsafe fn become_client(child: &mut Child<'_>, parent: pid_t) -> ! {
    let plan = child.plan;
    // SAFETY: plain system calls on values of this frame or made before the fork; none allocates.
    unsafe {
        // A supervisor that dies before it has the listener leaves this process in its `execve`
        // for ever. Only the guardian can end it then, and it waits for the end of the leash.
        libc::close(child.leash);
        if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 || libc::getppid() != parent {
            fail(child, Stage::Prepare, errno());
        }
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = plan.open_files;
        if libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) != 0
            || libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
        {
            fail(child, Stage::Prepare, errno());
        }
        // Where there are threads, the kernel waits for an RCU grace period of some ten milliseconds
        // before it makes a descriptor table larger (`expand_fdtable`). Here there are none yet.
        let high = libc::fcntl(child.report.as_raw_fd(), libc::F_DUPFD_CLOEXEC, plan.last_number);
        if high >= 0 {
            libc::close(high);
        }
        let listener = seccomp::install(plan.filter);
        if listener < 0 {
            fail(child, Stage::Filter, -listener);
        }
        if !send_file(child.socket.as_raw_fd(), listener) {
            fail(child, Stage::Listener, errno());
        }
        if let Some(signals) = plan.signals {
            for (signal, action) in signals.before() {
                libc::sigaction(*signal, ptr::from_ref(action), ptr::null_mut());
            }
        }
        // Rust's start-up code ignores it, and an ignored signal stays so across exec.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const child.mask, ptr::null_mut());
    }
    let mut result = libc::ENOENT;
    for candidate in plan.candidates {
        // SAFETY: null-terminated arrays of strings that live in `plan`.
        let error = unsafe { exec(child, candidate) };
        match error {
            libc::ENOENT | libc::ENOTDIR | libc::ENODEV | libc::ESTALE | libc::ETIMEDOUT => {}
            libc::EACCES => result = libc::EACCES,
            other => {
                result = other;
                break;
            }
        }
    }
    fail(child, Stage::Exec, result)
}

/// Runs `path`, or `/bin/sh` on it when the kernel does not know its format, as `execvp` does;
/// gives the errno.
///
/// # Safety
/// The vectors of `child` must point to live strings.
unsafe fn exec(child: &mut Child<'_>, path: &CStr) -> c_int {
    // SAFETY: by this function's contract.
    unsafe {
        let environment = child.environment.0.as_ptr();
        libc::execve(path.as_ptr(), child.arguments.0.as_ptr(), environment);
        let error = errno();
        if error == libc::ENOEXEC
            && let Some(script) = child.shell.0.get_mut(1)
        {
            *script = path.as_ptr();
            libc::execve(c"/bin/sh".as_ptr(), child.shell.0.as_ptr(), environment);
        }
        error
    }
}

fn fail(child: &Child<'_>, stage: Stage, errno: c_int) -> ! {
    let message = Failure { stage, errno }.encode();
    // SAFETY: writes bytes of this frame to a pipe, and ends.
    unsafe {
        libc::write(child.report.as_raw_fd(), message.as_ptr().cast(), message.len());
        libc::_exit(127)
    }
}

fn errno() -> c_int {
    // SAFETY: the location of errno is always valid.
    unsafe { *libc::__errno_location() }
}

/// Sends one descriptor with one byte.
///
/// # Safety
/// Both must be open descriptors.
unsafe fn send_file(socket: RawFd, file: RawFd) -> bool {
    let mut byte = 0_u8;
    let mut data = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    // Aligned as `cmsghdr` wants it, and larger than CMSG_SPACE of one descriptor, 24 bytes.
    let mut control = [0_u64; 4];
    // SAFETY: `msghdr` is plain data; it points to buffers of this frame with their lengths. The
    // control buffer has room for the header and one descriptor, so CMSG_FIRSTHDR is not null.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut data;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as _;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as _;
        libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(file);
        libc::sendmsg(socket, &raw const message, 0) == 1
    }
}
