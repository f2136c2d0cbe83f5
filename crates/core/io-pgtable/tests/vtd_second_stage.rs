//! VT-d second-stage tables, read by a decoder written from VT-d 3.7 and 9.8.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod support {
    pub(crate) mod histories;
    pub(crate) mod model;
    pub(crate) mod resizing;
}

use lychgate_io_pgtable::{Config, Error, VtdSecondStage, VtdSecondStageOptions};
use lychgate_types::{Memory, PhysAddr, Prot};
use proptest::prelude::*;
use support::histories::{Decoded, RW, Reading, Subject, geometry, op};
use support::resizing;

const SIZES: u64 = 1 << 12 | 1 << 21 | 1 << 30;

/// Host address width of the hardware that reads.
const HAW: u32 = 46;

/// Walks as hardware of [`HAW`] bits with SSADE, SC as given, and SSIRWE clear. A write of a clean leaf
/// sets A and D.
fn decode(
    memory: &dyn Memory,
    root: u64,
    levels: u32,
    iova: u64,
    write: bool,
    snoop_control: bool,
) -> Reading {
    let width = match levels {
        3 => 39,
        4 => 48,
        5 => 57,
        _ => return Err(format!("{levels} levels are no AW")),
    };
    if iova >> width != 0 {
        return Err(format!("{iova:#x} is beyond AW"));
    }
    let mut allowed = 3;
    let mut table = root;
    for (level, shift) in [48, 39, 30, 21, 12].into_iter().enumerate().skip(5 - levels as usize) {
        let at = PhysAddr::new(table | (iova >> shift & 0x1ff) << 3);
        let entry = memory.load_u64(at).map_err(|error| error.to_string())?;
        if entry & 3 == 0 {
            // Hardware would call that not present, but an unmap leaves nothing behind.
            return if entry == 0 { Ok(None) } else { Err(format!("leftover {entry:#x}")) };
        }
        allowed &= entry & 3;
        if (HAW..52).any(|bit| entry >> bit & 1 == 1) || entry >> 62 & 1 != 0 {
            return Err(format!("reserved bits in {entry:#x}"));
        }
        // Ignored, yet nothing that a driver should set: X, EMT, IPAT, 10, 60:53, IR, 63.
        if entry & (0x7c | 1 << 10 | 0x1ff << 53 | 1 << 63) != 0 {
            return Err(format!("unexpected bits in {entry:#x}"));
        }
        let large = entry >> 7 & 1 == 1;
        if shift > 12 && !large {
            if entry >> 11 & 1 != 0 || entry >> 9 & 1 != 0 {
                return Err(format!("SNP or D in the table entry {entry:#x}"));
            }
            table = entry & ((1 << HAW) - 1) & !0xfff;
            continue;
        }
        if shift > 30 || (shift == 12 && large) || entry >> 52 & 1 != 0 {
            return Err(format!("no leaf at index {level} from the top: {entry:#x}"));
        }
        let snoops = entry >> 11 & 1 == 1;
        if snoops != snoop_control {
            return Err(format!("SNP in {entry:#x}"));
        }
        let address = entry & ((1 << HAW) - 1) & !0xfff;
        let offset = iova & ((1 << shift) - 1);
        if address & ((1 << shift) - 1) != 0 {
            return Err(format!("reserved address bits in {entry:#x}"));
        }
        let mut now = entry;
        if write {
            assert_eq!(allowed & 2, 2);
            now |= 3 << 8;
            memory.store_u64(at, now).map_err(|error| error.to_string())?;
        }
        let prot = match allowed {
            1 => Prot::READ,
            2 => Prot::WRITE,
            _ => RW,
        };
        return Ok(Some(Decoded {
            phys: address + offset,
            page: 1 << shift,
            prot: if snoops { prot | Prot::CACHE } else { prot },
            dirty: now >> 9 & 1 == 1,
        }));
    }
    Err("no leaf at the last level".into())
}

fn allows(prot: Prot) -> Option<Prot> {
    let access = prot & RW;
    (access != Prot::NONE).then_some(access)
}

fn allows_snooped(prot: Prot) -> Option<Prot> {
    allows(prot).map(|access| access | Prot::CACHE)
}

fn config(bits: u32, force_snoop: bool) -> Config<VtdSecondStage> {
    Config { output_bits: HAW, ..Config::new(bits, VtdSecondStageOptions { force_snoop }) }
}

fn subject(bits: u32, force_snoop: bool) -> Subject<'static, VtdSecondStage> {
    Subject {
        config: config(bits, force_snoop),
        read: if force_snoop {
            &|memory, root, levels, iova, write| decode(memory, root, levels, iova, write, true)
        } else {
            &|memory, root, levels, iova, write| decode(memory, root, levels, iova, write, false)
        },
        allows: if force_snoop { allows_snooped } else { allows },
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn three_levels_hold_what_the_model_has(ops in prop::collection::vec(op(9, 27), 1..12)) {
        subject(39, false).run(&ops);
    }

    #[test]
    fn four_levels_hold_what_the_model_has(ops in prop::collection::vec(op(9, 36), 1..12)) {
        subject(48, true).run(&ops);
    }

    #[test]
    fn five_levels_hold_what_the_model_has(ops in prop::collection::vec(op(9, 45), 1..12)) {
        subject(57, false).run(&ops);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn leaves_are_cut_and_joined(ops in resizing::history(9, 27, 20)) {
        subject(39, false).run_resizing(&ops);
    }

    #[test]
    fn snooped_leaves_are_cut_and_joined(ops in resizing::history(9, 45, 20)) {
        subject(57, true).run_resizing(&ops);
    }
}

#[test]
fn every_permission_that_has_an_encoding_comes_back() {
    for bits in [39, 48, 57] {
        subject(bits, false).every_permission_comes_back();
        subject(bits, true).every_permission_comes_back();
    }
}

#[test]
fn memory_may_end_at_every_allocation() {
    for bits in [39, 48, 57] {
        subject(bits, true).memory_may_end_at_every_allocation();
    }
}

#[test]
fn memory_may_end_while_leaves_change() {
    for bits in [39, 48, 57] {
        subject(bits, true).memory_may_end_while_leaves_change();
    }
}

#[test]
fn hardware_records_writes_in_fresh_leaves() {
    for bits in [39, 48, 57] {
        subject(bits, true).writes_are_recorded(false);
    }
}

#[test]
fn levels_are_those_of_an_address_width() {
    assert_eq!(geometry(&config(20, false)), Ok((SIZES, 3, 0)));
    assert_eq!(geometry(&config(39, false)), Ok((SIZES, 3, 0)));
    assert_eq!(geometry(&config(40, false)), Ok((SIZES, 4, 0)));
    assert_eq!(geometry(&config(48, false)), Ok((SIZES, 4, 0)));
    assert_eq!(geometry(&config(49, false)), Ok((SIZES, 5, 0)));
    assert_eq!(geometry(&config(57, false)), Ok((SIZES, 5, 0)));
    assert_eq!(geometry(&config(58, false)), Err(Error::Unsupported("aperture")));
    let levels = |levels, bits| geometry(&Config { levels, ..config(bits, false) });
    assert_eq!(levels(2, 30), Err(Error::Unsupported("number of levels")));
    assert_eq!(levels(3, 48), Err(Error::Unsupported("number of levels")));
    assert_eq!(levels(5, 39), Ok((SIZES, 5, 0)));
    // CAP.SSLPS = 0.
    let small = Config { page_sizes: 1 << 12, ..config(48, false) };
    assert_eq!(geometry(&small), Ok((1 << 12, 4, 0)));
}
