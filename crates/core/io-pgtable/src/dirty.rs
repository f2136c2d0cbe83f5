//! Dirty tracking: which pages hardware has recorded writes to.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages};

use crate::error::Error;
use crate::format::{Format, item_shift, leaf_entries};
use crate::gather::Gather;
use crate::table::PageTable;
use crate::words;

/// What to do with a record of a write once it has been read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Dirty {
    /// Forget it: the next write is recorded anew, once `gather.range()` has been invalidated.
    Clear,
    /// Leave it (`IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`).
    Keep,
}

impl<F: Format, P: Pages> PageTable<F, P> {
    /// Tells `record` the first byte and the size of every leaf that intersects the range and
    /// that hardware has recorded a write to (`read_and_clear_dirty`). Holes are passed over.
    /// A leaf is told whole, and made clean whole, even if the range covers a part of it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the format has no such record; [`Error::Empty`],
    /// [`Error::Misaligned`], [`Error::Overflow`], [`Error::IovaOutOfRange`].
    pub fn read_dirty(
        &self,
        iova: Iova,
        len: u64,
        then: Dirty,
        gather: &mut Gather,
        record: &mut dyn FnMut(Iova, u64),
    ) -> Result<(), Error> {
        if !F::TRACKS_DIRTY {
            return Err(Error::Unsupported("dirty tracking"));
        }
        let last = self.check_range(iova.get(), len)?;
        let root = self.root();
        let mut scan = Scan {
            table: self,
            first: iova.get(),
            last,
            clear: then == Dirty::Clear,
            gather,
            record,
        };
        let top = root.levels.saturating_sub(1);
        scan.table_at(self.root_words(root), top, 0);
        Ok(())
    }
}

struct Scan<'a, F: Format, P: Pages> {
    table: &'a PageTable<F, P>,
    first: u64,
    last: u64,
    clear: bool,
    gather: &'a mut Gather,
    record: &'a mut dyn FnMut(Iova, u64),
}

impl<F: Format, P: Pages> Scan<'_, F, P> {
    /// Looks at what of the range lies in a table of `level` whose first entry is for `start`.
    fn table_at(&mut self, words: &[AtomicU64], level: u32, start: u64) {
        let item = item_shift::<F>(level);
        let from = usize::try_from(self.first.saturating_sub(start) >> item).unwrap_or(usize::MAX);
        let mut index = from;
        while let Some(rest) = words.get(index..).filter(|rest| !rest.is_empty()) {
            let here = start.wrapping_add((index as u64) << item);
            if here > self.last || (index != 0 && here < start) {
                break;
            }
            let entry = rest.first().map_or(0, words::load);
            index += 1;
            if !F::is_present(entry) {
                continue;
            }
            if level != 0 && F::is_table(level, entry) {
                let below = self.table.table_words(F::table_address(entry));
                self.table_at(below, level - 1, here);
                continue;
            }
            let shift = F::leaf_shift(level, entry);
            let copies = leaf_entries::<F>(level, shift);
            // The range may begin inside the leaf: its copies begin before `index` then.
            let first = (index - 1) & !(copies - 1);
            if let Some(slots) = words.get(first..first + copies) {
                self.leaf(slots, here & !((1u64 << shift) - 1), shift);
            }
            index = first + copies;
        }
    }

    /// Looks at the copies of one leaf: hardware records a write in the copy that it read.
    fn leaf(&mut self, copies: &[AtomicU64], start: u64, shift: u32) {
        let mut dirty = false;
        for word in copies {
            if !self.clear {
                dirty |= F::is_dirty(words::load(word));
            } else if words::update(word, |entry| F::is_dirty(entry).then(|| F::make_clean(entry)))
            {
                self.table.pages.clean(core::slice::from_ref(word));
                dirty = true;
            }
        }
        if dirty {
            if self.clear {
                self.gather.add(start, 1 << shift);
                self.gather.add_leaf(shift);
            }
            (self.record)(Iova::new(start), 1 << shift);
        }
    }
}
