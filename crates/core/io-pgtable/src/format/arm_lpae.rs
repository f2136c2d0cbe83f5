//! Arm VMSAv8-64 page tables (DDI 0487 D8.3), as SMMUv3 walks them.

use lychgate_types::{PhysAddr, Prot};

use super::{Format, SizeChange, SizeChanges};

/// Arm tables of stage 1 or 2 with granules of 4 KiB (`GRANULE_SHIFT` 12), 16 KiB (14) or 64 KiB
/// (16).
///
/// `WIDE` is the descriptor layout for addresses of 52 bits: FEAT_LPA with 64 KiB granules,
/// FEAT_LPA2 (CD.DS, STE.S2DS) with the others. Other tables take 48 bits.
///
/// Levels count from 0 at the granules: Arm's level 3 is level 0 here, its level -1 is level 4.
///
/// Leaves of several entries have the Contiguous hint; leave them out of
/// [`Config::page_sizes`](crate::Config::page_sizes) to do without. The root of stage 2 may be
/// up to 16 concatenated tables ([`Config::concatenated`](crate::Config::concatenated)), and must
/// be where hardware takes no higher start level (4 KiB granules with 40 or 42 bits, 16 KiB with
/// 40 or 48).
///
/// A large leaf that takes the place of empty tables is stored over the entry that led to them,
/// which is what IDR3.BBML 2 allows. With less, keep
/// [`Config::page_sizes`](crate::Config::page_sizes) to those of level 0: they never replace
/// tables.
///
/// Stage 1 cannot forbid reads: write-only mappings are readable too, and no access at all has no
/// encoding. Stage 2 does not know privilege.
#[derive(Clone, Copy, Debug)]
pub struct ArmLpae<const STAGE: u32, const GRANULE_SHIFT: u32, const WIDE: bool>;

/// Stage 1. The attribute index is into [`ARM_MAIR`].
pub type ArmStage1<const GRANULE_SHIFT: u32 = 12, const WIDE: bool = false> =
    ArmLpae<1, GRANULE_SHIFT, WIDE>;

/// Stage 2.
pub type ArmStage2<const GRANULE_SHIFT: u32 = 12, const WIDE: bool = false> =
    ArmLpae<2, GRANULE_SHIFT, WIDE>;

/// What CD.MAIR must be for stage 1 tables: Normal non-cacheable, Normal write-back
/// read- and write-allocate, Device-nGnRE.
pub const ARM_MAIR: u64 = 0x04_ff_44;

/// Software's choices for [`ArmLpae`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ArmOptions {
    /// Make new writable leaves writable-clean by DBM, so that the first write is recorded:
    /// hardware must update entries then (CD.HD, STE.S2HD). Otherwise they can be written at once,
    /// no write is ever recorded, and dirty tracking takes each of them for written every time.
    pub record_writes: bool,
    /// Stage 2: encode memory types as STE.S2FWB=1 reads them, which forces write-back.
    pub force_write_back: bool,
    /// What hardware takes when the size of a live page changes (IDR3.BBML, 0 to 2).
    pub break_before_make_level: u32,
}

const VALID: u64 = 1 << 0;
/// Of a table, or of a page at level 0; clear in blocks.
const TABLE_OR_PAGE: u64 = 1 << 1;
const ACCESSED: u64 = 1 << 10;
const DBM: u64 = 1 << 51;
const CONTIGUOUS: u64 = 1 << 52;
/// One of 58:55, which hardware leaves to software; ignored in tables too.
const SOFTWARE: u64 = 1 << 55;

const INDEX_CACHED: u64 = 1 << 2;
const INDEX_DEVICE: u64 = 2 << 2;
const INDEX: u64 = 7 << 2;
const UNPRIVILEGED: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const NOT_GLOBAL: u64 = 1 << 11;
const PRIVILEGED_NO_EXECUTE: u64 = 1 << 53;
const NO_EXECUTE: u64 = 1 << 54;

