//! A program in this process uses the machine as qemu-img and QEMU do, and its NVMe controller moves
//! data through every floor: ioctl, core, driver, page tables, model, memory.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod edu;
mod faults;
mod nvme;
mod process;
mod transfers;
mod vfio;
