//! VT-d second-stage page tables (VT-d 3.7, 9.8).

use lychgate_types::{PhysAddr, Prot};

use super::{Format, SizeChanges};

/// VT-d second stage: 3, 4 or 5 levels for IOVAs of 39, 48 or 57 bits (CAP.SAGAW, the AW of the
/// context or PASID entry), leaves of 4 KiB, 2 MiB and 1 GiB; leave out of
/// [`Config::page_sizes`](crate::Config::page_sizes) what CAP.SSLPS does not have.
///
/// There is no present bit: an entry is present that allows a read or a write, so no access at
/// all has no encoding. Bits 51:HAW are reserved: `output_bits` is the host address width.
///
/// Hardware uses A and D only where the PASID entry has SSADE set; they start clear.
#[derive(Clone, Copy, Debug)]
pub struct VtdSecondStage;

/// Software's choices for [`VtdSecondStage`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VtdSecondStageOptions {
    /// Set SNP in every leaf: accesses snoop whatever the device asks for. The bit is reserved
    /// where ECAP.SC is 0.
    pub force_snoop: bool,
}

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
/// Ignored at level 0.
const PAGE_SIZE: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const SNOOP: u64 = 1 << 11;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// One of 60:52, which hardware ignores.
const SOFTWARE: u64 = 1 << 52;

impl Format for VtdSecondStage {
    type Options = VtdSecondStageOptions;

    const NAME: &'static str = "vtdss";
    const GRANULE_SHIFT: u32 = 12;
    const INDEX_BITS: u32 = 9;
    const MAX_LEVELS: u32 = 5;
    const MIN_LEVELS: u32 = 3;
    const MAX_IOVA_BITS: u32 = 57;
    const MAX_OUTPUT_BITS: u32 = 52;
    const CLEAN_DONE: u64 = SOFTWARE;
    const TRACKS_DIRTY: bool = true;
    const ACCESSED: u64 = ACCESSED;

    fn leaf_sizes(level: u32) -> u64 {
        if level > 2 { 0 } else { 1 << (12 + 9 * level) }
    }

    fn attributes(options: &VtdSecondStageOptions, prot: Prot) -> Option<u64> {
        let mut bits = 0;
        if prot.contains(Prot::READ) {
            bits |= READ;
        }
        if prot.contains(Prot::WRITE) {
            bits |= WRITE;
        }
        if bits == 0 {
            return None;
        }
        if options.force_snoop {
            bits |= SNOOP;
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
        if entry & SNOOP != 0 {
            prot |= Prot::CACHE;
        }
        prot
    }

    fn address(phys: PhysAddr) -> u64 {
        phys.get() & ADDRESS
    }

    fn leaf(level: u32, _shift: u32, phys: PhysAddr, attributes: u64) -> u64 {
        let size = if level == 0 { 0 } else { PAGE_SIZE };
        Self::address(phys) | attributes | size
    }

    fn table(_options: &VtdSecondStageOptions, _level: u32, phys: PhysAddr) -> u64 {
        // SNP is reserved in entries that lead to tables.
        Self::address(phys) | READ | WRITE
    }

    fn is_present(entry: u64) -> bool {
        entry & (READ | WRITE) != 0
    }

    fn is_table(_level: u32, entry: u64) -> bool {
        entry & PAGE_SIZE == 0
    }

    fn is_plain_table(_level: u32, entry: u64) -> bool {
        entry & (READ | WRITE | PAGE_SIZE) == READ | WRITE
    }

    fn table_address(entry: u64) -> PhysAddr {
        PhysAddr::new(entry & ADDRESS)
    }

    fn leaf_shift(level: u32, _entry: u64) -> u32 {
        12 + 9 * level
    }

    fn leaf_address(level: u32, entry: u64) -> PhysAddr {
        PhysAddr::new(entry & ADDRESS).align_down(1 << (12 + 9 * level))
    }

    fn plain_leaf(level: u32) -> (u64, u64) {
        // Leaves that can only be written are rare; the walker looks at them one by one.
        if level == 0 { (READ, READ) } else { (READ | PAGE_SIZE, READ | PAGE_SIZE) }
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

    /// Hardware may hold both sizes at once, with the same result (VT-d 6.2.4.1). There are no
    /// runs.
    fn size_changes(_options: &VtdSecondStageOptions) -> SizeChanges {
        SizeChanges::IN_PLACE
    }
}
