//! RISC-V tables, read by a decoder written from the Privileged ISA (Sv39 to Sv57, hypervisor
//! extension, Svnapot, Svpbmt).

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

use lychgate_io_pgtable::{
    Config, Error, Gather, PageTable, RiscvFirstStage, RiscvOptions, RiscvSecondStage,
};
use lychgate_types::{HeapPages, Iova, Memory, PhysAddr, Prot};
use proptest::prelude::*;
use support::histories::{Decoded, RW, Reading, Subject, geometry, op};
use support::resizing;

const SIZES: u64 = 1 << 12 | 1 << 16 | 1 << 21 | 1 << 30 | 1 << 39 | 1 << 48;

/// A PTE, taken apart.
struct Pte(u64);

impl Pte {
    fn bit(&self, bit: u32) -> bool {
        self.0 >> bit & 1 == 1
    }

    fn ppn(&self) -> u64 {
        self.0 << 10 >> 20
    }

    fn pbmt(&self) -> u64 {
        self.0 >> 61 & 3
    }
}

/// Walks as hardware does: satp or hgatp with `levels` levels at `root`.
fn decode(
    memory: &dyn Memory,
    root: u64,
    levels: u32,
    iova: u64,
    write: bool,
    second_stage: bool,
) -> Reading {
    let bits = match (levels, second_stage) {
        (3..=5, false) => 12 + 9 * levels,
        (3..=5, true) => 14 + 9 * levels,
        _ => return Err(format!("{levels} levels are no mode")),
    };
    if second_stage {
        if iova >> bits != 0 || root & 0x3fff != 0 {
            return Err(format!("{iova:#x} from {root:#x}"));
        }
    } else if ((iova << (64 - bits)) as i64 >> (64 - bits)) as u64 != iova {
        return Err(format!("{iova:#x} is not sign-extended"));
    }
    let mut table = root;
    for i in (0..levels).rev() {
        let shift = 12 + 9 * i;
        let wide = second_stage && i + 1 == levels;
        let vpn = iova >> shift & if wide { 0x7ff } else { 0x1ff };
        let at = PhysAddr::new(table + 8 * vpn);
        let mut pte = Pte(memory.load_u64(at).map_err(|error| error.to_string())?);
        if !pte.bit(0) {
            return if pte.0 == 0 { Ok(None) } else { Err(format!("leftover {:#x}", pte.0)) };
        }
        let [r, w, x, u] = [1, 2, 3, 4].map(|bit| pte.bit(bit));
        if (54..=60).any(|bit| pte.bit(bit)) || pte.pbmt() == 3 || (w && !r) || pte.bit(5) {
            return Err(format!("reserved bits, or G, in {:#x}", pte.0));
        }
        if !r && !x {
            if u || pte.bit(6) || pte.bit(7) || pte.pbmt() != 0 || pte.bit(63) || pte.bit(9) {
                return Err(format!("reserved bits in the table entry {:#x}", pte.0));
            }
            table = pte.ppn() << 12;
            continue;
        }
        if second_stage && !u {
            return Err(format!("a second-stage leaf without U: {:#x}", pte.0));
        }
        if !pte.bit(6) || pte.bit(8) || pte.bit(9) {
            return Err(format!("A clear or RSW set in the leaf {:#x}", pte.0));
        }
        if pte.ppn() & ((1 << (9 * i)) - 1) != 0 {
            return Err(format!("misaligned superpage {:#x}", pte.0));
        }
        let (mut base, mut page) = (pte.ppn() << 12, 1u64 << shift);
        if pte.bit(63) {
            if i != 0 || pte.ppn() & 0xf != 8 {
                return Err(format!("reserved use of N in {:#x}", pte.0));
            }
            let first = at.get() & !0x7f;
            for copy in (first..first + 0x80).step_by(8) {
                let copy =
                    memory.load_u64(PhysAddr::new(copy)).map_err(|error| error.to_string())?;
                // Hardware updates A and D in one of them.
                if (copy ^ pte.0) & !0xc0 != 0 {
                    return Err(format!("copies of {:#x} differ", pte.0));
                }
            }
            (base, page) = ((pte.ppn() & !0xf) << 12, 0x1_0000);
        }
        if write {
            assert!(w);
            pte.0 |= 0xc0;
            memory.store_u64(at, pte.0).map_err(|error| error.to_string())?;
        }
        let mut prot = Prot::READ;
        let pbmt = pte.pbmt();
        for (holds, bit) in [
            (w, Prot::WRITE),
            (!x, Prot::NOEXEC),
            (!u, Prot::PRIV),
            (pbmt == 0, Prot::CACHE),
            (pbmt == 2, Prot::MMIO),
        ] {
            if holds {
                prot |= bit;
            }
        }
        let phys = base | iova & (page - 1);
        return Ok(Some(Decoded { phys, page, prot, dirty: pte.bit(7) }));
    }
    Err("no leaf at the last level".into())
}

