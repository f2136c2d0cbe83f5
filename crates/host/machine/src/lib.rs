//! One machine: memory, an IOMMU, endpoints, and the tree of `/dev` and `/sys` through which a
//! program sees them.

#![deny(unsafe_code)]

pub mod client;
#[expect(unsafe_code, reason = "memory maps: the one place of this crate that needs it")]
mod mapped;
pub mod memory;
pub mod system;
pub mod tree;

pub use client::{AddressSpace, Span, Unreachable, Vma};
pub use memory::{FrameOrder, PhysicalMemory};
pub use system::{Call, Node, System};
