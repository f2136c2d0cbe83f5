//! x86-64 tables, read by a decoder written from AMD 48882 2.2.6 and VT-d 3.6 and 9.7.

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

use lychgate_io_pgtable::{Config, Error, X86_64, X86_64Options};
use lychgate_types::{Iova, Memory, PhysAddr, Prot};
use proptest::prelude::*;
use support::histories::{Decoded, Reading, Subject, geometry, op};
use support::resizing;

const SIZES: u64 = 1 << 12 | 1 << 21 | 1 << 30;

/// Walks as hardware with NX and encryption by address bit `c_bit` (0: none), for a request with
/// PASID.
fn decode(
    memory: &dyn Memory,
    root: u64,
    levels: u32,
    iova: u64,
    write: bool,
    c_bit: u32,
) -> Reading {
    let top = 12 + 9 * levels - 1;
    if iova >> top != 0 {
        return Err(format!("{iova:#x} is not in the lower half"));
    }
    let (mut writable, mut user, mut executable) = (true, true, true);
    let mut table = root;
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * (level - 1);
        let at = PhysAddr::new(table + (iova >> shift & 511) * 8);
        let mut entry = memory.load_u64(at).map_err(|error| error.to_string())?;
        if entry & 1 == 0 {
            return if entry == 0 { Ok(None) } else { Err(format!("leftover {entry:#x}")) };
        }
        if entry >> 5 & 1 == 0 {
            return Err(format!("hardware would have to set A in {entry:#x}"));
        }
        // PWT, PCD, G, 11:9, the rest of 62:53.
        if entry & (0b1_0001_1000 | 0xe00 | 0x7fe << 52) != 0 {
            return Err(format!("unexpected bits in {entry:#x}"));
        }
        writable &= entry >> 1 & 1 == 1;
        user &= entry >> 2 & 1 == 1;
        executable &= entry >> 63 == 0;
        let encrypted = c_bit != 0 && entry >> c_bit & 1 == 1;
        let mut address = entry & 0x000f_ffff_ffff_f000;
        if encrypted {
            address -= 1 << c_bit;
        }
        let is_leaf = level == 1 || entry >> 7 & 1 == 1;
        if !is_leaf {
            if c_bit != 0 && !encrypted {
                return Err(format!("a table in the clear: {entry:#x}"));
            }
            if entry >> 6 & 1 == 1 || entry >> 63 == 1 {
                return Err(format!("unexpected bits in the table entry {entry:#x}"));
            }
            table = address;
            continue;
        }
        if level > 3 || (level == 1 && entry >> 7 & 1 == 1) {
            return Err(format!("PS in an entry of level {level}"));
        }
        let within = (1u64 << shift) - 1;
        if address & within != 0 {
            return Err(format!("reserved bits, or PAT, in the leaf {entry:#x}"));
        }
        if entry >> 52 & 1 == 1 {
            return Err(format!("the bit of tables in the leaf {entry:#x}"));
        }
        if write {
            assert!(writable);
            entry |= 1 << 6;
            memory.store_u64(at, entry).map_err(|error| error.to_string())?;
        }
        let mut prot = Prot::READ;
        for (holds, bit) in [
            (writable, Prot::WRITE),
            (!user, Prot::PRIV),
            (!executable, Prot::NOEXEC),
            (c_bit != 0 && !encrypted, Prot::MMIO),
        ] {
            if holds {
                prot |= bit;
            }
        }
        return Ok(Some(Decoded {
            phys: address | iova & within,
            page: within + 1,
            prot,
            dirty: entry >> 6 & 1 == 1,
        }));
    }
    Err("no leaf at the last level".into())
}

/// What a table with NX allows; W implies R.
fn allows_with_nx(prot: Prot) -> Option<Prot> {
    let access = if prot.contains(Prot::WRITE) {
        Prot::READ | Prot::WRITE
    } else if prot.contains(Prot::READ) {
        Prot::READ
    } else {
        return None;
    };
    Some(access | prot & (Prot::PRIV | Prot::NOEXEC))
}

fn allows_without_nx(prot: Prot) -> Option<Prot> {
    allows_with_nx(prot & (Prot::READ | Prot::WRITE | Prot::PRIV))
}

fn allows_encrypted(prot: Prot) -> Option<Prot> {
    allows_with_nx(prot).map(|allowed| allowed | prot & Prot::MMIO)
}

