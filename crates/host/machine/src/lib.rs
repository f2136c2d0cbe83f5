//! One machine: memory, IOMMU, endpoints, and the tree of /dev and /sys.
