//! Formats that differ from AMD v1 in everything a format may differ in, to hold the walker to it.

use lychgate_io_pgtable::{Format, SizeChanges};
use lychgate_types::{PhysAddr, Prot};

/// RISC-V second stage Sv39x4 with Svnapot (Privileged ISA, "Sv39x4" and "Svnapot"): a root of
/// 2048 entries, an address field that is shifted, 64 KiB pages whose size is in the address.
pub(crate) struct Sv39x4;

impl Format for Sv39x4 {
    type Options = ();
    const NAME: &'static str = "sv39x4";
    const GRANULE_SHIFT: u32 = 12;
    const INDEX_BITS: u32 = 9;
    const MAX_LEVELS: u32 = 3;
    const ROOT_EXTRA_BITS: u32 = 2;
    const MAX_IOVA_BITS: u32 = 41;
    const MAX_OUTPUT_BITS: u32 = 56;
    /// One of the bits that hardware leaves to software (RSW).
    const CLEAN_DONE: u64 = 1 << 8;

    fn leaf_sizes(level: u32) -> u64 {
        match level {
            0 => 1 << 12 | 1 << 16,
            1 => 1 << 21,
            _ => 1 << 30,
        }
    }

    fn attributes((): &(), prot: Prot) -> Option<u64> {
        let read = u64::from(prot.contains(Prot::READ)) << 1;
        let write = u64::from(prot.contains(Prot::WRITE)) << 2;
        // W without R is reserved, neither means a table.
        (read != 0).then_some(0xd1 | read | write)
    }

    fn prot(_level: u32, entry: u64) -> Prot {
        if entry & 4 != 0 { Prot::READ | Prot::WRITE } else { Prot::READ }
    }

    fn address(phys: PhysAddr) -> u64 {
        phys.get() >> 12 << 10
    }

    fn leaf(level: u32, shift: u32, phys: PhysAddr, attributes: u64) -> u64 {
        let napot = if level == 0 && shift == 16 { 1 << 63 | 8 << 10 } else { 0 };
        Self::address(phys) | attributes | napot
    }

    fn table((): &(), _level: u32, phys: PhysAddr) -> u64 {
        Self::address(phys) | 1
    }

    fn is_present(entry: u64) -> bool {
        entry & 1 != 0
    }

    fn is_table(_level: u32, entry: u64) -> bool {
        entry & 0xe == 0
    }

    fn table_address(entry: u64) -> PhysAddr {
        PhysAddr::new((entry >> 10 & 0xfff_ffff_ffff) << 12)
    }

    fn leaf_shift(level: u32, entry: u64) -> u32 {
        if entry >> 63 != 0 { 16 } else { 12 + 9 * level }
    }

    fn leaf_address(level: u32, entry: u64) -> PhysAddr {
        Self::table_address(entry).align_down(1 << Self::leaf_shift(level, entry))
    }

    fn plain_leaf(_level: u32) -> (u64, u64) {
        (1 << 63 | 3, 3)
    }

    fn size_changes((): &()) -> SizeChanges {
        SizeChanges::IN_PLACE
    }
}

/// Arm VMSAv8-64 with a granule of 16 KiB (DDI 0487 D8.3), as far as addresses go: tables of 2048
/// entries, runs of 128 pages or 32 blocks that the Contiguous bit marks and whose entries each
/// have their own address, and, to be hard on the walker, an address field that is linear below
/// 2^34 only, as that of 52-bit addresses is below 2^48.
pub(crate) struct Arm16K;

const CONTIGUOUS: u64 = 1 << 52;
const LINEAR: u64 = (1 << 34) - 1;

impl Format for Arm16K {
    type Options = ();
    const NAME: &'static str = "arm-16k";
    const GRANULE_SHIFT: u32 = 14;
    const INDEX_BITS: u32 = 11;
    const MAX_LEVELS: u32 = 3;
    const MAX_IOVA_BITS: u32 = 47;
    const MAX_OUTPUT_BITS: u32 = 40;
    const LINEAR_BITS: u32 = 34;

    fn leaf_sizes(level: u32) -> u64 {
        match level {
            0 => 1 << 14 | 1 << 21,
            1 => 1 << 25 | 1 << 30,
            _ => 0,
        }
    }

    fn attributes((): &(), prot: Prot) -> Option<u64> {
        let read_only = u64::from(!prot.contains(Prot::WRITE)) << 7;
        prot.contains(Prot::READ).then_some(0x401 | read_only)
    }

    fn prot(_level: u32, entry: u64) -> Prot {
        if entry & 0x80 != 0 { Prot::READ } else { Prot::READ | Prot::WRITE }
    }

    fn address(phys: PhysAddr) -> u64 {
        (phys.get() & LINEAR) | phys.get() >> 34 << 40
    }

    fn leaf(level: u32, shift: u32, phys: PhysAddr, attributes: u64) -> u64 {
        let page = u64::from(level == 0) << 1;
        let contiguous = if shift == 14 + 11 * level { 0 } else { CONTIGUOUS };
        Self::address(phys) | attributes | page | contiguous
    }

    fn replica_step(level: u32, _shift: u32) -> u64 {
        1 << (14 + 11 * level)
    }

    fn table((): &(), _level: u32, phys: PhysAddr) -> u64 {
        phys.get() | 3
    }

    fn is_present(entry: u64) -> bool {
        entry & 1 != 0
    }

    fn is_table(_level: u32, entry: u64) -> bool {
        entry & 2 != 0
    }

    fn table_address(entry: u64) -> PhysAddr {
        PhysAddr::new(entry & 0x0000_ffff_ffff_c000)
    }

    fn leaf_shift(level: u32, entry: u64) -> u32 {
        match (entry & CONTIGUOUS != 0, level) {
            (false, _) => 14 + 11 * level,
            (true, 0) => 21,
            (true, _) => 30,
        }
    }

    fn leaf_address(level: u32, entry: u64) -> PhysAddr {
        let address = entry & LINEAR & !0x3fff | (entry >> 40 & 0x3f) << 34;
        PhysAddr::new(address).align_down(1 << Self::leaf_shift(level, entry))
    }

    fn plain_leaf(level: u32) -> (u64, u64) {
        (CONTIGUOUS | 3, if level == 0 { 3 } else { 1 })
    }
}