/// First stage without Svpbmt; W implies R.
fn allows_first(prot: Prot) -> Option<Prot> {
    let access = match (prot.contains(Prot::READ), prot.contains(Prot::WRITE)) {
        (_, true) => RW,
        (true, false) => Prot::READ,
        (false, false) => return None,
    };
    Some(access | prot & (Prot::NOEXEC | Prot::PRIV) | Prot::CACHE)
}

fn with_svpbmt(allowed: Prot, prot: Prot) -> Prot {
    let rest = allowed & (RW | Prot::NOEXEC | Prot::PRIV);
    if prot.contains(Prot::MMIO) { rest | Prot::MMIO } else { rest | prot & Prot::CACHE }
}

fn allows_first_svpbmt(prot: Prot) -> Option<Prot> {
    allows_first(prot).map(|allowed| with_svpbmt(allowed, prot))
}

/// The second stage does not know privilege.
fn allows_second(prot: Prot) -> Option<Prot> {
    allows_first(prot & (RW | Prot::NOEXEC))
}

fn allows_second_svpbmt(prot: Prot) -> Option<Prot> {
    allows_second(prot).map(|allowed| with_svpbmt(allowed, prot))
}

fn first(bits: u32, options: RiscvOptions) -> Subject<'static, RiscvFirstStage> {
    Subject {
        config: Config::new(bits, options),
        read: &|memory, root, levels, iova, write| decode(memory, root, levels, iova, write, false),
        allows: if options.memory_types { allows_first_svpbmt } else { allows_first },
    }
}

fn second(bits: u32, options: RiscvOptions) -> Subject<'static, RiscvSecondStage> {
    Subject {
        config: Config::new(bits, options),
        read: &|memory, root, levels, iova, write| decode(memory, root, levels, iova, write, true),
        allows: if options.memory_types { allows_second_svpbmt } else { allows_second },
    }
}

const PLAIN: RiscvOptions = RiscvOptions { memory_types: false, record_writes: false };
const TYPES: RiscvOptions = RiscvOptions { memory_types: true, record_writes: false };

