//! The caller of an ioctl: its memory, its rights, its descriptors.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use lychgate_types::Errno;

use crate::file::OpenFile;
use crate::mm::{MemFile, Mm};

/// Capabilities that the ABI asks about (`capabilities(7)`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Cap {
    /// `CAP_IPC_LOCK`.
    IpcLock,
    /// `CAP_SYS_RAWIO`.
    SysRawio,
    /// `CAP_SYS_RESOURCE`.
    SysResource,
}

/// An eventfd of a client that both sides hold.
pub trait EventFd: Send + Sync {
    /// Adds 1 to its counter, without blocking: `eventfd_signal`.
    fn signal(&self);

    /// The eventfd itself, for calls that wait until the client signals it; `None` when this side
    /// can only signal.
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// The thread that made a call, for as long as the call lasts.
pub trait Client {
    /// `copy_from_user`: fills `to` from the client's address `from`; `EFAULT`.
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno>;

    /// `copy_to_user`: stores `from` at the client's address `to`; `EFAULT`.
    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno>;

    /// Whether the caller has a capability.
    fn capable(&self, cap: Cap) -> bool;

    /// The caller's soft `RLIMIT_MEMLOCK` in bytes; `u64::MAX` for none.
    fn memlock_limit(&self) -> u64;

    /// The caller's address space.
    fn mm(&self) -> Arc<dyn Mm>;

    /// The file of ours behind a descriptor of the caller; `None` for any other descriptor.
    fn file(&self, fd: i32) -> Option<Arc<dyn OpenFile>>;

    /// A descriptor of the caller whose memory can be mapped for DMA: `EBADF` when it is not open,
    /// `EINVAL` when it is no memfd or other file in memory.
    fn mem_file(&self, fd: i32) -> Result<Arc<dyn MemFile>, Errno>;

    /// An eventfd of the caller: `EBADF` when it is not open, `EINVAL` when it is something else.
    fn eventfd(&self, fd: i32) -> Result<Arc<dyn EventFd>, Errno>;

    /// Whether any process maps a byte of `len` bytes from `offset` of one of our files. Ended
    /// processes map nothing; what no process asked to map, none maps.
    fn is_mapped(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
        let _ = (file, offset, len);
        false
    }
}
