//! One thread's way to map, and to let what is unmapped wait for a flush.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use lychgate_types::{Iova, Locks, PhysAddr, PhysRun, Prot};

use super::cache::{DmaCache, DmaSegment, Granules};
use super::error::DmaError;
use super::space::{DmaSpace, Reach};
use crate::domain::PagingDomain;
use crate::error::MapError;
use crate::iova::{AllocError, Flush, FlushClock, FlushQueue, IovaCache, Limits, Unmapped};

/// A domain that can unmap without an invalidation (Linux, `IOMMU_DOMAIN_DMA_FQ`).
pub trait LazyDomain: PagingDomain {
    /// Page tables that were taken out and that hardware may still walk. Every unmapped range has one
    /// until it is flushed, and hardly any has tables: it had better be small then.
    type Dead: Send;

    /// Unmaps as [`PagingDomain::unmap`] does, but invalidates nothing: devices may go on using
    /// the frames until [`flush`](Self::flush) returns. Gives the bytes, and what to hand to
    /// [`free`](Self::free) after that.
    fn unmap_lazily(&self, iova: Iova, len: u64) -> (u64, Self::Dead);

    /// Makes every device forget every translation of the domain, table entries too. When it
    /// returns, no device uses what was unmapped before, and every DMA that did has completed.
    ///
    /// # Errors
    /// [`MapError::Hardware`]: nobody knows what devices still use.
    fn flush(&self) -> Result<(), MapError>;

    /// Frees tables that no device reaches any more.
    fn free(&self, dead: Self::Dead);
}

/// A thread's, or processor's, own way to a [`DmaSpace`] whose invalidations are made many at a time.
///
/// A device may use a buffer after its unmap, for [`Limits::delay`] at most as long as the owner
/// calls [`poll`](Self::poll): a caller that does not trust its devices uses a [`DmaCache`]. Never
/// does a device see another buffer at the IOVA before: those are given again only after a flush that
/// began after the unmap.
///
/// Dropping it flushes. Should that fail, what waits is left to the [`FlushClock`].
pub struct LazyDma<D: LazyDomain + ?Sized, L: Locks> {
    mapper: DmaCache<D, L>,
    queue: FlushQueue<D::Dead, L>,
}

impl<D: LazyDomain + ?Sized, L: Locks> LazyDma<D, L> {
    /// A way to `space`. All that unmap in it lazily share `clock`.
    pub fn new(
        space: Arc<DmaSpace<D, L>>,
        clock: Arc<FlushClock<D::Dead, L>>,
        limits: Limits,
    ) -> Self {
        Self { mapper: DmaCache::new(space), queue: FlushQueue::new(clock, limits) }
    }

    /// The space that it maps in.
    pub const fn space(&self) -> &Arc<DmaSpace<D, L>> {
        self.mapper.space()
    }

    /// As [`DmaCache::map_phys`]. When no IOVA is free, flushes and tries again.
    ///
    /// # Errors
    /// As [`DmaCache::map_phys`].
    #[inline]
    pub fn map_phys(
        &mut self,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        reach: Reach,
    ) -> Result<Iova, DmaError> {
        match self.mapper.map_phys(phys, len, prot, reach) {
            Err(DmaError::Space(AllocError::NoSpace)) => {
                self.flush()?;
                self.mapper.map_phys(phys, len, prot, reach)
            }
            done => done,
        }
    }

    /// As [`DmaCache::map_sg`]. When no IOVA is free, flushes and tries again.
    ///
    /// # Errors
    /// As [`DmaCache::map_sg`].
    pub fn map_sg(
        &mut self,
        buffers: &[PhysRun],
        prot: Prot,
        reach: Reach,
        to: &mut Vec<DmaSegment>,
    ) -> Result<(), DmaError> {
        match self.mapper.map_sg(buffers, prot, reach, to) {
            Err(DmaError::Space(AllocError::NoSpace)) => {
                self.flush()?;
                self.mapper.map_sg(buffers, prot, reach, to)
            }
            done => done,
        }
    }