const NX: X86_64Options = X86_64Options { no_execute: true, record_writes: false };

fn plain(bits: u32, options: X86_64Options) -> Subject<'static, X86_64> {
    Subject {
        config: Config::new(bits, options),
        read: &|memory, root, levels, iova, write| decode(memory, root, levels, iova, write, 0),
        allows: if options.no_execute { allows_with_nx } else { allows_without_nx },
    }
}

fn encrypted() -> Subject<'static, X86_64<47>> {
    Subject {
        config: Config::new(47, NX),
        read: &|memory, root, levels, iova, write| decode(memory, root, levels, iova, write, 47),
        allows: allows_encrypted,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn four_levels_hold_what_the_model_has(ops in prop::collection::vec(op(9, 35), 1..12)) {
        plain(47, NX).run(&ops);
    }

    #[test]
    fn five_levels_hold_what_the_model_has(ops in prop::collection::vec(op(9, 44), 1..12)) {
        plain(56, X86_64Options::default()).run(&ops);
    }

    #[test]
    fn encrypted_tables_hold_what_the_model_has(ops in prop::collection::vec(op(9, 35), 1..12)) {
        encrypted().run(&ops);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(50))]

    #[test]
    fn leaves_are_cut_and_joined(ops in resizing::history(9, 35, 20)) {
        plain(47, NX).run_resizing(&ops);
    }

    #[test]
    fn leaves_that_record_writes_are_cut_and_joined(
        ops in resizing::history(9, 44, 20),
    ) {
        plain(56, X86_64Options { record_writes: true, ..NX }).run_resizing(&ops);
    }

    #[test]
    fn encrypted_leaves_are_cut_and_joined(
        ops in resizing::history(9, 35, 20),
    ) {
        encrypted().run_resizing(&ops);
    }
}

#[test]
fn every_permission_that_has_an_encoding_comes_back() {
    for record_writes in [false, true] {
        for no_execute in [false, true] {
            plain(47, X86_64Options { no_execute, record_writes }).every_permission_comes_back();
        }
    }
    encrypted().every_permission_comes_back();
}

#[test]
fn memory_may_end_at_every_allocation() {
    plain(47, NX).memory_may_end_at_every_allocation();
    plain(56, NX).memory_may_end_at_every_allocation();
    encrypted().memory_may_end_at_every_allocation();
}

#[test]
fn memory_may_end_while_leaves_change() {
    plain(47, NX).memory_may_end_while_leaves_change();
    plain(56, NX).memory_may_end_while_leaves_change();
    encrypted().memory_may_end_while_leaves_change();
}

#[test]
fn dirty_is_set_from_the_start_unless_writes_are_to_be_recorded() {
    plain(47, NX).writes_are_recorded(true);
    plain(56, X86_64Options { record_writes: true, ..NX }).writes_are_recorded(false);
}

#[test]
fn the_aperture_ends_below_the_sign_bit() {
    let config = |bits| Config::<X86_64>::new(bits, NX);
    assert_eq!(geometry(&config(32)), Ok((SIZES, 4, 0)));
    assert_eq!(geometry(&config(47)), Ok((SIZES, 4, 0)));
    assert_eq!(geometry(&config(48)), Ok((SIZES, 5, 0)));
    assert_eq!(geometry(&config(56)), Ok((SIZES, 5, 0)));
    assert_eq!(geometry(&config(57)), Err(Error::Unsupported("aperture")));
    let unsupported = Err(Error::Unsupported("number of levels"));
    assert_eq!(geometry(&Config { levels: 3, ..config(32) }), unsupported);
    assert_eq!(geometry(&Config { levels: 4, ..config(48) }), unsupported);
    assert_eq!(geometry(&Config { levels: 6, ..config(47) }), unsupported);
    let wide = Config { output_bits: 53, ..config(47) };
    assert_eq!(geometry(&wide), Err(Error::Unsupported("output address width")));
    let with_c_bit = Config { output_bits: 48, ..Config::<X86_64<47>>::new(47, NX) };
    assert_eq!(geometry(&with_c_bit), Err(Error::Unsupported("output address width")));
    let no_gigabytes = Config { page_sizes: !(1 << 30), ..config(47) };
    assert_eq!(geometry(&no_gigabytes), Ok((1 << 12 | 1 << 21, 4, 0)));
    assert_eq!(*config(47).aperture.end(), Iova::new((1 << 47) - 1));
}
