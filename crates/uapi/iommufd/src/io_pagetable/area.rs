//! A range of IOVA that leads to memory (`struct iopt_area`).

use std::collections::BTreeMap;
use std::sync::Arc;

use lychgate_iommu::PagingDomain;
use lychgate_types::{Errno, Iova, PhysRun, Prot};

use crate::error::{Result, refuse};
use crate::mm::PAGE_SIZE;
use crate::pages::Pages;

/// Pages of the memory, by number: the first and the last one.
pub(super) type PageRange = (u64, u64);

/// A range of IOVA that leads to memory. Its first IOVA is kept by whoever holds it.
pub(super) struct Area {
    /// Last IOVA.
    pub(super) last: u64,
    /// The memory.
    pub(super) pages: Arc<Pages>,
    /// The byte of the memory at the first IOVA.
    pub(super) start: u64,
    /// What devices may do.
    pub(super) prot: Prot,
    /// An unmap waits for access objects to let go: none may pin more.
    pub(super) prevent_access: bool,
    /// Pins that no unmap may ask for (`num_locks`).
    pub(super) locks: u32,
    /// What access objects pinned, and how often.
    pub(super) pins: BTreeMap<PageRange, u32>,
}

impl Area {
    pub(super) fn new(last: u64, pages: Arc<Pages>, start: u64, prot: Prot) -> Self {
        Self { last, pages, start, prot, prevent_access: false, locks: 0, pins: BTreeMap::new() }
    }

    /// Bytes of an area that starts at `first`.
    pub(super) fn len(&self, first: u64) -> u64 {
        self.last - first + 1
    }

    /// Whether everything about it is a multiple of `alignment`.
    pub(super) fn is_aligned(&self, first: u64, alignment: u64) -> bool {
        (first | self.len(first) | (self.start % PAGE_SIZE)).is_multiple_of(alignment)
    }

    /// Whether an access object pins pages of it (`num_accesses`).
    pub(super) fn is_pinned(&self) -> bool {
        !self.pins.is_empty()
    }

    /// Whether domains hold it: not when it is memory of a device that was taken back.
    pub(super) fn is_there(&self) -> bool {
        self.pages.import().is_none_or(|import| !import.is_revoked())
    }

    /// Maps it into a domain in which it is not, when another one holds it already or when `pin`
    /// says that it is the first one.
    pub(super) fn map(
        &self,
        first: u64,
        domain: &dyn PagingDomain,
        large_pages: bool,
        pin: bool,
    ) -> Result<()> {
        self.with_frames(first, pin, |runs, prot| map_runs(domain, first, runs, prot, large_pages))
    }

    /// Gives its frames to `with`, and pins them with `pin`, unless `with` fails. Nothing happens for
    /// memory of a device that was taken back.
    pub(super) fn with_frames(
        &self,
        first: u64,
        pin: bool,
        with: impl FnOnce(&[PhysRun], Prot) -> Result<()>,
    ) -> Result<()> {
        let len = self.len(first);
        match self.pages.import() {
            Some(import) if import.is_revoked() => Ok(()),
            Some(import) => {
                let run = import.frames(self.pages.position(self.start), len);
                with(&[run], (self.prot & Prot::READ.union(Prot::WRITE)) | Prot::MMIO)
            }
            None if pin => self.pages.acquire(self.start, len, |runs| with(runs, self.prot)),
            None => self.pages.with_frames(self.start, len, |runs| with(runs, self.prot)),
        }
    }

    /// Unmaps it from a domain.
    pub(super) fn unmap(&self, first: u64, domain: &dyn PagingDomain) {
        if self.is_there() {
            unmap_all(domain, first, self.len(first));
        }
    }

    /// Unpins what the first domain pinned.
    pub(super) fn unpin(&self, first: u64) {
        if self.pages.import().is_none() {
            self.pages.release(self.start, self.len(first));
        }
    }

    /// The pages of the memory behind `at..=last`, all inside of the area.
    pub(super) fn page_range(&self, first: u64, at: u64, last: u64) -> PageRange {
        let start = self.start + (at - first);
        (start / PAGE_SIZE, (start + (last - at)) / PAGE_SIZE)
    }

    /// Cuts it in two behind `last`, inside of it, and gives the right part (`iopt_area_split`).
    /// `mapped` says whether domains hold it, `large_pages` how.
    pub(super) fn split(
        &mut self,
        first: u64,
        last: u64,
        alignment: u64,
        mapped: bool,
        large_pages: bool,
    ) -> Result<Self> {
        if self.prevent_access {
            return refuse(Errno::EBUSY, "the area is being unmapped");
        }
        if self.pages.import().is_some() {
            return refuse(Errno::EOPNOTSUPP, "memory of a device cannot be cut");
        }
        let kept = last - first + 1;
        if !((last + 1) | (self.start + kept)).is_multiple_of(alignment) {
            return refuse(
                Errno::EINVAL,
                format!("{:#x} is not a multiple of {alignment}", last + 1),
            );
        }
        if self.is_pinned() {
            return refuse(Errno::EINVAL, "an area of which pages are pinned cannot be cut");
        }
        if mapped && large_pages {
            return refuse(Errno::EINVAL, "an area that large pages may map cannot be cut");
        }
        let right = Self::new(self.last, Arc::clone(&self.pages), self.start + kept, self.prot);
        self.last = last;
        Ok(right)
    }
}

/// Maps `runs` with the largest pages that fit, or page by page. On an error nothing stays mapped.
pub(super) fn map_runs(
    domain: &dyn PagingDomain,
    iova: u64,
    runs: &[PhysRun],
    prot: Prot,
    large_pages: bool,
) -> Result<()> {
    if large_pages {
        return Ok(domain.map(Iova::new(iova), runs, prot)?);
    }
    let mut mapped = 0;
    for run in runs {
        let mut done = 0;
        while done < run.len {
            let page =
                PhysRun { start: run.start.wrapping_add(done), len: PAGE_SIZE.min(run.len - done) };
            if let Err(error) = domain.map(Iova::new(iova + mapped), &[page], prot) {
                unmap_all(domain, iova, mapped);
                return Err(error.into());
            }
            done += page.len;
            mapped += page.len;
        }
    }
    Ok(())
}

/// Unmaps a range that is mapped without holes.
fn unmap_all(domain: &dyn PagingDomain, iova: u64, len: u64) {
    let mut done = 0;
    while done < len {
        match domain.unmap(Iova::new(iova.wrapping_add(done)), len - done) {
            0 => break,
            bytes => done = done.saturating_add(bytes),
        }
    }
}
