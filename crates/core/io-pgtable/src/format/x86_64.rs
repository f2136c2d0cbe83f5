//! x86-64 page tables: AMD-Vi guest ("v2", AMD 48882 2.2.6) and VT-d first stage (VT-d 3.6, 9.7).

use lychgate_types::{PhysAddr, Prot};

use super::{Format, SizeChanges};

/// x86-64 page tables of 4 or 5 levels with leaves of 4 KiB, 2 MiB and 1 GiB; leave 1 GiB out of
/// [`Config::page_sizes`](crate::Config::page_sizes) where VT-d has no CAP.FS1GP.
///
/// VT-d, and AMD-Vi for requests with a PASID, fault on an IOVA that is not canonical; AMD-Vi does
/// not sign-extend that of a request without PASID. A table that means the same to all of them ends
/// below the sign bit: at 47 bits with 4 levels, 56 with 5.
///
/// An entry that is present can be read: write-only mappings are readable too, as with Linux. There
/// is no encoding for no access at all.
///
/// `ENCRYPTION_BIT` is the address bit that selects memory encryption (CPUID 8000_001F EBX\[5:0\]),
/// 0 for none. Then tables and leaves have it set, but for leaves of `IOMMU_MMIO`, and physical
/// addresses end below it.
#[derive(Clone, Copy, Debug)]
pub struct X86_64<const ENCRYPTION_BIT: u32 = 0>;

/// Software's choices for [`X86_64`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct X86_64Options {
    /// Set NX for `IOMMU_NOEXEC` (AMD: EFR.NXSup). Otherwise the bit stays 0: VT-d ignores it.
    pub no_execute: bool,
    /// Leave D of new writable leaves to hardware, so that the first write is recorded. Otherwise
    /// it is set from the start, as Linux does: hardware need not update the entry, and
    /// every writable leaf counts as written once.
    pub record_writes: bool,
}

const PRESENT: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// At level 0 this bit belongs to the PAT index and stays 0.
const PAGE_SIZE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Ignored by AMD-Vi (58:52) and VT-d (63:52).
const SOFTWARE: u64 = 1 << 52;
const NO_EXECUTE: u64 = 1 << 63;

impl<const ENCRYPTION_BIT: u32> X86_64<ENCRYPTION_BIT> {
    const ENCRYPTED: u64 = if ENCRYPTION_BIT == 0 { 0 } else { 1 << ENCRYPTION_BIT };
    const ADDRESS: u64 = ADDRESS & !Self::ENCRYPTED;
}

impl<const ENCRYPTION_BIT: u32> Format for X86_64<ENCRYPTION_BIT> {
    type Options = X86_64Options;

    const NAME: &'static str = "x86_64";
    const GRANULE_SHIFT: u32 = 12;
    const INDEX_BITS: u32 = 9;
    const MAX_LEVELS: u32 = 5;
    const MIN_LEVELS: u32 = 4;
    const SIGN_EXTENDS: bool = true;
    const MAX_IOVA_BITS: u32 = 56;
    const MAX_OUTPUT_BITS: u32 = if ENCRYPTION_BIT == 0 {
        52
    } else {
        assert!(ENCRYPTION_BIT >= 32 && ENCRYPTION_BIT < 52, "not a bit of physical addresses");
        ENCRYPTION_BIT
    };
    const CLEAN_DONE: u64 = SOFTWARE;
    const TRACKS_DIRTY: bool = true;
    const ACCESSED: u64 = ACCESSED;

    fn leaf_sizes(level: u32) -> u64 {
        if level > 2 { 0 } else { 1 << (12 + 9 * level) }
    }

    fn attributes(options: &X86_64Options, prot: Prot) -> Option<u64> {
        let mut bits = PRESENT | ACCESSED;
        if prot.contains(Prot::WRITE) {
            bits |= WRITE;
            if !options.record_writes {
                bits |= DIRTY;
            }
        } else if !prot.contains(Prot::READ) {
            return None;
        }
        if !prot.contains(Prot::PRIV) {
            bits |= USER;
        }
        if prot.contains(Prot::NOEXEC) && options.no_execute {
            bits |= NO_EXECUTE;
        }
        if !prot.contains(Prot::MMIO) {
            bits |= Self::ENCRYPTED;
        }
        Some(bits)
    }

    fn prot(_level: u32, entry: u64) -> Prot {
        let mut prot = Prot::READ;
        if entry & WRITE != 0 {
            prot |= Prot::WRITE;
        }
        if entry & USER == 0 {
            prot |= Prot::PRIV;
        }
        if entry & NO_EXECUTE != 0 {
            prot |= Prot::NOEXEC;
        }
        if Self::ENCRYPTED != 0 && entry & Self::ENCRYPTED == 0 {
            prot |= Prot::MMIO;
        }
        prot
    }

    fn address(phys: PhysAddr) -> u64 {
        phys.get() & Self::ADDRESS
    }

    fn leaf(level: u32, _shift: u32, phys: PhysAddr, attributes: u64) -> u64 {
        let size = if level == 0 { 0 } else { PAGE_SIZE };
        Self::address(phys) | attributes | size
    }

    fn table(_options: &X86_64Options, _level: u32, phys: PhysAddr) -> u64 {
        Self::address(phys) | PRESENT | WRITE | USER | ACCESSED | Self::ENCRYPTED
    }

    fn is_present(entry: u64) -> bool {
        entry & PRESENT != 0
    }

    fn is_table(_level: u32, entry: u64) -> bool {
        entry & PAGE_SIZE == 0
    }

    fn table_address(entry: u64) -> PhysAddr {
        PhysAddr::new(entry & Self::ADDRESS)
    }

    fn leaf_shift(level: u32, _entry: u64) -> u32 {
        12 + 9 * level
    }

    fn leaf_address(level: u32, entry: u64) -> PhysAddr {
        PhysAddr::new(entry & Self::ADDRESS).align_down(1 << (12 + 9 * level))
    }

    fn plain_leaf(level: u32) -> (u64, u64) {
        if level == 0 { (PRESENT, PRESENT) } else { (PRESENT | PAGE_SIZE, PRESENT | PAGE_SIZE) }
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

    /// Hardware may hold both sizes at once, with the same result (VT-d 6.2.4.1; AMD 48882 2.2.6).
    /// There are no runs.
    fn size_changes(_options: &X86_64Options) -> SizeChanges {
        SizeChanges::IN_PLACE
    }
}
