//! What every floor of lychgate speaks about: addresses, requesters, permissions, errno, and the
//! traits through which software reaches memory and registers.
//!
//! Addresses are newtypes so that an IOVA cannot be handed to something that wants a physical
//! address. Nothing here allocates, and nothing depends on the host's byte order: memory that
//! hardware reads is little-endian.

#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
#[cfg(feature = "std")]
extern crate std;

pub mod addr;
pub mod errno;
pub mod lock;
pub mod memory;
pub mod pages;
pub mod prot;
pub mod requester;
pub mod sync;

pub use addr::{Iova, PhysAddr, PhysRun};
pub use errno::Errno;
pub use lock::{Lock, Locks};
pub use memory::{BusError, Memory, Mmio};
pub use pages::{OutOfMemory, Pages};
pub use prot::Prot;
pub use requester::{Bdf, Pasid, RequesterId};

#[cfg(feature = "std")]
pub use lock::StdLocks;
#[cfg(feature = "std")]
pub use pages::HeapPages;
