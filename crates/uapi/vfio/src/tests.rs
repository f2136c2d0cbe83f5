//! Tests at the level of system calls, on a function, an interrupt controller, an IOMMU driver and a
//! client that exist in memory only.

mod abi;
mod bus;
mod cdev;
mod client;
mod config;
mod function;
mod fuzz;
mod group;
mod hot_reset;
mod info;
mod interrupts;
mod iommu;
mod regions;
mod sequences;
mod trace;
