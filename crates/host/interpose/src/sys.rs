//! The system calls that no safe interface offers. All unsafe code is in here, one kind a file.

pub(crate) mod guardian;
pub(crate) mod janitor;
pub(crate) mod limits;
pub(crate) mod lock;
pub(crate) mod maps;
pub(crate) mod memory;
pub(crate) mod notify;
mod remove;
pub(crate) mod seccomp;
pub(crate) mod signals;
pub(crate) mod spawn;