proptest! {
    #![proptest_config(ProptestConfig::with_cases(80))]

    #[test]
    fn sv39_holds_what_the_model_has(ops in prop::collection::vec(op(9, 26), 1..12)) {
        first(38, TYPES).run(&ops);
    }

    #[test]
    fn sv48_holds_what_the_model_has(ops in prop::collection::vec(op(9, 35), 1..12)) {
        first(47, PLAIN).run(&ops);
    }

    #[test]
    fn sv57_holds_what_the_model_has(ops in prop::collection::vec(op(9, 44), 1..12)) {
        first(56, TYPES).run(&ops);
    }

    #[test]
    fn sv39x4_holds_what_the_model_has(ops in prop::collection::vec(op(9, 29), 1..12)) {
        second(41, PLAIN).run(&ops);
    }

    #[test]
    fn sv48x4_holds_what_the_model_has(ops in prop::collection::vec(op(9, 38), 1..12)) {
        second(50, TYPES).run(&ops);
    }

    #[test]
    fn sv57x4_holds_what_the_model_has(ops in prop::collection::vec(op(9, 47), 1..12)) {
        second(59, TYPES).run(&ops);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn first_stage_leaves_are_cut_and_joined(
        ops in resizing::history(9, 26, 20),
    ) {
        first(38, TYPES).run_resizing(&ops);
    }

    #[test]
    fn second_stage_leaves_are_cut_and_joined(
        ops in resizing::history(9, 38, 20),
    ) {
        second(50, RiscvOptions { record_writes: true, ..PLAIN }).run_resizing(&ops);
    }
}

#[test]
fn every_permission_that_has_an_encoding_comes_back() {
    for memory_types in [false, true] {
        for record_writes in [false, true] {
            let options = RiscvOptions { memory_types, record_writes };
            first(47, options).every_permission_comes_back();
            second(59, options).every_permission_comes_back();
        }
    }
}

#[test]
fn memory_may_end_at_every_allocation() {
    for bits in [38, 47, 56] {
        first(bits, PLAIN).memory_may_end_at_every_allocation();
        second(bits + 3, TYPES).memory_may_end_at_every_allocation();
    }
}

#[test]
fn memory_may_end_while_leaves_change() {
    for bits in [38, 47, 56] {
        first(bits, PLAIN).memory_may_end_while_leaves_change();
        second(bits + 3, TYPES).memory_may_end_while_leaves_change();
    }
}

#[test]
fn dirty_is_set_from_the_start_unless_writes_are_to_be_recorded() {
    first(38, PLAIN).writes_are_recorded(true);
    first(47, RiscvOptions { record_writes: true, ..TYPES }).writes_are_recorded(false);
    second(41, PLAIN).writes_are_recorded(true);
    second(50, RiscvOptions { record_writes: true, ..TYPES }).writes_are_recorded(false);
}

#[test]
fn modes_are_those_of_the_specification() {
    let first = |bits| geometry(&Config::<RiscvFirstStage>::new(bits, PLAIN));
    assert_eq!(first(20), Ok((SIZES, 3, 0)));
    assert_eq!(first(38), Ok((SIZES, 3, 0)));
    assert_eq!(first(39), Ok((SIZES, 4, 0)));
    assert_eq!(first(47), Ok((SIZES, 4, 0)));
    assert_eq!(first(56), Ok((SIZES, 5, 0)));
    assert_eq!(first(57), Err(Error::Unsupported("aperture")));
    let config = |bits| Config::<RiscvSecondStage>::new(bits, PLAIN);
    assert_eq!(geometry(&config(20)), Ok((SIZES, 3, 2)));
    assert_eq!(geometry(&config(41)), Ok((SIZES, 3, 2)));
    assert_eq!(geometry(&config(42)), Ok((SIZES, 4, 2)));
    assert_eq!(geometry(&config(50)), Ok((SIZES, 4, 2)));
    assert_eq!(geometry(&config(59)), Ok((SIZES, 5, 2)));
    assert_eq!(geometry(&config(60)), Err(Error::Unsupported("aperture")));
    let narrow = Config { root_extra_bits: 0, ..config(39) };
    assert_eq!(geometry(&narrow), Err(Error::Unsupported("concatenation of roots")));
    assert_eq!(geometry(&config(41).concatenated()), Ok((SIZES, 3, 2)));
    let no_napot = Config { page_sizes: !(1 << 16), ..config(41) };
    assert_eq!(geometry(&no_napot), Ok((SIZES & !(1 << 16), 3, 2)));
}

#[test]
fn entries_are_those_worked_out_by_hand() {
    let pages = HeapPages::new();
    let table = PageTable::<RiscvFirstStage, _>::new(&pages, Config::new(47, PLAIN)).unwrap();
    let mut gather = Gather::new();
    let rw = RW | Prot::NOEXEC;
    let (small, large) = (Iova::new(0x1000), Iova::new(0x1_0000));
    table.map(small, PhysAddr::new(0x8765_4000), 0x1000, rw, &mut gather).unwrap();
    table.map(large, PhysAddr::new(0x8765_0000), 0x1_0000, rw, &mut gather).unwrap();
    let entry = |iova| table.path(iova).steps().last().unwrap().entry;
    assert_eq!(entry(small), 0x21d9_50d7);
    assert_eq!(entry(large), 0x8000_0000_21d9_60d7);
    assert_eq!(entry(Iova::new(0x1_f000)), 0x8000_0000_21d9_60d7);
}
