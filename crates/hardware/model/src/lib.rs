//! What hangs off the bus, as far as every device and every IOMMU agrees about it: DMA requests,
//! PCI functions, the port of an IOMMU, the IOTLB and its policies, fault records, the
//! checker.

#![forbid(unsafe_code)]

pub mod cache;
pub mod checker;
pub mod config_space;
pub mod dma;
pub mod fault;
pub mod iommu;
pub mod msix;
pub mod pci;

pub use cache::{Cache, Policy, Span};
pub use checker::{
    Audit, CacheKind, Certainty, ChangedWord, Checking, Finding, Rule, Scope, StaleUse,
};
pub use config_space::{Capabilities, ConfigSpace, Header, MsiLayout, MsixLayout};
pub use dma::{DmaError, DmaRequest, DmaSegment, FileBytes, Upstream};
pub use fault::{FaultAccess, FaultCause, FaultObserver, FaultRecord};
pub use iommu::{Aborted, Access, IommuPort, Translation};
pub use msix::{Msix, MsixGate};
pub use pci::{Bar, BarKind, Msi, PciFunction, RegisterFile, Service};
