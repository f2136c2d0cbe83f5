//! Linux's `/dev/iommu`: every object and ioctl, errno for errno, in Linux's order of checks.
//!
//! It speaks to the IOMMU core alone and does not know which hardware is below.
//!
//! A [`Context`] is one open of `/dev/iommu`, or of `/dev/vfio/vfio`, which iommufd serves too. The
//! machine hands it system calls through [`OpenFile`]; VFIO holds a [`ContextRef`], binds devices to
//! it and attaches them, by requester id and by PASID.
//!
//! All objects of Linux are there: IO address spaces with what is mapped in them, memory, files and
//! dma-bufs; page tables, those that are made by attaching, and those of guests on a second stage or
//! on a vIOMMU; access objects; fault queues, vIOMMUs, vDEVICEs, vEVENTQs and hardware queues; and
//! VFIO's type1 containers, both versions. What a driver below does not offer is refused as Linux
//! refuses it there. `IOMMU_IOAS_NOIOMMU_GET_PA` is refused as by a kernel without no-IOMMU mode.

#![forbid(unsafe_code)]

pub mod abi;
mod access;
mod alloc_iova;
mod attach;
pub mod client;
mod command;
mod container;
pub mod context;
pub mod device;
mod dirty;
mod dispatch;
mod dma_buf;
pub mod error;
mod event_file;
pub mod fault_injection;
mod fault_queue;
pub mod file;
mod handle;
mod hw_info;
mod hw_queue;
mod hwpt;
mod invalidate;
mod io_pagetable;
mod ioas;
pub mod mm;
mod mmap;
mod nested_hwpt;
mod noiommu;
mod objects;
pub mod observer;
mod option;
mod pages;
mod reserved;
pub mod selftest;
mod state;
pub mod trace;
mod unmap;
mod vdevice;
mod veventq;
mod vfio_compat;
mod viommu;

pub use access::{Access, AccessOps};
pub use client::{Cap, Client, EventFd};
pub use context::{Config, Context, ContextRef, NodeKind, SharedIommu};
pub use device::BoundDevice;
pub use dma_buf::{DmaBuf, Importer};
pub use error::{Refusal, Result};
pub use fault_injection::FaultInjection;
pub use file::{MmapRequest, NewFile, OpenFile, Readiness, Reply};
pub use mm::{Accounting, Charged, MemFile, Mm, PAGE_SIZE, PinSource};
pub use observer::{Event, Observer};
pub use selftest::Selftest;
