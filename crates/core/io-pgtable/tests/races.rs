//! What threads and hardware may see of each other on one table, in every order that the memory
//! model allows: for the model checker loom, so nothing here runs in an ordinary test.
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test --release -p lychgate-io-pgtable --test races
//! ```
//!
//! The tables are those of AMD v1 with a granule of 32 bytes: 4 entries each, so that a model stays
//! small, and runs of two.

#![cfg(loom)]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

use std::sync::{Arc, Mutex, OnceLock};

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;
use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Dirty, Gather, PageTable};
use lychgate_types::{Iova, OutOfMemory, Pages, PhysAddr, Prot};

/// Tables of four entries, granules of 32 bytes.
type Small = AmdV1<5>;
type Table = PageTable<Small, Arc<Pool>>;

const RW: Prot = Prot::READ.union(Prot::WRITE);
const GRANULE: u64 = 1 << 5;
/// What a table of granules spans, and a leaf one level up.
const BLOCK: u64 = 1 << 7;
/// Two of them: a run at that level.
const RUN: u64 = 1 << 8;

const START: u64 = 1 << 32;
const PAGE: u64 = 4096;
const PAGES: usize = 8;
const ENTRIES: usize = 4;
/// What is in a page that was given back.
const FREED: u64 = 0xdead_dead_dead_deac;

/// Pages of which only the words of a table exist, or all those of a list.
struct Pool {
    pages: [Page; PAGES],
    live: Mutex<[bool; PAGES]>,
}

#[derive(Default)]
struct Page {
    table: OnceLock<Box<[AtomicU64]>>,
    /// For who asks for all words of a page, which no table of this size does.
    list: OnceLock<Box<[AtomicU64]>>,
}

impl Pool {
    fn new() -> Arc<Self> {
        Arc::new(Self { pages: Default::default(), live: Mutex::default() })
    }

    fn live(&self) -> usize {
        self.live.lock().unwrap().iter().filter(|live| **live).count()
    }

    fn word(&self, at: u64) -> &AtomicU64 {
        self.words(PhysAddr::new(at), 1).first().expect("a word of a table")
    }
}

fn zeros(count: usize) -> Box<[AtomicU64]> {
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl Pages for Pool {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        let at = self.alloc_uninit(bytes)?;
        self.words(at, ENTRIES).iter().for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(at)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        assert_eq!(bytes, PAGE);
        let mut live = self.live.lock().unwrap();
        let free = live.iter().position(|live| !live).ok_or(OutOfMemory)?;
        live[free] = true;
        Ok(PhysAddr::new(START + PAGE * free as u64))
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        assert_eq!(bytes, PAGE);
        let index = ((at.get() - START) / PAGE) as usize;
        self.words(at, ENTRIES).iter().for_each(|word| word.store(FREED, Ordering::Relaxed));
        let was_live = std::mem::replace(&mut self.live.lock().unwrap()[index], false);
        assert!(was_live, "given back twice");
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        let Some(offset) = at.get().checked_sub(START) else {
            return &[];
        };
        let first = (offset % PAGE / 8) as usize;
        let Some(page) = self.pages.get((offset / PAGE) as usize) else {
            return &[];
        };
        if count > ENTRIES {
            return page.list.get_or_init(|| zeros(512)).get(first..first + count).unwrap_or(&[]);
        }
        let words = match page.list.get() {
            Some(list) if page.table.get().is_none() => list,
            _ => page.table.get_or_init(|| zeros(ENTRIES)),
        };
        words.get(first..first + count).unwrap_or(&[])
    }
}

/// Two levels, one root: IOVAs of 9 bits.
fn table(pool: &Arc<Pool>) -> Table {
    PageTable::new(pool.clone(), Config::new(9, AmdV1Options::default())).unwrap()
}

/// Where hardware finds the entry for an IOVA, or `None` where it would fault: `root` and `levels`
/// as the device table entry holds them. Every entry on the way is read once.
fn hardware_walk(pool: &Pool, root: u64, levels: u32, iova: u64) -> Option<(u64, u64)> {
    let (mut table, mut level) = (root, levels);
    loop {
        level -= 1;
        let at = table + 8 * (iova >> (5 + 2 * level) & 3);
        let entry = pool.word(at).load(Ordering::Acquire);
        assert_ne!(entry, FREED, "hardware reads a table that was given back");
        if entry & 1 == 0 {
            return None;
        }
        match entry >> 9 & 7 {
            0 | 7 => return Some((at, entry)),
            next => assert_eq!(next, u64::from(level)),
        }
        table = entry & 0x000f_ffff_ffff_f000;
    }
}

