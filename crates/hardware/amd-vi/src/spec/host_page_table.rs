//! Entries of the host (version 1) page table (AMD 48882 2.2.3 Tables 14 to 18).
//!
//! A table is 4 KiB: 512 entries of 8 bytes. Level n (1 to 6) indexes IOVA bits
//! `12 + 9n - 1 : 12 + 9(n - 1)`; level 6 uses 7 of them, up to bit 63.

use super::fields::{fields, mask};
use super::size::Block;
use lychgate_types::PhysAddr;

/// Entries of a table.
pub const ENTRIES: u64 = 512;
/// [`Entry::next_level`] of a page of the level's default size.
pub const NEXT_LEVEL_PAGE: u64 = 0;
/// [`Entry::next_level`] of a page whose size the address field encodes.
pub const NEXT_LEVEL_SIZED_PAGE: u64 = 7;

/// Reserved bits of a page entry (58:52; 58:57 are PMC where TMPM is supported).
pub const PTE_RESERVED: u64 = mask(58, 52);
/// Reserved bits of a directory entry.
pub const PDE_RESERVED: u64 = mask(60, 52);

/// One entry: a PTE where NextLevel is 0 or 7, else a PDE.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Entry(pub [u64; 1]);

const ADDRESS: u64 = mask(51, 12);

fields! { Entry {
    /// PR: present. 0: every other bit is ignored.
    pr, with_pr: 0[0];
    /// A: accessed.
    a, with_a: 0[5];
    /// D: dirty; in a PTE only.
    d, with_d: 0[6];
    /// NextLevel: [`NEXT_LEVEL_PAGE`], [`NEXT_LEVEL_SIZED_PAGE`], or the level of the next table.
    next_level, with_next_level: 0[11:9];
    /// U: the ATS answer says "untranslated only"; in a PTE only.
    u, with_u: 0[59];
    /// FC: accesses are forced coherent; in a PTE only.
    fc, with_fc: 0[60];
    /// IR: reads are allowed.
    ir, with_ir: 0[61];
    /// IW: writes are allowed.
    iw, with_iw: 0[62];
} }

impl Entry {
    /// Address field, bits 51:12: a table, a page, or for NextLevel 7 a page with its size.
    pub const fn address(self) -> PhysAddr {
        PhysAddr::new(self.0[0] & ADDRESS)
    }

    /// `self` with bits 51:12 of `address` as the address field.
    #[must_use]
    pub const fn with_address(mut self, address: PhysAddr) -> Self {
        self.0[0] = self.0[0] & !ADDRESS | address.get() & ADDRESS;
        self
    }

    /// The page that a NextLevel 7 entry names: 2^(p+1) bytes, p the lowest zero bit of the
    /// address field at or above 12. Whether the size fits the level is for the reader to check.
    pub const fn sized_page(self) -> Block {
        Block::decode(self.0[0] & ADDRESS, true)
    }
}

/// log2 of the default page size of `level` (1 to 6): 12, 21, 30, 39, 48, 57.
pub const fn level_shift(level: u32) -> u32 {
    3 + 9 * level
}

/// IOVA bits that a table of `levels` (1 to 6) reaches: 21, 30, 39, 48, 57, 64.
pub const fn reach(levels: u32) -> u32 {
    if levels >= 6 { 64 } else { 12 + 9 * levels }
}
