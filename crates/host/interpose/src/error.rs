//! Why a program could not be run.

use std::io;
use std::path::PathBuf;

/// Why there is no run. What a shell would give as its exit code is [`Error::exit_code`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No file of that name, on `PATH` or as a path.
    #[error("{}: no such program", .0.display())]
    NotFound(PathBuf),
    /// The file is there, but cannot be executed.
    #[error("{}: cannot be executed: {source}", .program.display())]
    NotExecutable {
        /// The program as given.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A program name, an argument or a variable with a zero byte.
    #[error("a zero byte in {0:?}")]
    ZeroByte(String),
    /// The kernel, or a sandbox like gVisor in its place, has no seccomp user notification.
    #[error(
        "this kernel has no seccomp user notification (Linux 5.0, CONFIG_SECCOMP_FILTER); \
         sandboxes like gVisor do not offer it"
    )]
    NoNotification,
    /// The kernel is older than 5.19.
    #[error(
        "this kernel lacks SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Linux 5.19 or later is needed, \
         because before it a signal repeats an ioctl that is under way"
    )]
    NoWaitKillable,
    /// Somebody is being notified already.
    #[error(
        "a seccomp listener is in place already: this is a program under lychgate, or in a container \
         whose runtime uses seccomp notification, and the kernel allows one listener"
    )]
    Nested,
    /// The machine's policy forbids the memory of other processes.
    #[error(
        "kernel.yama.ptrace_scope is {0}: it forbids access to the memory of the program; 0 or 1 is \
         needed, or CAP_SYS_PTRACE with 2"
    )]
    Yama(u32),
    /// `/proc` is not there, or is another PID namespace's.
    #[error("/proc is not mounted for this PID namespace")]
    NoProc,
    /// The limit of open files leaves no numbers for descriptors.
    #[error("the hard limit of open files (ulimit -Hn) is {0}: at least 512 is needed")]
    TooFewFiles(u64),
    /// The child failed before it could become the program.
    #[error("cannot start the program: {0}: {1}")]
    Start(&'static str, #[source] io::Error),
    /// A call of the supervisor itself failed.
    #[error("{0}: {1}")]
    Os(&'static str, #[source] io::Error),
    /// The machine, or the supervisor, has a defect; the program and all it started were killed.
    #[error("internal error: the thread that serves the program has panicked")]
    Panicked,
    /// The machine's tree cannot be used.
    #[error("the machine's tree {}: {source}", .path.display())]
    Tree {
        /// The tree.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// 127 when there is no such program, 126 when it cannot be executed, else 125: what `env(1)`
    /// and `timeout(1)` give.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::NotExecutable { .. } => 126,
            _ => 125,
        }
    }
}
