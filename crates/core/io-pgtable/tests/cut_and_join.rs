//! Cutting and joining leaves of AMD v1 tables, which have leaves of nearly every power of two.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod support {
    pub(crate) mod decoder;
    pub(crate) mod histories;
    pub(crate) mod model;
    pub(crate) mod resizing;
}

use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config};
use lychgate_types::{Memory, PhysAddr, Prot};
use proptest::prelude::*;
use support::decoder;
use support::histories::{Decoded, RW, Reading, Subject, geometry, op};
use support::resizing;

const DIRTY: u64 = 1 << 6;

/// Reads as hardware does, and records a write in the entry that the IOVA selects.
fn read(memory: &dyn Memory, root: u64, levels: u32, iova: u64, write: bool) -> Reading {
    let Some(there) = decoder::decode(memory, root, levels, iova).map_err(|why| why.0)? else {
        return Ok(None);
    };
    let mut entry = root;
    let mut level = levels;
    let at = loop {
        let at = PhysAddr::new(entry + 8 * (iova >> (3 + 9 * level) & 0x1ff));
        let next = memory.load_u64(at).unwrap();
        match (next >> 9 & 7) as u32 {
            0 | 7 => break at,
            below => (entry, level) = (next & 0x000f_ffff_ffff_f000, below),
        }
    };
    if write {
        memory.fetch_or_u64(at, DIRTY).unwrap();
    }
    let dirty = memory.load_u64(at).unwrap() & DIRTY != 0;
    let bits = [(there.read, Prot::READ), (there.write, Prot::WRITE)];
    let prot =
        bits.iter().filter(|(holds, _)| *holds).fold(Prot::CACHE, |all, (_, bit)| all | *bit);
    Ok(Some(Decoded { phys: there.phys, page: there.page, prot, dirty }))
}

fn allows(prot: Prot) -> Option<Prot> {
    Some(prot & RW | Prot::CACHE)
}

fn subject(levels: u32, bits: u32, page_sizes: u64) -> Subject<'static, AmdV1> {
    let config = Config::new(bits, AmdV1Options::default());
    Subject { config: Config { levels, page_sizes, ..config }, read: &read, allows }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn six_levels_hold_what_the_model_has(ops in prop::collection::vec(op(9, 52), 1..12)) {
        subject(6, 64, u64::MAX).run(&ops);
    }

    #[test]
    fn cuts_and_joins_do_what_the_model_does(ops in resizing::history(9, 36, 25)) {
        subject(4, 48, u64::MAX).run_resizing(&ops);
    }

    #[test]
    fn in_the_largest_space_too(ops in resizing::history(9, 52, 25)) {
        subject(6, 64, u64::MAX).run_resizing(&ops);
    }

    #[test]
    fn with_few_page_sizes_too(
        ops in resizing::history(9, 27, 20),
        sizes in any::<u64>(),
    ) {
        subject(3, 39, sizes | 1 << 12).run_resizing(&ops);
    }
}

#[test]
fn every_permission_has_an_encoding() {
    subject(4, 48, u64::MAX).every_permission_comes_back();
}

#[test]
fn memory_may_end_at_every_allocation() {
    subject(5, 57, u64::MAX).memory_may_end_at_every_allocation();
}

#[test]
fn memory_may_end_while_leaves_change() {
    for bits in [39, 48, 57, 64] {
        subject(6, bits, u64::MAX).memory_may_end_while_leaves_change();
    }
    let few = 1 << 12 | 1 << 23 | 1 << 30;
    subject(4, 48, few).memory_may_end_while_leaves_change();
}

#[test]
fn hardware_records_writes_in_fresh_leaves() {
    subject(6, 64, u64::MAX).writes_are_recorded(false);
}

#[test]
fn there_is_a_leaf_of_every_power_of_two_but_512_gib() {
    let (sizes, levels, _) = geometry(&subject(6, 64, u64::MAX).config).unwrap();
    assert_eq!((sizes, levels), ((1 << 52) - (1 << 12) - (1 << 39), 6));
}
