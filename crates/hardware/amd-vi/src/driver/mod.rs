//! The driver: programs the IOMMU for `lychgate-iommu` through its registers and in-memory tables.
