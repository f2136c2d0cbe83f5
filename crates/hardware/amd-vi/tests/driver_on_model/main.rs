//! The driver on the register-level model: two readings of AMD 48882 that share layouts alone.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests fail by panicking; clippy sees only `#[test]` functions as tests"
)]

mod bench;
mod core;
mod life;
mod mutations;
mod random;
mod recovery;
mod threads;
