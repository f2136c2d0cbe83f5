//! `/dev/iommu` as its callers see it, on a machine that checks what is done to it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod common;

mod access;
mod accounting;
mod against_a_model;
mod attach;
mod containers;
mod dirty;
mod dispatch;
mod dma_buf;
mod fail_nth;
mod fault_queue;
mod hwpt;
mod ioas;
mod nested;
mod nesting_fails;
mod pasid;
mod threads;
mod trace;
mod unwinding;
mod veventq;
mod viommu;
