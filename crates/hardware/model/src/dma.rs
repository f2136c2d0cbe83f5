//! DMA as a function issues it.

use std::fmt;
use std::os::fd::BorrowedFd;

use lychgate_types::{Iova, Pasid, RequesterId};

/// `len` bytes at consecutive bus addresses from `start`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DmaSegment {
    /// First byte.
    pub start: Iova,
    /// Length in bytes, not 0.
    pub len: u64,
}

/// One transfer of a function: who asks, for which addresses, and why.
#[derive(Clone, Copy)]
pub struct DmaRequest<'a> {
    /// The requester id in the transaction's header.
    pub requester: RequesterId,
    /// The PASID prefix, if there is one.
    pub pasid: Option<Pasid>,
    /// Where, in the order of the data.
    pub segments: &'a [DmaSegment],
    /// What the function was doing, for people: `queue 3, command 0x17 READ lba 2048+8`.
    pub initiator: &'a dyn fmt::Display,
}

impl fmt::Debug for DmaRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaRequest")
            .field("requester", &self.requester)
            .field("pasid", &self.pasid)
            .field("segments", &self.segments)
            .field("initiator", &format_args!("{}", self.initiator))
            .finish()
    }
}

/// Bytes of a file, in a place from which system calls can take them.
#[derive(Clone, Copy, Debug)]
pub struct FileBytes<'a> {
    /// The file, open for reading.
    pub file: BorrowedFd<'a>,
    /// Position of the first byte.
    pub offset: u64,
    /// Length in bytes, not 0.
    pub len: usize,
    /// The address of the first byte in a mapping of the file. It is for system calls alone: when
    /// somebody truncates the file, theirs is an error, and an access of this process SIGBUS.
    pub mapped: usize,
}

/// What a function learns of a transfer that did not complete: an Unsupported Request or a
/// Completer Abort. Bytes before `at`, in the order of the segments, may have moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("DMA aborted at {at}")]
pub struct DmaError {
    /// First bus address that could not be reached.
    pub at: Iova,
}

/// What a function sees of the system above it: the way to memory, and its interrupt lines.
///
/// Gating by the function's Bus Master Enable is the function's own duty (PCIe Base 5.0 7.5.1.1.3).
pub trait Upstream: Send + Sync {
    /// Memory reads: fills `to`, whose length is the sum of the segments.
    fn read(&self, request: &DmaRequest<'_>, to: &mut [u8]) -> Result<(), DmaError>;

    /// Memory writes: stores `from`, whose length is the sum of the segments. An aligned write of
    /// 4 or 8 bytes in one segment is a single access, ordered after every earlier write.
    fn write(&self, request: &DmaRequest<'_>, from: &[u8]) -> Result<(), DmaError>;

    /// As [`Upstream::write`], with bytes that are still in a file, and in one copy. `None`, with
    /// any part of the bytes stored, where that does not work: [`Upstream::write`] does, or says
    /// why not.
    fn write_from(
        &self,
        request: &DmaRequest<'_>,
        from: &FileBytes<'_>,
    ) -> Option<Result<(), DmaError>> {
        let _ = (request, from);
        None
    }

    /// A message-signalled interrupt: a posted 4-byte write of `data` to `address` without PASID,
    /// ordered after every earlier write of the function.
    fn msi(&self, requester: RequesterId, address: u64, data: u32);

    /// The level of the function's INTx pin.
    fn intx(&self, requester: RequesterId, asserted: bool);
}
