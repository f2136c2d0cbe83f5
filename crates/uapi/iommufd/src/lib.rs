//! Linux's `/dev/iommu`: every object and ioctl, errno for errno, in Linux's order of checks.
//!
//! It speaks to the IOMMU core alone and does not know which hardware is below.

#![forbid(unsafe_code)]

pub mod abi;
mod alloc_iova;
mod attach;
pub mod client;
mod command;
pub mod context;
pub mod device;
mod dispatch;
pub mod error;
pub mod file;
mod hw_info;
mod hwpt;
mod io_pagetable;
mod ioas;
pub mod mm;
mod objects;
pub mod observer;
mod option;
mod pages;
mod reserved;
mod state;
mod unsupported;
mod vfio_compat;

pub use client::{Cap, Client, EventFd};
pub use context::{Config, Context, ContextRef, NodeKind, SharedIommu};
pub use device::BoundDevice;
pub use error::{Refusal, Result};
pub use file::{MmapRequest, NewFile, OpenFile, Readiness, Reply};
pub use mm::{Accounting, MemFile, Mm, PAGE_SIZE, PinSource};
pub use observer::{Event, Observer};
