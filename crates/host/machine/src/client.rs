//! How the machine reaches the memory of a client process.

use std::os::fd::OwnedFd;

/// `len` bytes of a client's address space from `start`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Span {
    /// First virtual address.
    pub start: u64,
    /// Length in bytes, not 0.
    pub len: usize,
}

/// The memory is not there: unmapped, protected, or the process is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the client's memory cannot be reached")]
pub struct Unreachable;

/// One line of `/proc/PID/maps`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// First address behind it.
    pub end: u64,
    /// Readable.
    pub read: bool,
    /// Writable.
    pub write: bool,
    /// Shared rather than private.
    pub shared: bool,
    /// Offset into the file of the first byte.
    pub offset: u64,
    /// Device and inode of the file; `None` for anonymous memory.
    pub file: Option<(u64, u64)>,
    /// The name as `/proc/PID/maps` shows it.
    pub name: String,
}

/// The address space of one process, from its `exec` to its end or its next `exec`.
pub trait AddressSpace: Send + Sync {
    /// The process (thread group) that has it.
    fn process(&self) -> u32;

    /// Gathers the bytes of `spans`, in order, into `to`, whose length is their sum. Memory
    /// protection of the client does not matter: what is mapped can be read, as by a device.
    fn read(&self, spans: &[Span], to: &mut [u8]) -> Result<(), Unreachable>;

    /// Scatters `from` to `spans`, in order. Memory protection of the client does not matter: what
    /// is mapped can be written, as by a device. An aligned span of 4 or 8 bytes is one store.
    fn write(&self, spans: &[Span], from: &[u8]) -> Result<(), Unreachable>;

    /// The number by which `process_vm_writev` reaches this address space now and for as long as
    /// its process makes no further call; `None` where only [`AddressSpace::write`] does.
    fn number(&self) -> Option<u32> {
        None
    }

    /// The mappings that touch `len` bytes from `start`, ascending.
    fn vmas(&self, start: u64, len: u64) -> Result<Vec<Vma>, Unreachable>;

    /// Opens the file behind a shared mapping for reading and writing, if the process still has a
    /// descriptor of it.
    fn open_file(&self, vma: &Vma) -> Option<OwnedFd>;

    /// The user that the process runs as, for the accounting of pinned memory.
    fn user(&self) -> u32;
}
