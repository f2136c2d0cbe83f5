//! Joining: leaves that continue each other become the largest leaves that there are.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages, PhysAddr};

use crate::error::Error;
use crate::format::{Format, SizeChange, SizeChanges, item_shift, leaf_entries, table_bytes};
use crate::gather::Gather;
use crate::leaf::{Record, Said};
use crate::ledger::Displaced;
use crate::table::PageTable;
use crate::words;

/// What a join has done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Joined {
    /// Leaves that take the place of smaller ones now.
    pub leaves: usize,
    /// First byte of the first leaves that could have been joined but for
    /// [`SizeChange::BreakBeforeMake`].
    pub needs_break: Option<Iova>,
}

impl<F: Format, P: Pages> PageTable<F, P> {
    /// Joins leaves in the range that map consecutive memory with the same permissions and
    /// attributes into larger ones, the largest that format, page sizes and alignment allow. Only
    /// leaves that lie in the range, and make one that does, are looked at. Holes are passed over.
    ///
    /// Every byte translates as before at every moment. A joined leaf counts as written or used if
    /// one of its parts did. Tables whose place a leaf has taken go to `gather` and stay as they
    /// are, as hardware may go on using them, and recording in them, until `gather.range()` has
    /// been invalidated. Where hardware records writes, [`PageTable::settle`] comes between that
    /// and [`Gather::release`].
    ///
    /// Joins whose tables wait in one gather are of one page table. Walks of other threads are
    /// right until the release.
    ///
    /// Whether a full table becomes a leaf is decided table by table: sizes that span several
    /// tables are reached only where a leaf of the size that one of them spans may be.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Misaligned`], [`Error::Overflow`], [`Error::IovaOutOfRange`];
    /// [`Error::OutOfMemory`] when there is none to list displaced tables, [`Error::Raced`] and
    /// [`Error::Corrupt`]. What had been joined before stays so: `gather` says what to invalidate
    /// after an error too.
    pub fn join(&self, iova: Iova, len: u64, gather: &mut Gather) -> Result<Joined, Error> {
        let last = self.check_range(iova.get(), len)?;
        let root = self.root();
        let mut joiner = Joiner {
            table: self,
            gather,
            first: iova.get(),
            last,
            sizes: self.sizes_below(root.levels),
            changes: self.size_changes(),
            joined: Joined::default(),
        };
        if let Some(top) = root.levels.checked_sub(1) {
            let words = self.root_words(root);
            joiner.table_at(words, top, 0)?;
            joiner.runs(words, top, 0)?;
        }
        Ok(joiner.joined)
    }

    /// Takes over what hardware has recorded in tables that a [join](PageTable::join) of this page
    /// table has displaced, after they were. To be called when `gather.range()` has been
    /// invalidated and that has completed, before [`Gather::release`]; then no write goes
    /// unreported.
    pub fn settle(&self, gather: &Gather) {
        gather.each_displaced(&self.pages, |displaced| {
            let level = displaced.level - 1;
            let item = item_shift::<F>(level);
            let words = self.table_words(displaced.at);
            for (word, items) in words.iter().zip(0u64..) {
                let record = Record::of::<F>(words::load(word));
                if record != Record::default() {
                    let start = displaced.iova.wrapping_add(items << item);
                    self.put_record_between(start, start | ((1 << item) - 1), record);
                }
            }
        });
    }

    /// Puts `record` into the leaves of a range that lies in one item of some level.
    fn put_record_between(&self, first: u64, last: u64, record: Record) {
        let root = self.root();
        let mut words = self.root_words(root);
        for level in (0..root.levels).rev() {
            let index = self.index(root, level, first);
            let others = (last - first) >> item_shift::<F>(level);
            let count = usize::try_from(others).map_or(0, |others| others + 1);
            let Some(slots) = words.get(index..).and_then(|rest| rest.get(..count)) else {
                return;
            };
            let entry = slots.first().map_or(0, words::load);
            let leads_down = level != 0 && F::is_present(entry) && F::is_table(level, entry);
            if count > 1 || !leads_down {
                return self.put_record(slots, level, record);
            }
            words = self.table_words(F::table_address(entry));
        }
    }
}

/// A join in progress.
struct Joiner<'a, F: Format, P: Pages> {
    table: &'a PageTable<F, P>,
    gather: &'a mut Gather,
    first: u64,
    last: u64,
    sizes: u64,
    changes: SizeChanges,
    joined: Joined,
}

/// Leaves that continue each other.
struct Parts {
    /// What the first one begins with.
    said: Said,
    record: Record,
    /// Their sizes: bit n for 2^n bytes.
    sizes: u64,
}

