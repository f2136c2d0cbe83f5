//! The program that lychgate's demo runs: an NVMe user on the published VFIO and iommufd crates.
