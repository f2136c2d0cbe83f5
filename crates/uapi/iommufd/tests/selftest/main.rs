//! `IOMMU_TEST_CMD` and the mock IOMMU, operation by operation and error by error.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod common;

mod accesses;
mod checks;
mod devices;
mod dirty;
mod dma_bufs;
mod faults;
mod nesting;
mod page_requests;
mod pasids;
mod random_operations;
mod viommus;
