//! The walker against the plain model for formats of every shape.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod support {
    pub(crate) mod formats;
    pub(crate) mod model;
}

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Error, Format, Gather, PageTable, Stop};
use lychgate_types::{HeapPages, Iova, OutOfMemory, Pages, PhysAddr, PhysRun, Prot};
use proptest::prelude::*;
use support::formats::{Arm16K, Sv39x4};
use support::model::{End, Model};

const RW: Prot = Prot::READ.union(Prot::WRITE);

type Rival = Box<dyn FnOnce() + Send>;

/// Memory behind a cache that hardware does not snoop: what it sees is what was cleaned.
struct Incoherent {
    heap: HeapPages,
    /// First byte in this process to physical address and length, of every allocation.
    places: Mutex<BTreeMap<usize, (u64, u64)>>,
    memory: Mutex<BTreeMap<u64, u64>>,
    /// What runs before the n-th single word is cleaned, when others can read it already.
    rival: Mutex<(usize, Option<Rival>)>,
}

impl Incoherent {
    fn new() -> Self {
        Self {
            heap: HeapPages::new(),
            places: Mutex::default(),
            memory: Mutex::default(),
            rival: Mutex::default(),
        }
    }

    fn load(&self, at: u64) -> u64 {
        // What was never cleaned is whatever the last user left there.
        let stale = 0x5a5a_5a5a_5a5a_5a5a;
        self.memory.lock().unwrap().get(&at).copied().unwrap_or(stale)
    }
}

impl Pages for Incoherent {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let at = self.heap.alloc(bytes)?;
        let words = self.heap.words(at, usize::try_from(bytes / 8).unwrap());
        let place = words.as_ptr().addr();
        self.places.lock().unwrap().insert(place, (at.get(), bytes));
        let mut memory = self.memory.lock().unwrap();
        for word in (at.get()..at.get() + bytes).step_by(8) {
            memory.remove(&word);
        }
        Ok(at)
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        self.heap.free(at, bytes);
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        self.heap.words(at, count)
    }

    fn clean(&self, words: &[AtomicU64]) {
        let rival = {
            let mut rival = self.rival.lock().unwrap();
            rival.0 = rival.0.saturating_sub(usize::from(words.len() == 1));
            if rival.0 == 0 { rival.1.take() } else { None }
        };
        if let Some(rival) = rival {
            rival();
        }
        let first = words.as_ptr().addr();
        let places = self.places.lock().unwrap();
        let Some((&place, &(at, bytes))) = places.range(..=first).next_back() else {
            panic!("cleaned what was not allocated");
        };
        let offset = (first - place) as u64;
        assert!(offset + 8 * words.len() as u64 <= bytes);
        let mut memory = self.memory.lock().unwrap();
        for (n, word) in (0..).zip(words) {
            memory.insert(at + offset + 8 * n, word.load(Ordering::Relaxed));
        }
    }
}

/// A walk of Sv39x4 as hardware does it, over what it sees.
fn hardware_walk(memory: &Incoherent, root: u64, iova: u64) -> Option<u64> {
    let mut table = root;
    let mut index = iova >> 30;
    for shift in [30, 21, 12] {
        let entry = memory.load(table + 8 * index);
        assert_ne!(entry, 0x5a5a_5a5a_5a5a_5a5a, "a table was linked before it was cleaned");
        if entry & 1 == 0 {
            return None;
        }
        let number = entry >> 10 & 0xfff_ffff_ffff;
        if entry & 0xe != 0 {
            let napot = entry >> 63 != 0;
            assert!(!napot || (shift == 12 && number & 0xf == 8));
            let shift = if napot { 16 } else { shift };
            let within = (1 << shift) - 1;
            return Some(number << 12 & !within | iova & within);
        }
        table = number << 12;
        index = iova >> (shift - 9) & 0x1ff;
    }
    panic!("a table below the last level");
}

/// In units of the format's granule.
#[derive(Clone, Debug)]
enum Op {
    Map { page: u64, runs: Vec<(u64, u64)> },
    Unmap { page: u64, pages: u64 },
}

fn op(order: u32) -> impl Strategy<Value = Op> {
    let near = 0..(1u64 << (order + 2));
    // Around the first boundary of each level.
    let page = (near, 0..3u32).prop_map(move |(near, level)| (1 << (order * level)) + near);
    let length = || prop_oneof![1..40u64, (0..=order + 2).prop_map(|bits| 1u64 << bits)];
    let frame = prop_oneof![
        0..1u64 << 13,
        (0..16u64).prop_map(move |n| n << order),
        // Around what `Arm16K` calls the end of a linear field.
        (0..64u64).prop_map(|n| (1 << 20) - n),
    ];
    prop_oneof![
        (page.clone(), prop::collection::vec((frame, length()), 1..4))
            .prop_map(|(page, runs)| Op::Map { page, runs }),
        (page, length()).prop_map(|(page, pages)| Op::Unmap { page, pages }),
    ]
}

