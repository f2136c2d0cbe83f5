//! What a page-table format is: where its bits lie, as constants and functions that fold.
//!
//! The walker in [`crate::PageTable`] is compiled once per format, so a shift or a mask that a
//! format states becomes a constant of the code. A format never reaches memory.
//!
//! Levels count from 0, the tables whose entries map single granules, upwards. AMD and VT-d call
//! that level 1; Arm counts downwards from the root.

use core::fmt;

use lychgate_types::{PhysAddr, Prot};

mod amd_v1;
mod arm_lpae;
mod riscv;
mod vtd_second_stage;
mod x86_64;

pub use amd_v1::{AmdV1, AmdV1Options};
pub use arm_lpae::{ARM_MAIR, ArmLpae, ArmOptions, ArmStage1, ArmStage2};
pub use riscv::{Riscv, RiscvFirstStage, RiscvOptions, RiscvSecondStage};
pub use vtd_second_stage::{VtdSecondStage, VtdSecondStageOptions};
pub use x86_64::{X86_64, X86_64Options};

/// Levels of the deepest format (AMD v1, Mode 6).
pub const LEVELS_LIMIT: usize = 6;

/// How the size of a page may change while hardware translates through it, and nothing else of it
/// changes: the same memory, permissions and attributes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SizeChange {
    /// Entry by entry, each by one store. Hardware uses the old size or the new one until it has
    /// been told to forget the old one, and either leads to the same place.
    InPlace,
    /// Only by break-before-make: unmap, invalidate, wait, map anew. Accesses fault in between, so
    /// it is the owner of the devices who must do it.
    BreakBeforeMake,
}

/// What a format says of each kind of [`SizeChange`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct SizeChanges {
    /// An entry that is a leaf comes to lead to a table of smaller leaves, or the other way round.
    pub tables: SizeChange,
    /// The entries of a contiguous run become smaller leaves in the same table, or the other way
    /// round.
    pub runs: SizeChange,
}

impl SizeChanges {
    /// Everything in place.
    pub const IN_PLACE: Self = Self { tables: SizeChange::InPlace, runs: SizeChange::InPlace };

    /// Nothing in place.
    pub const BREAK_BEFORE_MAKE: Self =
        Self { tables: SizeChange::BreakBeforeMake, runs: SizeChange::BreakBeforeMake };
}

