//! The DMA API on a domain that is a list of pages, with an IOTLB that forgets nothing by itself.

#![expect(
    clippy::unwrap_used,
    reason = "tests fail by panicking; clippy sees only `#[test]` functions as tests"
)]

mod behaviour;
mod fake;
mod random_operations;
