//! Cursors against a plain map of pages, while the table changes under them as well.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;

use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, ArmOptions, ArmStage1, ArmStage2, Config, Cursor, Error, Format, Gather,
    PageTable, RiscvFirstStage, RiscvOptions, RiscvSecondStage, Stop, VtdSecondStage,
    VtdSecondStageOptions, X86_64, X86_64Options,
};
use lychgate_types::{HeapPages, Iova, PhysAddr, Prot};
use proptest::prelude::*;

const RW: Prot = Prot::READ.union(Prot::WRITE);

/// In units of the granule.
#[derive(Clone, Debug)]
enum Op {
    /// By the cursor, single pages one after the other.
    Map { page: u64, pages: u64, frame: u64 },
    /// By the cursor, single pages one after the other.
    Unmap { page: u64, pages: u64 },
    /// By the cursor, all at once.
    MapRun { page: u64, pages: u64, frame: u64 },
    /// By the cursor, all at once.
    UnmapRun { page: u64, pages: u64 },
    /// By the table, so that leaf tables are full.
    Fill { table: u64, tables: u64 },
    /// By the table, whatever is mapped there, so that leaf tables go.
    Empty { table: u64, tables: u64 },
}

/// Operations around the ends of leaf tables of 2^`order` pages, and around the first IOVA beyond a
/// table of the level above.
fn op(order: u32) -> impl Strategy<Value = Op> {
    let page = (0..4u64, any::<bool>(), 0..48u64).prop_map(move |(table, far, near)| {
        let beyond = if far { 1 << (2 * order) } else { 0 };
        (beyond + (table << order) + near).saturating_sub(24)
    });
    let tables = || (0..3u64, 1..3u64);
    let frame = || 0..1u64 << 10;
    prop_oneof![
        4 => (page.clone(), 1..40u64, frame())
            .prop_map(|(page, pages, frame)| Op::Map { page, pages, frame }),
        4 => (page.clone(), 1..40u64).prop_map(|(page, pages)| Op::Unmap { page, pages }),
        1 => (page.clone(), 1..40u64, frame())
            .prop_map(|(page, pages, frame)| Op::MapRun { page, pages, frame }),
        1 => (page, 1..40u64).prop_map(|(page, pages)| Op::UnmapRun { page, pages }),
        1 => tables().prop_map(|(table, tables)| Op::Fill { table, tables }),
        2 => tables().prop_map(|(table, tables)| Op::Empty { table, tables }),
    ]
}

/// A table, its cursor, and what they should hold: frames by page.
struct Bench<'t, F: Format> {
    table: &'t PageTable<F, &'t HeapPages>,
    pages: &'t HeapPages,
    cursor: Cursor<'t, F, &'t HeapPages>,
    model: BTreeMap<u64, u64>,
}

