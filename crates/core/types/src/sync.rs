//! The words of structures that hardware reads, and who checks races on them.
//!
//! Everything that reaches such words names [`AtomicU64`] through here. Built with `--cfg loom` it is
//! that of the model checker loom, which tries the orders in which threads may see each other's
//! accesses; otherwise it is [`core::sync::atomic::AtomicU64`].

#[cfg(not(loom))]
pub use core::sync::atomic::AtomicU64;
#[cfg(loom)]
pub use loom::sync::atomic::AtomicU64;
