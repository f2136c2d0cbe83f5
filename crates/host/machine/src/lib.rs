//! One machine: memory, an IOMMU, endpoints, and the tree of `/dev` and `/sys` through which a
//! program sees them.

pub mod client;

pub use client::{AddressSpace, Span, Unreachable, Vma};

pub mod system;
pub use system::{Call, Node, System};