/// Where the leaf `entry`, found at `level` counted from 0, leads.
fn target(entry: u64, level: u32, iova: u64) -> u64 {
    let granules = (entry & 0x000f_ffff_ffff_f000) >> 12;
    let shift = if entry >> 9 & 7 == 7 { 6 + granules.trailing_ones() } else { 5 + 2 * level };
    (granules << 5) & !((1 << shift) - 1) | iova & ((1 << shift) - 1)
}

/// A walk of two levels that must not fault.
fn translate(pool: &Pool, root: u64, iova: u64) -> u64 {
    let (at, entry) = hardware_walk(pool, root, 2, iova).expect("hardware faults");
    target(entry, u32::from(at & !(PAGE - 1) == root), iova)
}

/// Hardware writes to an IOVA of a table of two levels: it records that in the leaf, checking as
/// part of it that this still is one (RISC-V "Virtual Address Translation Process" says so most
/// clearly).
fn hardware_write(pool: &Pool, root: u64, iova: u64) {
    loop {
        let (at, entry) = hardware_walk(pool, root, 2, iova).expect("hardware faults");
        // The bit may land in what has taken the leaf's place: hardware walks again then.
        let before = pool.word(at).fetch_or(1 << 6, Ordering::AcqRel);
        if before | 1 << 6 == entry | 1 << 6 {
            return;
        }
    }
}

fn dirty(table: &Table, iova: u64, len: u64) -> Vec<(u64, u64)> {
    let mut seen = Vec::new();
    let mut gather = Gather::new();
    let mut record = |iova: Iova, size| seen.push((iova.get(), size));
    let start = Iova::new(iova);
    table.read_dirty(start, len, Dirty::Keep, &mut gather, &mut record).unwrap();
    seen
}

fn map(table: &Table, iova: u64, phys: u64, len: u64) {
    let mut gather = Gather::new();
    table.map(Iova::new(iova), PhysAddr::new(phys), len, RW, &mut gather).unwrap();
    gather.release(table.pages());
}

fn unmap(table: &Table, iova: u64, len: u64) {
    let mut gather = Gather::new();
    assert_eq!(table.unmap(Iova::new(iova), len, &mut gather).unwrap().bytes, len);
    // Here an invalidation would wait for hardware.
    gather.release(table.pages());
}

#[test]
fn of_two_who_install_a_table_one_uses_the_others() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        let other = {
            let table = table.clone();
            thread::spawn(move || map(&table, GRANULE, 0x4000, GRANULE))
        };
        map(&table, 0, 0x8000, GRANULE);
        other.join().unwrap();
        assert_eq!(table.walk(Iova::new(0)).unwrap().phys.get(), 0x8000);
        assert_eq!(table.walk(Iova::new(GRANULE)).unwrap().phys.get(), 0x4000);
        assert_eq!(pool.live(), 2, "the loser's table is given back");
        drop(table);
        assert_eq!(pool.live(), 0);
    });
}

#[test]
fn who_finds_a_table_finds_it_filled() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        let root = table.root().table.get();
        let hardware = {
            let pool = pool.clone();
            thread::spawn(move || {
                if let Some((_, entry)) = hardware_walk(&pool, root, 2, GRANULE) {
                    assert_eq!(target(entry, 0, GRANULE), 0x4000 + GRANULE);
                }
            })
        };
        map(&table, 0, 0x4000, BLOCK - GRANULE);
        hardware.join().unwrap();
    });
}

#[test]
fn entries_and_tables_go_while_others_use_those_next_to_them() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        map(&table, 0, 0x4000, 3 * GRANULE);
        map(&table, 3 * GRANULE, 0x8000, GRANULE);
        map(&table, BLOCK, 0xc000, BLOCK - GRANULE);
        map(&table, RUN - GRANULE, 0x4000, GRANULE);
        let other = {
            let table = table.clone();
            thread::spawn(move || {
                let mine = 3 * GRANULE;
                assert_eq!(table.walk(Iova::new(mine)).unwrap().phys.get(), 0x8000);
                assert_eq!(dirty(&table, mine, GRANULE), []);
                unmap(&table, mine, GRANULE);
                map(&table, mine, 0x2000, GRANULE);
                assert_eq!(table.walk(Iova::new(mine)).unwrap().phys.get(), 0x2000);
            })
        };
        unmap(&table, 0, 3 * GRANULE);
        unmap(&table, BLOCK, BLOCK);
        map(&table, BLOCK, 0x1000, BLOCK);
        other.join().unwrap();
        assert_eq!(table.walk(Iova::new(BLOCK)).unwrap().page_size, BLOCK);
        assert_eq!(pool.live(), 2);
        drop(table);
        assert_eq!(pool.live(), 0);
    });
}