/// Applies `ops` to a table and to a model, which must agree at every step; gives the model.
fn run<F: Format, P: Pages>(table: &PageTable<F, P>, ops: &[Op]) -> Model {
    let mut model = Model::default();
    for op in ops {
        let mut gather = Gather::new();
        match op {
            Op::Map { page, runs } => {
                let iova = page << F::GRANULE_SHIFT;
                let scale = |&(frame, pages): &(u64, u64)| {
                    (frame << F::GRANULE_SHIFT, pages << F::GRANULE_SHIFT)
                };
                let bytes: Vec<_> = runs.iter().map(scale).collect();
                let len = bytes.iter().map(|(_, len)| len).sum();
                let runs: Vec<_> = bytes
                    .iter()
                    .map(|&(start, len)| PhysRun { start: PhysAddr::new(start), len })
                    .collect();
                let taken = model.first_mapped(iova, len);
                match table.map_batch(Iova::new(iova), &runs, RW, &mut gather) {
                    Ok(mapped) => {
                        assert_eq!((mapped, taken), (len, None));
                        model.map(iova, &bytes, RW, table.page_sizes());
                    }
                    Err(Error::AlreadyMapped { at }) => assert_eq!(taken, Some(at.get())),
                    Err(error) => panic!("{error}"),
                }
            }
            Op::Unmap { page, pages } => {
                let (iova, len) = (page << F::GRANULE_SHIFT, pages << F::GRANULE_SHIFT);
                let unmapped = table.unmap(Iova::new(iova), len, &mut gather).unwrap();
                let (bytes, end) = model.unmap(iova, len);
                let end = match end {
                    End::Complete => None,
                    End::Hole => Some(Stop::Hole),
                    End::Leaf { start, size } => Some(Stop::Leaf { start: Iova::new(start), size }),
                };
                assert_eq!((unmapped.bytes, unmapped.stop), (bytes, end));
            }
        }
        gather.release(table.pages());
        for (at, phys) in edges(&model) {
            let walk = table.walk(Iova::new(at));
            assert_eq!(walk.map(|there| there.phys.get()), phys, "{at:#x}");
            if let Some((_, leaf)) = model.at(at) {
                assert_eq!(walk.unwrap().page_size, leaf.size);
                assert_eq!(walk.unwrap().prot & RW, RW);
            }
        }
    }
    model
}

/// Addresses at and next to the ends of every leaf, and where they lead.
fn edges(model: &Model) -> Vec<(u64, Option<u64>)> {
    let ends = model.leaves.iter().flat_map(|(&start, leaf)| {
        let last = start + (leaf.size - 1);
        [start, last, start + leaf.size / 2, start.saturating_sub(1), last + 1]
    });
    ends.map(|at| {
        let phys = model.at(at).map(|(start, leaf)| leaf.phys + (at - start));
        (at, phys)
    })
    .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn amd_v1_with_granules_of_2_kib(ops in prop::collection::vec(op(8), 1..16)) {
        let pages = HeapPages::new();
        let config = Config { levels: 5, ..Config::new(56, AmdV1Options::default()) };
        let table = PageTable::<AmdV1<11>, _>::new(&pages, config).unwrap();
        prop_assert_eq!(table.granule(), 2048);
        run(&table, &ops);
        drop(table);
        prop_assert_eq!(pages.live(), 0);
    }

    #[test]
    fn a_wide_root_and_walks_that_do_not_snoop(ops in prop::collection::vec(op(9), 1..16)) {
        let pages = Incoherent::new();
        let config = Config { root_extra_bits: 2, levels: 3, ..Config::new(41, ()) };
        let table = PageTable::<Sv39x4, _>::new(&pages, config).unwrap();
        let root = table.root().table.get();
        // 2048 entries of the root: the last ones are beyond what 9 bits of index reach.
        let top = Iova::new((1 << 41) - (1 << 30));
        let mut gather = Gather::new();
        table.map(top, PhysAddr::new(0), 1 << 30, RW, &mut gather).unwrap();
        let model = run(&table, &ops);
        for (at, phys) in edges(&model) {
            prop_assert_eq!(hardware_walk(&pages, root, at), phys, "{:#x}", at);
        }
        prop_assert_eq!(hardware_walk(&pages, root, (1 << 41) - 1), Some((1 << 30) - 1));
        drop(table);
        prop_assert_eq!(pages.heap.live(), 0);
    }

    #[test]
    fn contiguous_runs_with_an_address_each(ops in prop::collection::vec(op(11), 1..12)) {
        let pages = HeapPages::new();
        let table = PageTable::<Arm16K, _>::new(&pages, Config::new(47, ())).unwrap();
        run(&table, &ops);
        drop(table);
        prop_assert_eq!(pages.live(), 0);
    }
}

