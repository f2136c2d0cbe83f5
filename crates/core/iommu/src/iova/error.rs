//! Why an IOVA allocator refuses.

use core::fmt;

use lychgate_types::{Errno, Iova};

/// No IOVA was given.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum AllocError {
    /// The length is 0.
    Empty,
    /// No range of this length is free at or below the limit.
    NoSpace,
}

/// A range could not be given back. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum FreeError {
    /// The length is 0.
    Empty,
    /// The range is not one that this allocator gives: its bounds or its alignment are none.
    Foreign,
    /// The range, or a part of it, is free already or was allocated with another length.
    NotAllocated,
}

/// A range could not be reserved. Nothing has changed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum ReserveError {
    /// The range ends before it begins.
    Empty,
    /// A part is allocated, or waits in the cache of another thread.
    InUse {
        /// First byte of the part, or of a part that was asked for and that holds it.
        at: Iova,
    },
}

/// A space of IOVA cannot be like that.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum ConfigError {
    /// The granule is no power of two, or above 2^48 bytes.
    Granule,
    /// No granule but 0 lies wholly in the aperture.
    Aperture,
}

impl AllocError {
    /// The errno that Linux gives for it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Empty => Errno::EINVAL,
            Self::NoSpace => Errno::ENOSPC,
        }
    }
}

impl FreeError {
    /// The errno that fits: Linux has none, it warns.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Empty | Self::Foreign => Errno::EINVAL,
            Self::NotAllocated => Errno::ENOENT,
        }
    }
}

impl ReserveError {
    /// The errno that Linux gives for it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::Empty => Errno::EINVAL,
            Self::InUse { .. } => Errno::EBUSY,
        }
    }
}

impl ConfigError {
    /// The errno that Linux gives for it.
    pub const fn errno(self) -> Errno {
        Errno::EINVAL
    }
}

impl fmt::Display for AllocError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "a range of no bytes was asked for",
            Self::NoSpace => "no range of this length is free below the limit",
        })
    }
}

impl fmt::Display for FreeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Empty => "the range has no bytes",
            Self::Foreign => "the range is not one that the allocator gives",
            Self::NotAllocated => "the range is not allocated, or with another length",
        })
    }
}

impl fmt::Display for ReserveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => f.write_str("the range has no bytes"),
            Self::InUse { at } => write!(f, "the range is in use at {at}"),
        }
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Granule => "the granule is no power of two up to 2^48",
            Self::Aperture => "the aperture holds no granule",
        })
    }
}

impl core::error::Error for AllocError {}
impl core::error::Error for FreeError {}
impl core::error::Error for ReserveError {}
impl core::error::Error for ConfigError {}