    /// Unmaps what [`map_phys`](Self::map_phys) gave for `len` bytes; the IOVA waits for a flush.
    /// `now` is any clock in nanoseconds that does not run backwards, one for all of a domain.
    ///
    /// # Errors
    /// [`DmaError::Length`]; [`DmaError::NotUnmapped`] when it was not mapped; [`DmaError::Flush`]
    /// when it was unmapped and waits, but a flush was due and has failed.
    #[inline]
    pub fn unmap_phys(&mut self, now: u64, iova: Iova, len: u64) -> Result<(), DmaError> {
        let Granules { start, len } = self.mapper.granules(iova.get(), len)?;
        let iova = Iova::new(start);
        let (bytes, dead) = self.mapper.space.domain().unmap_lazily(iova, len);
        // What was not unmapped whole is not given again, but its tables wait like any others.
        let len = if bytes == len { len } else { 0 };
        let (queue, mut domain) = self.parts();
        let pushed = queue.push(now, Unmapped { iova, len, dead }, &mut domain);
        if len == 0 {
            return Err(DmaError::NotUnmapped { bytes });
        }
        pushed.map_err(DmaError::Flush)
    }

    /// Unmaps what [`map_sg`](Self::map_sg) made of a list: all of it.
    ///
    /// # Errors
    /// As [`unmap_phys`](Self::unmap_phys).
    pub fn unmap_sg(&mut self, now: u64, segments: &[DmaSegment]) -> Result<(), DmaError> {
        let (iova, len) = self.mapper.span(segments)?;
        self.unmap_phys(now, iova, len)
    }

    /// Frees what waits if it has waited for long enough; for a timer.
    ///
    /// # Errors
    /// [`DmaError::Flush`]: everything goes on waiting.
    pub fn poll(&mut self, now: u64) -> Result<(), DmaError> {
        let (queue, mut domain) = self.parts();
        queue.poll(now, &mut domain).map_err(DmaError::Flush)
    }

    /// When [`poll`](Self::poll) has something to do.
    pub fn deadline(&self) -> Option<u64> {
        self.queue.deadline()
    }

    /// Flushes now and frees everything that waits.
    ///
    /// # Errors
    /// [`DmaError::Flush`]: everything goes on waiting.
    pub fn flush(&mut self) -> Result<(), DmaError> {
        let (queue, mut domain) = self.parts();
        queue.flush(&mut domain).map_err(DmaError::Flush)
    }

    fn parts(&mut self) -> (&mut FlushQueue<D::Dead, L>, Backend<'_, D, L>) {
        let DmaCache { space, iovas, .. } = &mut self.mapper;
        (&mut self.queue, Backend { domain: space.domain(), iovas })
    }
}

/// What the queue needs: the domain, and where IOVAs go.
struct Backend<'a, D: LazyDomain + ?Sized, L: Locks> {
    domain: &'a D,
    iovas: &'a mut IovaCache<L>,
}

impl<D: LazyDomain + ?Sized, L: Locks> Flush<D::Dead> for Backend<'_, D, L> {
    type Error = MapError;

    fn flush(&mut self) -> Result<(), MapError> {
        self.domain.flush()
    }

    fn release(&mut self, unmapped: Unmapped<D::Dead>) {
        self.domain.free(unmapped.dead);
        if unmapped.len != 0 {
            // What is refused was mapped around the space: then it is not the space's to give.
            let _ = self.iovas.free(unmapped.iova, unmapped.len);
        }
    }
}

impl<D: LazyDomain + ?Sized, L: Locks> Drop for LazyDma<D, L> {
    fn drop(&mut self) {
        if self.deadline().is_some() {
            // If it fails, the queue leaves what it holds to the clock.
            let _ = self.flush();
        }
    }
}

impl<D: LazyDomain + ?Sized, L: Locks> fmt::Debug for LazyDma<D, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LazyDma")
            .field("mapper", &self.mapper)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}
