//! The IOMMU core: devices, groups, domains, attachment and DMA ownership.
