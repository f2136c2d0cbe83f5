//! The DMA API: memory goes in, IOVA comes out. What Linux keeps in `drivers/iommu/dma-iommu.c`, for any
//! kernel or hypervisor whose drivers do not care where in IOVA their buffers are.
//!
//! A [`DmaSpace`] is a paging domain and what is free in it. Each thread, or processor, maps through its own
//! [`DmaCache`], which unmaps strictly, or [`LazyDma`], which lets what was unmapped wait for one flush.
//!
//! ```
//! # use std::{any::Any, collections::BTreeMap, sync::Mutex};
//! use std::sync::Arc;
//!
//! use lychgate_iommu::dma::{DmaCache, DmaSpace, Reach};
//! # use lychgate_iommu::{Geometry, MapError, PagingDomain};
//! use lychgate_types::{Iova, PhysAddr, PhysRun, Prot, StdLocks};
//!
//! # #[derive(Default)]
//! # struct Domain(Mutex<BTreeMap<u64, u64>>);
//! # impl PagingDomain for Domain {
//! #     fn geometry(&self) -> Geometry {
//! #         Geometry { first: Iova::new(0), last: Iova::new((1 << 48) - 1), page_sizes: 4096 }
//! #     }
//! #     fn map(&self, iova: Iova, runs: &[PhysRun], _: Prot) -> Result<(), MapError> {
//! #         self.0.lock().unwrap().insert(iova.get(), runs[0].start.get());
//! #         Ok(())
//! #     }
//! #     fn unmap(&self, iova: Iova, len: u64) -> u64 {
//! #         self.0.lock().unwrap().remove(&iova.get()).map_or(0, |_| len)
//! #     }
//! #     fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
//! #         let page = self.0.lock().unwrap().get(&(iova.get() & !0xfff)).copied();
//! #         page.map(|page| PhysAddr::new(page + iova.get() % 4096))
//! #     }
//! #     fn enforce_cache_coherency(&self) -> bool {
//! #         true
//! #     }
//! #     fn as_any(&self) -> &dyn Any {
//! #         self
//! #     }
//! # }
//! # let domain: Arc<dyn PagingDomain> = Arc::new(Domain::default());
//! // The domain that a device's group is attached to, without the window of its interrupts.
//! let space: DmaSpace<dyn PagingDomain, StdLocks> = DmaSpace::new(Arc::clone(&domain), &[])?;
//! let space = Arc::new(space);
//!
//! // On each thread:
//! let mut dma = DmaCache::new(Arc::clone(&space));
//! let buffer = PhysAddr::new(0x1234_5600);
//! let iova = dma.map_phys(buffer, 0x200, Prot::READ, Reach::of_bits(32))?;
//! assert_eq!(iova, Iova::new(0xffff_f600));
//! assert_eq!(domain.iova_to_phys(iova), Some(buffer));
//!
//! dma.unmap_phys(iova, 0x200)?;
//! assert_eq!(domain.iova_to_phys(iova), None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cache;
mod error;
mod lazy;
mod space;

pub use cache::{DmaCache, DmaSegment};
pub use error::{DmaError, DmaSpaceError};
pub use lazy::{LazyDma, LazyDomain};
pub use space::{DmaSpace, Reach};
