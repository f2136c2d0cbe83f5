//! AMD-Vi host ("v1") page tables (AMD 48882 2.2.3, Tables 14 to 18).

use lychgate_types::{PhysAddr, Prot};

use super::{Format, SizeChanges};

/// AMD-Vi host page tables: 1 to 6 levels, a root that can grow, and a leaf of every power of two
/// but 512 GiB (bit 39), which Linux avoids because of a hardware bug.
///
/// `GRANULE_SHIFT` is 12 in hardware. Another value scales tables and addresses alike,
/// as Linux's selftest format `amdv1_mock` does with 11: tables of 2^`GRANULE_SHIFT` bytes, and
/// address fields that count granules from bit 12.
#[derive(Clone, Copy, Debug)]
pub struct AmdV1<const GRANULE_SHIFT: u32 = 12>;

/// Software's choices for [`AmdV1`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AmdV1Options {
    /// Set FC in every leaf: accesses snoop whatever the device asks for. Linux always does.
    pub force_coherent: bool,
}

impl Default for AmdV1Options {
    fn default() -> Self {
        Self { force_coherent: true }
    }
}

const PRESENT: u64 = 1 << 0;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const NEXT_LEVEL_SHIFT: u32 = 9;
const NEXT_LEVEL: u64 = 7 << NEXT_LEVEL_SHIFT;
/// Next level 7: the size of the page is in the address field.
const SIZE_IN_ADDRESS: u64 = 7 << NEXT_LEVEL_SHIFT;
const ADDRESS_SHIFT: u32 = 12;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const FORCE_COHERENT: u64 = 1 << 60;
const READ: u64 = 1 << 61;
const WRITE: u64 = 1 << 62;

impl<const GRANULE_SHIFT: u32> Format for AmdV1<GRANULE_SHIFT> {
    type Options = AmdV1Options;

    const NAME: &'static str = if GRANULE_SHIFT == 12 { "amdv1" } else { "amdv1_mock" };
    const GRANULE_SHIFT: u32 = GRANULE_SHIFT;
    const INDEX_BITS: u32 = GRANULE_SHIFT - 3;
    const MAX_LEVELS: u32 = 6;
    const MAX_IOVA_BITS: u32 =
        if GRANULE_SHIFT == 12 { 64 } else { GRANULE_SHIFT + 6 * (GRANULE_SHIFT - 3) };
    const MAX_OUTPUT_BITS: u32 = 40 + GRANULE_SHIFT;
    const GROWS: bool = true;
    const TRACKS_DIRTY: bool = true;
    const ACCESSED: u64 = ACCESSED;

    fn leaf_sizes(level: u32) -> u64 {
        if level > 4 {
            return 0;
        }
        let smallest = GRANULE_SHIFT + Self::INDEX_BITS * level;
        let beyond = smallest + Self::INDEX_BITS;
        // The greatest size still needs its terminating 0 and one address bit above it.
        let beyond = if beyond < Self::MAX_OUTPUT_BITS { beyond } else { Self::MAX_OUTPUT_BITS };
        ((1 << beyond) - (1 << smallest)) & !(1 << 39)
    }

    fn attributes(options: &AmdV1Options, prot: Prot) -> Option<u64> {
        let mut bits = PRESENT;
        if options.force_coherent {
            bits |= FORCE_COHERENT;
        }
        if prot.contains(Prot::READ) {
            bits |= READ;
        }
        if prot.contains(Prot::WRITE) {
            bits |= WRITE;
        }
        Some(bits)
    }

    fn prot(_level: u32, entry: u64) -> Prot {
        let mut prot = Prot::NONE;
        if entry & READ != 0 {
            prot |= Prot::READ;
        }
        if entry & WRITE != 0 {
            prot |= Prot::WRITE;
        }
        if entry & FORCE_COHERENT != 0 {
            prot |= Prot::CACHE;
        }
        prot
    }

    fn address(phys: PhysAddr) -> u64 {
        phys.get() >> GRANULE_SHIFT << ADDRESS_SHIFT
    }

    fn leaf(level: u32, shift: u32, phys: PhysAddr, attributes: u64) -> u64 {
        let entry = Self::address(phys) | attributes;
        if shift == GRANULE_SHIFT + Self::INDEX_BITS * level {
            return entry;
        }
        // A page of 2^(p+1) granules: p ones, then a 0 (Table 14).
        let ones = (1u64 << (shift - GRANULE_SHIFT - 1)) - 1;
        entry | SIZE_IN_ADDRESS | ones << ADDRESS_SHIFT
    }

    fn table(_options: &AmdV1Options, level: u32, phys: PhysAddr) -> u64 {
        let next_level = u64::from(level) << NEXT_LEVEL_SHIFT;
        // Tables are aligned to pages of 4 KiB whatever the granule, and their addresses count
        // bytes.
        (phys.get() & ADDRESS) | PRESENT | next_level | READ | WRITE
    }

    fn is_present(entry: u64) -> bool {
        entry & PRESENT != 0
    }

    fn is_table(_level: u32, entry: u64) -> bool {
        let next_level = entry & NEXT_LEVEL;
        next_level != 0 && next_level != SIZE_IN_ADDRESS
    }

    fn is_plain_table(level: u32, entry: u64) -> bool {
        // No table of ours skips levels.
        let next_level = u64::from(level) << NEXT_LEVEL_SHIFT;
        entry & (PRESENT | NEXT_LEVEL) == PRESENT | next_level
    }

    fn table_address(entry: u64) -> PhysAddr {
        PhysAddr::new(entry & ADDRESS)
    }

    fn leaf_shift(level: u32, entry: u64) -> u32 {
        if entry & NEXT_LEVEL == SIZE_IN_ADDRESS {
            GRANULE_SHIFT + 1 + ((entry & ADDRESS) >> ADDRESS_SHIFT).trailing_ones()
        } else {
            GRANULE_SHIFT + Self::INDEX_BITS * level
        }
    }

    fn leaf_address(level: u32, entry: u64) -> PhysAddr {
        let address = (entry & ADDRESS) >> ADDRESS_SHIFT << GRANULE_SHIFT;
        PhysAddr::new(address).align_down(1 << Self::leaf_shift(level, entry))
    }

    fn plain_leaf(_level: u32) -> (u64, u64) {
        (PRESENT | NEXT_LEVEL, PRESENT)
    }

    fn is_dirty(entry: u64) -> bool {
        entry & DIRTY != 0
    }

    fn make_clean(entry: u64) -> u64 {
        entry & !DIRTY
    }

    fn make_dirty(entry: u64) -> u64 {
        entry | DIRTY
    }

    /// A leaf may become a table and back (48882 2.2.3). Of a run, Table 14 wants all entries to be
    /// equal, yet none can write them at once: they differ whenever a run is mapped or unmapped,
    /// too. A walk reads the one entry that the IOVA selects, which names size and address by
    /// itself, so entries that name different sizes of the same memory translate alike.
    fn size_changes(_options: &AmdV1Options) -> SizeChanges {
        SizeChanges::IN_PLACE
    }
}