#[test]
fn permissions_that_a_format_cannot_say_are_refused() {
    let pages = HeapPages::new();
    let config = Config { root_extra_bits: 2, ..Config::new(39, ()) };
    let table = PageTable::<Sv39x4, _>::new(&pages, config).unwrap();
    let mut gather = Gather::new();
    let result = table.map(Iova::new(0), PhysAddr::new(0), 4096, Prot::WRITE, &mut gather);
    assert_eq!(result, Err(Error::Permissions));
    assert_eq!(pages.live(), 1);
}

#[test]
fn who_maps_below_a_table_entry_that_is_not_clean_yet_cleans_it() {
    // The entry of the root and the one below it, each found on the short way and the long one.
    for (entry, pages_of_rival) in [(1, 1), (1, 3), (2, 1), (2, 3)] {
        let pages = Arc::new(Incoherent::new());
        let table = PageTable::<Sv39x4, _>::new(pages.clone(), Config::new(39, ())).unwrap();
        let table = Arc::new(table);
        let root = table.root().table.get();
        let rival = {
            let (table, pages) = (table.clone(), pages.clone());
            move || {
                let (iova, phys) = (Iova::new(0x5000), PhysAddr::new(0x9000));
                let mut gather = Gather::new();
                let len = 0x1000 * pages_of_rival;
                table.map(iova, phys, len, RW, &mut gather).unwrap();
                // It may tell a device now.
                assert_eq!(hardware_walk(&pages, root, 0x5123), Some(0x9123));
            }
        };
        *pages.rival.lock().unwrap() = (entry, Some(Box::new(rival)));
        let mut gather = Gather::new();
        let (iova, phys) = (Iova::new(0), PhysAddr::new(0x7000));
        table.map(iova, phys, 0x1000, RW, &mut gather).unwrap();
        assert!(pages.rival.lock().unwrap().1.is_none());
        assert_eq!(hardware_walk(&pages, root, 0x123), Some(0x7123));
        assert_eq!(hardware_walk(&pages, root, 0x5123), Some(0x9123));
    }
}

/// Memory behind a cache that hardware does not snoop, and hardware that walks it whenever something
/// is cleaned.
struct Watched {
    memory: Incoherent,
    root: OnceLock<u64>,
}

/// The IOVA range that is watched, and where it leads.
const WATCHED: (u64, u64, u64) = (1 << 30, 2 << 30, 1 << 33);

impl Watched {
    fn look(&self) {
        let (first, end, phys) = WATCHED;
        if let Some(&root) = self.root.get() {
            for offset in [0, 0x5123, 0x1_0000, 0x2f_ffff, 0x40_0000, end - first - 1] {
                let there = hardware_walk(&self.memory, root, first + offset);
                assert_eq!(there, Some(phys + offset), "hardware faults, or goes astray");
            }
        }
    }
}

impl Pages for Watched {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.memory.alloc(bytes)
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        self.memory.free(at, bytes);
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        self.memory.words(at, count)
    }

    fn clean(&self, words: &[AtomicU64]) {
        self.memory.clean(words);
        self.look();
    }
}

#[test]
fn walks_that_do_not_snoop_see_no_hole_in_what_is_cut_and_joined() {
    let pages = Arc::new(Watched { memory: Incoherent::new(), root: OnceLock::new() });
    let config = Config::<Sv39x4>::new(39, ());
    let table = PageTable::<Sv39x4, _>::new(pages.clone(), config).unwrap();
    let (first, end, phys) = WATCHED;
    let (iova, frames) = (Iova::new(first), PhysAddr::new(phys));
    let mut gather = Gather::new();
    table.map(iova, frames, end - first, RW, &mut gather).unwrap();
    pages.root.set(table.root().table.get()).unwrap();
    // A page, which leaves 64 KiB pages and 2 MiB pages next to it, and everything in 4 KiB pages.
    let page = Iova::new(first + 0x5000);
    assert_eq!(table.cut(page, 0x1000, &mut gather), Ok(1));
    assert_eq!(table.walk(page).unwrap().page_size, 0x1000);
    assert_eq!(table.walk(Iova::new(first + 0x1_0000)).unwrap().page_size, 0x1_0000);
    let low = 1 << 22;
    assert!(table.cut_down(iova, low, 0x1000, &mut gather).unwrap() > 16);
    gather.release(&pages);
    let joined = table.join(iova, end - first, &mut gather).unwrap();
    assert_eq!((joined.leaves, joined.needs_break), (3, None));
    assert_eq!((gather.dead_tables(), gather.table_levels()), (3, 0b110));
    pages.look();
    gather.release(&pages);
    assert_eq!(table.walk(page).unwrap().page_size, end - first);
    pages.look();
}
