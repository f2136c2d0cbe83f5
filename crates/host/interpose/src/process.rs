//! What `/proc` says of clients.
//!
//! A notification names a thread. It waits in its system call, so its number is its own until it is
//! answered; only a kill can end it, which [`Listener::waits`](crate::sys::notify::Listener::waits)
//! tells.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::OnceLock;

use lychgate_types::Errno;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, Stat};
use rustix::path::DecInt;

use crate::sys::limits;

/// The file behind a descriptor of a thread, by its inode. `EBADF` when it is not open.
pub(crate) fn stat_file(thread: u32, fd: i32) -> Result<Stat, Errno> {
    if fd < 0 {
        return Err(Errno::EBADF);
    }
    rustix::fs::statat(CWD, format!("/proc/{thread}/fd/{fd}"), AtFlags::empty())
        .map_err(|_| Errno::EBADF)
}

/// `/proc/THREAD/fd`, for [`stat_file_in`]. It stays with that very thread: when another has its
/// number, nothing is found in it.
pub(crate) fn open_table(thread: u32) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/{thread}/fd"), flags, Mode::empty())
}

/// [`stat_file`] in a table that is open; `None` when it is not there.
pub(crate) fn stat_file_in(table: &OwnedFd, fd: i32) -> Option<Stat> {
    rustix::fs::statat(table, DecInt::new(fd), AtFlags::empty()).ok()
}

/// Opens the file behind a descriptor of a thread anew.
pub(crate) fn reopen(thread: u32, fd: i32, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = format!("/proc/{thread}/fd/{fd}");
    rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
}

/// Where a descriptor of a thread leads, as the link in `/proc` says.
pub(crate) fn link_of_file(thread: u32, fd: i32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{thread}/fd/{fd}")).ok()
}

/// The working directory of a thread.
pub(crate) fn directory(thread: u32) -> Option<PathBuf> {
    std::fs::read_link(format!("/proc/{thread}/cwd")).ok()
}

/// The value of the first line of `/proc/THREAD/fdinfo/FD` with `name` before the colon.
pub(crate) fn file_info(thread: u32, fd: i32, name: &str) -> Option<String> {
    field(&read(format!("/proc/{thread}/fdinfo/{fd}")).ok()?, name).map(str::to_owned)
}

/// The open numbers of a thread's descriptors within a range.
pub(crate) fn open_files(thread: u32) -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir(format!("/proc/{thread}/fd")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// Whether a thread has a descriptor of this number.
pub(crate) fn is_open(thread: u32, fd: u32) -> bool {
    rustix::fs::statat(CWD, format!("/proc/{thread}/fd/{fd}"), AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// Whether a process has a thread of this number.
pub(crate) fn has_thread(process: u32, thread: u32) -> bool {
    let path = format!("/proc/{process}/task/{thread}");
    rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

/// What `/proc/THREAD/status` says.
pub(crate) struct Status(String);

impl Status {
    /// Reads it.
    pub(crate) fn of(thread: u32) -> io::Result<Self> {
        read(format!("/proc/{thread}/status")).map(Self)
    }

    /// The thread group: what programs call the process.
    pub(crate) fn process(&self) -> Option<u32> {
        self.first("Tgid")?.parse().ok()
    }

    /// The real user.
    pub(crate) fn user(&self) -> Option<u32> {
        self.first("Uid")?.parse().ok()
    }

    /// The effective capabilities.
    pub(crate) fn capabilities(&self) -> Option<u64> {
        u64::from_str_radix(self.first("CapEff")?, 16).ok()
    }

    fn first(&self, name: &str) -> Option<&str> {
        field(&self.0, name)?.split_ascii_whitespace().next()
    }
}

/// The soft `RLIMIT_MEMLOCK` of a thread in bytes; `u64::MAX` for none.
pub(crate) fn memlock_limit(thread: u32) -> Option<u64> {
    // `/proc` tells of the few that `prlimit` may not ask about: those of other users.
    if let Some(limit) = limits::memlock(thread) {
        return Some(limit);
    }
    let limits = read(format!("/proc/{thread}/limits")).ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    match line.split_ascii_whitespace().next()? {
        "unlimited" => Some(u64::MAX),
        number => number.parse().ok(),
    }
}

/// Whether a thread is in the user namespace of the supervisor.
pub(crate) fn is_in_our_user_namespace(thread: u32) -> bool {
    // Nothing here enters another one.
    static OWN: OnceLock<Option<PathBuf>> = OnceLock::new();
    let own = OWN.get_or_init(|| std::fs::read_link("/proc/self/ns/user").ok());
    own.is_some() && *own == std::fs::read_link(format!("/proc/{thread}/ns/user")).ok()
}

/// All processes.
pub(crate) fn all() -> Vec<u32> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The processes whose parent is `parent`.
pub(crate) fn children(parent: u32) -> Vec<u32> {
    let is_child = |process: &u32| Image::of(*process).is_some_and(|stat| stat.parent == parent);
    all().into_iter().filter(is_child).collect()
}

/// What `/proc/PROCESS/maps` says; `None` where it cannot be read.
pub(crate) fn maps(process: u32) -> Option<String> {
    read(format!("/proc/{process}/maps")).ok()
}

/// Fields of `/proc/PID/stat`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Image {
    parent: u32,
    /// `start_code`, `end_code` and `start_stack`: differ from one `exec` to the next.
    pub(crate) image: [u64; 3],
}

impl Image {
    /// Reads them.
    pub(crate) fn of(process: u32) -> Option<Self> {
        let text = read(format!("/proc/{process}/stat")).ok()?;
        // The name in parentheses may hold anything; the third field follows it.
        let (_, rest) = text.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            parent: u32::try_from(field(4)?).ok()?,
            image: [field(26)?, field(27)?, field(28)?],
        })
    }
}

/// Major and minor version of the kernel.
pub(crate) fn kernel_version() -> Option<(u32, u32)> {
    let release = read("/proc/sys/kernel/osrelease".to_owned()).ok()?;
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
}

/// Reads a file whose text need not be UTF-8: names of processes and paths are not.
fn read(path: String) -> io::Result<String> {
    std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}