#[test]
fn hardware_never_faults_on_a_leaf_that_becomes_a_table() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        map(&table, 0, 0x4000, BLOCK);
        let root = table.root().table.get();
        let others = [0, 1].map(|software| {
            let (pool, table) = (pool.clone(), table.clone());
            thread::spawn(move || {
                let iova = 3 * GRANULE + 5;
                let phys = if software == 1 {
                    table.walk(Iova::new(iova)).unwrap().phys.get()
                } else {
                    translate(&pool, root, iova)
                };
                assert_eq!(phys, 0x4000 + iova);
            })
        });
        let mut gather = Gather::new();
        assert_eq!(table.cut(Iova::new(GRANULE), GRANULE, &mut gather), Ok(1));
        others.into_iter().for_each(|other| other.join().unwrap());
        gather.release(table.pages());
        assert_eq!(table.walk(Iova::new(GRANULE)).unwrap().page_size, GRANULE);
    });
}

#[test]
fn hardware_never_faults_on_a_run_that_is_cut_and_joined() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        map(&table, 0, 0x4000, RUN);
        assert_eq!(table.walk(Iova::new(0)).unwrap().page_size, RUN);
        let root = table.root().table.get();
        let hardware = {
            let pool = pool.clone();
            thread::spawn(move || {
                for iova in [9, BLOCK + GRANULE + 9] {
                    assert_eq!(translate(&pool, root, iova), 0x4000 + iova);
                }
            })
        };
        let mut gather = Gather::new();
        assert_eq!(table.cut_down(Iova::new(0), RUN, BLOCK, &mut gather), Ok(1));
        let joined = table.join(Iova::new(0), RUN, &mut gather).unwrap();
        assert_eq!(joined.leaves, 1);
        hardware.join().unwrap();
        gather.release(table.pages());
        assert_eq!(table.walk(Iova::new(BLOCK)).unwrap().page_size, RUN);
    });
}

#[test]
fn a_write_during_a_cut_is_recorded() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        map(&table, 0, 0x4000, BLOCK);
        let root = table.root().table.get();
        let hardware = {
            let pool = pool.clone();
            thread::spawn(move || hardware_write(&pool, root, 2 * GRANULE))
        };
        let mut gather = Gather::new();
        assert_eq!(table.cut_down(Iova::new(0), BLOCK, GRANULE, &mut gather), Ok(1));
        hardware.join().unwrap();
        gather.release(table.pages());
        assert!(dirty(&table, 0, BLOCK).contains(&(2 * GRANULE, GRANULE)));
    });
}

#[test]
fn a_write_by_any_entry_of_a_run_counts_for_all_of_it() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        map(&table, 0, 0x4000, RUN);
        let root = table.root().table.get();
        let hardware = {
            let pool = pool.clone();
            thread::spawn(move || {
                // It keeps the run with what it was told of it: writes are recorded already, so one
                // to the other half is not.
                let (at, entry) = hardware_walk(&pool, root, 2, BLOCK).unwrap();
                let before = pool.word(at).fetch_or(1 << 6, Ordering::AcqRel);
                before == entry && entry >> 9 & 7 == 7
            })
        };
        let mut gather = Gather::new();
        assert_eq!(table.cut_down(Iova::new(0), RUN, BLOCK, &mut gather), Ok(1));
        let by_run = hardware.join().unwrap();
        gather.release(table.pages());
        let seen = dirty(&table, 0, RUN);
        assert!(seen.contains(&(BLOCK, BLOCK)));
        assert!(!by_run || seen.contains(&(0, BLOCK)));
    });
}

#[test]
fn a_write_during_a_join_is_recorded_wherever_it_lands() {
    loom::model(|| {
        let pool = Pool::new();
        let table = Arc::new(table(&pool));
        map(&table, 0, 0x4000, BLOCK);
        let mut gather = Gather::new();
        assert_eq!(table.cut_down(Iova::new(0), BLOCK, GRANULE, &mut gather), Ok(1));
        gather.release(table.pages());
        let root = table.root().table.get();
        let hardware = {
            let pool = pool.clone();
            thread::spawn(move || {
                assert_eq!(translate(&pool, root, 9), 0x4000 + 9);
                hardware_write(&pool, root, GRANULE);
            })
        };
        assert_eq!(table.join(Iova::new(0), BLOCK, &mut gather).unwrap().leaves, 1);
        // The invalidation waits for what hardware is at.
        hardware.join().unwrap();
        table.settle(&gather);
        gather.release(table.pages());
        assert_eq!(dirty(&table, 0, BLOCK), [(0, BLOCK)]);
        drop(table);
        assert_eq!(pool.live(), 0);
    });
}
