//! Open files that the machine serves: what each system call on them does.

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use lychgate_types::Errno;

use crate::client::Client;
use crate::dma_buf::DmaBuf;
use crate::error::{Result, refuse};

/// What a successful ioctl gives back.
pub enum Reply {
    /// The return value.
    Value(i32),
    /// A new file; its descriptor in the caller is the return value.
    File(NewFile),
    /// A new file whose descriptor is stored as a `u32` at the caller's address `at`, such as
    /// `out_fault_fd`; 0 is the return value. `EFAULT` when it cannot be stored: the file is then
    /// released, and what the call made else must go with it. Once the caller has it,
    /// [`OpenFile::given`] is called.
    FileAt {
        /// What is made.
        file: NewFile,
        /// Where the caller reads its number.
        at: u64,
    },
}

/// A call that gives back nothing answers 0.
impl From<()> for Reply {
    fn from((): ()) -> Self {
        Self::Value(0)
    }
}

/// A file that a call creates for its caller.
pub struct NewFile {
    /// What it is.
    pub file: Arc<dyn OpenFile>,
    /// Whether the descriptor closes on exec.
    pub cloexec: bool,
}

/// Whom a file tells whether there is something to read.
pub trait Readiness: Send + Sync {
    /// `poll` on the file says `POLLIN` from now on, or no longer does. The last word counts.
    fn set_readable(&self, readable: bool);
}

/// What a client asks of `mmap`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MmapRequest {
    /// Offset into the file in bytes, a multiple of the page size.
    pub offset: u64,
    /// Length in bytes, as given.
    pub len: u64,
    /// `PROT_READ`.
    pub read: bool,
    /// `PROT_WRITE`.
    pub write: bool,
    /// `PROT_EXEC`.
    pub exec: bool,
    /// `MAP_SHARED`.
    pub shared: bool,
}

/// An open file description: one `open`, shared by every `dup` of it and by forked children.
pub trait OpenFile: Send + Sync {
    /// What it is, for people: `/dev/iommu`, `/dev/vfio/7`, `vfio-device 0000:01:00.0`.
    fn name(&self) -> String;

    /// The device number that `stat` shows; `None` for an anonymous inode.
    fn device_number(&self) -> Option<(u32, u32)>;

    /// `ioctl(2)`. `argument` is the third argument as given, mostly a client address.
    fn ioctl(&self, client: &dyn Client, command: u32, argument: u64) -> Result<Reply>;

    /// The name of an ioctl and the structure that it is given, as text: called before the ioctl it
    /// shows what is asked, called after it what was answered. `None` for an ioctl that the file
    /// does not have, and where the caller's memory cannot be read.
    fn describe(&self, client: &dyn Client, command: u32, argument: u64) -> Option<String> {
        let _ = (client, command, argument);
        None
    }

    /// `pread(2)` and, for files with a position of 0, `read(2)`: up to `count` bytes at `offset`
    /// into the client's `buffer`; gives the bytes read.
    fn read_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        let _ = (client, buffer, count, offset);
        refuse(Errno::EINVAL, "this file cannot be read")
    }

    /// `pwrite(2)` and `write(2)`, as [`OpenFile::read_at`].
    fn write_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        let _ = (client, buffer, count, offset);
        refuse(Errno::EINVAL, "this file cannot be written")
    }

    /// Whether `read(2)` and `write(2)` leave the file position where it is, as for files that are
    /// queues rather than memory.
    fn is_queue(&self) -> bool {
        false
    }

    /// Whether `mmap(2)` may go on: onto [`OpenFile::backing`], at the same offset.
    fn mmap(&self, request: &MmapRequest) -> Result<()> {
        let _ = request;
        refuse(Errno::ENODEV, "this file cannot be mapped")
    }

    /// The memory that a client maps, a file as large as the largest offset; `None` when nothing can
    /// be mapped.
    fn backing(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Called once, before a client has the file. A file that `poll` can wait for keeps `readiness`,
    /// tells it the state at each change, and gives `true`; such a file has no backing.
    fn wait_with(&self, readiness: Arc<dyn Readiness>) -> bool {
        let _ = readiness;
        false
    }

    /// The caller that [`Reply::FileAt`] was meant for has the descriptor, and is about to be told
    /// that its call succeeded.
    fn given(&self) {}

    /// The memory of a device that the file stands for, if it is a dma-buf.
    fn dma_buf(&self) -> Option<Arc<dyn DmaBuf>> {
        None
    }

    /// The last reference in any process is gone.
    fn release(&self);

    /// The file's own type, for calls that are given a descriptor.
    fn as_any(&self) -> &dyn Any;
}
