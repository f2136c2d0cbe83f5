//! Linux's /dev/iommu, errno for errno.
