//! The core with a driver that remembers what it was told.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "tests fail by panicking; clippy sees only `#[test]` functions as tests"
)]

mod fake;
mod groups;
mod ownership;
mod page_faults;
mod pasids;
mod random_operations;
