//! Unmapping: leaves are cleared, tables that lose all of their range are handed to the gather.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages};

use crate::error::Error;
use crate::format::{
    Format, item_shift, leaf_entries, leaf_level, span_shift, table_bytes, table_entries,
};
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
    #[inline(always)]
    pub fn unmap(&self, iova: Iova, len: u64, gather: &mut Gather) -> Result<Unmapped, Error> {
        if len == 1 << F::GRANULE_SHIFT && self.unmap_single(0, iova.get(), gather) {
            return Ok(Unmapped { bytes: 1 << F::GRANULE_SHIFT, stop: None });
        }
        self.unmap_any(iova.get(), len, gather)
    }

    /// As [`Self::unmap`], for anything but the short way of a single granule.
    #[inline(never)]
    pub(crate) fn unmap_any(
        &self,
        iova: u64,
        len: u64,
        gather: &mut Gather,
    ) -> Result<Unmapped, Error> {
        let done = if len == 1 << item_shift::<F>(1) {
            self.unmap_single(1, iova, gather)
        } else if len == 1 << item_shift::<F>(2) {
            self.unmap_single(2, iova, gather)
        } else {
            false
        };
        if done {
            return Ok(Unmapped { bytes: len, stop: None });
        }
        self.unmap_more(iova, len, gather)
    }

    /// As [`Self::unmap`], for more than a single leaf of the usual sizes.
    #[inline(never)]
    fn unmap_more(&self, iova: u64, len: u64, gather: &mut Gather) -> Result<Unmapped, Error> {
        let last = self.check_range(iova, len)?;
        let root = self.root();
        let mut bytes = 0;
        if self.root_reaches(root, last) {
            bytes = self.unmap_in_table(root, iova, len, gather);
        }
        if bytes == len {
            return Ok(Unmapped { bytes, stop: None });
        }
        let mut rest = self.sweep(root, iova.wrapping_add(bytes), len - bytes, false, gather);
        rest.bytes += bytes;
        Ok(rest)
    }

    /// As [`PageTable::unmap`], for a caller who knows that all of the range is mapped, as those do who
    /// unmap what they have mapped: a leaf table that lies wholly in the range is taken out unread, which
    /// makes this many times faster where there are such tables.
    ///
    /// The price is that a hole in such a table is not noticed: it counts as unmapped, and
    /// does not stop the unmap. Otherwise nothing differs. Whatever was mapped, nothing of the first
    /// [`Unmapped::bytes`] is mapped afterwards, and nothing else is touched; leaf sizes that such
    /// a table may have held are in [`Gather::leaf_sizes`].
    ///
    /// # Errors
    /// As [`PageTable::unmap`].
    #[inline(always)]
    pub fn unmap_mapped(
        &self,
        iova: Iova,
        len: u64,
        gather: &mut Gather,
    ) -> Result<Unmapped, Error> {
        if len < 1 << span_shift::<F>(0) {
            return self.unmap(iova, len, gather);
        }
        self.unmap_tables(iova.get(), len, gather)
    }

    /// As [`Self::unmap_mapped`], for a range with whole tables.
    #[inline(never)]
    fn unmap_tables(&self, iova: u64, len: u64, gather: &mut Gather) -> Result<Unmapped, Error> {
        self.check_range(iova, len)?;
        Ok(self.sweep(self.root(), iova, len, true, gather))
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

    /// The short way: what one entry of `level`, a constant, spans, mapped by one leaf. Gives whether it
    /// was that; if not, nothing has changed.
    #[inline(always)]
    fn unmap_single(&self, level: u32, iova: u64, gather: &mut Gather) -> bool {
        let root = self.root();
        if !self.holds_single(level, iova) || !self.root_reaches(root, iova) {
            return false;
        }
        let word = self.word_at(root, level, iova);
        word.is_some_and(|word| self.take_single(level, word, iova, gather))
    }

    /// Whether a leaf of the size that one entry of `level` spans could be at `iova`.
    #[inline(always)]
    pub(crate) fn holds_single(&self, level: u32, iova: u64) -> bool {
        let size = 1 << item_shift::<F>(level);
        self.page_sizes & size != 0
            && iova & (size - 1) == 0
            && iova >= self.first
            && iova | (size - 1) <= self.last
    }

    /// Clears `word`, an entry of `level`, if it is a leaf by itself.
    #[inline(always)]
    pub(crate) fn take_single(
        &self,
        level: u32,
        word: &AtomicU64,
        iova: u64,
        gather: &mut Gather,
    ) -> bool {
        let (mask, value) = F::plain_leaf(level);
        if words::load(word) & mask != value {
            return false;
        }
        words::store(word, 0);
        self.pages.clean(core::slice::from_ref(word));
        gather.add(iova, 1 << item_shift::<F>(level));
        gather.add_leaf(item_shift::<F>(level));
        true
    }

    /// As [`Self::unmap_single`], for a range that was checked and is a part of a leaf table, mapped by
    /// granules, or one leaf of any size. Gives the bytes that it has unmapped from the start, perhaps
    /// not all.
    #[inline(always)]
    fn unmap_in_table(&self, root: Root, iova: u64, len: u64, gather: &mut Gather) -> u64 {
        if len < 1 << span_shift::<F>(0)
            && let Some(table) = self.table_at(root, 0, iova)
        {
            let first = self.index(root, 0, iova);
            let count = usize::try_from(len >> F::GRANULE_SHIFT).unwrap_or(usize::MAX);
            let rest = table.get(first..).unwrap_or(&[]);
            // What passes the end of the table is for the table after it.
            let slots = rest.get(..count).unwrap_or(rest);
            let (mask, value) = F::plain_leaf(0);
            if slots.first().is_none_or(|word| words::load(word) & mask != value) {
                return self.clear_leaf(rest, 0, iova, len, gather);
            }
            let cleared = words::clear_matching(slots, mask, value);
            self.pages.clean(slots.get(..cleared).unwrap_or(&[]));
            let bytes = (cleared as u64) << F::GRANULE_SHIFT;
            gather.add(iova, bytes);
            gather.add_leaf(F::GRANULE_SHIFT);
            return bytes;
        }
        if !len.is_power_of_two() || self.sizes_below(root.levels) & len == 0 {
            return 0;
        }
        let level = leaf_level::<F>(len.trailing_zeros());
        let table = self.table_at(root, level, iova).unwrap_or(&[]);
        let rest = table.get(self.index(root, level, iova)..).unwrap_or(&[]);
        self.clear_leaf(rest, level, iova, len, gather)
    }

    /// Clears the leaf at the start of `words`, entries of `level`, if it is the whole range. Gives its
    /// bytes then.
    #[inline(always)]
    fn clear_leaf(
        &self,
        words: &[AtomicU64],
        level: u32,
        iova: u64,
        len: u64,
        gather: &mut Gather,
    ) -> u64 {
        let entry = words.first().map_or(0, words::load);
        if !F::is_present(entry) || (level != 0 && F::is_table(level, entry)) {
            return 0;
        }
        let shift = F::leaf_shift(level, entry);
        if len != 1 << shift || iova & (len - 1) != 0 {
            return 0;
        }
        let Some(words) = words.get(..leaf_entries::<F>(level, shift)) else {
            return 0;
        };
        words::fill(words, 0, 0);
        self.pages.clean(words);
        gather.add(iova, len);
        gather.add_leaf(shift);
        len
    }

    /// Unmaps a range that was checked against the aperture, and of which the caller knows that all
    /// is mapped if `mapped`.
    #[inline(never)]
    pub(crate) fn sweep(
        &self,
        root: Root,
        iova: u64,
        len: u64,
        mapped: bool,
        gather: &mut Gather,
    ) -> Unmapped {
        let reach = if self.root_reaches(root, u64::MAX) {
            len
        } else {
            let end = 1u64 << span_shift::<F>(root.levels - 1);
            len.min(end.saturating_sub(iova))
        };
        let mut sweep = Sweep { table: self, root, gather, mapped, iova, left: reach, stop: None };
        if reach != 0 {
            // The range lies in one table mostly, and does not take it all: no need to come by those
            // above step by step.
            let in_one = |level: u32| {
                let span = span_shift::<F>(level);
                span < 64
                    && (iova ^ iova.wrapping_add(reach - 1)) >> span == 0
                    && reach >> span == 0
            };
            let low = if in_one(1) {
                self.table_at(root, 1, iova).map(|words| (words, 1))
            } else if in_one(2) {
                self.table_at(root, 2, iova).map(|words| (words, 2))
            } else {
                None
            };
            let (words, level) = low.unwrap_or((self.root_words(root), root.levels - 1));
            sweep.table_at(words, level, false);
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
    /// Whether all of the range is mapped, so that whole leaf tables need not be read.
    mapped: bool,
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
            if level == 1 {
                let tables = self.leaf_tables(rest, doomed);
                if tables != 0 {
                    index += tables;
                    continue;
                }
            }
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

    /// Unmaps by whole leaf tables, those that the entries of level 1 at the start of `words` lead to,
    /// as long as nothing in them needs a closer look. Gives the number of entries.
    #[inline(always)]
    fn leaf_tables(&mut self, words: &[AtomicU64], doomed: bool) -> usize {
        let span = 1 << span_shift::<F>(0);
        if self.iova & (span - 1) != 0 {
            return 0;
        }
        let pages = &self.table.pages;
        let (mask, value) = F::plain_leaf(0);
        let mut count = 0;
        let most = usize::try_from(self.left / span).unwrap_or(usize::MAX);
        for word in words.iter().take(most) {
            let entry = words::load(word);
            if !F::is_plain_table(1, entry) {
                break;
            }
            let table = F::table_address(entry);
            let below = self.table.table_words(table);
            let known = if self.mapped {
                !below.is_empty()
            } else {
                words::count_matching(below, mask, value) == table_entries::<F>()
            };
            if !known {
                break;
            }
            if !doomed {
                words::store(word, 0);
                pages.clean(core::slice::from_ref(word));
            }
            self.gather.bury(pages, table, table_bytes::<F>(0), 1);
            count += 1;
        }
        if count != 0 {
            let bytes = span * count as u64;
            self.iova = self.iova.wrapping_add(bytes);
            self.left -= bytes;
            let sizes = if self.mapped { F::leaf_sizes(0) } else { 1 << F::GRANULE_SHIFT };
            self.gather.add_leaves(sizes & self.table.page_sizes);
        }
        count
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
        let mut count = 0;
        if shift == item {
            let most = usize::try_from(self.left >> item).unwrap_or(usize::MAX);
            let run = words.get(..most).unwrap_or(words);
            // Spelled out for the levels of usual sizes, so that masks are constants.
            count = match level {
                0 => plain_leaves::<F>(run, 0, doomed),
                1 => plain_leaves::<F>(run, 1, doomed),
                _ => plain_leaves::<F>(run, level, doomed),
            };
        }
        let plain = count != 0;
        if !plain {
            count = leaf_entries::<F>(level, shift);
        }
        let Some(slots) = words.get(..count) else {
            self.stop = Some(Stop::Hole);
            return 0;
        };
        if !doomed {
            if !plain {
                words::fill(slots, 0, 0);
            }
            self.table.pages.clean(slots);
        }
        self.gather.add_leaf(shift);
        let bytes = (count as u64) << item;
        self.iova = self.iova.wrapping_add(bytes);
        self.left -= bytes;
        count
    }
}

/// How many of `words` from the start on are leaves of just their entry in a table of `level`. They are
/// cleared, unless the table is `doomed`.
#[inline(always)]
fn plain_leaves<F: Format>(words: &[AtomicU64], level: u32, doomed: bool) -> usize {
    let (mask, value) = F::plain_leaf(level);
    if doomed {
        words::count_matching(words, mask, value)
    } else {
        words::clear_matching(words, mask, value)
    }
}
