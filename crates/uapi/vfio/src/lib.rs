//! Linux's VFIO: groups, the group's and the device's own files, and PCI functions behind them, errno
//! for errno. Containers are iommufd's: [`lychgate_iommufd::Context`] serves `/dev/vfio/vfio`.
//!
//! A machine binds each function with [`VfioPciDevice::new`], adds it to its [`Vfio`], and opens
//! `/dev/vfio/N` and `/dev/vfio/devices/vfioN` through it.

#![forbid(unsafe_code)]

pub mod abi;
mod config;
mod device;
mod device_file;
mod group;
mod hot_reset;
mod irq;
mod pci_device;
pub mod trace;
mod user;
mod vfio;

pub use irq::{Handler, Interrupts};
pub use pci_device::{Parts, VfioPciDevice};
pub use vfio::{CdevNode, GroupNode, Vfio};

#[cfg(test)]
mod tests;
