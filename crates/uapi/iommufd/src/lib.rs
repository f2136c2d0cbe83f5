//! Linux's `/dev/iommu`: every object and ioctl, errno for errno, in Linux's order of checks.
//!
//! It speaks to the IOMMU core alone and does not know which hardware is below.
//!
//! A [`Context`] is one open of `/dev/iommu`, or of `/dev/vfio/vfio`, which iommufd serves too. The
//! machine hands it system calls through [`OpenFile`]; VFIO holds a [`ContextRef`], binds devices to
//! it and attaches them. All of an IO address space is there: allocation, mapping of memory and of
//! memfds, copies, allowed and reserved ranges, options, accounting; page tables of the paging kind,
//! with the automatic ones; description of the hardware; and VFIO's type1 containers, both versions.
//!
//! What no IOMMU below has is refused as Linux refuses it there, after the checks of its arguments:
//! `IOMMU_HWPT_SET_DIRTY_TRACKING` and `IOMMU_HWPT_GET_DIRTY_BITMAP`, nested page tables and
//! `IOMMU_HWPT_INVALIDATE`, `IOMMU_FAULT_QUEUE_ALLOC`, `IOMMU_VIOMMU_ALLOC`, `IOMMU_VDEVICE_ALLOC`,
//! `IOMMU_VEVENTQ_ALLOC`, `IOMMU_HW_QUEUE_ALLOC` and `IOMMU_IOAS_NOIOMMU_GET_PA`. `IOMMU_IOAS_MAP_FILE`
//! takes memfds, no dma-bufs. Devices are attached by their requester id alone, not by PASIDs.

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