impl<F: Format, P: Pages> Joiner<'_, F, P> {
    /// Joins what of the range lies in tables below one of `level` whose first entry is for
    /// `start`.
    fn table_at(&mut self, words: &[AtomicU64], level: u32, start: u64) -> Result<(), Error> {
        if level == 0 {
            return Ok(());
        }
        let item = item_shift::<F>(level);
        let first = self.first.saturating_sub(start) >> item;
        let last = (self.last - start) >> item;
        for offset in first..=last {
            let Some(word) = usize::try_from(offset).ok().and_then(|index| words.get(index)) else {
                break;
            };
            let entry = words::load(word);
            if !F::is_present(entry) || !F::is_table(level, entry) {
                continue;
            }
            let here = start.wrapping_add(offset << item);
            let at = F::table_address(entry);
            let below = self.table.table_words(at);
            if below.is_empty() {
                return Err(Error::Corrupt);
            }
            self.table_at(below, level - 1, here)?;
            if !self.displace(word, at, level, here)? {
                self.runs(below, level - 1, here)?;
            }
        }
        Ok(())
    }

    /// Puts a leaf into `word`, an entry at `level` for `start`, in the place of the table `at`
    /// if that is full of its parts. Gives whether it did.
    fn displace(
        &mut self,
        word: &AtomicU64,
        at: PhysAddr,
        level: u32,
        start: u64,
    ) -> Result<bool, Error> {
        let shift = item_shift::<F>(level);
        if !self.may_be(shift, start) {
            return Ok(false);
        }
        let below = self.table.table_words(at);
        let Some(parts) = parts::<F>(below, level - 1, start, shift) else {
            return Ok(false);
        };
        if self.changes.tables == SizeChange::BreakBeforeMake {
            self.joined.needs_break.get_or_insert(Iova::new(start));
            return Ok(false);
        }
        let pages = &self.table.pages;
        self.gather.make_room(pages)?;
        let leaf = parts.said.leaf::<F>(level, shift, parts.record);
        loop {
            // Hardware may record in it that it was used; another thread may have cleaned it.
            let entry = words::load(word);
            let leads_down = F::is_present(entry) && F::is_table(level, entry);
            if !leads_down || F::table_address(entry) != at {
                return Err(Error::Raced { at: Iova::new(start) });
            }
            if words::exchange(word, entry, leaf) {
                break;
            }
        }
        pages.clean(core::slice::from_ref(word));
        let displaced = Displaced { at, bytes: table_bytes::<F>(0), level, iova: start };
        self.gather.displace(pages, &displaced);
        self.done(start, shift, parts.sizes);
        Ok(true)
    }

    /// Joins leaves in `words`, a table at `level` whose first entry is for `start`, into
    /// contiguous runs.
    fn runs(&mut self, words: &[AtomicU64], level: u32, start: u64) -> Result<(), Error> {
        let item = item_shift::<F>(level);
        let mut sizes = self.sizes & F::leaf_sizes(level) & !((2 << item) - 1);
        while sizes != 0 {
            let shift = sizes.ilog2();
            sizes &= !(1 << shift);
            let mut next = self.first.max(start).checked_next_multiple_of(1 << shift);
            while let Some(here) = next.filter(|&here| self.may_be(shift, here)) {
                let index = usize::try_from((here - start) >> item).unwrap_or(usize::MAX);
                let count = leaf_entries::<F>(level, shift);
                let slots = words.get(index..).and_then(|rest| rest.get(..count));
                let Some(slots) = slots else {
                    break;
                };
                self.run(slots, level, shift, here)?;
                next = here.checked_add(1 << shift);
            }
        }
        Ok(())
    }

    /// Makes `words` one leaf of 2^`shift` bytes if they are its parts.
    fn run(
        &mut self,
        words: &[AtomicU64],
        level: u32,
        shift: u32,
        start: u64,
    ) -> Result<(), Error> {
        let Some(Parts { said, mut record, sizes }) = parts::<F>(words, level, start, shift) else {
            return Ok(());
        };
        if sizes >> shift != 0 {
            return Ok(());
        }
        if self.changes.runs == SizeChange::BreakBeforeMake {
            self.joined.needs_break.get_or_insert(Iova::new(start));
            return Ok(());
        }
        let item = item_shift::<F>(level);
        let leaf = said.leaf::<F>(level, shift, Record::default());
        for (word, items) in words.iter().zip(0u64..) {
            let here = start.wrapping_add(items << item);
            let expected = Some(said.further::<F>(level, items));
            let new = leaf.wrapping_add(F::replica_step(level, shift).wrapping_mul(items));
            loop {
                let old = words::load(word);
                if Said::by::<F>(level, old, here) != expected {
                    return Err(Error::Raced { at: Iova::new(here) });
                }
                record = record.or(Record::of::<F>(old));
                if words::exchange(word, old, record.put::<F>(level, new)) {
                    break;
                }
            }
        }
        self.table.pages.clean(words);
        self.done(start, shift, sizes);
        Ok(())
    }

    /// Whether a leaf of 2^`shift` bytes from `start` is in the range and of a size in use.
    const fn may_be(&self, shift: u32, start: u64) -> bool {
        let inside = self.first <= start && start <= self.last;
        inside && self.last - start >= (1 << shift) - 1 && self.sizes >> shift & 1 != 0
    }

    fn done(&mut self, start: u64, shift: u32, sizes: u64) {
        self.gather.add(start, 1 << shift);
        for part in (0..64).filter(|part| sizes >> part & 1 != 0) {
            self.gather.add_leaf(part);
        }
        self.joined.leaves += 1;
    }
}

/// What `words`, entries at `level` for all bytes of a leaf of 2^`shift` bytes from `start`, are if
/// they are leaves that continue each other and could be that leaf.
fn parts<F: Format>(words: &[AtomicU64], level: u32, start: u64, shift: u32) -> Option<Parts> {
    let item = item_shift::<F>(level);
    let said = Said::by::<F>(level, words::load(words.first()?), start)?;
    let mut parts = Parts { said, record: Record::default(), sizes: 0 };
    if said.phys & ((1 << shift) - 1) != 0 {
        return None;
    }
    for (word, items) in words.iter().zip(0u64..) {
        let entry = words::load(word);
        let here = start.wrapping_add(items << item);
        if Said::by::<F>(level, entry, here) != Some(said.further::<F>(level, items)) {
            return None;
        }
        parts.record = parts.record.or(Record::of::<F>(entry));
        parts.sizes |= 1 << F::leaf_shift(level, entry);
    }
    Some(parts)
}
