//! Access objects of an IOAS: what they pin, read and write (`iommufd_access_pin_pages` and
//! following).

use std::sync::Arc;

use lychgate_types::{Errno, PhysRun, Prot};

use super::area::Area;
use super::{IoPageTable, last_of};
use crate::access::AccessOps;
use crate::client::Client;
use crate::error::{Result, refuse};
use crate::fault_injection::{Step, allocation, should_fail};
use crate::mm::PAGE_SIZE;
use crate::pages::Transfer;

/// An access object that may use the areas.
pub(super) struct User {
    id: u32,
    /// What IOVAs must be a multiple of: a page when it pins.
    pub(super) alignment: u64,
    /// Whom to tell of unmaps; `None` for an internal one.
    ops: Option<Arc<dyn AccessOps>>,
}

/// How pages are pinned.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pin {
    /// They will be written.
    pub(crate) write: bool,
    /// No unmap takes them away: it is refused instead.
    pub(crate) lock: bool,
}

impl IoPageTable {
    /// Lets an access object use the areas (`iopt_add_access`). `EADDRINUSE` when it pins pages, and
    /// an area is not made of whole ones.
    pub(crate) fn add_access(
        &mut self,
        id: u32,
        pins: bool,
        ops: Option<Arc<dyn AccessOps>>,
    ) -> Result<()> {
        allocation()?;
        let alignment = if pins { PAGE_SIZE } else { 1 };
        self.check_alignment(alignment)?;
        self.alignment = self.alignment.max(alignment);
        self.users.push(User { id, alignment, ops });
        Ok(())
    }

    /// Undoes [`IoPageTable::add_access`]. It has unpinned what it pinned.
    pub(crate) fn remove_access(&mut self, id: u32) {
        self.users.retain(|user| user.id != id);
        self.alignment = self.needed_alignment(self.large_pages);
    }

    /// Whom to tell that something is to be unmapped (`iommufd_access_notify_unmap`).
    pub(crate) fn access_ops(&self) -> Vec<Arc<dyn AccessOps>> {
        self.users.iter().filter_map(|user| user.ops.clone()).collect()
    }

    /// Pins what is mapped at `len` bytes from `iova`, and gives the frames, whole pages of them
    /// (`iopt_area_add_access` for each area).
    pub(crate) fn pin(&mut self, iova: u64, len: u64, how: Pin) -> Result<Vec<PhysRun>> {
        let last = last_of(iova, len)?;
        let mut frames = Vec::new();
        let mut at = iova;
        loop {
            let pinned = match self.area_at(at) {
                Some((first, area)) => pin_area(first, area, at, last, how, &mut frames),
                None => refuse(Errno::ENOENT, format!("nothing is mapped at {at:#x}")),
            };
            match pinned {
                Ok(end) if end == last => return Ok(frames),
                Ok(end) => at = end + 1,
                Err(refusal) => {
                    if at > iova {
                        self.unpin(iova, at - iova, how.lock);
                    }
                    return Err(refusal);
                }
            }
        }
    }

    /// Undoes a pin of exactly this range.
    pub(crate) fn unpin(&mut self, iova: u64, len: u64, locked: bool) {
        let Ok(last) = last_of(iova, len) else {
            return;
        };
        let mut at = iova;
        while let Some((first, area)) = self.area_at(at) {
            let end = area.last.min(last);
            let range = area.page_range(first, at, end);
            if let Some(count) = area.pins.get_mut(&range) {
                *count -= 1;
                if *count == 0 {
                    area.pins.remove(&range);
                }
                if locked {
                    area.locks = area.locks.saturating_sub(1);
                }
                area.pages.release(range.0 * PAGE_SIZE, bytes(range));
            }
            if end == last {
                return;
            }
            at = end + 1;
        }
    }

    /// Copies bytes out of what is mapped from `iova` on, or into it (`iommufd_access_rw`). On an
    /// error some of it may be copied.
    pub(crate) fn copy(
        &self,
        iova: u64,
        copy: Transfer<'_>,
        caller: Option<&dyn Client>,
    ) -> Result<()> {
        let (len, needed) = match &copy {
            Transfer::Read(to) => (to.len() as u64, Prot::READ),
            Transfer::Write(from) => (from.len() as u64, Prot::WRITE),
        };
        let last = last_of(iova, len)?;
        let (mut at, mut rest) = (iova, copy);
        loop {
            let found = self.areas.range(..=at).next_back().filter(|(_, area)| area.last >= at);
            let Some((&first, area)) = found else {
                return refuse(Errno::ENOENT, format!("nothing is mapped at {at:#x}"));
            };
            check_access(area, needed)?;
            let end = area.last.min(last);
            let part = usize::try_from(end - at + 1).unwrap_or(usize::MAX);
            let (now, later) = split(rest, part);
            area.pages.copy(area.start + (at - first), now, caller)?;
            if end == last {
                return Ok(());
            }
            (at, rest) = (end + 1, later);
        }
    }

    fn area_at(&mut self, at: u64) -> Option<(u64, &mut Area)> {
        let (first, area) = self.areas.range_mut(..=at).next_back()?;
        (area.last >= at).then_some((*first, area))
    }
}

/// Pins what of `at..=last` is in an area, adds the frames to `frames`, and gives its end.
fn pin_area(
    first: u64,
    area: &mut Area,
    at: u64,
    last: u64,
    how: Pin,
    frames: &mut Vec<PhysRun>,
) -> Result<u64> {
    let end = area.last.min(last);
    let start = area.start + (at - first);
    let cut = end != last && !(start + (end - at) + 1).is_multiple_of(PAGE_SIZE);
    if !start.is_multiple_of(PAGE_SIZE) || cut {
        return refuse(Errno::EINVAL, format!("{at:#x} leads into the middle of a page"));
    }
    check_access(area, if how.write { Prot::WRITE } else { Prot::READ })?;
    if area.pages.import().is_some() {
        return refuse(Errno::EINVAL, "memory of a device has no pages to pin");
    }
    if how.write && !area.pages.writable() {
        return refuse(Errno::EPERM, "the memory was mapped for reading only");
    }
    allocation()?;
    if should_fail(Step::Iommufd) {
        return refuse(Errno::ENOMEM, "this access is to fail (fail-nth)");
    }
    let range = area.page_range(first, at, end);
    area.pages.acquire(range.0 * PAGE_SIZE, bytes(range), |runs| {
        frames.extend_from_slice(runs);
        Ok(())
    })?;
    *area.pins.entry(range).or_default() += 1;
    if how.lock {
        area.locks += 1;
    }
    Ok(end)
}

/// `EINVAL` while the area is being unmapped; `EPERM` for what devices could not do either.
fn check_access(area: &Area, needed: Prot) -> Result<()> {
    if area.prevent_access {
        return refuse(Errno::EINVAL, "the area is being unmapped");
    }
    if !area.prot.contains(needed) {
        return refuse(Errno::EPERM, "the area is not mapped for that");
    }
    Ok(())
}

/// Bytes of a range of pages.
fn bytes((first, last): (u64, u64)) -> u64 {
    (last - first + 1) * PAGE_SIZE
}

/// The first `len` bytes of a copy, and the rest.
fn split(copy: Transfer<'_>, len: usize) -> (Transfer<'_>, Transfer<'_>) {
    match copy {
        Transfer::Read(to) => {
            let (now, later) = to.split_at_mut(len.min(to.len()));
            (Transfer::Read(now), Transfer::Read(later))
        }
        Transfer::Write(from) => {
            let (now, later) = from.split_at(len.min(from.len()));
            (Transfer::Write(now), Transfer::Write(later))
        }
    }
}
