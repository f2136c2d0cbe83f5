//! What a namespace keeps its blocks on.

mod file;
mod memory;

pub use file::FileStorage;
pub use memory::MemoryStorage;

use std::io;

use lychgate_model::FileBytes;

/// Bytes that outlive a transfer. Callers stay below [`Storage::len`]; beyond it, and on a medium
/// that fails, a method answers with an error and never panics.
pub trait Storage: Send + Sync {
    /// Size in bytes, constant.
    fn len(&self) -> u64;

    /// Whether there is no byte to keep.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether writes are refused.
    fn read_only(&self) -> bool;

    /// Fills `to` from `offset`.
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()>;

    /// Stores `from` at `offset`.
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()>;

    /// Makes what was written survive a loss of power.
    fn flush(&self) -> io::Result<()>;

    /// Gives `len` bytes from `offset` back to the medium. They read as zeros from then on.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Lends the bytes at `offset` where they stand, so that they move to memory in one copy:
    /// hands as many of the `len` as lie together, at least 1, to `take`, once, and returns how
    /// many. `None`, without a call, when the bytes are not in memory: use [`Storage::read_at`].
    fn lend(&self, offset: u64, len: usize, take: &mut dyn FnMut(&[u8])) -> Option<usize> {
        let _ = (offset, len, take);
        None
    }

    /// As [`Storage::lend`], for bytes that are about to be stored.
    fn lend_mut(&self, offset: u64, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Option<usize> {
        let _ = (offset, len, fill);
        None
    }

    /// The `len` bytes at `offset` as a part of a file, if system calls can take them from there
    /// and need not wait for the medium: they then move to memory in one copy.
    fn file_bytes(&self, offset: u64, len: usize) -> Option<FileBytes<'_>> {
        let _ = (offset, len);
        None
    }
}

/// The error for a range that does not lie inside the storage.
fn out_of_range() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "beyond the end of the storage")
}

#[cfg(test)]
mod tests;
