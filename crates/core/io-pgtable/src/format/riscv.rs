//! RISC-V page tables of 64-bit hardware (Privileged ISA, Sv39 to Sv57, the x4 second stages,
//! Svnapot, Svpbmt; RISC-V IOMMU 2.3 for what an IOMMU makes of them).

use lychgate_types::{PhysAddr, Prot};

use super::{Format, SizeChanges};

/// RISC-V page tables of 3, 4 or 5 levels, with leaves of 4 KiB, 2 MiB, 1 GiB, 512 GiB and 256 TiB
/// and, with Svnapot, 64 KiB; leave the latter out of
/// [`Config::page_sizes`](crate::Config::page_sizes) where hardware lacks it.
///
/// The first stage (Sv39, Sv48, Sv57) sign-extends: its lower half ends at 38, 47 or 56
/// bits. The second (Sv39x4, Sv48x4, Sv57x4) has a root of 16 KiB, takes 41, 50 or 59 bits and
/// does not sign-extend.
///
/// W without R is reserved and neither means a table, so write-only mappings are readable too, as
/// with Linux, and no access at all has no encoding.
#[derive(Clone, Copy, Debug)]
pub struct Riscv<const SECOND_STAGE: bool>;

/// Sv39, Sv48 and Sv57.
pub type RiscvFirstStage = Riscv<false>;

/// Sv39x4, Sv48x4 and Sv57x4.
pub type RiscvSecondStage = Riscv<true>;

/// Software's choices for [`Riscv`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RiscvOptions {
    /// Say by PBMT that memory is not cacheable where `IOMMU_CACHE` is not asked for, and that it
    /// is I/O for `IOMMU_MMIO` (capabilities.Svpbmt). The bits are reserved otherwise.
    pub memory_types: bool,
    /// Leave D of new writable leaves to hardware, so that the first write is recorded: it must
    /// update entries then (tc.SADE, tc.GADE; capabilities.AMO_HWAD). Otherwise D is set from the
    /// start, as hardware that does not update faults without it.
    pub record_writes: bool,
}

const VALID: u64 = 1 << 0;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
/// One of RSW, which hardware leaves to software.
const SOFTWARE: u64 = 1 << 8;
const NUMBER_SHIFT: u32 = 10;
const NUMBER: u64 = ((1 << 44) - 1) << NUMBER_SHIFT;
const NOT_CACHEABLE: u64 = 1 << 61;
const IO: u64 = 2 << 61;
const MEMORY_TYPE: u64 = 3 << 61;
const NAPOT: u64 = 1 << 63;
const NAPOT_SHIFT: u32 = 16;
/// The low bits of the page number of a 64 KiB leaf: 1000b says the size.
const NAPOT_NUMBER: u64 = 8 << NUMBER_SHIFT;

impl<const SECOND_STAGE: bool> Format for Riscv<SECOND_STAGE> {
    type Options = RiscvOptions;

    const NAME: &'static str = if SECOND_STAGE { "riscv_64_x4" } else { "riscv_64" };
    const GRANULE_SHIFT: u32 = 12;
    const INDEX_BITS: u32 = 9;
    const MAX_LEVELS: u32 = 5;
    const MIN_LEVELS: u32 = 3;
    const ROOT_EXTRA_BITS: u32 = if SECOND_STAGE { 2 } else { 0 };
    const MIN_ROOT_EXTRA_BITS: u32 = Self::ROOT_EXTRA_BITS;
    const SIGN_EXTENDS: bool = !SECOND_STAGE;
    const MAX_IOVA_BITS: u32 = if SECOND_STAGE { 59 } else { 56 };
    const MAX_OUTPUT_BITS: u32 = 56;
    const CLEAN_DONE: u64 = SOFTWARE;
    const TRACKS_DIRTY: bool = true;
    const ACCESSED: u64 = ACCESSED;

    fn leaf_sizes(level: u32) -> u64 {
        match level {
            0 => 1 << 12 | 1 << NAPOT_SHIFT,
            1..5 => 1 << (12 + 9 * level),
            _ => 0,
        }
    }

    fn attributes(options: &RiscvOptions, prot: Prot) -> Option<u64> {
        let mut bits = VALID | READ | ACCESSED;
        if prot.contains(Prot::WRITE) {
            bits |= WRITE;
            if !options.record_writes {
                bits |= DIRTY;
            }
        } else if !prot.contains(Prot::READ) {
            return None;
        }
        if !prot.contains(Prot::NOEXEC) {
            bits |= EXECUTE;
        }
        // The second stage is always checked as for a user, whoever asks.
        if SECOND_STAGE || !prot.contains(Prot::PRIV) {
            bits |= USER;
        }
        if options.memory_types {
            if prot.contains(Prot::MMIO) {
                bits |= IO;
            } else if !prot.contains(Prot::CACHE) {
                bits |= NOT_CACHEABLE;
            }
        }
        Some(bits)
    }

    /// `IOMMU_CACHE` where PBMT leaves it to the platform, which makes memory coherent.
    fn prot(_level: u32, entry: u64) -> Prot {
        let mut prot = Prot::READ;
        if entry & WRITE != 0 {
            prot |= Prot::WRITE;
        }
        if entry & EXECUTE == 0 {
            prot |= Prot::NOEXEC;
        }
        if entry & USER == 0 {
            prot |= Prot::PRIV;
        }
        match entry & MEMORY_TYPE {
            0 => prot |= Prot::CACHE,
            IO => prot |= Prot::MMIO,
            _ => {}
        }
        prot
    }

    fn address(phys: PhysAddr) -> u64 {
        phys.get() >> 12 << NUMBER_SHIFT
    }

    fn leaf(level: u32, shift: u32, phys: PhysAddr, attributes: u64) -> u64 {
        let entry = Self::address(phys) | attributes;
        if level == 0 && shift == NAPOT_SHIFT { entry | NAPOT | NAPOT_NUMBER } else { entry }
    }

    fn table(_options: &RiscvOptions, _level: u32, phys: PhysAddr) -> u64 {
        // A, D, U, PBMT and N are reserved here.
        Self::address(phys) & NUMBER | VALID
    }

    fn is_present(entry: u64) -> bool {
        entry & VALID != 0
    }

    fn is_table(_level: u32, entry: u64) -> bool {
        entry & (READ | WRITE | EXECUTE) == 0
    }

    fn table_address(entry: u64) -> PhysAddr {
        PhysAddr::new((entry & NUMBER) >> NUMBER_SHIFT << 12)
    }

    fn leaf_shift(level: u32, entry: u64) -> u32 {
        if level == 0 && entry & NAPOT != 0 { NAPOT_SHIFT } else { 12 + 9 * level }
    }

    fn leaf_address(level: u32, entry: u64) -> PhysAddr {
        Self::table_address(entry).align_down(1 << Self::leaf_shift(level, entry))
    }

    fn plain_leaf(_level: u32) -> (u64, u64) {
        (VALID | READ | NAPOT, VALID | READ)
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

    /// Superpages may be split and merged without a step through V=0 as long as address,
    /// permissions and type stay (RISC-V IOMMU 6.3.6); for the 16 entries of a Svnapot page, each
    /// of which is a whole translation by itself, that is no different.
    fn size_changes(_options: &RiscvOptions) -> SizeChanges {
        SizeChanges::IN_PLACE
    }
}
