//! Unmapping what is known to be mapped, next to unmapping with a look.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, ArmOptions, ArmStage1, ArmStage2, Config, Format, Gather, PageTable,
    RiscvFirstStage, RiscvOptions, RiscvSecondStage, Stop, Unmapped, VtdSecondStage,
    VtdSecondStageOptions, X86_64, X86_64Options,
};
use lychgate_types::{HeapPages, Iova, PhysAddr, PhysRun, Prot};
use proptest::prelude::*;

const RW: Prot = Prot::READ.union(Prot::WRITE);

/// What an unmap did, as far as its caller and hardware can tell.
#[derive(PartialEq, Debug)]
struct Effect {
    unmapped: Unmapped,
    range: Option<(u64, u64)>,
    table_levels: u8,
    dead_tables: usize,
    left: Vec<Option<u64>>,
    live: usize,
}

/// Maps `runs`, in granules, from `page` on, and unmaps `pages` of it from `skip` on.
fn effect<F: Format>(
    config: Config<F>,
    page: u64,
    runs: &[(u64, u64)],
    part: (u64, u64),
    known: bool,
) -> (Effect, u64) {
    let pages = HeapPages::new();
    let table = PageTable::new(&pages, config).unwrap();
    let granule = table.granule();
    let frames = |&(frame, count): &(u64, u64)| PhysRun {
        start: PhysAddr::new(frame * granule),
        len: count * granule,
    };
    let frames: Vec<PhysRun> = runs.iter().map(frames).collect();
    let mut gather = Gather::new();
    let first = Iova::new(page * granule);
    let len = table.map_batch(first, &frames, RW, &mut gather).unwrap();
    assert!(gather.is_empty());

    let (skip, rest) = (part.0 * granule, part.1 * granule);
    let at = Iova::new(first.get() + skip % len);
    let rest = rest.min(len - skip % len);
    let unmapped = if known {
        table.unmap_mapped(at, rest, &mut gather)
    } else {
        table.unmap(at, rest, &mut gather)
    };
    let range = gather.range().map(|range| (range.start().get(), range.end().get()));
    let (table_levels, sizes) = (gather.table_levels(), gather.leaf_sizes());
    let dead_tables = gather.dead_tables();
    gather.release(&pages);
    let walk = |n| table.walk(Iova::new(first.get() + n * granule)).map(|it| it.phys.get());
    let left = (0..len / granule).map(walk).collect();
    let live = pages.live();
    let unmapped = unmapped.unwrap();
    (Effect { unmapped, range, table_levels, dead_tables, left, live }, sizes)
}

fn same<F: Format + Clone>(config: &Config<F>, page: u64, runs: &[(u64, u64)], part: (u64, u64)) {
    let (looked, sizes) = effect(config.clone(), page, runs, part, false);
    let (known, perhaps) = effect(config.clone(), page, runs, part, true);
    assert_eq!(known, looked);
    // Of tables that are not read it can only say what they may have held.
    assert_eq!(sizes & !perhaps, 0);
}

/// A first page around the ends of tables of 2^`order` entries, runs of frames, and a part of them.
fn history(order: u32) -> impl Strategy<Value = (u64, Vec<(u64, u64)>, (u64, u64))> {
    let table = 1u64 << order;
    let page = (0..3u64, 0..5u64).prop_map(move |(n, near)| (n * table + near).saturating_sub(2));
    let length = prop_oneof![1..40u64, Just(table), Just(table * 3 / 2), Just(table * 2)];
    let frame = prop_oneof![0..1u64 << 12, (0..8u64).prop_map(move |n| n * table)];
    let runs = prop::collection::vec((frame, length), 1..4);
    let skip = prop_oneof![2 => Just(0), 1 => 0..table, 1 => Just(table)];
    let count = prop_oneof![2 => Just(u64::MAX >> 20), 1 => 1..table, 1 => Just(table)];
    (page, runs, (skip, count))
}

macro_rules! formats {
    ($($name:ident: $format:ty, $bits:literal, $options:expr;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig::with_cases(24))]

            $(
                #[test]
                fn $name((page, runs, part) in history(<$format as Format>::INDEX_BITS)) {
                    same(&Config::<$format>::new($bits, $options), page, &runs, part);
                }
            )*
        }
    };
}

formats! {
    amd_v1: AmdV1, 39, AmdV1Options::default();
    amd_v1_with_granules_of_2k: AmdV1<11>, 35, AmdV1Options::default();
    x86_64: X86_64, 47, X86_64Options::default();
    vtd_second_stage: VtdSecondStage, 48, VtdSecondStageOptions::default();
    riscv_first_stage: RiscvFirstStage, 38, RiscvOptions::default();
    riscv_second_stage: RiscvSecondStage, 41, RiscvOptions::default();
    arm_stage_1_of_4k: ArmStage1, 48, ArmOptions::default();
    arm_stage_1_of_16k: ArmStage1<14>, 47, ArmOptions::default();
    arm_stage_2_of_4k: ArmStage2, 40, ArmOptions::default();
}

/// Four leaf tables full of granules, from 1 GiB on.
fn four_tables(pages: &HeapPages) -> PageTable<X86_64, &HeapPages> {
    let config = Config::<X86_64>::new(47, X86_64Options::default());
    let table = PageTable::new(pages, config).unwrap();
    let mut gather = Gather::new();
    table.map(Iova::new(1 << 30), PhysAddr::new(0x1000), 8 << 20, RW, &mut gather).unwrap();
    table
}

#[test]
fn a_hole_in_a_whole_table_counts_as_unmapped() {
    let pages = HeapPages::new();
    let table = four_tables(&pages);
    let mut gather = Gather::new();
    let hole = Iova::new((1 << 30) + (3 << 20));
    assert_eq!(table.unmap(hole, 0x1000, &mut gather).unwrap().bytes, 0x1000);
    gather.release(&pages);
    let unmapped = table.unmap_mapped(Iova::new(1 << 30), 8 << 20, &mut gather).unwrap();
    assert_eq!(unmapped, Unmapped { bytes: 8 << 20, stop: None });
    assert_eq!(gather.dead_tables(), 4);
    gather.release(&pages);
    for page in 0..2048 {
        assert_eq!(table.walk(Iova::new((1 << 30) + (page << 12))), None);
    }
    drop(table);
    assert_eq!(pages.live(), 0);
}

#[test]
fn a_hole_elsewhere_ends_it() {
    let pages = HeapPages::new();
    let table = four_tables(&pages);
    let mut gather = Gather::new();
    let stopped = |bytes| Unmapped { bytes, stop: Some(Stop::Hole) };

    // In a table that the range covers a part of.
    let hole = Iova::new((1 << 30) + (7 << 20));
    assert_eq!(table.unmap(hole, 0x1000, &mut gather).unwrap().bytes, 0x1000);
    let most = (8 << 20) - 0x2000;
    let unmapped = table.unmap_mapped(Iova::new(1 << 30), most, &mut gather).unwrap();
    assert_eq!(unmapped, stopped(7 << 20));
    assert!(table.walk(Iova::new(hole.get() + 0x1000)).is_some());

    // Where a whole table is missing.
    table.map(Iova::new(1 << 30), PhysAddr::new(0x1000), 2 << 20, RW, &mut gather).unwrap();
    let unmapped = table.unmap_mapped(Iova::new(1 << 30), 8 << 20, &mut gather).unwrap();
    assert_eq!(unmapped, stopped(2 << 20));
    assert!(table.walk(Iova::new(hole.get() + 0x1000)).is_some());
    gather.release(&pages);
    drop(table);
    assert_eq!(pages.live(), 0);
}