/// The facts of one page-table format.
///
/// Entries are passed in the host's byte order; the walker converts. An entry of 0 is not present
/// in every format, and an entry is not present when its bits 5:0 are clear: the walker
/// relies on the first to clear entries, on the second to link dead tables through their word 0.
///
/// A *leaf* maps a page. Its size may be greater than what one entry of its level spans: then the
/// page is a *contiguous run* of entries in one table, whose first is [`Format::leaf`] and in which
/// each next one differs by [`Format::replica_step`].
pub trait Format: Send + Sync + 'static {
    /// Choices that software makes once per table and that change entries: forced coherence,
    /// shareability, quirks.
    type Options: Copy + fmt::Debug + Send + Sync;

    /// Name, as Linux's generic_pt or io-pgtable spells it.
    const NAME: &'static str;

    /// log2 of the smallest page in bytes.
    const GRANULE_SHIFT: u32;

    /// IOVA bits that one level decodes; a table below the root has 2^`INDEX_BITS` entries.
    const INDEX_BITS: u32;

    /// Greatest number of levels, at most [`LEVELS_LIMIT`].
    const MAX_LEVELS: u32;

    /// IOVA bits that a root may decode beyond `INDEX_BITS`, for concatenated roots (Arm stage 2,
    /// RISC-V x4): the root is then one naturally aligned block of tables.
    const ROOT_EXTRA_BITS: u32 = 0;

    /// Fewest levels that hardware can be told to walk.
    const MIN_LEVELS: u32 = 1;

    /// IOVA bits that every root decodes beyond `INDEX_BITS`: 0 unless wide roots are the rule
    /// (RISC-V x4).
    const MIN_ROOT_EXTRA_BITS: u32 = 0;

    /// Whether hardware wants the IOVA bits above a root's reach to equal the highest one that it
    /// decodes. Apertures then end in the middle of the reach, below the IOVAs of which that bit is
    /// set.
    const SIGN_EXTENDS: bool = false;

    /// Greatest width of an IOVA in bits.
    const MAX_IOVA_BITS: u32;

    /// Greatest width of a physical address in bits.
    const MAX_OUTPUT_BITS: u32;

    /// Whether hardware takes root and level count together, so that a level can be put on top of
    /// a table in use.
    const GROWS: bool = false;

    /// Physical addresses whose bits from here up are equal differ in their entries by
    /// [`Format::address`] of their difference. Below 64 where the address field is not in one
    /// piece (Arm, 64 KiB granule, 52 bits).
    const LINEAR_BITS: u32 = 64;

    /// A bit of table entries that hardware ignores, set by software once the entry has been
    /// cleaned from the caches; 0 where hardware always snoops. Without it a thread could
    /// rely on a table whose entry another thread has stored but not cleaned.
    const CLEAN_DONE: u64 = 0;

    /// Whether hardware can record writes in the entries.
    const TRACKS_DIRTY: bool = false;

    /// The bit of a leaf in which hardware records that it has used it; 0 for none.
    const ACCESSED: u64 = 0;

    /// Page sizes whose leaves lie at `level`: bit n for 2^n bytes. Contiguous runs included.
    fn leaf_sizes(level: u32) -> u64;

    /// The bits of a leaf that depend on permissions and options alone; `None` when the format
    /// cannot express them.
    fn attributes(options: &Self::Options, prot: Prot) -> Option<u64>;

    /// The permissions of a leaf.
    fn prot(level: u32, entry: u64) -> Prot;

    /// The address field of an entry.
    fn address(phys: PhysAddr) -> u64;

    /// The first entry of a leaf of 2^`shift` bytes at `level`, where `phys` is a multiple of its
    /// size and `attributes` is what [`Format::attributes`] gave.
    fn leaf(level: u32, shift: u32, phys: PhysAddr, attributes: u64) -> u64;

    /// By how much each next entry of a contiguous run of 2^`shift` bytes at `level` differs.
    fn replica_step(level: u32, shift: u32) -> u64 {
        let _ = (level, shift);
        0
    }

    /// An entry at `level` that leads to the table `phys` at `level - 1`.
    fn table(options: &Self::Options, level: u32, phys: PhysAddr) -> u64;

    /// Whether hardware looks at the entry at all.
    fn is_present(entry: u64) -> bool;

    /// Whether a present entry at `level` leads to a table.
    fn is_table(level: u32, entry: u64) -> bool;

    /// Whether an entry at `level` is present and leads to a table: true of every entry that
    /// [`Format::table`] gives, and of no other than those that are both. For formats in
    /// which this takes fewer steps.
    fn is_plain_table(level: u32, entry: u64) -> bool {
        Self::is_present(entry) && Self::is_table(level, entry)
    }

    /// Where a table entry leads.
    fn table_address(entry: u64) -> PhysAddr;

    /// log2 of the size of a present leaf at `level`, at most 63 whatever the entry.
    fn leaf_shift(level: u32, entry: u64) -> u32;

    /// First byte of the page that a present leaf at `level` maps.
    fn leaf_address(level: u32, entry: u64) -> PhysAddr;

    /// A mask and a value. An entry whose masked bits equal the value is a present leaf of exactly
    /// the size that one entry of `level` spans. Others may be too: the walker looks at
    /// those one by one.
    fn plain_leaf(level: u32) -> (u64, u64);

    /// Whether hardware has recorded a write in this entry of a leaf.
    fn is_dirty(entry: u64) -> bool {
        let _ = entry;
        false
    }

    /// What to replace an entry by that [`Format::is_dirty`], for the next write to be recorded.
    fn make_clean(entry: u64) -> u64 {
        entry
    }

    /// What a leaf that could be written is once hardware has recorded a write in it.
    fn make_dirty(entry: u64) -> u64 {
        entry
    }

    /// How the sizes of leaves may change under hardware that translates through them.
    fn size_changes(options: &Self::Options) -> SizeChanges {
        let _ = options;
        SizeChanges::BREAK_BEFORE_MAKE
    }
}

/// The level whose entries hold leaves of 2^`shift` bytes.
#[inline(always)]
pub(crate) const fn leaf_level<F: Format>(shift: u32) -> u32 {
    (shift - F::GRANULE_SHIFT) / F::INDEX_BITS
}

/// log2 of the bytes that one entry of `level` spans.
pub(crate) const fn item_shift<F: Format>(level: u32) -> u32 {
    F::GRANULE_SHIFT + F::INDEX_BITS * level
}

/// log2 of the bytes that one table of `level`, not a root, spans; may exceed 63.
pub(crate) const fn span_shift<F: Format>(level: u32) -> u32 {
    item_shift::<F>(level + 1)
}

/// Entries that a leaf of 2^`shift` bytes takes at `level`; never more than a table has.
#[inline(always)]
pub(crate) const fn leaf_entries<F: Format>(level: u32, shift: u32) -> usize {
    let bits = shift.saturating_sub(item_shift::<F>(level));
    if bits > F::INDEX_BITS {
        return table_entries::<F>();
    }
    1 << bits
}

/// Entries of a table below the root.
pub(crate) const fn table_entries<F: Format>() -> usize {
    1 << F::INDEX_BITS
}

/// Bytes to allocate for a table whose root is `extra` bits wider than others.
pub(crate) const fn table_bytes<F: Format>(extra: u32) -> u64 {
    let bytes = 8 << (F::INDEX_BITS + extra);
    if bytes < 4096 { 4096 } else { bytes }
}
