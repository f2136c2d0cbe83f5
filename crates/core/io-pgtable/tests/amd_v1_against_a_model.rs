//! Random changes of an AMD v1 table against a plain model, and against a decoder written from the
//! specification that reads the tables as hardware does.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod support {
    pub(crate) mod decoder;
    pub(crate) mod model;
}

use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Error, Gather, PageTable, Stop};
use lychgate_types::{HeapPages, Iova, PhysAddr, PhysRun, Prot};
use proptest::prelude::*;
use support::decoder::decode;
use support::model::{End, Model};

const RW: Prot = Prot::READ.union(Prot::WRITE);

#[derive(Clone, Debug)]
enum Op {
    Map { page: u64, runs: Vec<(u64, u64)>, prot: Prot, memory_for: Option<usize> },
    Unmap { page: u64, pages: u64 },
    Grow { bits: u32 },
}

/// Pages around places where something ends: a table of each level, a root of each size.
fn page() -> impl Strategy<Value = u64> {
    let edges = prop_oneof![
        6 => Just(0x400u64),
        3 => Just(1 << 18),
        2 => Just(1 << 27),
        1 => Just(1 << 36),
        1 => Just(1 << 45),
        1 => Just((1 << 52) - 0x800),
    ];
    let near = prop_oneof![(0..0x400u64), (0..16u64).prop_map(|n| n * 64)];
    (edges, near, any::<bool>()).prop_map(
        |(edge, near, below)| {
            if below { edge - near.min(edge) } else { edge + near }
        },
    )
}

fn length() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 1..8u64,
        3 => (0..11u32).prop_map(|order| 1 << order),
        2 => 1..0x600u64,
    ]
}

fn runs() -> impl Strategy<Value = Vec<(u64, u64)>> {
    let frame = prop_oneof![
        2 => 0..0x2000u64,
        3 => (0..64u64).prop_map(|n| n * 0x200),
        2 => (0..64u64).prop_map(|n| n * 0x10),
    ];
    let piece = prop_oneof![3 => 1..4u64, 1 => 4..70u64];
    // Single pages some of which continue each other, at every place of a table.
    let pieces = prop::collection::vec((frame.clone(), piece), 1..24).prop_map(|pieces| {
        let singles = |(frame, pages)| (0..pages).map(move |n| (frame + n, 1));
        pieces.into_iter().flat_map(singles).collect()
    });
    prop_oneof![
        3 => prop::collection::vec((frame, length()), 1..4),
        2 => pieces,
        1 => (0..0x1000u64, 1..0x400u64)
            .prop_map(|(frame, pages)| (0..pages).map(|page| (frame + page, 1)).collect()),
        1 => prop::collection::vec((0..0x10000u64, Just(1u64)), 1..0x300),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let prot = prop_oneof![Just(RW), Just(Prot::READ), Just(Prot::WRITE)];
    let memory_for = prop_oneof![4 => Just(None), 1 => (0..6usize).prop_map(Some)];
    prop_oneof![
        5 => (page(), runs(), prot, memory_for).prop_map(|(page, runs, prot, memory_for)| Op::Map {
            page, runs, prot, memory_for,
        }),
        5 => (page(), length()).prop_map(|(page, pages)| Op::Unmap { page, pages }),
        1 => (12..=64u32).prop_map(|bits| Op::Grow { bits }),
    ]
}

/// A table, its model, and the root that hardware was last told.
struct Bench<'a> {
    pages: &'a HeapPages,
    table: PageTable<AmdV1, &'a HeapPages>,
    model: Model,
    hardware: (u64, u32),
}