const MEMORY_DEVICE: u64 = 1 << 2;
const MEMORY_NOT_CACHED: u64 = 5 << 2;
const MEMORY_FORCED_WRITE_BACK: u64 = 6 << 2;
const MEMORY_WRITE_BACK: u64 = 0xf << 2;
const MEMORY: u64 = 0xf << 2;
const S2_READ: u64 = 1 << 6;
const S2_WRITE: u64 = 1 << 7;

const OUTER_SHAREABLE: u64 = 2 << 8;
const INNER_SHAREABLE: u64 = 3 << 8;

impl<const STAGE: u32, const GRANULE_SHIFT: u32, const WIDE: bool>
    ArmLpae<STAGE, GRANULE_SHIFT, WIDE>
{
    /// Bits of the address that are where they are in the entry.
    const IN_PLACE: u64 = {
        let bits = if WIDE && GRANULE_SHIFT != 16 { 50 } else { 48 };
        (1 << bits) - (1 << GRANULE_SHIFT)
    };
    /// Whether bits 9:8 are of the address; shareability is the CD's or STE's then.
    const ADDRESS_FOR_SHAREABILITY: bool = WIDE && GRANULE_SHIFT != 16;

    const fn pack(address: u64) -> u64 {
        let beyond = match (WIDE, GRANULE_SHIFT) {
            (false, _) => 0,
            (true, 16) => (address >> 48 & 0xf) << 12,
            (true, _) => (address >> 50 & 0x3) << 8,
        };
        address & Self::IN_PLACE | beyond
    }

    const fn unpack(entry: u64) -> u64 {
        let beyond = match (WIDE, GRANULE_SHIFT) {
            (false, _) => 0,
            (true, 16) => (entry >> 12 & 0xf) << 48,
            (true, _) => (entry >> 8 & 0x3) << 50,
        };
        entry & Self::IN_PLACE | beyond
    }

    const fn item_shift(level: u32) -> u32 {
        GRANULE_SHIFT + (GRANULE_SHIFT - 3) * level
    }

    /// log2 of the bytes of a contiguous group at `level`, where there is one.
    const fn contiguous_shift(level: u32) -> Option<u32> {
        match (GRANULE_SHIFT, level) {
            (12, 0..3) => Some(Self::item_shift(level) + 4),
            (14, 0) => Some(21),
            (14, 1) => Some(30),
            (16, 0) => Some(21),
            (16, 1) => Some(34),
            _ => None,
        }
    }

    /// Whether one entry of `level` can be a page or block.
    const fn has_leaves(level: u32) -> bool {
        match (GRANULE_SHIFT, level) {
            (12, 0..3) | (_, 0..2) => true,
            (12, 3) | (_, 2) => WIDE,
            _ => false,
        }
    }

    fn stage1_attributes(options: &ArmOptions, prot: Prot) -> Option<u64> {
        let mut bits = VALID | ACCESSED | NOT_GLOBAL;
        if !prot.contains(Prot::WRITE) {
            if !prot.contains(Prot::READ) {
                return None;
            }
            bits |= READ_ONLY;
        } else if options.record_writes {
            bits |= DBM | READ_ONLY;
        }
        if prot.contains(Prot::PRIV) {
            // No read and no write do not keep the unprivileged from executing.
            bits |= NO_EXECUTE;
        } else {
            bits |= UNPRIVILEGED;
        }
        if prot.contains(Prot::NOEXEC) {
            bits |= NO_EXECUTE | PRIVILEGED_NO_EXECUTE;
        }
        if prot.contains(Prot::MMIO) {
            bits |= INDEX_DEVICE;
        } else if prot.contains(Prot::CACHE) {
            bits |= INDEX_CACHED;
        }
        Some(bits)
    }

    fn stage2_attributes(options: &ArmOptions, prot: Prot) -> Option<u64> {
        let mut bits = VALID | ACCESSED;
        if prot & (Prot::READ | Prot::WRITE) == Prot::NONE {
            return None;
        }
        if prot.contains(Prot::READ) {
            bits |= S2_READ;
        }
        if prot.contains(Prot::WRITE) {
            bits |= if options.record_writes { DBM } else { S2_WRITE };
        }
        if prot.contains(Prot::NOEXEC) {
            bits |= NO_EXECUTE;
        }
        bits |= if prot.contains(Prot::MMIO) {
            MEMORY_DEVICE
        } else if !prot.contains(Prot::CACHE) {
            MEMORY_NOT_CACHED
        } else if options.force_write_back {
            MEMORY_FORCED_WRITE_BACK
        } else {
            MEMORY_WRITE_BACK
        };
        Some(bits)
    }

    fn stage1_prot(entry: u64) -> Prot {
        let mut prot = Prot::READ;
        if entry & READ_ONLY == 0 || entry & DBM != 0 {
            prot |= Prot::WRITE;
        }
        let no_execute = if entry & UNPRIVILEGED == 0 {
            prot |= Prot::PRIV;
            PRIVILEGED_NO_EXECUTE
        } else {
            NO_EXECUTE
        };
        if entry & no_execute != 0 {
            prot |= Prot::NOEXEC;
        }
        match entry & INDEX {
            INDEX_CACHED => prot |= Prot::CACHE,
            INDEX_DEVICE => prot |= Prot::MMIO,
            _ => {}
        }
        prot
    }

    fn stage2_prot(entry: u64) -> Prot {
        let mut prot = Prot::NONE;
        if entry & S2_READ != 0 {
            prot |= Prot::READ;
        }
        if entry & (S2_WRITE | DBM) != 0 {
            prot |= Prot::WRITE;
        }
        if entry & NO_EXECUTE != 0 {
            prot |= Prot::NOEXEC;
        }
        match entry & MEMORY {
            MEMORY_FORCED_WRITE_BACK | MEMORY_WRITE_BACK => prot |= Prot::CACHE,
            MEMORY_DEVICE => prot |= Prot::MMIO,
            _ => {}
        }
        prot
    }
}

