//! Gives an unmodified program the machine's devices by seccomp user notification.
//!
//! [`run`] starts a program under a filter that notifies the supervisor of the few system calls that
//! may concern the machine: those by path, `ioctl`s of VFIO and iommufd, and those on descriptors
//! that the supervisor gave out. The rest runs at its own speed. The supervisor answers for the
//! [`System`](lychgate_machine::System) where a call is the machine's, and lets the kernel go on where
//! it is not. No rights are needed, no namespace, and no module.
//!
//! # What programs see
//! * Device nodes open, and `stat` shows character devices with their numbers. Their descriptors
//!   have numbers from 768 to 1023, from the top, so that the filter knows them; `dup` and `F_DUPFD`
//!   stay in there. Through `dup2`, `dup3` and sockets they can get any number: then `ioctl`, `mmap`,
//!   `poll`, and `pread` and `pwrite` past 1 TiB, where VFIO has all regions but the first, work as
//!   ever, while `fstat`, `read` and `write` see the memory behind.
//! * Files are released at their last reference in any process, memory mappings included.
//! * Texts that the machine shows or takes ([`System::attribute`], [`System::fail_nth`]) are as the
//!   kernel's are. Where a shell redirects to one by `dup2`, what it writes is taken at the close.
//!   `/proc/PID/status` counts what the machine has pinned and locked of a process.
//! * Paths are looked up in the machine's tree laid over the host's ([`System::tree`]), through links
//!   in both. A directory that both have lists the names of both; each `open` sees them as they are
//!   then.
//! * Not seen through: `chdir` into a directory of the machine, which needs `fchdir`; `chroot` and mount
//!   namespaces of a client; `io_uring`'s own `openat`, `read` and `statx`; `statx` with a path, a
//!   directory and `AT_EMPTY_PATH` at once; 32-bit programs, which get `ENOSYS` and a warning.
//!
//! # What it needs
//! x86-64 and Linux 5.19; 6.6 makes each call twelve times faster. See [`Error`] for what else can be
//! in the way.
//!
//! [`System::tree`]: lychgate_machine::System::tree
//! [`System::attribute`]: lychgate_machine::System::attribute
//! [`System::fail_nth`]: lychgate_machine::System::fail_nth

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!("lychgate-interpose knows the system calls of x86-64 Linux only");

mod attributes;
mod caller;
mod command;
mod error;
mod eventfds;
mod files;
mod filter;
mod mappings;
mod merged;
mod names;
mod origin;
mod paths;
mod process;
mod scratch;
mod server;
mod space;
mod supervisor;
mod sys;
mod text_file;
mod trace;

pub use command::{Command, ExitStatus};
pub use error::Error;
pub use scratch::Scratch;
pub use supervisor::{Options, Origins, run};
pub use trace::{Served, Tracer};
