//! Linux's `/dev/iommu`: every object and ioctl, errno for errno, in Linux's order of checks.
//!
//! It speaks to the IOMMU core alone and does not know which hardware is below.

#![forbid(unsafe_code)]

pub mod client;
pub mod error;
pub mod file;
pub mod mm;
pub mod observer;

pub use client::{Cap, Client, EventFd};
pub use error::{Refusal, Result};
pub use file::{MmapRequest, NewFile, OpenFile, Readiness, Reply};
pub use mm::{Accounting, MemFile, Mm, PAGE_SIZE, PinSource};
pub use observer::{Event, Observer};