impl<const STAGE: u32, const GRANULE_SHIFT: u32, const WIDE: bool> Format
    for ArmLpae<STAGE, GRANULE_SHIFT, WIDE>
{
    type Options = ArmOptions;

    const NAME: &'static str = if STAGE == 1 { "arm_64_lpae_s1" } else { "arm_64_lpae_s2" };
    const GRANULE_SHIFT: u32 = {
        assert!(matches!(STAGE, 1 | 2), "there are two stages");
        assert!(matches!(GRANULE_SHIFT, 12 | 14 | 16), "no granule of VMSAv8-64");
        GRANULE_SHIFT
    };
    const INDEX_BITS: u32 = GRANULE_SHIFT - 3;
    const MAX_LEVELS: u32 = match (GRANULE_SHIFT, WIDE) {
        (12, true) => 5,
        (16, _) => 3,
        _ => 4,
    };
    /// 4 KiB granules have no start level 3 but for small translation tables (STT).
    const MIN_LEVELS: u32 = if GRANULE_SHIFT == 12 { 2 } else { 1 };
    const ROOT_EXTRA_BITS: u32 = if STAGE == 2 { 4 } else { 0 };
    const MAX_IOVA_BITS: u32 = if WIDE { 52 } else { 48 };
    const MAX_OUTPUT_BITS: u32 = if WIDE { 52 } else { 48 };
    const LINEAR_BITS: u32 = match (WIDE, GRANULE_SHIFT) {
        (false, _) => 64,
        (true, 16) => 48,
        (true, _) => 50,
    };
    const CLEAN_DONE: u64 = SOFTWARE;
    const TRACKS_DIRTY: bool = true;
    const ACCESSED: u64 = ACCESSED;

    fn leaf_sizes(level: u32) -> u64 {
        let one = if Self::has_leaves(level) { 1 << Self::item_shift(level) } else { 0 };
        let group = Self::contiguous_shift(level).map_or(0, |shift| 1 << shift);
        one | group
    }

    fn attributes(options: &ArmOptions, prot: Prot) -> Option<u64> {
        let bits = if STAGE == 1 {
            Self::stage1_attributes(options, prot)
        } else {
            Self::stage2_attributes(options, prot)
        }?;
        let shareability = match (Self::ADDRESS_FOR_SHAREABILITY, prot.contains(Prot::CACHE)) {
            (true, _) => 0,
            (false, true) => INNER_SHAREABLE,
            (false, false) => OUTER_SHAREABLE,
        };
        Some(bits | shareability)
    }

    fn prot(_level: u32, entry: u64) -> Prot {
        if STAGE == 1 { Self::stage1_prot(entry) } else { Self::stage2_prot(entry) }
    }

    fn address(phys: PhysAddr) -> u64 {
        Self::pack(phys.get())
    }

    fn leaf(level: u32, shift: u32, phys: PhysAddr, attributes: u64) -> u64 {
        let mut entry = Self::address(phys) | attributes;
        if level == 0 {
            entry |= TABLE_OR_PAGE;
        }
        if shift != Self::item_shift(level) {
            entry |= CONTIGUOUS;
        }
        entry
    }

    fn replica_step(level: u32, _shift: u32) -> u64 {
        // A group lies in one linear piece of the address.
        1 << Self::item_shift(level)
    }

    fn table(_options: &ArmOptions, _level: u32, phys: PhysAddr) -> u64 {
        Self::address(phys) | VALID | TABLE_OR_PAGE
    }

    fn is_present(entry: u64) -> bool {
        entry & VALID != 0
    }

    fn is_table(_level: u32, entry: u64) -> bool {
        entry & TABLE_OR_PAGE != 0
    }

    fn table_address(entry: u64) -> PhysAddr {
        PhysAddr::new(Self::unpack(entry))
    }

    fn leaf_shift(level: u32, entry: u64) -> u32 {
        if entry & CONTIGUOUS != 0
            && let Some(shift) = Self::contiguous_shift(level)
        {
            return shift;
        }
        Self::item_shift(level)
    }

    fn leaf_address(level: u32, entry: u64) -> PhysAddr {
        PhysAddr::new(Self::unpack(entry)).align_down(1 << Self::leaf_shift(level, entry))
    }

    fn plain_leaf(level: u32) -> (u64, u64) {
        let page = if level == 0 { TABLE_OR_PAGE } else { 0 };
        (VALID | TABLE_OR_PAGE | CONTIGUOUS, VALID | page)
    }

    fn is_dirty(entry: u64) -> bool {
        if STAGE == 1 { entry & READ_ONLY == 0 } else { entry & S2_WRITE != 0 }
    }

    fn make_clean(entry: u64) -> u64 {
        if entry & DBM == 0 {
            entry
        } else if STAGE == 1 {
            entry | READ_ONLY
        } else {
            entry & !S2_WRITE
        }
    }

    fn make_dirty(entry: u64) -> u64 {
        if STAGE == 1 { entry & !READ_ONLY } else { entry | S2_WRITE }
    }

    /// SMMUv3 3.21.1: level 1 lets the Contiguous bit change without a break, level 2 blocks and
    /// tables too. With level 1 a block can also become a table, but only by way of its nT bit and
    /// an invalidation in between, which is no single step and so counts as a break here.
    fn size_changes(options: &ArmOptions) -> SizeChanges {
        let from = |level| {
            if options.break_before_make_level >= level {
                SizeChange::InPlace
            } else {
                SizeChange::BreakBeforeMake
            }
        };
        SizeChanges { tables: from(2), runs: from(1) }
    }
}
