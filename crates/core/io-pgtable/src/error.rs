//! Why a page table refuses. Each error has the errno that Linux's generic_pt or the core around it
//! gives.

use core::fmt;

use lychgate_types::{Errno, Iova, OutOfMemory, PhysAddr};

/// Why a page table could not be made or changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Error {
    /// The configuration asks for what the format cannot do (`EOPNOTSUPP`).
    Unsupported(
        /// Which part of the configuration.
        &'static str,
    ),
    /// The range has no bytes (`EINVAL`).
    Empty,
    /// IOVA, physical address or length is not a multiple of the smallest page size (`EINVAL`, as
    /// `iommu_map()` checks it).
    Misaligned {
        /// The smallest page in bytes.
        granule: u64,
    },
    /// The permissions have no encoding in the format (`EOPNOTSUPP`).
    Permissions,
    /// The range passes 2^64 (`EOVERFLOW`).
    Overflow,
    /// The range passes the aperture (`ERANGE`).
    IovaOutOfRange {
        /// First byte of the range.
        iova: Iova,
        /// Its last byte.
        last: Iova,
    },
    /// A physical address is wider than entries, or the configuration, allow (`ERANGE`).
    OutputOutOfRange {
        /// A byte of the frames beyond what can be addressed.
        phys: PhysAddr,
    },
    /// The range is in the aperture but beyond the present root: call
    /// [`crate::PageTable::grow`] first (`EAGAIN`).
    BeyondTop {
        /// Levels that it takes.
        levels: u32,
    },
    /// Another thread is in [`crate::PageTable::grow`] (`EBUSY`). Callers serialise it, so this is
    /// a defect of the caller.
    Growing,
    /// Something is mapped in the range (`EADDRINUSE`).
    AlreadyMapped {
        /// First byte of the range that is taken.
        at: Iova,
    },
    /// A leaf would have to change its size, which the format allows by break-before-make alone
    /// ([`crate::format::SizeChange::BreakBeforeMake`], `EOPNOTSUPP`).
    BreakBeforeMake {
        /// First byte of the leaf.
        at: Iova,
        /// Its size in bytes.
        size: u64,
    },
    /// Another thread has changed the range meanwhile (`EBUSY`). Callers keep off ranges that
    /// others change, so this is a defect of the caller.
    Raced {
        /// Where it was noticed.
        at: Iova,
    },
    /// No memory for a table (`ENOMEM`).
    OutOfMemory,
    /// An entry leads to a table that the allocator does not know: the table was
    /// overwritten (`EIO`).
    Corrupt,
}

impl Error {
    /// The errno that Linux gives for it, as documented at each variant.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Unsupported(_) | Self::Permissions | Self::BreakBeforeMake { .. } => {
                Errno::EOPNOTSUPP
            }
            Self::Empty | Self::Misaligned { .. } => Errno::EINVAL,
            Self::Overflow => Errno::EOVERFLOW,
            Self::IovaOutOfRange { .. } | Self::OutputOutOfRange { .. } => Errno::ERANGE,
            Self::BeyondTop { .. } => Errno::EAGAIN,
            Self::Growing | Self::Raced { .. } => Errno::EBUSY,
            Self::AlreadyMapped { .. } => Errno::EADDRINUSE,
            Self::OutOfMemory => Errno::ENOMEM,
            Self::Corrupt => Errno::EIO,
        }
    }
}

impl From<Error> for Errno {
    fn from(error: Error) -> Self {
        error.errno()
    }
}

impl From<OutOfMemory> for Error {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(what) => {
                write!(f, "the page-table format does not allow this {what}")
            }
            Self::Empty => f.write_str("the range has no bytes"),
            Self::Misaligned { granule } => {
                write!(f, "the range is not a multiple of {granule:#x} bytes")
            }
            Self::Permissions => f.write_str("the format has no encoding for these permissions"),
            Self::Overflow => f.write_str("the range passes the end of the 64-bit space"),
            Self::IovaOutOfRange { iova, last } => {
                write!(f, "{iova} to {last} passes the aperture of the page table")
            }
            Self::OutputOutOfRange { phys } => {
                write!(f, "physical address {phys} does not fit the page table")
            }
            Self::BeyondTop { levels } => {
                write!(f, "the range needs a page table of {levels} levels")
            }
            Self::Growing => f.write_str("the page table is growing already"),
            Self::AlreadyMapped { at } => write!(f, "{at} is mapped already"),
            Self::BreakBeforeMake { at, size } => {
                write!(f, "the page of {size:#x} bytes at {at} cannot change its size while in use")
            }
            Self::Raced { at } => write!(f, "{at} was changed by another thread meanwhile"),
            Self::OutOfMemory => f.write_str("out of memory for page tables"),
            Self::Corrupt => f.write_str("an entry leads to memory that is no table"),
        }
    }
}

impl core::error::Error for Error {}
