//! Allocation of IOVA: what Linux keeps in `drivers/iommu/iova.c`, for any kernel or hypervisor.
//!
//! An [`IovaSpace`] belongs to a domain and knows what is free; each thread, or processor, allocates
//! through its own [`IovaCache`], which is handed around as `&mut` and so needs no lock.
//!
//! ```
//! use std::sync::Arc;
//!
//! use lychgate_iommu::iova::{IovaCache, IovaSpace};
//! use lychgate_types::{Iova, StdLocks};
//!
//! // 48 bits of IOVA in pages of 4 KiB, without the window in which x86 takes interrupts.
//! let space: IovaSpace<StdLocks> =
//!     IovaSpace::new(Iova::new(0), Iova::new((1 << 48) - 1), 4096)?;
//! space.reserve(Iova::new(0xfee0_0000)..=Iova::new(0xfeef_ffff))?;
//! let space = Arc::new(space);
//!
//! // On each thread:
//! let mut cache = IovaCache::new(Arc::clone(&space));
//! let below_4g = cache.alloc(3 * 4096, Iova::new(u32::MAX.into()))?;
//! assert_eq!(below_4g, Iova::new(0xffff_c000));
//! let anywhere = cache.alloc(2 << 20, Iova::new(u64::MAX))?;
//! assert!(anywhere.is_aligned(2 << 20));
//!
//! cache.free(below_4g, 3 * 4096)?;
//! cache.free(anywhere, 2 << 20)?;
//! drop(cache);
//! assert_eq!(space.free_ranges().len(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Where an allocation comes from
//!
//! Allocation is top-down, first fit, aligned to the length rounded up to a power of two. Up to 2^12
//! granules, that is also what a range takes, so that freed ranges can be used again
//! as they are: such lengths are kept in *magazines*, arrays of up to 127 ranges of one size.
//!
//! 1. The thread's loaded magazine, and the one that was loaded before.
//! 2. The *depot*, where threads exchange full magazines for empty ones.
//! 3. The tree of free ranges. It is asked for several neighbouring ranges at once.
//! 4. When that has none, what the thread and the depots hold goes back to the tree, which is asked
//!    again. Other threads are told to give back what they have.
//!
//! Ranges below 4 GiB are kept apart from those above, so that 32-bit devices hit too. Any other limit
//! is met by a search through the magazines.
//!
//! # When a range may be given again
//!
//! As soon as it is freed: by then no IOTLB may translate it any more. A domain that flushes for
//! many unmaps at once puts ranges into a [`FlushQueue`] instead, which hands them on when a flush has
//! completed that began after their unmap.

mod cache;
mod depot;
mod error;
mod flush_queue;
mod ledger;
mod ranges;
mod shape;
mod space;

pub use cache::IovaCache;
pub use error::{AllocError, ConfigError, FreeError, ReserveError};
pub use flush_queue::{Flush, FlushClock, FlushQueue, Limits, Unmapped};
pub use space::IovaSpace;
