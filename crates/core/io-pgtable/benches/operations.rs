//! Nanoseconds per operation of tables of each format, next to what the same machine needs, in the same run,
//! for the bare stores or loads: `cargo bench -p lychgate-io-pgtable`.
//!
//! The floor of a map or unmap is one call that stores the same number of words to a flat array; of
//! a walk, one that loads a word of it. Figures are medians over rounds. A pool without locks, as a
//! kernel has per processor, gives the tables; there is no hardware, so no invalidation. `SIZE` lines
//! that end in `/page` are per 4 KiB page. A word as argument picks formats or operations by a part
//! of their names.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, ArmOptions, ArmStage1, ArmStage2, Config, Format, Gather, PageTable,
    RiscvFirstStage, RiscvOptions, VtdSecondStage, VtdSecondStageOptions, X86_64, X86_64Options,
};
use lychgate_types::{Iova, OutOfMemory, Pages, PhysAddr, PhysRun, Prot};

const RW: Prot = Prot::READ.union(Prot::WRITE);
const PAGE: u64 = 4096;
const GIB_PAGES: u64 = 1 << 18;

/// Table memory for one thread: a flat array, and a stack of free pages. Pages come back unzeroed.
struct Pool {
    pages: Box<[[AtomicU64; 512]]>,
    free: Box<[AtomicU64]>,
    free_count: AtomicU64,
}

impl Pool {
    fn new(pages: u64) -> Self {
        let zero = |_| [const { AtomicU64::new(0) }; 512];
        // Address 0 is left out.
        let free: Box<[_]> = (1..pages).rev().map(|n| AtomicU64::new(n * PAGE)).collect();
        Self {
            pages: (0..pages).map(zero).collect(),
            free_count: AtomicU64::new(free.len() as u64),
            free,
        }
    }
}

impl Pages for Pool {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let at = self.alloc_uninit(bytes)?;
        for word in self.words(at, 512) {
            word.store(0, Ordering::Relaxed);
        }
        Ok(at)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let count = self.free_count.load(Ordering::Relaxed);
        let left = count.checked_sub(1).ok_or(OutOfMemory)?;
        if bytes != PAGE {
            return Err(OutOfMemory);
        }
        self.free_count.store(left, Ordering::Relaxed);
        let slot = self.free.get(index(left)).ok_or(OutOfMemory)?;
        Ok(PhysAddr::new(slot.load(Ordering::Relaxed)))
    }

    fn free(&self, at: PhysAddr, _bytes: u64) {
        let count = self.free_count.load(Ordering::Relaxed);
        if let Some(slot) = self.free.get(index(count)) {
            slot.store(at.get(), Ordering::Relaxed);
            self.free_count.store(count + 1, Ordering::Relaxed);
        }
    }

    #[inline(always)]
    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        let Some(page) = self.pages.get(index(at.get() / PAGE)) else {
            return &[];
        };
        let first = index(at.get() % PAGE / 8);
        page.get(first..first + count).unwrap_or(&[])
    }
}

