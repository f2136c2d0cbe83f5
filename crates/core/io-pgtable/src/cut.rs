//! Cutting: leaves that are too large become smaller ones, and no access in between sees a hole.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages};

use crate::error::Error;
use crate::format::{Format, SizeChange, SizeChanges, item_shift, leaf_entries, table_bytes};
use crate::gather::Gather;
use crate::leaf::{Record, Said};
use crate::table::PageTable;
use crate::words;

impl<F: Format, P: Pages> PageTable<F, P> {
    /// What the format, with the options of this table, lets [`PageTable::cut`] and
    /// [`PageTable::join`] do.
    pub fn size_changes(&self) -> SizeChanges {
        F::size_changes(&self.options)
    }

    /// Cuts leaves that lie partly in the range at its ends, so that an unmap of it stops at holes
    /// alone. Gives the number of leaves that were cut.
    ///
    /// Every byte translates as before at every moment, with the same permissions and attributes:
    /// a table of smaller leaves is complete before one compare-and-swap puts it in the
    /// place of the leaf, and entries of a contiguous run are rewritten one by one to
    /// smaller leaves of the same memory. The smaller leaves are as large as the format and
    /// the cut allow. Each of them counts as written or used if the large one did, in whichever of
    /// its entries hardware has recorded it, to the last moment.
    ///
    /// Hardware may go on using the old size until `gather.range()` has been invalidated.
    /// If a leaf has become a table, [`Gather::removed_tables`] asks for an invalidation of
    /// table entries too (Arm and RISC-V want that, AMD and VT-d take it).
    ///
    /// For [rule](crate#rules-for-callers) number one a cut changes the whole of the leaves that it
    /// cuts. Walks of other threads are right all the same.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Misaligned`], [`Error::Overflow`], [`Error::IovaOutOfRange`];
    /// [`Error::OutOfMemory`] or [`Error::BreakBeforeMake`], with the leaf that it is about as it
    /// was; [`Error::Raced`] and [`Error::Corrupt`]. Leaves that had been cut before stay so:
    /// `gather` says what to invalidate after an error too.
    pub fn cut(&self, iova: Iova, len: u64, gather: &mut Gather) -> Result<usize, Error> {
        let last = self.check_range(iova.get(), len)?;
        let ends = [(iova.get(), iova.get()), (last, last)];
        self.cut_pieces(iova.get(), last, u64::MAX, &ends, gather)
    }

    /// As [`PageTable::cut`], and cuts leaves in the range until none has more than `largest`
    /// bytes, a page size or anything not below the smallest one. Holes are passed over.
    ///
    /// # Errors
    /// As [`PageTable::cut`]; [`Error::Unsupported`] when `largest` is below the granule.
    pub fn cut_down(
        &self,
        iova: Iova,
        len: u64,
        largest: u64,
        gather: &mut Gather,
    ) -> Result<usize, Error> {
        let last = self.check_range(iova.get(), len)?;
        if largest < self.granule() {
            return Err(Error::Unsupported("page size"));
        }
        self.cut_pieces(iova.get(), last, largest, &[(iova.get(), last)], gather)
    }

    /// Cuts the leaves that intersect one of `parts`, by first and last byte, of the range.
    fn cut_pieces(
        &self,
        first: u64,
        last: u64,
        largest: u64,
        parts: &[(u64, u64)],
        gather: &mut Gather,
    ) -> Result<usize, Error> {
        let root = self.root();
        let pieces = Pieces { first, last, largest, sizes: self.sizes_below(root.levels) };
        let mut cutter =
            Cutter { table: self, gather, pieces, changes: self.size_changes(), cut: 0 };
        if let Some(top) = root.levels.checked_sub(1) {
            for &part in parts {
                cutter.table_at(self.root_words(root), top, 0, part)?;
            }
        }
        Ok(cutter.cut)
    }
}

/// How large leaves may be, and where.
#[derive(Clone, Copy)]
struct Pieces {
    first: u64,
    last: u64,
    /// In the range; others only must not cross an end of it.
    largest: u64,
    sizes: u64,
}

impl Pieces {
    /// Whether a leaf of 2^`shift` bytes from `start` may be.
    const fn allow(&self, start: u64, shift: u32) -> bool {
        let size = 1u64 << shift;
        let end = start | (size - 1);
        let apart = end < self.first || start > self.last;
        let inside = self.first <= start && end <= self.last;
        apart || (inside && size <= self.largest)
    }

