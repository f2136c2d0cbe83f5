//! What the entries of leaves say beyond where they lead, and what hardware has recorded in them,
//! for those who replace leaves by leaves of another size.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Pages, PhysAddr, Prot};

use crate::format::{Format, item_shift};
use crate::table::PageTable;
use crate::words;

/// What hardware has recorded in entries of leaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Record {
    dirty: bool,
    accessed: bool,
}

impl Record {
    /// What `entry`, of a present leaf, holds.
    pub(crate) fn of<F: Format>(entry: u64) -> Self {
        Self { dirty: F::is_dirty(entry), accessed: entry & F::ACCESSED != 0 }
    }

    /// What either of two holds.
    pub(crate) const fn or(self, other: Self) -> Self {
        Self { dirty: self.dirty || other.dirty, accessed: self.accessed || other.accessed }
    }

    /// `entry`, of a leaf at `level`, with this in it as well: a write only where it can be
    /// written.
    pub(crate) fn put<F: Format>(self, level: u32, entry: u64) -> u64 {
        let written =
            self.dirty && !F::is_dirty(entry) && F::prot(level, entry).contains(Prot::WRITE);
        let entry = if written { F::make_dirty(entry) } else { entry };
        if self.accessed { entry | F::ACCESSED } else { entry }
    }
}

/// What one entry of a leaf says of the bytes that it spans.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Said {
    /// Where the first of these bytes is, not of the whole leaf's.
    pub(crate) phys: u64,
    /// What [`Format::leaf`] makes a leaf of any size from that is the same but for what hardware
    /// records.
    pub(crate) attributes: u64,
}

impl Said {
    /// Reads `entry` at `level`, which begins at `iova`; `None` when it is no leaf.
    pub(crate) fn by<F: Format>(level: u32, entry: u64, iova: u64) -> Option<Self> {
        if !F::is_present(entry) || (level != 0 && F::is_table(level, entry)) {
            return None;
        }
        let shift = F::leaf_shift(level, entry);
        let within = iova & ((1 << shift) - 1);
        let start = F::leaf_address(level, entry);
        // What depends on address and size is known by what `leaf` makes of them alone.
        let highest = u64::MAX >> (64 - F::MAX_OUTPUT_BITS);
        let address = F::address(PhysAddr::new(highest));
        let size = F::leaf(level, shift, PhysAddr::new(0), 0);
        let attributes = F::make_clean(entry) & !(address | size | F::ACCESSED);
        Some(Self { phys: start.get().wrapping_add(within), attributes })
    }

    /// The same for the entry `items` further on at `level`.
    pub(crate) const fn further<F: Format>(self, level: u32, items: u64) -> Self {
        Self { phys: self.phys.wrapping_add(items << item_shift::<F>(level)), ..self }
    }

    /// The first entry of the leaf of 2^`shift` bytes at `level` that begins here.
    pub(crate) fn leaf<F: Format>(self, level: u32, shift: u32, record: Record) -> u64 {
        let phys = PhysAddr::new(self.phys);
        record.put::<F>(level, F::leaf(level, shift, phys, self.attributes))
    }
}

impl<F: Format, P: Pages> PageTable<F, P> {
    /// Puts `record` into all leaves of `words`, entries at `level`, and below.
    pub(crate) fn put_record(&self, words: &[AtomicU64], level: u32, record: Record) {
        for word in words {
            let entry = words::load(word);
            if !F::is_present(entry) {
                continue;
            }
            if level != 0 && F::is_table(level, entry) {
                let below = self.table_words(F::table_address(entry));
                self.put_record(below, level - 1, record);
                continue;
            }
            let put = |entry| {
                let new = record.put::<F>(level, entry);
                (new != entry).then_some(new)
            };
            if words::update(word, put) {
                self.pages.clean(core::slice::from_ref(word));
            }
        }
    }
}
