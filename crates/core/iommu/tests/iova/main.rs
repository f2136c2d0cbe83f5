//! The IOVA allocator.

#![expect(
    clippy::unwrap_used,
    reason = "tests fail by panicking; clippy sees only `#[test]` functions as tests"
)]

mod behaviour;
mod flush_queue;
mod random_operations;
mod threads;
