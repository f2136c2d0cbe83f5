//! The IOMMU core: which devices share a group, which domain each group is attached to, and who
//! owns its DMA. What Linux keeps in `drivers/iommu/iommu.c`, for any kernel or hypervisor.
//!
//! The core is one value, [`Iommu`], whose methods take `&mut self`: the embedder puts it behind
//! the lock that it has. Domains are shared and are used without that lock: mapping and unmapping
//! never take it.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

mod attach;
mod default_domain;
pub mod dma;
pub mod domain;
pub mod driver;
pub mod error;
pub mod fault;
mod group;
pub mod handle;
pub mod iova;
pub mod nested;
mod ownership;
pub mod page_fault;
mod pasid;
pub mod pci;
mod reserved;
pub mod subsystem;
pub mod viommu;

pub use default_domain::DefaultDomain;
pub use domain::{DirtyBits, DirtyTracking, Domain, Geometry, PagingDomain};
pub use driver::{AllocFlags, Capability, Driver, HwInfo, ReservedKind, ReservedRegion, UserData};
pub use error::{AllocError, AttachError, ClaimError, MapError, ProbeError};
pub use fault::{FaultReason, FaultReport, FaultSink};
pub use handle::{AttachHandle, DomainKind};
pub use nested::{Handled, NestedDomain, UserArray};
pub use page_fault::{FaultGroup, PageFault, PageResponse};
pub use pci::{Acs, PciFunctionInfo, PciKind};
pub use subsystem::{DeviceId, GroupId, Instance, Iommu, Owner};
pub use viommu::{
    HwQueue, HwQueueRequest, NewHwQueue, NewViommu, SharedMemory, ViommuHost, ViommuRequest,
    VirtualDevice, VirtualDevices, VirtualIommu,
};
