//! The areas of an IOAS, and where in it something may be mapped (`struct io_pagetable`).

mod accesses;
mod area;
mod domains;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use lychgate_iommu::PagingDomain;
use lychgate_types::{Errno, Prot};

pub(crate) use self::accesses::Pin;
use self::accesses::User;
use self::area::Area;
use crate::alloc_iova::{SEARCHED, Wanted};
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
use crate::mm::PAGE_SIZE;
use crate::pages::Pages;
use crate::reserved::{Reserved, ReservedBy, merge};

/// What of some memory is to be mapped.
#[derive(Clone)]
pub(crate) struct Slice {
    /// The memory.
    pub(crate) pages: Arc<Pages>,
    /// First byte.
    pub(crate) start: u64,
    /// Bytes, not 0.
    pub(crate) len: u64,
}

/// A domain that holds every area, and the number of its object.
struct Holder {
    id: u32,
    domain: Arc<dyn PagingDomain>,
}

/// The areas of an IOAS.
pub(crate) struct IoPageTable {
    areas: BTreeMap<u64, Area>,
    allowed: Vec<RangeInclusive<u64>>,
    reserved: Reserved,
    holders: Vec<Holder>,
    users: Vec<User>,
    alignment: u64,
    large_pages: bool,
}

/// What the next step of an unmap does.
pub(crate) enum Unmap {
    /// This area is gone.
    Unmapped {
        /// Its first IOVA.
        iova: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Access objects pin pages of this area: they are to be told, and pin no more of it.
    Pinned {
        /// Its first IOVA.
        iova: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Nothing is left.
    Done,
}

impl IoPageTable {
    /// Nothing mapped, nothing reserved, large pages allowed.
    pub(crate) fn new() -> Self {
        Self {
            areas: BTreeMap::new(),
            allowed: Vec::new(),
            reserved: Reserved::default(),
            holders: Vec::new(),
            users: Vec::new(),
            alignment: 1,
            large_pages: true,
        }
    }

    /// What IOVAs, lengths and offsets into pages must be a multiple of.
    pub(crate) fn alignment(&self) -> u64 {
        self.alignment
    }

    /// Whether large pages may be used.
    pub(crate) fn large_pages(&self) -> bool {
        self.large_pages
    }

    /// The ranges that can be mapped.
    pub(crate) fn usable(&self) -> Vec<RangeInclusive<u64>> {
        self.reserved.holes()
    }

    /// The first and the last IOVA of all areas together; `None` when there is no area.
    pub(crate) fn span(&self) -> Option<(u64, u64)> {
        let (first, _) = self.areas.first_key_value()?;
        let (_, area) = self.areas.last_key_value()?;
        Some((*first, area.last))
    }

    /// The memory of every area.
    pub(crate) fn memory(&self) -> impl Iterator<Item = &Arc<Pages>> {
        self.areas.values().map(|area| &area.pages)
    }

    /// Maps `slices` one behind the other, at `iova` or, without one, where they fit; gives the
    /// first IOVA. Each becomes an area (`iopt_map_pages`).
    pub(crate) fn map(&mut self, slices: &[Slice], iova: Option<u64>, prot: Prot) -> Result<u64> {
        let len = slices.iter().try_fold(0_u64, |sum, slice| sum.checked_add(slice.len));
        let len = len.unwrap_or(u64::MAX);
        if len == 0 || !len.is_multiple_of(self.alignment) {
            return refuse(
                Errno::EINVAL,
                format!("the length is 0 or not a multiple of {}", self.alignment),
            );
        }
        let first = match iova {
            Some(iova) => self.check_iova(iova, len)?,
            None => self.alloc_iova(slices, len)?,
        };
        slices.iter().try_for_each(|slice| self.check_slice(slice, prot))?;
        let mut at = first;
        for slice in slices {
            match self.insert(slice, at, prot) {
                Ok(last) => at = last.wrapping_add(1),
                Err(refusal) => {
                    self.remove_before(first, at);
                    return Err(refusal);
                }
            }
        }
        Ok(first)
    }

    /// What is mapped at `len` bytes from `iova`, without any hole (`iopt_get_pages`).
    pub(crate) fn slices(&self, iova: u64, len: u64) -> Result<Vec<Slice>> {
        let last = last_of(iova, len)?;
        let mut slices = Vec::new();
        let mut at = iova;
        loop {
            let found = self.areas.range(..=at).next_back().filter(|(_, area)| area.last >= at);
            let Some((&first, area)) = found else {
                return refuse(Errno::ENOENT, format!("nothing is mapped at {at:#x}"));
            };
            let end = area.last.min(last);
            slices.push(Slice {
                pages: Arc::clone(&area.pages),
                start: area.start + (at - first),
                len: end - at + 1,
            });
            if end == last {
                return Ok(slices);
            }
            at = end + 1;
        }
    }

    /// Unmaps the first area in `first..=last` (a round of `iopt_unmap_iova_range`). `ENOENT` when it
    /// is only partly inside; `EBUSY` when hardware uses it.
    pub(crate) fn unmap_next(&mut self, first: u64, last: u64) -> Result<Unmap> {
        let Some((start, end)) = self.first_area(first, last) else {
            return Ok(Unmap::Done);
        };
        let len = end - start + 1;
        if let Some(area) = self.areas.get_mut(&start) {
            if area.locks > 0 {
                return refuse(
                    Errno::EBUSY,
                    format!("a queue of hardware is in the area {start:#x}..={end:#x}"),
                );
            }
            if start < first || end > last {
                return refuse(
                    Errno::ENOENT,
                    format!("the area {start:#x}..={end:#x} is only partly in the range"),
                );
            }
            if area.is_pinned() {
                area.prevent_access = true;
                return Ok(Unmap::Pinned { iova: start, len });
            }
        }
        if let Some(area) = self.areas.remove(&start) {
            self.unfill(start, &area);
        }
        Ok(Unmap::Unmapped { iova: start, len })
    }

    /// Cuts the area that `last` is inside of in two, `last` the last byte of the first one
    /// (`iopt_cut_iova`). Nothing happens where there is no area or it ends there.
    pub(crate) fn cut(&mut self, last: u64) -> Result<()> {
        let found = self.areas.range_mut(..=last).next_back().filter(|(_, area)| area.last > last);
        let Some((&first, area)) = found else {
            return Ok(());
        };
        let mapped = !self.holders.is_empty();
        let right = area.split(first, last, self.alignment, mapped, self.large_pages)?;
        self.areas.insert(last + 1, right);
        Ok(())
    }

    /// Restricts the IOVAs that are chosen to `ranges`, or to none with an empty list
    /// (`iopt_set_allow_iova`).
    pub(crate) fn allow(&mut self, ranges: Vec<RangeInclusive<u64>>) -> Result<()> {
        for range in &ranges {
            if self.reserved.overlaps(*range.start(), *range.end()) {
                return refuse(
                    Errno::EADDRINUSE,
                    format!("{:#x}..={:#x} is in part reserved", range.start(), range.end()),
                );
            }
        }
        self.allowed = merge(ranges);
        Ok(())
    }

    /// Reserves `range` (`iopt_reserve_iova`). `EADDRINUSE` when something is mapped there, or the
    /// caller allowed it.
    pub(crate) fn reserve(&mut self, range: RangeInclusive<u64>, by: ReservedBy) -> Result<()> {
        let (first, last) = (*range.start(), *range.end());
        if self.first_area(first, last).is_some() {
            return refuse(
                Errno::EADDRINUSE,
                format!("something is mapped in {first:#x}..={last:#x}, which is reserved"),
            );
        }
        if self.allowed.iter().any(|allowed| *allowed.start() <= last && first <= *allowed.end()) {
            return refuse(
                Errno::EADDRINUSE,
                format!("allowed IOVAs are in {first:#x}..={last:#x}, which is reserved"),
            );
        }
        self.reserved.add(range, by);
        Ok(())
    }

    /// Takes back what `by` reserved.
    pub(crate) fn unreserve(&mut self, by: ReservedBy) {
        self.reserved.remove(by);
    }

    /// Lets large pages be used or not (`iopt_enable_large_pages`, `iopt_disable_large_pages`).
    pub(crate) fn set_large_pages(&mut self, allowed: bool) -> Result<()> {
        if self.large_pages && !allowed {
            if !self.holders.is_empty() && !self.areas.is_empty() {
                return refuse(
                    Errno::EINVAL,
                    "large pages cannot be ruled out once domains have mappings",
                );
            }
            self.check_alignment(self.needed_alignment(false))?;
        }
        self.large_pages = allowed;
        self.alignment = self.needed_alignment(allowed);
        Ok(())
    }

    /// Whether memory can be mapped in this way.
    fn check_slice(&self, slice: &Slice, prot: Prot) -> Result<()> {
        if prot.contains(Prot::WRITE) && !slice.pages.writable() {
            return refuse(Errno::EPERM, "the memory was mapped for reading only");
        }
        if !(slice.start % PAGE_SIZE).is_multiple_of(self.alignment) {
            return refuse(
                Errno::EINVAL,
                format!("the memory does not start at a multiple of {}", self.alignment),
            );
        }
        Ok(())
    }

    /// Adds the area of a slice at `iova`, where nothing is, and gives its last IOVA
    /// (`iopt_insert_area`, `iopt_area_fill_domains`).
    fn insert(&mut self, slice: &Slice, iova: u64, prot: Prot) -> Result<u64> {
        allocation()?;
        let last = last_of(iova, slice.len)?;
        let area = Area::new(last, Arc::clone(&slice.pages), slice.start, prot);
        self.fill(iova, &area)?;
        self.areas.insert(iova, area);
        Ok(last)
    }

    /// Takes back the areas that were added from `first` up to `end`.
    fn remove_before(&mut self, first: u64, end: u64) {
        while let Some((&at, _)) = self.areas.range(first..end).next_back() {
            if let Some(area) = self.areas.remove(&at) {
                self.unfill(at, &area);
            }
        }
    }

    /// Whether a fixed range can be mapped (`iopt_check_iova`); gives its first IOVA.
    fn check_iova(&self, iova: u64, len: u64) -> Result<u64> {
        if !iova.is_multiple_of(self.alignment) {
            return refuse(
                Errno::EINVAL,
                format!("the IOVA {iova:#x} is not a multiple of {}", self.alignment),
            );
        }
        let last = last_of(iova, len)?;
        if self.reserved.overlaps(iova, last) {
            return refuse(Errno::EINVAL, format!("{iova:#x}..={last:#x} is in part reserved"));
        }
        match self.first_area(iova, last) {
            Some((first, last)) => refuse(
                Errno::EEXIST,
                format!("the area {first:#x}..={last:#x} is mapped there already"),
            ),
            None => Ok(iova),
        }
    }

    /// A place for `len` bytes (`iopt_alloc_iova`).
    fn alloc_iova(&self, slices: &[Slice], len: u64) -> Result<u64> {
        if len >= u64::MAX / 2 {
            return refuse(Errno::EOVERFLOW, "the length is half of the address space or more");
        }
        let position = slices.first().map_or(0, |slice| slice.pages.position(slice.start));
        let wanted = Wanted::new(len, position);
        if wanted.alignment < self.alignment {
            return refuse(
                Errno::EINVAL,
                format!("the memory does not start at a multiple of {}", self.alignment),
            );
        }
        let everywhere = [SEARCHED];
        let allowed: &[_] = if self.allowed.is_empty() { &everywhere } else { &self.allowed };
        for range in allowed {
            let first = *range.start().max(SEARCHED.start());
            let last = *range.end().min(SEARCHED.end());
            if first > last {
                continue;
            }
            let mut reserved = self.reserved.merged().iter().cloned();
            let mut areas = self.ranges_from(first);
            if let Some(iova) = wanted.search(first, last, [&mut reserved, &mut areas]) {
                return Ok(iova);
            }
        }
        refuse(Errno::ENOSPC, format!("no hole of {len:#x} bytes is left"))
    }

    /// The areas that end at `first` or behind it.
    fn ranges_from(&self, first: u64) -> impl Iterator<Item = RangeInclusive<u64>> {
        let before = self.areas.range(..first).next_back().filter(|(_, area)| area.last >= first);
        let after = self.areas.range(first..);
        before.into_iter().chain(after).map(|(&first, area)| first..=area.last)
    }

    /// The first IOVA of the area that `number` others are before.
    pub(crate) fn area_by_number(&self, number: usize) -> Option<u64> {
        self.areas.keys().nth(number).copied()
    }

    /// First and last IOVA of the first area that overlaps `first..=last`.
    fn first_area(&self, first: u64, last: u64) -> Option<(u64, u64)> {
        let range = self.ranges_from(first).next()?;
        (*range.start() <= last).then(|| range.into_inner())
    }

    /// `EADDRINUSE` when an area does not fit an alignment (`iopt_check_iova_alignment`).
    fn check_alignment(&self, alignment: u64) -> Result<()> {
        if alignment <= self.alignment {
            return Ok(());
        }
        match self.areas.iter().find(|(first, area)| !area.is_aligned(**first, alignment)) {
            Some((first, area)) => refuse(
                Errno::EADDRINUSE,
                format!("the area {first:#x}..={:#x} is not aligned to {alignment}", area.last),
            ),
            None => Ok(()),
        }
    }

    /// The alignment that domains, access objects and large pages ask for
    /// (`iopt_calculate_iova_alignment`).
    fn needed_alignment(&self, large_pages: bool) -> u64 {
        let least = if large_pages { 1 } else { PAGE_SIZE };
        let domains = self.holders.iter().map(|holder| holder.domain.geometry().granule());
        let users = self.users.iter().map(|user| user.alignment);
        domains.chain(users).fold(least, u64::max)
    }
}

/// The last of `len` bytes from `iova`.
pub(crate) fn last_of(iova: u64, len: u64) -> Result<u64> {
    let Some(more) = len.checked_sub(1) else {
        return refuse(Errno::EINVAL, "the length is 0");
    };
    match iova.checked_add(more) {
        Some(last) => Ok(last),
        None => refuse(Errno::EOVERFLOW, "the range passes the end of the IOVA space"),
    }
}