impl<F: Format> Bench<'_, F> {
    fn iova(page: u64) -> Iova {
        Iova::new(page << F::GRANULE_SHIFT)
    }

    fn phys(frame: u64) -> PhysAddr {
        PhysAddr::new(frame << F::GRANULE_SHIFT)
    }

    fn grow_to(&self, end: u64) {
        let last = Iova::new((end << F::GRANULE_SHIFT) - 1);
        self.table.grow(last, |_| ()).unwrap();
    }

    fn map(&mut self, page: u64, pages: u64, frame: u64) {
        let len = pages << F::GRANULE_SHIFT;
        let mut gather = Gather::new();
        let (iova, phys) = (Self::iova(page), Self::phys(frame));
        let result = self.cursor.map(iova, phys, len, RW, &mut gather);
        let taken = self.model.range(page..page + pages).next().map(|(&page, _)| Self::iova(page));
        match taken {
            Some(at) => assert_eq!(result, Err(Error::AlreadyMapped { at })),
            None => {
                assert_eq!(result, Ok(()));
                self.model.extend((0..pages).map(|n| (page + n, frame + n)));
            }
        }
        gather.release(self.pages);
    }

    fn unmap(&mut self, page: u64, pages: u64) {
        let mut gather = Gather::new();
        let len = pages << F::GRANULE_SHIFT;
        let done = self.cursor.unmap(Self::iova(page), len, &mut gather).unwrap();
        let there = (page..page + pages).take_while(|page| self.model.contains_key(page)).count();
        let there = (there as u64) << F::GRANULE_SHIFT;
        match done.stop {
            // A large leaf that passes the end of the range stays.
            Some(Stop::Leaf { .. }) => assert!(done.bytes < there),
            Some(Stop::Hole) => assert!(done.bytes == there && there < len),
            None => assert_eq!((done.bytes, there), (len, len)),
        }
        for page in page..page + (done.bytes >> F::GRANULE_SHIFT) {
            self.model.remove(&page);
        }
        assert_eq!(gather.is_empty(), done.bytes == 0);
        gather.release(self.pages);
    }

    /// Unmaps by the table all that is mapped, leaf by leaf or more at once.
    fn empty(&mut self, first: u64, pages: u64) {
        let mut at = first;
        let mut gather = Gather::new();
        while let Some((&page, _)) = self.model.range(at..first + pages).next() {
            let len = (first + pages - page) << F::GRANULE_SHIFT;
            let done = self.table.unmap_mapped(Self::iova(page), len, &mut gather).unwrap();
            // The table may take a table with holes for full.
            let end = page + (done.bytes >> F::GRANULE_SHIFT);
            self.model.retain(|other, _| !(page..end).contains(other));
            at = match done.stop {
                Some(Stop::Leaf { start, size }) => (start.get() + size) >> F::GRANULE_SHIFT,
                _ => end.max(page + 1),
            };
        }
        gather.release(self.pages);
    }

    fn apply(&mut self, op: &Op) {
        let table_pages = 1u64 << F::INDEX_BITS;
        match *op {
            Op::Map { page, pages, frame } => {
                self.grow_to(page + pages);
                for n in 0..pages {
                    self.map(page + n, 1, frame + n * 3);
                }
            }
            Op::Unmap { page, pages } => (page..page + pages).for_each(|page| self.unmap(page, 1)),
            Op::MapRun { page, pages, frame } => {
                self.grow_to(page + pages);
                self.map(page, pages, frame);
            }
            Op::UnmapRun { page, pages } => self.unmap(page, pages),
            Op::Fill { table, tables } => {
                let (first, pages) = (table * table_pages, tables * table_pages);
                self.empty(first, pages);
                if self.model.range(first..first + pages).next().is_none() {
                    // Not aligned as the IOVA is, so in single granules.
                    let mut gather = Gather::new();
                    let (iova, phys) = (Self::iova(first), Self::phys(first + 1));
                    let len = pages << F::GRANULE_SHIFT;
                    self.table.map(iova, phys, len, RW, &mut gather).unwrap();
                    self.model.extend((first..first + pages).map(|page| (page, page + 1)));
                    gather.release(self.pages);
                }
            }
            Op::Empty { table, tables } => self.empty(table * table_pages, tables * table_pages),
        }
    }

    /// The cursor, the table and the model agree on some pages, a step apart from `first` on.
    fn check(&mut self, first: u64, step: usize) {
        let last = self.table.aperture().end().get() >> F::GRANULE_SHIFT;
        for page in (first..=last).step_by(step).take(80) {
            let iova = Iova::new((page << F::GRANULE_SHIFT) + 0x123);
            let walked = self.cursor.walk(iova);
            assert_eq!(walked, self.table.walk(iova), "{iova}");
            let phys = self.model.get(&page).map(|&frame| Self::phys(frame).get() + 0x123);
            assert_eq!(walked.map(|there| there.phys.get()), phys, "{iova}");
        }
    }
}

fn check<F: Format>(config: Config<F>, ops: &[Op]) {
    let pages = HeapPages::new();
    let table = PageTable::new(&pages, config).unwrap();
    let cursor = table.cursor();
    let mut bench = Bench { table: &table, pages: &pages, cursor, model: BTreeMap::new() };
    for op in ops {
        bench.apply(op);
        bench.check(0, 1);
        bench.check((1 << F::INDEX_BITS) - 24, 1);
        bench.check(0, (1 << F::INDEX_BITS) + 1);
    }
    drop(table);
    assert_eq!(pages.live(), 0);
}

macro_rules! formats {
    ($($name:ident: $format:ty, $bits:literal, $options:expr;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig::with_cases(24))]

            $(
                #[test]
                fn $name(
                    ops in prop::collection::vec(op(<$format as Format>::INDEX_BITS), 1..24)
                ) {
                    check(Config::<$format>::new($bits, $options), &ops);
                }
            )*
        }
    };
}

formats! {
    amd_v1: AmdV1, 64, AmdV1Options::default();
    amd_v1_with_granules_of_2k: AmdV1<11>, 48, AmdV1Options::default();
    x86_64: X86_64, 47, X86_64Options::default();
    x86_64_of_5_levels: X86_64, 56, X86_64Options::default();
    vtd_second_stage: VtdSecondStage, 48, VtdSecondStageOptions::default();
    riscv_first_stage: RiscvFirstStage, 38, RiscvOptions::default();
    riscv_second_stage: RiscvSecondStage, 41, RiscvOptions::default();
    arm_stage_1_of_4k: ArmStage1, 48, ArmOptions::default();
    arm_stage_1_of_4k_and_52_bits: ArmStage1<12, true>, 52, ArmOptions::default();
    arm_stage_1_of_16k: ArmStage1<14>, 47, ArmOptions::default();
    arm_stage_2_of_4k: ArmStage2, 40, ArmOptions::default();
    arm_stage_2_of_64k: ArmStage2<16, true>, 52, ArmOptions::default();
}

