//! What a change of the tables leaves to do: caches to invalidate, tables to free afterwards.

use core::fmt;
use core::ops::RangeInclusive;
use core::sync::atomic::Ordering;

use lychgate_types::{Iova, OutOfMemory, Pages, PhysAddr};

use crate::ledger::{Displaced, Ledger};

/// Collects what changes of one or more page tables ask for (`struct iommu_iotlb_gather`).
///
/// A gather that is not [empty](Self::is_empty) must be followed by an invalidation of
/// [`range`](Self::range), which also drops cached table entries if
/// [`removed_tables`](Self::removed_tables) (AMD: PDE=1); only when that has completed, by
/// [`release`](Self::release). Dropping a gather instead leaks the tables in it.
///
/// Until the invalidation hardware may go on using what was unmapped: a table that lost all of
/// its range keeps its leaves, so a cached entry that leads to it still translates. That is what
/// a stale IOTLB entry does too, and the same invalidation ends both.
///
/// A table in whose place [`PageTable::join`](crate::PageTable::join) has put a leaf stays as it is
/// altogether, as the range goes on being used. Such tables are listed in pages of their own, which
/// go with them.
///
/// Collecting others needs no memory: dead tables are chained through their own word 0. Bits 57:12
/// hold the address of the next one, bits 63:58 log2 of its size; the bits below 12, where formats
/// keep "present", "accessed" and "dirty", are clear and not relied on, as hardware may still set
/// the latter.
#[must_use = "tables in it are freed by `release` alone"]
pub struct Gather {
    /// The complement of the first byte, so that an empty gather is all zeros.
    not_first: u64,
    /// The last byte, never 0 when there is one.
    last: u64,
    leaf_sizes: u64,
    table_levels: u8,
    dead: u64,
    dead_count: usize,
    displaced: Ledger,
}

const ADDRESS: u64 = 0x03ff_ffff_ffff_f000;
const SIZE_SHIFT: u32 = 58;

impl Gather {
    /// Nothing to do.
    pub const fn new() -> Self {
        Self {
            not_first: 0,
            last: 0,
            leaf_sizes: 0,
            table_levels: 0,
            dead: 0,
            dead_count: 0,
            displaced: Ledger::new(),
        }
    }

    /// Whether there is nothing to invalidate and nothing to free.
    pub const fn is_empty(&self) -> bool {
        self.last | self.dead == 0 && self.displaced.is_empty()
    }

    /// The smallest range that covers every change, both ends included; `None` when there was none.
    pub fn range(&self) -> Option<RangeInclusive<Iova>> {
        (self.last != 0).then(|| Iova::new(!self.not_first)..=Iova::new(self.last))
    }

    /// Whether tables were taken out or put in the place of leaves, so that hardware must also
    /// forget entries that lead to tables.
    pub const fn removed_tables(&self) -> bool {
        self.table_levels != 0
    }

    /// Levels whose entries led to tables that were taken out, or lead to tables where leaves were:
    /// bit n for level n, 0 being the level of granules. For architectures whose commands name a
    /// level (Arm TTL, RISC-V).
    pub const fn table_levels(&self) -> u8 {
        self.table_levels
    }

    /// Sizes of the leaves that were changed: bit n for 2^n bytes.
    pub const fn leaf_sizes(&self) -> u64 {
        self.leaf_sizes
    }

    /// Tables that wait to be freed.
    pub const fn dead_tables(&self) -> usize {
        self.dead_count
    }

    /// Gives the dead tables back to `pages`, which they came from, and makes the gather
    /// empty. The caller has invalidated as [`Gather`] says and waited for completion.
    #[inline]
    pub fn release<P: Pages + ?Sized>(&mut self, pages: &P) {
        if self.dead != 0 || !self.displaced.is_empty() {
            self.free_dead(pages);
        }
        *self = Self::new();
    }

    #[inline(never)]
    fn free_dead<P: Pages + ?Sized>(&mut self, pages: &P) {
        let mut link = self.dead;
        while link != 0 {
            let at = PhysAddr::new(link & ADDRESS);
            let bytes = 1 << (link >> SIZE_SHIFT);
            let Some(word) = pages.words(at, 1).first() else {
                break;
            };
            link = u64::from_le(word.load(Ordering::Relaxed));
            pages.free(at, bytes);
        }
        self.displaced.release(pages);
    }

    /// Records that `len` bytes from `iova`, at least two, changed.
    pub(crate) const fn add(&mut self, iova: u64, len: u64) {
        if !iova > self.not_first {
            self.not_first = !iova;
        }
        let last = iova.wrapping_add(len.wrapping_sub(1));
        if last > self.last {
            self.last = last;
        }
    }

    /// Records leaves of 2^`shift` bytes.
    pub(crate) const fn add_leaf(&mut self, shift: u32) {
        self.leaf_sizes |= 1 << (shift & 63);
    }

    /// Records that an entry at `level` has come to lead to a table.
    pub(crate) const fn add_table(&mut self, level: u32) {
        self.table_levels |= 1 << level;
    }

    /// Makes sure that there is room for one more table that is displaced.
    pub(crate) fn make_room<P: Pages>(&mut self, pages: &P) -> Result<(), OutOfMemory> {
        self.displaced.make_room(pages)
    }

    /// Takes a table that something else has taken the place of, which translates alike. It stays
    /// as it is. The caller has made room.
    pub(crate) fn displace<P: Pages>(&mut self, pages: &P, table: &Displaced) {
        self.table_levels |= 1 << table.level;
        self.displaced.push(pages, table);
        self.dead_count += 1;
    }

    /// Tells `f` of the tables that were displaced.
    pub(crate) fn each_displaced<P: Pages>(&self, pages: &P, f: impl FnMut(Displaced)) {
        self.displaced.each(pages, f);
    }

    /// Records leaves of all of `sizes`, bit n for 2^n bytes.
    pub(crate) const fn add_leaves(&mut self, sizes: u64) {
        self.leaf_sizes |= sizes;
    }

    /// Takes a table out of which an entry at `level` led. Its word 0 is overwritten.
    pub(crate) fn bury<P: Pages>(&mut self, pages: &P, table: PhysAddr, bytes: u64, level: u32) {
        self.table_levels |= 1 << level;
        let Some(word) = pages.words(table, 1).first() else {
            return;
        };
        word.store(self.dead.to_le(), Ordering::Relaxed);
        let size = u64::from(bytes.trailing_zeros());
        self.dead = (table.get() & ADDRESS) | size << SIZE_SHIFT;
        self.dead_count += 1;
    }
}

impl Default for Gather {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Gather {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gather")
            .field("range", &self.range())
            .field("table_levels", &format_args!("{:#b}", self.table_levels))
            .field("leaf_sizes", &format_args!("{:#x}", self.leaf_sizes))
            .field("dead_tables", &self.dead_count)
            .finish()
    }
}