impl<'a> Bench<'a> {
    fn new(pages: &'a HeapPages, levels: u32) -> Self {
        let config = Config { levels, ..Config::new(64, AmdV1Options::default()) };
        let table = PageTable::new(pages, config).unwrap();
        let hardware = (table.root().table.get(), table.root().levels);
        Self { pages, table, model: Model::default(), hardware }
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Map { page, runs, prot, memory_for } => {
                self.map(page << 12, runs, *prot, *memory_for)
            }
            Op::Unmap { page, pages } => self.unmap(page << 12, pages << 12),
            Op::Grow { bits } => {
                let last = u64::MAX >> (64 - bits);
                self.grow(last);
                assert!(self.table.reaches(Iova::new(last)));
            }
        }
    }

    fn grow(&mut self, last: u64) {
        let before = self.table.root();
        let mut told = None;
        self.table
            .grow(Iova::new(last), |root| {
                // Both roots translate while hardware changes over.
                assert_eq!(self.table.root(), before);
                told = Some(root);
            })
            .unwrap();
        if let Some(root) = told {
            assert!(root.levels > before.levels);
            assert_eq!(self.table.root(), root);
            self.hardware = (root.table.get(), root.levels);
            assert_eq!(
                self.table.path(Iova::new(0)).steps().last().map(|step| step.level < before.levels),
                Some(true)
            );
        } else {
            assert_eq!(self.table.root(), before);
        }
    }

    fn map(&mut self, iova: u64, runs: &[(u64, u64)], prot: Prot, memory_for: Option<usize>) {
        let bytes: Vec<_> = runs.iter().map(|(at, n)| (at << 12, n << 12)).collect();
        let len: u64 = bytes.iter().map(|(_, len)| len).sum();
        let runs: Vec<_> = bytes
            .iter()
            .map(|&(start, len)| PhysRun { start: PhysAddr::new(start), len })
            .collect();
        let mut gather = Gather::new();
        let mut result = self.try_map(iova, &runs, prot, memory_for, &mut gather);
        if let Err(Error::BeyondTop { levels }) = result {
            assert!(gather.is_empty() && levels > self.hardware.1);
            self.grow(iova + (len - 1));
            result = self.try_map(iova, &runs, prot, memory_for, &mut gather);
        }
        match result {
            Ok(mapped) => {
                assert_eq!(mapped, len);
                assert_eq!(self.model.first_mapped(iova, len), None);
                let reach = (12 + 9 * self.hardware.1).min(63);
                let sizes = self.table.page_sizes() & ((1 << reach) - 1);
                self.model.map(iova, &bytes, prot, sizes);
            }
            Err(Error::AlreadyMapped { at }) => {
                assert_eq!(self.model.first_mapped(iova, len), Some(at.get()));
            }
            Err(Error::OutOfMemory) => assert!(memory_for.is_some()),
            Err(Error::Overflow) => assert!(iova.checked_add(len - 1).is_none()),
            Err(error) => panic!("{error}"),
        }
        self.finish(&mut gather, iova, len);
    }

    fn try_map(
        &self,
        iova: u64,
        runs: &[PhysRun],
        prot: Prot,
        memory_for: Option<usize>,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        self.pages.fail_after(memory_for.unwrap_or(usize::MAX));
        let result = self.table.map_batch(Iova::new(iova), runs, prot, gather);
        self.pages.fail_after(usize::MAX);
        result
    }

    fn unmap(&mut self, iova: u64, len: u64) {
        let mut gather = Gather::new();
        let result = self.table.unmap(Iova::new(iova), len, &mut gather);
        if iova.checked_add(len - 1).is_none() {
            assert_eq!(result, Err(Error::Overflow));
            return;
        }
        let unmapped = result.unwrap();
        let (bytes, end) = self.model.unmap(iova, len);
        let end = match end {
            End::Complete => None,
            End::Hole => Some(Stop::Hole),
            End::Leaf { start, size } => Some(Stop::Leaf { start: Iova::new(start), size }),
        };
        assert_eq!((unmapped.bytes, unmapped.stop), (bytes, end));
        let expected = Iova::new(iova).span(bytes);
        assert_eq!(gather.range(), expected);
        self.finish(&mut gather, iova, len);
    }

    /// Checks what a gather asks for, and does it.
    fn finish(&self, gather: &mut Gather, iova: u64, len: u64) {
        if let Some(range) = gather.range() {
            assert!(range.start().get() >= iova);
            assert!(range.end().get() - iova < len);
        }
        assert_eq!(gather.removed_tables(), gather.dead_tables() != 0);
        let live = self.pages.live();
        let dead = gather.dead_tables();
        gather.release(self.pages);
        assert_eq!(self.pages.live(), live - dead);
        assert!(gather.is_empty());
    }

    /// The table, read as hardware and by its own walk, says what the model says: at both ends of
    /// every leaf and next to them.
    fn check(&self) {
        let mut places = vec![0, u64::MAX];
        for (&start, leaf) in &self.model.leaves {
            let last = start + (leaf.size - 1);
            places.extend([start, last, start.wrapping_sub(1), last.wrapping_add(1)]);
            places.push(start + leaf.size / 2 + 5);
        }
        for at in places {
            let walk = self.table.walk(Iova::new(at));
            let decoded = decode(self.pages, self.hardware.0, self.hardware.1, at).unwrap();
            let Some((start, leaf)) = self.model.at(at) else {
                assert_eq!((walk, decoded), (None, None), "{at:#x} is not mapped");
                continue;
            };
            let (walk, decoded) = (walk.unwrap(), decoded.unwrap());
            assert_eq!(walk.phys.get(), leaf.phys + (at - start), "{at:#x}");
            assert_eq!(walk.page_size, leaf.size);
            assert_eq!(walk.prot, leaf.prot | Prot::CACHE);
            assert_eq!(decoded.phys, walk.phys.get());
            assert_eq!(decoded.page, walk.page_size);
            assert_eq!(decoded.read, leaf.prot.contains(Prot::READ));
            assert_eq!(decoded.write, leaf.prot.contains(Prot::WRITE));
            assert!(decoded.force_coherent);
            let path = self.table.path(Iova::new(at));
            assert_eq!(path.translation, Some(walk));
            assert!(path.steps().count() <= self.hardware.1 as usize);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_history_leaves_what_the_model_has(
        levels in 1..=6u32,
        ops in prop::collection::vec(op(), 1..24),
    ) {
        let pages = HeapPages::new();
        let mut bench = Bench::new(&pages, levels);
        for op in &ops {
            bench.apply(op);
        }
        bench.check();
        drop(bench);
        prop_assert_eq!(pages.live(), 0);
    }

    #[test]
    fn every_step_leaves_what_the_model_has(ops in prop::collection::vec(op(), 1..12)) {
        let pages = HeapPages::new();
        let mut bench = Bench::new(&pages, 3);
        for op in &ops {
            bench.apply(op);
            bench.check();
        }
    }
}
