//! One machine: memory, an IOMMU, endpoints, and the tree of `/dev` and `/sys` through which a
//! program sees them.
//!
//! [`MachineBuilder`] says what it is made of; [`Machine`] is it, running, and answers programs'
//! calls as a [`System`]. A DMA that does not pass becomes a [`FaultStory`].

#![deny(unsafe_code)]

mod builder;
mod bus;
mod check;
pub mod client;
mod endpoints;
mod fault_injection;
mod faults;
mod image;
mod interrupts;
pub mod journal;
mod machine;
#[expect(unsafe_code, reason = "memory maps: the one place of this crate that needs it")]
mod mapped;
pub mod memory;
mod platform;
mod report;
mod service;
pub mod system;
mod text;
mod topology;
pub mod tree;

pub use builder::{BuildError, IommuKind, MachineBuilder, NamespaceSource};
pub use check::{StaleStory, kind};
pub use client::{AddressSpace, Span, Unreachable, Vma};
pub use faults::FaultListener;
pub use image::ImageError;
pub use lychgate_model::{Access, Certainty, Policy};
pub use machine::Machine;
pub use memory::{FrameOrder, MemlockPolicy, PhysicalMemory};
pub use report::{FaultStory, Reason};
pub use system::{Call, Node, System};
pub use text::Text;
