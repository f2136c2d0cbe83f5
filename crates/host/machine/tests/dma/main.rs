//! A program in this process uses the machine as qemu-img and QEMU do, and its NVMe controller moves
//! data through every floor: ioctl, core, driver, page tables, model, memory.

mod faults;
mod nvme;
mod process;
mod transfers;
mod vfio;