    /// log2 of the largest leaf that may begin at `start` at `level`, `room` bytes at most; `None`
    /// when it takes a table.
    fn at<F: Format>(&self, level: u32, start: u64, room: u64) -> Option<u32> {
        let mut sizes = self.sizes & F::leaf_sizes(level);
        while sizes != 0 {
            let shift = sizes.ilog2();
            let size = 1u64 << shift;
            if size <= room && start & (size - 1) == 0 && self.allow(start, shift) {
                return Some(shift);
            }
            sizes &= !size;
        }
        None
    }
}

/// A cut in progress.
struct Cutter<'a, F: Format, P: Pages> {
    table: &'a PageTable<F, P>,
    gather: &'a mut Gather,
    pieces: Pieces,
    changes: SizeChanges,
    cut: usize,
}

/// A leaf to be cut.
struct Large<'a> {
    /// All its entries.
    words: &'a [AtomicU64],
    level: u32,
    shift: u32,
    start: u64,
    /// What its first entry says.
    said: Said,
    record: Record,
}

impl<F: Format, P: Pages> Cutter<'_, F, P> {
    /// Cuts leaves that intersect `part`, by first and last byte, in a table of `level` whose first
    /// entry is for `start`, and below.
    fn table_at(
        &mut self,
        words: &[AtomicU64],
        level: u32,
        start: u64,
        part: (u64, u64),
    ) -> Result<(), Error> {
        let item = item_shift::<F>(level);
        let mut offset = part.0.saturating_sub(start) >> item;
        let last = (part.1 - start) >> item;
        while offset <= last {
            let index = usize::try_from(offset).unwrap_or(usize::MAX);
            let Some(entry) = words.get(index).map(words::load) else {
                break;
            };
            let here = start.wrapping_add(offset << item);
            offset += 1;
            if !F::is_present(entry) {
                continue;
            }
            if level != 0 && F::is_table(level, entry) {
                let below = self.table.table_words(F::table_address(entry));
                if below.is_empty() {
                    return Err(Error::Corrupt);
                }
                self.table_at(below, level - 1, here, part)?;
                continue;
            }
            let shift = F::leaf_shift(level, entry);
            let count = leaf_entries::<F>(level, shift);
            // The range may begin inside the leaf: its entries begin before `index` then.
            let first = index & !(count - 1);
            if !self.pieces.allow(here & !((1 << shift) - 1), shift) {
                let words = words.get(first..first + count).ok_or(Error::Corrupt)?;
                self.leaf(words, level, shift, here & !((1 << shift) - 1))?;
            }
            offset = (first + count) as u64;
        }
        Ok(())
    }

    /// Cuts the leaf of 2^`shift` bytes from `start` that takes `words` at `level`.
    fn leaf(
        &mut self,
        words: &[AtomicU64],
        level: u32,
        shift: u32,
        start: u64,
    ) -> Result<(), Error> {
        let entries = || words.iter().map(words::load);
        let said = entries().next().and_then(|entry| Said::by::<F>(level, entry, start));
        let said = said.ok_or(Error::Raced { at: Iova::new(start) })?;
        let record = entries().map(Record::of::<F>).fold(Record::default(), Record::or);
        let large = Large { words, level, shift, start, said, record };
        let tables = self.takes_tables(&large);
        let run = words.len() > 1;
        if (run && self.changes.runs == SizeChange::BreakBeforeMake)
            || (tables && self.changes.tables == SizeChange::BreakBeforeMake)
        {
            return Err(Error::BreakBeforeMake { at: Iova::new(start), size: 1 << shift });
        }
        let replaced = if run {
            // A draft of all entries, so that memory ends before the first of them is replaced.
            let pages = &self.table.pages;
            let bytes = table_bytes::<F>(0);
            let page = pages.alloc_uninit(bytes)?;
            let draft = self.table.table_words(page).get(..words.len()).ok_or(Error::Corrupt);
            let replaced = draft.and_then(|draft| self.replace(&large, draft));
            pages.free(page, bytes);
            replaced
        } else {
            self.replace(&large, core::slice::from_ref(&AtomicU64::new(0)))
        };
        replaced?;
        self.gather.add(start, 1 << shift);
        self.gather.add_leaf(shift);
        if tables {
            self.gather.add_table(level);
        }
        self.cut += 1;
        Ok(())
    }

    /// Whether some of the entries of the leaf are to lead to tables.
    fn takes_tables(&self, large: &Large<'_>) -> bool {
        let (mut start, mut room) = (large.start, 1u64 << large.shift);
        while room != 0 {
            let Some(shift) = self.pieces.at::<F>(large.level, start, room) else {
                return true;
            };
            start = start.wrapping_add(1 << shift);
            room -= 1 << shift;
        }
        false
    }

    /// Draws smaller leaves up in `draft` and puts them in the place of the large one.
    fn replace(&self, large: &Large<'_>, draft: &[AtomicU64]) -> Result<(), Error> {
        let level = large.level;
        let drawn = self.draw(draft, level, large.start, large.said, large.record);
        if let Err(error) = drawn {
            self.table.free_below(draft, level);
            return Err(error);
        }
        let mut record = large.record;
        for (index, (word, new)) in large.words.iter().zip(draft).enumerate() {
            if !self.exchange(large, index as u64, word, new, &mut record) {
                self.table.free_below(draft.get(index..).unwrap_or(&[]), level);
                return Err(Error::Raced { at: Iova::new(large.start) });
            }
        }
        if record != large.record {
            // Hardware has recorded something in one entry of the run when others were replaced.
            self.table.put_record(large.words, level, record);
        }
        Ok(())
    }

    /// Replaces `word`, the entry `items` into a large leaf, by its draft; gives whether it still
    /// was of that leaf. Adds what hardware has recorded in it to `record`, and that to the draft.
    fn exchange(
        &self,
        large: &Large<'_>,
        items: u64,
        word: &AtomicU64,
        draft: &AtomicU64,
        record: &mut Record,
    ) -> bool {
        let (table, level) = (self.table, large.level);
        let here = large.start.wrapping_add(items << item_shift::<F>(level));
        let expected = Some(large.said.further::<F>(level, items));
        loop {
            let old = words::load(word);
            if Said::by::<F>(level, old, here) != expected
                || F::leaf_shift(level, old) != large.shift
            {
                return false;
            }
            *record = record.or(Record::of::<F>(old));
            let mut new = words::load(draft);
            let leads_down = level != 0 && F::is_table(level, new);
            if leads_down {
                if *record != large.record {
                    let below = table.table_words(F::table_address(new));
                    table.put_record(below, level - 1, *record);
                }
                new &= !F::CLEAN_DONE;
            } else {
                new = record.put::<F>(level, new);
            }
            if words::exchange(word, old, new) {
                table.pages.clean(core::slice::from_ref(word));
                if leads_down && F::CLEAN_DONE != 0 {
                    words::update(word, |entry| Some(entry | F::CLEAN_DONE));
                }
                return true;
            }
        }
    }

    /// Fills `words`, entries at `level` that no hardware sees, with leaves as large as may be for
    /// the memory that `said` begins, and with tables of them. On an error, what is there can be
    /// freed as any table.
    fn draw(
        &self,
        words: &[AtomicU64],
        level: u32,
        start: u64,
        said: Said,
        record: Record,
    ) -> Result<(), Error> {
        let item = item_shift::<F>(level);
        let mut index = 0;
        while let Some(rest) = words.get(index..).filter(|rest| !rest.is_empty()) {
            let here = start.wrapping_add((index as u64) << item);
            let said = said.further::<F>(level, index as u64);
            let room = (rest.len() as u64) << item;
            if let Some(shift) = self.pieces.at::<F>(level, here, room) {
                let count = leaf_entries::<F>(level, shift);
                let leaf = said.leaf::<F>(level, shift, record);
                let step = F::replica_step(level, shift);
                words::fill(rest.get(..count).unwrap_or(rest), leaf, step);
                index += count;
                continue;
            }
            match (self.draw_table(level, here, said, record), rest.first()) {
                (Ok(entry), Some(word)) => words::store(word, entry),
                (result, _) => {
                    words::fill(rest, 0, 0);
                    return result.map(|_| ());
                }
            }
            index += 1;
        }
        Ok(())
    }

    /// A table below an entry of `level` for `start`; gives the entry.
    fn draw_table(&self, level: u32, start: u64, said: Said, record: Record) -> Result<u64, Error> {
        let pages = &self.table.pages;
        let bytes = table_bytes::<F>(0);
        // The smallest page size ends at both ends of the range, so tables of level 0 suffice.
        let below = level.checked_sub(1).ok_or(Error::Unsupported("page size"))?;
        let at = pages.alloc_uninit(bytes)?;
        let words = self.table.table_words(at);
        if let Err(error) = self.draw(words, below, start, said, record) {
            self.table.free_below(words, below);
            pages.free(at, bytes);
            return Err(error);
        }
        pages.clean(words);
        Ok(F::table(&self.table.options, level, at) | F::CLEAN_DONE)
    }
}
