//! One thread's way to map and to unmap strictly.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use lychgate_types::{Iova, Locks, PhysAddr, PhysRun, Prot};

use super::error::DmaError;
use super::space::{DmaSpace, Reach};
use crate::domain::PagingDomain;
use crate::iova::IovaCache;

/// A thread's, or processor's, own way to a [`DmaSpace`].
///
/// Buffers need not be aligned: the granules that they touch are mapped whole, and the device then
/// reaches what else is in these. A caller that does not trust a device with that gives
/// whole granules.
///
/// When an unmap returns, no device reaches the buffer and its IOVA can be given again.
pub struct DmaCache<D: PagingDomain + ?Sized, L: Locks> {
    pub(super) space: Arc<DmaSpace<D, L>>,
    pub(super) iovas: IovaCache<L>,
    /// Granule, less one.
    mask: u64,
    /// What a list is mapped from; kept for its memory.
    runs: Vec<PhysRun>,
}

/// Consecutive bytes of IOVA, as a device is told of them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DmaSegment {
    /// First byte.
    pub iova: Iova,
    /// Length in bytes.
    pub len: u64,
}

/// Whole granules.
#[derive(Clone, Copy)]
pub(super) struct Granules {
    pub(super) start: u64,
    pub(super) len: u64,
}

impl<D: PagingDomain + ?Sized, L: Locks> DmaCache<D, L> {
    /// A way to `space`, with nothing cached yet.
    pub fn new(space: Arc<DmaSpace<D, L>>) -> Self {
        let iovas = IovaCache::new(Arc::clone(space.iovas()));
        let mask = space.iovas().granule() - 1;
        Self { space, iovas, mask, runs: Vec::new() }
    }

    /// The space that it maps in.
    pub const fn space(&self) -> &Arc<DmaSpace<D, L>> {
        &self.space
    }

    /// Maps `len` bytes of consecutive memory (Linux, `dma_map_phys`). Gives where the device finds the
    /// first.
    ///
    /// # Errors
    /// [`DmaError::Length`], [`DmaError::Space`], [`DmaError::Map`]; nothing has changed.
    #[inline]
    pub fn map_phys(
        &mut self,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        reach: Reach,
    ) -> Result<Iova, DmaError> {
        let Granules { start, len } = self.granules(phys.get(), len)?;
        let iova = self.space.alloc(&mut self.iovas, len, reach.limit).map_err(DmaError::Space)?;
        let run = PhysRun { start: PhysAddr::new(start), len };
        if let Err(error) = self.space.domain().map(iova, &[run], prot) {
            return Err(self.take_back(iova, len, error));
        }
        Ok(Iova::new(iova.get() | (phys.get() & self.mask)))
    }

    /// Unmaps what [`map_phys`](Self::map_phys) gave for `len` bytes.
    ///
    /// # Errors
    /// [`DmaError::Length`]; [`DmaError::NotUnmapped`] when it was not mapped, so that a buffer that is
    /// unmapped twice is found out; [`DmaError::Free`] when it was not mapped by this space.
    #[inline]
    pub fn unmap_phys(&mut self, iova: Iova, len: u64) -> Result<(), DmaError> {
        let Granules { start, len } = self.granules(iova.get(), len)?;
        let bytes = self.space.domain().unmap(Iova::new(start), len);
        if bytes != len {
            return Err(DmaError::NotUnmapped { bytes });
        }
        self.iovas.free(Iova::new(start), len).map_err(DmaError::Free)
    }

    /// Maps a list of buffers at once (Linux, `dma_map_sg`). `to` is made the segments that the device
    /// is told of: buffers that follow each other at the bounds of granules become one, as far as the
    /// device takes segments as long.
    ///
    /// # Errors
    /// As [`map_phys`](Self::map_phys); nothing has changed, and `to` is empty.
    pub fn map_sg(
        &mut self,
        buffers: &[PhysRun],
        prot: Prot,
        reach: Reach,
        to: &mut Vec<DmaSegment>,
    ) -> Result<(), DmaError> {
        to.clear();
        let mut runs = core::mem::take(&mut self.runs);
        let mapped = self.map_list(buffers, prot, reach, &mut runs);
        if let Ok(first) = mapped {
            self.tell(first, buffers, reach.max_segment, to);
        }
        runs.clear();
        self.runs = runs;
        mapped.map(|_| ())
    }

