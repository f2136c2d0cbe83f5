//! Unmapping: leaves are cleared, tables that lose all of their range are handed to the gather.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages};

use crate::error::Error;
use crate::format::{Format, item_shift, leaf_entries, leaf_level, span_shift, table_bytes};
use crate::gather::Gather;
use crate::table::{PageTable, Root};
use crate::words;

/// What an unmap has done: exactly the first `bytes` of the range are unmapped now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use = "an unmap may end before the end of the range"]
pub struct Unmapped {
    /// Bytes unmapped, from the start of the range.
    pub bytes: u64,
    /// Why it ended before the end of the range, if it did.
    pub stop: Option<Stop>,
}

/// What ends an unmap early, at the first byte that was not unmapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// Nothing is mapped there.
    Hole,
    /// A leaf is mapped there of which the range covers a part only. It is untouched.
    Leaf {
        /// First byte of the leaf, perhaps before the range.
        start: Iova,
        /// Its size in bytes.
        size: u64,
    },
}

impl<F: Format, P: Pages> PageTable<F, P> {
    /// Unmaps `len` bytes from `iova`, up to the first hole or the first leaf that does not lie
    /// wholly in the range. What to invalidate, and tables to free afterwards, go to `gather`.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Misaligned`], [`Error::Overflow`] or [`Error::IovaOutOfRange`];
    /// nothing has changed.
    #[inline]
    pub fn unmap(&self, iova: Iova, len: u64, gather: &mut Gather) -> Result<Unmapped, Error> {
        if len == 1 << F::GRANULE_SHIFT && self.unmap_granule(iova.get(), gather) {
            return Ok(Unmapped { bytes: 1 << F::GRANULE_SHIFT, stop: None });
        }
        self.unmap_any(iova.get(), len, gather)
    }

    /// As [`Self::unmap`], for anything but the short way of a single granule.
    #[inline(never)]
    fn unmap_any(&self, iova: u64, len: u64, gather: &mut Gather) -> Result<Unmapped, Error> {
        let last = self.check_range(iova, len)?;
        let root = self.root();
        if self.root_reaches(root, last) && self.unmap_leaf(root, iova, len) {
            gather.add(iova, len);
            gather.add_leaf(len.trailing_zeros());
            return Ok(Unmapped { bytes: len, stop: None });
        }
        Ok(self.unmap_range(root, iova, len, gather))
    }

    /// As [`PageTable::unmap`], but a leaf that begins in the range and passes its end is
    /// unmapped whole, as `iommu_unmap()` does. Gives the bytes, which are then more than `len`.
    ///
    /// # Errors
    /// As [`PageTable::unmap`].
    pub fn unmap_whole_leaves(
        &self,
        iova: Iova,
        len: u64,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        let mut done = self.unmap(iova, len, gather)?;
        if let Some(Stop::Leaf { start, size }) = done.stop
            && start.get() == iova.get().wrapping_add(done.bytes)
        {
            done.bytes += self.unmap(start, size, gather)?.bytes;
        }
        Ok(done.bytes)
    }

    /// Checks a range against granule and aperture; gives its last byte.
    #[inline(always)]
    pub(crate) fn check_range(&self, iova: u64, len: u64) -> Result<u64, Error> {
        let rest = len.checked_sub(1).ok_or(Error::Empty)?;
        if (iova | len) & self.within_granule != 0 {
            return Err(Error::Misaligned { granule: self.granule() });
        }
        let last = iova.checked_add(rest).ok_or(Error::Overflow)?;
        if iova < self.first || last > self.last {
            return Err(Error::IovaOutOfRange { iova: Iova::new(iova), last: Iova::new(last) });
        }
        Ok(last)
    }

    /// The short way: one granule, mapped by a leaf of its own. Gives whether it was that; if not,
    /// nothing has changed.
    #[inline(always)]
    fn unmap_granule(&self, iova: u64, gather: &mut Gather) -> bool {
        let root = self.root();
        let len = 1 << F::GRANULE_SHIFT;
        let last = iova | (len - 1);
        if (iova | len) & self.within_granule != 0
            || iova < self.first
            || last > self.last
            || !self.root_reaches(root, last)
        {
            return false;
        }
        let Some(word) = self.word_at(root, 0, iova) else {
            return false;
        };
        let (mask, value) = F::plain_leaf(0);
        if words::load(word) & mask != value {
            return false;
        }
        words::store(word, 0);
        self.pages.clean(core::slice::from_ref(word));
        gather.add(iova, len);
        gather.add_leaf(F::GRANULE_SHIFT);
        true
    }

    /// As [`Self::unmap_granule`], for a range that was checked and is one leaf of any size.
    #[inline(always)]
    fn unmap_leaf(&self, root: Root, iova: u64, len: u64) -> bool {
        if !len.is_power_of_two()
            || self.sizes_below(root.levels) & len == 0
            || iova & (len - 1) != 0
        {
            return false;
        }
        let shift = len.trailing_zeros();
        let level = leaf_level::<F>(shift);
        // Spelled out for the levels of usual sizes, so that the walks to them have constant shifts.
        let table = match level {
            0 => self.table_at(root, 0, iova),
            1 => self.table_at(root, 1, iova),
            2 => self.table_at(root, 2, iova),
            _ => self.table_at(root, level, iova),
        };
        let Some(rest) = table.and_then(|table| table.get(self.index(root, level, iova)..)) else {
            return false;
        };
        let entry = rest.first().map_or(0, words::load);
        if !F::is_present(entry)
            || (level != 0 && F::is_table(level, entry))
            || F::leaf_shift(level, entry) != shift
        {
            return false;
        }
        let Some(words) = rest.get(..leaf_entries::<F>(level, shift)) else {
            return false;
        };
        words::fill(words, 0, 0);
        self.pages.clean(words);
        true
    }

