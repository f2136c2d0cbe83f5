//! PCI functions that do DMA: an NVMe controller and edu.
//!
//! Both are [`lychgate_model::PciFunction`]s: whoever builds a machine gives them a way to memory
//! ([`lychgate_model::Upstream`]) and a thread that calls `service`.

#![forbid(unsafe_code)]

pub mod edu;
pub mod nvme;
pub mod storage;
#[cfg(test)]
mod testing;

pub use edu::{Clock, Edu, EduConfig, SystemClock};
pub use nvme::{Namespace, Nvme, NvmeConfig, NvmeError};
pub use storage::{FileStorage, MemoryStorage, Storage};
