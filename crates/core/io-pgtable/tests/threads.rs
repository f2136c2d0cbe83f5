//! Threads on disjoint ranges of one table, down to neighbouring entries, while it grows.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support {
    pub(crate) mod decoder;
}

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Error, Gather, PageTable};
use lychgate_types::{HeapPages, Iova, OutOfMemory, Pages, PhysAddr, PhysRun, Prot};
use support::decoder::decode;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const K4: u64 = 1 << 12;
const M2: u64 = 1 << 21;
const THREADS: u64 = 4;
const ROUNDS: u64 = 3000;

type Table<'a> = PageTable<AmdV1, &'a HeapPages>;

/// A generator of numbers that need not be good, only the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// The places that thread `own` of [`THREADS`] uses: every fourth page of shared tables, and every
/// fourth 2 MiB of shared directories.
fn place(own: u64, random: &mut Random) -> (u64, u64) {
    if random.below(2) == 0 {
        let page = random.below(2 * 512 / THREADS) * THREADS + own;
        (page * K4, K4)
    } else {
        let block = 8 + random.below(16) * THREADS + own;
        (block * M2, M2)
    }
}

fn work(table: &Table<'_>, own: u64) -> BTreeMap<u64, (u64, u64)> {
    let mut random = Random(own + 1);
    let mut mine: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let (iova, len) = place(own, &mut random);
        let mut gather = Gather::new();
        if let Some((phys, len)) = mine.remove(&iova) {
            let there = table.walk(Iova::new(iova + len - 1)).unwrap();
            assert_eq!(there.phys.get(), phys + len - 1);
            let unmapped = table.unmap(Iova::new(iova), len, &mut gather).unwrap();
            assert_eq!((unmapped.bytes, unmapped.stop), (len, None));
        } else {
            // Granules or a large page by turns, so that tables come and go.
            let phys = M2 * (1 + random.below(1000)) + K4 * random.below(2);
            let run = PhysRun { start: PhysAddr::new(phys), len };
            let mapped = table.map_batch(Iova::new(iova), &[run], RW, &mut gather);
            assert_eq!(mapped, Ok(len));
            mine.insert(iova, (phys, len));
        }
        gather.release(table.pages());
    }
    mine
}

#[test]
fn disjoint_ranges_do_not_disturb_each_other() {
    let pages = HeapPages::new();
    let config = Config { levels: 3, ..Config::new(64, AmdV1Options::default()) };
    let table: Table<'_> = PageTable::new(&pages, config).unwrap();
    let start = Barrier::new(usize::try_from(THREADS).unwrap() + 1);
    let maps: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS)
            .map(|own| {
                let (table, start) = (&table, &start);
                scope.spawn(move || {
                    start.wait();
                    work(table, own)
                })
            })
            .collect();
        start.wait();
        for bits in [48, 57, 64] {
            let last = Iova::new(u64::MAX >> (64 - bits));
            table.grow(last, |_| thread::yield_now()).unwrap();
        }
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let root = table.root();
    assert_eq!(root.levels, 6);
    let read = |at| decode(&pages, root.table.get(), root.levels, at).unwrap();
    for (&iova, &(phys, len)) in maps.iter().flatten() {
        for offset in [0, len / 2, len - 1] {
            assert_eq!(read(iova + offset).unwrap().phys, phys + offset);
        }
        let mut gather = Gather::new();
        let unmapped = table.unmap(Iova::new(iova), len, &mut gather).unwrap();
        assert_eq!(unmapped.bytes, len);
        gather.release(&pages);
    }
    for page in 0..8 * 512 + 16 * THREADS * 512 {
        assert_eq!(read(page * K4), None);
    }
    drop(table);
    assert_eq!(pages.live(), 0);
}

type Rival = Box<dyn FnOnce() + Send>;

/// Memory that lets a rival run in the middle of an allocation, when the caller has seen that
/// a table is missing and not installed its own.
struct Interrupted {
    heap: HeapPages,
    /// Allocations until the rival runs, and the rival.
    rival: Mutex<(usize, Option<Rival>)>,
}

impl Interrupted {
    fn interrupt(&self) {
        let rival = {
            let mut rival = self.rival.lock().unwrap();
            rival.0 = rival.0.saturating_sub(1);
            if rival.0 == 0 { rival.1.take() } else { None }
        };
        if let Some(rival) = rival {
            rival();
        }
    }
}

impl Pages for Interrupted {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.interrupt();
        self.heap.alloc(bytes)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.interrupt();
        self.heap.alloc_uninit(bytes)
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        self.heap.free(at, bytes);
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        self.heap.words(at, count)
    }
}

#[test]
fn who_finds_a_rivals_table_uses_it_and_frees_its_own() {
    // The rival has made the directory and the table, or the table alone; a granule or a large
    // page, where this caller wants granules.
    for (allocations, rival_len) in [(1, K4), (2, K4), (1, M2), (2, M2)] {
        let pages = Arc::new(Interrupted { heap: HeapPages::new(), rival: Mutex::default() });
        let config = Config::new(39, AmdV1Options::default());
        let table = Arc::new(PageTable::<AmdV1, _>::new(pages.clone(), config).unwrap());
        let map = |table: &PageTable<_, _>, iova: u64, phys: u64, len: u64| {
            let mut gather = Gather::new();
            let (iova, phys) = (Iova::new(iova), PhysAddr::new(phys));
            let result = table.map(iova, phys, len, RW, &mut gather);
            assert!(gather.is_empty());
            result
        };
        let (rival_table, rival_map) = (table.clone(), map);
        let rival: Rival = Box::new(move || rival_map(&rival_table, 0, M2, rival_len).unwrap());
        *pages.rival.lock().unwrap() = (allocations, Some(rival));
        let result = map(&table, 2 * K4, 0x9000, 2 * K4);

        let theirs = table.walk(Iova::new(0)).unwrap();
        assert_eq!((theirs.phys.get(), theirs.page_size), (M2, rival_len));
        if rival_len == K4 {
            assert_eq!(result, Ok(()));
            let ours = table.walk(Iova::new(3 * K4)).unwrap();
            assert_eq!(ours.phys.get(), 0xa000);
        } else {
            let at = Iova::new(2 * K4);
            assert_eq!(result, Err(Error::AlreadyMapped { at }));
        }
        assert_eq!(pages.heap.live(), if rival_len == K4 { 3 } else { 2 });
        assert!(pages.rival.lock().unwrap().1.is_none());
        drop(table);
        assert_eq!(pages.heap.live(), 0);
    }
}