/// Whole tables of every level go, and their memory becomes tables for other IOVAs: a cursor that was
/// there before must not take them for its own.
#[test]
fn tables_may_go_and_come_back_elsewhere_under_a_cursor() {
    type F = AmdV1<11>;
    let pages = HeapPages::new();
    let config = Config::<F> { levels: 4, ..Config::new(40, AmdV1Options::default()) };
    let table = PageTable::new(&pages, config).unwrap();
    // What one entry of each level spans, mapped by granules because the frames are one off.
    for level in 1..3 {
        let span = 1u64 << (F::GRANULE_SHIFT + F::INDEX_BITS * level);
        let (here, elsewhere) = (Iova::new(0), Iova::new(3 << 35));
        let (granule, frames) = (1 << F::GRANULE_SHIFT, PhysAddr::new(1 << F::GRANULE_SHIFT));
        let mut gather = Gather::new();
        let mut cursor = table.cursor();
        table.map(here, frames, span, RW, &mut gather).unwrap();
        let at = Iova::new(span / 2);
        assert!(cursor.walk(at).is_some());

        assert_eq!(table.unmap(here, span, &mut gather).unwrap().bytes, span);
        assert!(gather.dead_tables() != 0);
        gather.release(&pages);
        let live = pages.live();
        table.map(elsewhere, frames, span, RW, &mut gather).unwrap();
        assert!(pages.live() > live);

        assert_eq!(cursor.walk(at), None);
        assert_eq!(cursor.unmap(at, granule, &mut gather).unwrap().bytes, 0);
        let single = PhysAddr::new(7 << F::GRANULE_SHIFT);
        cursor.map(at, single, granule, RW, &mut gather).unwrap();
        assert_eq!(table.walk(at).map(|there| there.phys), Some(single));
        for offset in (0..span).step_by(1 << F::GRANULE_SHIFT) {
            let there = table.walk(Iova::new(elsewhere.get() + offset)).unwrap();
            assert_eq!(there.phys, PhysAddr::new(frames.get() + offset));
        }
        assert_eq!(cursor.unmap(at, granule, &mut gather).unwrap().bytes, granule);
        assert_eq!(table.unmap(elsewhere, span, &mut gather).unwrap().bytes, span);
        gather.release(&pages);
    }
}

#[test]
fn a_table_may_grow_under_a_cursor() {
    let pages = HeapPages::new();
    let config = Config::<AmdV1> { levels: 1, ..Config::new(64, AmdV1Options::default()) };
    let table = PageTable::new(&pages, config).unwrap();
    let mut cursor = table.cursor();
    let mut gather = Gather::new();
    let first = Iova::new(0x1f_f000);
    for levels in 1..=6 {
        // The last page of a table of this many levels.
        let iova = Iova::new(((1 << (9 * levels).min(52)) - 1) << 12);
        let phys = PhysAddr::new(levels << 12);
        let result = cursor.map(iova, phys, 0x1000, RW, &mut gather);
        if levels != 1 {
            assert!(matches!(result, Err(Error::BeyondTop { .. })));
            table.grow(iova, |_| ()).unwrap();
            cursor.map(iova, phys, 0x1000, RW, &mut gather).unwrap();
        }
        assert_eq!(cursor.walk(iova).map(|there| there.phys), Some(phys));
        assert_eq!(cursor.walk(first).map(|there| there.phys), Some(PhysAddr::new(0x1000)));
    }
}

#[test]
fn a_cursor_keeps_to_the_aperture_and_to_what_can_be_mapped() {
    let pages = HeapPages::new();
    let aperture = Iova::new(0x10_1000)..=Iova::new(0x10_2fff);
    let config =
        Config { aperture, output_bits: 36, ..Config::<X86_64>::new(47, X86_64Options::default()) };
    let table = PageTable::new(&pages, config).unwrap();
    let (mut cursor, mut gather) = (table.cursor(), Gather::new());
    let phys = PhysAddr::new(0x4000);
    let mut map = |iova, phys, prot| {
        let before = cursor.walk(Iova::new(iova));
        let result = cursor.map(Iova::new(iova), phys, 0x1000, prot, &mut gather);
        if result.is_err() {
            assert_eq!(table.map(Iova::new(iova), phys, 0x1000, prot, &mut gather), result);
        }
        (before.is_some(), result)
    };
    assert_eq!(map(0x10_1000, phys, RW), (false, Ok(())));
    let at = Iova::new(0x10_1000);
    assert_eq!(map(0x10_1000, phys, RW), (true, Err(Error::AlreadyMapped { at })));
    assert!(matches!(map(0x10_0000, phys, RW), (false, Err(Error::IovaOutOfRange { .. }))));
    assert!(matches!(map(0x10_3000, phys, RW), (false, Err(Error::IovaOutOfRange { .. }))));
    let misaligned = Err(Error::Misaligned { granule: 0x1000 });
    assert_eq!(map(0x10_2000, PhysAddr::new(0x4800), RW), (false, misaligned));
    let wide = PhysAddr::new(1 << 36);
    assert!(matches!(map(0x10_2000, wide, RW), (false, Err(Error::OutputOutOfRange { .. }))));
    assert_eq!(map(0x10_2000, phys, Prot::NONE), (false, Err(Error::Permissions)));
    let out_of_range = cursor.unmap(Iova::new(0x10_3000), 0x1000, &mut gather);
    assert!(matches!(out_of_range, Err(Error::IovaOutOfRange { .. })));
    assert!(matches!(cursor.unmap(at, 0, &mut gather), Err(Error::Empty)));
}