    /// Unmaps a range that was checked against the aperture.
    #[inline(never)]
    pub(crate) fn unmap_range(
        &self,
        root: Root,
        iova: u64,
        len: u64,
        gather: &mut Gather,
    ) -> Unmapped {
        let reach = if self.root_reaches(root, u64::MAX) {
            len
        } else {
            let end = 1u64 << span_shift::<F>(root.levels - 1);
            len.min(end.saturating_sub(iova))
        };
        let mut sweep = Sweep { table: self, root, gather, iova, left: reach, stop: None };
        if reach != 0 && root.levels != 0 {
            sweep.table_at(self.root_words(root), root.levels - 1, false);
        }
        let bytes = reach - sweep.left;
        let stop = match sweep.stop {
            None if bytes < len => Some(Stop::Hole),
            stop => stop,
        };
        if bytes != 0 {
            gather.add(iova, bytes);
        }
        Unmapped { bytes, stop }
    }
}

/// An unmap in progress: `left` bytes from `iova` are still to be looked at.
struct Sweep<'a, F: Format, P: Pages> {
    table: &'a PageTable<F, P>,
    root: Root,
    gather: &'a mut Gather,
    iova: u64,
    left: u64,
    stop: Option<Stop>,
}

impl<F: Format, P: Pages> Sweep<'_, F, P> {
    /// Unmaps what of the range lies in a table of `level`. Entries of a table that is `doomed`,
    /// wholly in the range and about to be taken out, stay as they are unless the sweep stops in it.
    fn table_at(&mut self, words: &[AtomicU64], level: u32, doomed: bool) {
        let item = item_shift::<F>(level);
        let first = self.table.index(self.root, level, self.iova);
        let mut index = first;
        while self.left != 0 && self.stop.is_none() {
            let Some(rest) = words.get(index..).filter(|rest| !rest.is_empty()) else {
                break;
            };
            let entry = rest.first().map_or(0, words::load);
            index += if !F::is_present(entry) {
                self.stop = Some(Stop::Hole);
                0
            } else if level != 0 && F::is_table(level, entry) {
                usize::from(self.child(rest, level, entry, doomed))
            } else {
                self.leaves(rest, level, item, entry, doomed)
            };
        }
        if doomed && self.stop.is_some() {
            // The table stays after all, with what comes behind.
            if let Some(done) = words.get(first..index) {
                words::fill(done, 0, 0);
                self.table.pages.clean(done);
            }
        }
    }

    /// Unmaps below the first of `words`, a table entry at `level`. Gives whether the sweep is
    /// through with the entry.
    fn child(&mut self, words: &[AtomicU64], level: u32, entry: u64, doomed: bool) -> bool {
        let item = item_shift::<F>(level);
        let within = self.iova & ((1 << item) - 1);
        let whole = within == 0 && self.left >> item != 0;
        let table = F::table_address(entry);
        let below = self.table.table_words(table);
        if below.is_empty() {
            self.stop = Some(Stop::Hole);
            return false;
        }
        self.table_at(below, level - 1, whole);
        if self.stop.is_some() {
            return false;
        }
        if whole {
            if !doomed && let Some(word) = words.first() {
                words::store(word, 0);
                self.table.pages.clean(core::slice::from_ref(word));
            }
            let bytes = table_bytes::<F>(0);
            self.gather.bury(&self.table.pages, table, bytes, level);
        }
        true
    }

    /// Unmaps leaves from the start of `words`, of which the first is `entry`. Gives the number of
    /// entries.
    #[inline(always)]
    fn leaves(
        &mut self,
        words: &[AtomicU64],
        level: u32,
        item: u32,
        entry: u64,
        doomed: bool,
    ) -> usize {
        let shift = F::leaf_shift(level, entry);
        let size = 1u64 << shift;
        let within = self.iova & (size - 1);
        if shift < item || within != 0 || self.left < size {
            self.stop = Some(Stop::Leaf { start: Iova::new(self.iova - within), size });
            return 0;
        }
        let count = if shift == item {
            let most = usize::try_from(self.left >> item).unwrap_or(usize::MAX);
            let run = words.get(..most).unwrap_or(words);
            let (mask, value) = F::plain_leaf(level);
            words::count_matching(run, mask, value).max(1)
        } else {
            leaf_entries::<F>(level, shift)
        };
        let Some(slots) = words.get(..count) else {
            self.stop = Some(Stop::Hole);
            return 0;
        };
        if !doomed {
            words::fill(slots, 0, 0);
            self.table.pages.clean(slots);
        }
        self.gather.add_leaf(shift);
        let bytes = (count as u64) << item;
        self.iova = self.iova.wrapping_add(bytes);
        self.left -= bytes;
        count
    }
}
