//! Linux's `/dev/iommu`: every object and ioctl, errno for errno, in Linux's order of checks.
//!
//! It speaks to the IOMMU core alone and does not know which hardware is below.

#![forbid(unsafe_code)]

pub mod client;
pub mod context;
pub mod device;
pub mod error;
pub mod file;
pub mod mm;
pub mod observer;
mod state;

pub use client::{Cap, Client, EventFd};
pub use context::{Config, Context, ContextRef, NodeKind, SharedIommu};
pub use device::BoundDevice;
pub use error::{Refusal, Result};
pub use file::{MmapRequest, NewFile, OpenFile, Readiness, Reply};
pub use mm::{Accounting, MemFile, Mm, PAGE_SIZE, PinSource};
pub use observer::{Event, Observer};