    /// Unmaps what [`map_sg`](Self::map_sg) made of a list: all of it.
    ///
    /// # Errors
    /// As [`unmap_phys`](Self::unmap_phys).
    pub fn unmap_sg(&mut self, segments: &[DmaSegment]) -> Result<(), DmaError> {
        let (iova, len) = self.span(segments)?;
        self.unmap_phys(iova, len)
    }

    /// Gives the IOVAs that are kept for the next buffers back to the space.
    pub fn drain(&mut self) {
        self.iovas.drain();
    }

    /// The granules that a range touches.
    #[inline(always)]
    pub(super) fn granules(&self, start: u64, len: u64) -> Result<Granules, DmaError> {
        let last = len.checked_sub(1).and_then(|rest| start.checked_add(rest));
        let last = last.ok_or(DmaError::Length)? | self.mask;
        let start = start & !self.mask;
        // Only all of the 64-bit space has no length.
        let len = (last - start).checked_add(1).ok_or(DmaError::Length)?;
        Ok(Granules { start, len })
    }

    /// From the first byte of the first segment to the last one of the last.
    pub(super) fn span(&self, segments: &[DmaSegment]) -> Result<(Iova, u64), DmaError> {
        let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
            return Err(DmaError::Length);
        };
        let before = last.iova.checked_offset_from(first.iova).ok_or(DmaError::Length)?;
        let len = before.checked_add(last.len).ok_or(DmaError::Length)?;
        Ok((first.iova, len))
    }

    /// Maps the granules of all buffers next to each other; gives where.
    fn map_list(
        &mut self,
        buffers: &[PhysRun],
        prot: Prot,
        reach: Reach,
        runs: &mut Vec<PhysRun>,
    ) -> Result<Iova, DmaError> {
        let mut all: u64 = 0;
        for buffer in buffers {
            let Granules { start, len } = self.granules(buffer.start.get(), buffer.len)?;
            all = all.checked_add(len).ok_or(DmaError::Length)?;
            runs.push(PhysRun { start: PhysAddr::new(start), len });
        }
        if all == 0 {
            return Err(DmaError::Length);
        }
        let iova = self.space.alloc(&mut self.iovas, all, reach.limit).map_err(DmaError::Space)?;
        match self.space.domain().map(iova, runs, prot) {
            Ok(()) => Ok(iova),
            Err(error) => Err(self.take_back(iova, all, error)),
        }
    }

    /// The segments of buffers that are mapped from `first` on.
    fn tell(&self, first: Iova, buffers: &[PhysRun], max_segment: u64, to: &mut Vec<DmaSegment>) {
        let mut at = first.get();
        for buffer in buffers {
            let offset = buffer.start.get() & self.mask;
            let next = DmaSegment { iova: Iova::new(at + offset), len: buffer.len };
            // The last one may end with the 64-bit space.
            at = at.wrapping_add((offset + buffer.len + self.mask) & !self.mask);
            match to.last_mut() {
                Some(segment)
                    if segment.iova.get() + segment.len == next.iova.get()
                        && segment.len.saturating_add(next.len) <= max_segment =>
                {
                    segment.len += next.len;
                }
                _ => to.push(next),
            }
        }
    }

    #[cold]
    fn take_back(&mut self, iova: Iova, len: u64, error: crate::error::MapError) -> DmaError {
        match self.iovas.free(iova, len) {
            Ok(()) => DmaError::Map(error),
            Err(error) => DmaError::Free(error),
        }
    }
}

impl<D: PagingDomain + ?Sized, L: Locks> fmt::Debug for DmaCache<D, L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DmaCache")
            .field("space", &self.space)
            .field("iovas", &self.iovas)
            .finish_non_exhaustive()
    }
}