fn index(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

type Table<'a, F> = PageTable<F, &'a Pool>;

#[inline(never)]
fn map<F: Format>(table: &Table<'_, F>, iova: u64, runs: &[PhysRun]) {
    let mut gather = Gather::new();
    let mapped = table.map_batch(Iova::new(iova), runs, RW, &mut gather);
    assert!(mapped.is_ok());
    if !gather.is_empty() {
        gather.release(table.pages());
    }
}

#[inline(never)]
fn unmap<F: Format>(table: &Table<'_, F>, iova: u64, len: u64) {
    let mut gather = Gather::new();
    let unmapped = table.unmap(Iova::new(iova), len, &mut gather);
    assert!(unmapped.is_ok_and(|unmapped| unmapped.bytes == len));
    black_box(gather.range());
    gather.release(table.pages());
}

#[inline(never)]
fn walk<F: Format>(table: &Table<'_, F>, iova: u64) -> u64 {
    let there = table.walk(Iova::new(iova));
    there.map_or(0, |there| there.phys.get())
}

/// The bare stores of a map of consecutive pages.
#[inline(never)]
fn store(words: &[AtomicU64], first: u64) {
    let mut entry = first;
    let (chunks, rest) = words.as_chunks::<8>();
    for chunk in chunks {
        for (word, n) in chunk.iter().zip(0..) {
            word.store(entry + PAGE * n, Ordering::Relaxed);
        }
        entry += 8 * PAGE;
    }
    for word in rest {
        word.store(entry, Ordering::Relaxed);
        entry += PAGE;
    }
}

/// The bare stores of an unmap.
#[inline(never)]
fn clear(words: &[AtomicU64]) {
    let (chunks, rest) = words.as_chunks::<8>();
    for chunk in chunks {
        for word in chunk {
            word.store(0, Ordering::Relaxed);
        }
    }
    for word in rest {
        word.store(0, Ordering::Relaxed);
    }
}

#[inline(never)]
fn load(words: &[AtomicU64], at: usize) -> u64 {
    words.get(at).map_or(0, |word| word.load(Ordering::Relaxed))
}

/// One operation and its inverse, over `places`, `units` per place.
struct Case {
    name: &'static str,
    unit: &'static str,
    places: Vec<u64>,
    runs: Vec<PhysRun>,
    /// Entries that hold one place.
    entries: usize,
    units: u64,
    rounds: usize,
    /// Something to map once, so that tables stay.
    sentinel: Option<u64>,
}

fn nanoseconds(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e9
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

fn report(name: &str, unit: &str, cost: f64, floor: f64) {
    println!("{name:<34} {cost:>9.3} {floor:>9.3} {:>7.2}x  ns/{unit}", cost / floor);
}

fn run<F: Format>(table: &Table<'_, F>, flat: &[AtomicU64], case: &Case) {
    let len: u64 = case.runs.iter().map(|run| run.len).sum();
    let first = case.runs.first().map_or(0, |run| run.start.get());
    if let Some(iova) = case.sentinel {
        let frame = [PhysRun { start: PhysAddr::new(0), len: PAGE }];
        map(table, iova, &frame);
    }
    let (mut maps, mut unmaps, mut stores, mut clears) = (vec![], vec![], vec![], vec![]);
    for _ in 0..case.rounds {
        maps.push(nanoseconds(|| {
            for &iova in &case.places {
                map(table, iova, &case.runs);
            }
        }));
        unmaps.push(nanoseconds(|| {
            for &iova in &case.places {
                unmap(table, iova, len);
            }
        }));
        // The same places of the flat array, a table's worth apart at most.
        let slots = |iova: u64| {
            let at = index(iova / PAGE) & (flat.len() - 1);
            flat.get(at..at + case.entries).unwrap_or(flat)
        };
        stores.push(nanoseconds(|| {
            for &iova in &case.places {
                store(slots(iova), first | 1);
            }
        }));
        clears.push(nanoseconds(|| {
            for &iova in &case.places {
                clear(slots(iova));
            }
        }));
    }
    if let Some(iova) = case.sentinel {
        unmap(table, iova, PAGE);
    }
    let per_unit = |samples| median(samples) / (case.places.len() as u64 * case.units) as f64;
    let name = format!("map {}", case.name);
    report(&name, case.unit, per_unit(maps), per_unit(stores));
    let name = format!("unmap {}", case.name);
    report(&name, case.unit, per_unit(unmaps), per_unit(clears));
}

fn walks<F: Format>(table: &Table<'_, F>, flat: &[AtomicU64], order: &[u64]) {
    let frames = [PhysRun { start: PhysAddr::new(0x1_0000_1000), len: 512 * PAGE }];
    map(table, 0, &frames);
    let (mut costs, mut floors) = (vec![], vec![]);
    for _ in 0..2001 {
        costs.push(nanoseconds(|| {
            for &n in order {
                black_box(walk(table, n * PAGE));
            }
        }));
        floors.push(nanoseconds(|| {
            for &n in order {
                black_box(load(flat, index(n)));
            }
        }));
    }
    unmap(table, 0, 512 * PAGE);
    let per_walk = |samples| median(samples) / order.len() as f64;
    report("walk 4K", "op", per_walk(costs), per_walk(floors));
}

/// All operations on a table of one format.
fn format<F: Format>(pool: &Pool, flat: &[AtomicU64], config: Config<F>, wanted: Option<&str>) {
    let name = format!("{}, {} levels", F::NAME, config.levels);
    let Ok(table) = PageTable::new(pool, config) else {
        println!("no memory for a table of {name}");
        return;
    };
    // A fixed order in which no place follows its neighbour: 167 and 256 have no common divisor.
    let order: Vec<u64> = (0..256u64).map(|n| n * 167 % 256).collect();
    let picked = |case: &str| wanted.is_none_or(|part| case.contains(part) || name.contains(part));
    // A case of one leaf is for formats that have the leaf.
    let offered = |case: &Case| {
        let lengths = case.runs.iter().fold(0, |all, run| all | run.len);
        !case.name.ends_with("contiguous") || table.page_sizes() & lengths != 0
    };
    let cases: Vec<Case> =
        cases(&order).into_iter().filter(|case| picked(case.name) && offered(case)).collect();
    if cases.is_empty() && !picked("walk") {
        return;
    }
    println!("{name:<34} {:>9} {:>9} {:>8}", "cost", "floor", "ratio");
    for case in &cases {
        run(&table, flat, case);
    }
    if picked("walk") {
        walks(&table, flat, &order);
    }
}

fn cases(order: &[u64]) -> Vec<Case> {
    let frames = |start, len| vec![PhysRun { start: PhysAddr::new(start), len }];
    let scattered = (0..512u64).map(|n| PhysRun {
        start: PhysAddr::new(0x1_0000_0000 + n * 167 % 512 * 2 * PAGE),
        len: PAGE,
    });
    let single = |name, size: u64, phys| Case {
        name,
        unit: "op",
        places: order.iter().map(|n| (1 << 30) + n * size).collect(),
        runs: frames(phys, size),
        entries: 1,
        units: 1,
        rounds: 2001,
        sentinel: Some(if size == PAGE { (1 << 30) + 300 * PAGE } else { (1 << 30) + 300 * size }),
    };
    vec![
        single("4K", PAGE, 0x1_0000_0000),
        single("2M", 2 << 20, 0x1_0000_0000),
        Case {
            entries: 256,
            places: vec![1 << 30],
            sentinel: Some((1 << 30) + 300 * PAGE),
            ..single("1M contiguous", 1 << 20, 0x1_0000_0000)
        },
        Case {
            entries: 16,
            sentinel: Some((1 << 30) + (300 << 16)),
            ..single("64K contiguous", 1 << 16, 0x1_0000_0000)
        },
        Case {
            name: "256x4K",
            unit: "page",
            places: vec![1 << 30],
            runs: frames(0x1_0000_1000, 256 * PAGE),
            entries: 256,
            units: 256,
            rounds: 2001,
            sentinel: Some((1 << 30) + 300 * PAGE),
        },
        Case {
            name: "512x4K, its own table",
            unit: "page",
            places: vec![1 << 30],
            runs: frames(0x1_0000_1000, 512 * PAGE),
            entries: 512,
            units: 512,
            rounds: 2001,
            sentinel: Some(1 << 31),
        },
        Case {
            name: "512x4K scattered, one batch",
            unit: "page",
            places: vec![(1 << 30) + 256 * PAGE],
            runs: scattered.collect(),
            entries: 512,
            units: 512,
            rounds: 2001,
            sentinel: Some(1 << 30),
        },
        Case {
            name: "1G as 4K",
            unit: "page",
            places: vec![1 << 30],
            runs: frames(0x1_0000_1000, GIB_PAGES * PAGE),
            entries: index(GIB_PAGES),
            units: GIB_PAGES,
            rounds: 31,
            sentinel: Some(1 << 31),
        },
        Case {
            name: "1G as 2M",
            unit: "2M page",
            places: vec![1 << 30],
            runs: frames(0x1_0020_0000, GIB_PAGES * PAGE),
            entries: 512,
            units: 512,
            rounds: 2001,
            sentinel: Some(1 << 31),
        },
    ]
}

fn main() {
    let pool = Pool::new(2048);
    let flat: Box<[_]> = (0..GIB_PAGES).map(|_| AtomicU64::new(0)).collect();
    // Cargo passes `--bench`.
    let word = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let word = word.as_deref();
    format(&pool, &flat, Config::<AmdV1>::new(48, AmdV1Options::default()), word);
    format(&pool, &flat, Config::<X86_64>::new(47, X86_64Options::default()), word);
    let vtd = VtdSecondStageOptions { force_snoop: true };
    format(&pool, &flat, Config::<VtdSecondStage>::new(48, vtd), word);
    format(&pool, &flat, Config::<RiscvFirstStage>::new(38, RiscvOptions::default()), word);
    format(&pool, &flat, Config::<ArmStage1>::new(48, ArmOptions::default()), word);
    format(&pool, &flat, Config::<ArmStage2>::new(39, ArmOptions::default()), word);
}
