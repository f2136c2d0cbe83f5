//! Why the DMA API refuses.

use core::fmt;

use lychgate_types::Errno;

use crate::error::MapError;
use crate::iova::{AllocError, ConfigError, FreeError, ReserveError};

/// A buffer could not be mapped or unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum DmaError {
    /// The buffer has no bytes, or passes the end of the 64-bit space.
    Length,
    /// No IOVA is free where the device reaches. Nothing has changed.
    Space(AllocError),
    /// The domain did not map it. Nothing has changed.
    Map(MapError),
    /// What the domain unmapped is not the range: it was not mapped like that, or hardware does not
    /// answer. The IOVAs are not given again.
    NotUnmapped {
        /// What was unmapped, from the start of the range.
        bytes: u64,
    },
    /// What was mapped there was not mapped by this space.
    Free(FreeError),
    /// What was unmapped waits, but a flush that was due has failed.
    Flush(MapError),
}

/// A domain could not be made a space.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum DmaSpaceError {
    /// The domain's geometry leaves nothing to allocate.
    Geometry(ConfigError),
    /// A reserved region is none.
    Reserved(ReserveError),
}

impl DmaError {
    /// The errno that Linux gives for it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Length => Errno::EINVAL,
            Self::Space(error) => error.errno(),
            Self::Map(error) | Self::Flush(error) => error.errno(),
            Self::NotUnmapped { .. } => Errno::EIO,
            Self::Free(error) => error.errno(),
        }
    }
}

impl DmaSpaceError {
    /// The errno that Linux gives for it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Geometry(error) => error.errno(),
            Self::Reserved(error) => error.errno(),
        }
    }
}

impl fmt::Display for DmaError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Length => f.write_str("the buffer has no bytes or no end"),
            Self::Space(error) => write!(f, "no IOVA for the buffer: {error}"),
            Self::Map(error) => write!(f, "the buffer was not mapped: {error}"),
            Self::NotUnmapped { bytes } => {
                write!(f, "{bytes:#x} bytes were unmapped, which is not the buffer")
            }
            Self::Free(error) => write!(f, "the range is not the space's: {error}"),
            Self::Flush(error) => write!(f, "the IOTLB was not flushed: {error}"),
        }
    }
}

impl fmt::Display for DmaSpaceError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Geometry(error) => write!(f, "the domain has no room: {error}"),
            Self::Reserved(error) => write!(f, "a reserved region is malformed: {error}"),
        }
    }
}

impl core::error::Error for DmaError {}
impl core::error::Error for DmaSpaceError {}
