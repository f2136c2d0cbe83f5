//! Programs under the supervisor, on a small machine of the test's own.
//!
//! Each case is two functions: one that is run as the client, in this executable started anew, and
//! one that starts it under the supervisor and looks at what came of it.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    reason = "a test fails by panicking, and its numbers are its own"
)]

#[path = "support/mod.rs"]
mod support;

#[path = "cases/mod.rs"]
mod cases;

fn main() -> std::process::ExitCode {
    support::main(cases::ALL)
}
