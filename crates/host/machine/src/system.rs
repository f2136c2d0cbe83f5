//! What a program's system calls ask of a machine. `interpose` calls it, [`crate`] implements it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use lychgate_iommufd::{Cap, Client, MemFile, Mm, OpenFile, Result};
use lychgate_origins::Stack;
use lychgate_types::Errno;

use crate::client::AddressSpace;
use crate::text::Text;

/// A device node of the machine, as `stat` shows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Node {
    /// Major device number.
    pub major: u32,
    /// Minor device number.
    pub minor: u32,
    /// Permission bits; the type is a character device.
    pub mode: u32,
}

/// A system call that a client made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Call {
    /// Counts from 1 in the life of the machine.
    pub number: u64,
    /// Process (thread group) that called.
    pub process: u32,
    /// Thread that called.
    pub thread: u32,
    /// The instruction behind the call, a virtual address of the process.
    pub instruction: u64,
    /// What was called, for people: `IOMMU_IOAS_MAP`, `pread`.
    pub name: String,
}

/// A machine as the programs on it see it.
pub trait System: Send + Sync {
    /// A directory that holds `dev` and `sys`: real directories, files and relative links for all
    /// that the machine adds to the host's. Device nodes are empty regular files there. What is not
    /// in it is the host's.
    fn tree(&self) -> &Path;

    /// The device node at an absolute path as programs spell it, `/dev/vfio/vfio`.
    fn node(&self, path: &Path) -> Option<Node>;

    /// Opens a device node. `ENOENT` where there is none; else as its driver answers.
    fn open(&self, path: &Path, client: &dyn Client) -> Result<Arc<dyn OpenFile>>;

    /// Whether all clients have a capability on the machine, whatever the host says.
    fn grants(&self, cap: Cap) -> bool {
        let _ = cap;
        false
    }

    /// An attribute in the tree that can be written; `None` for one that is there to be read, and for
    /// all else.
    fn attribute(&self, path: &Path) -> Option<Arc<dyn Text>> {
        let _ = path;
        None
    }

    /// `/proc/PID/task/THREAD/fail-nth` of a client; `None` where programs cannot make the machine
    /// fail.
    fn fail_nth(&self, thread: u32) -> Option<Arc<dyn Text>> {
        let _ = thread;
        None
    }

    /// Makes an address space known to the machine.
    fn mm(&self, space: Arc<dyn AddressSpace>) -> Arc<dyn Mm>;

    /// Makes a file in memory known to the machine; the same file gives the same frames however
    /// often it comes. `EINVAL` for a file that is not in memory.
    fn mem_file(&self, fd: OwnedFd) -> Result<Arc<dyn MemFile>, Errno>;

    /// A call begins on this thread: changes up to [`System::call_ends`] are its doing.
    fn call_begins(&self, call: Call);

    /// Where in the program the call that began last on this thread comes from.
    fn call_came_from(&self, stack: Stack) {
        let _ = stack;
    }

    /// The call that began last on this thread is over.
    fn call_ends(&self);
}
