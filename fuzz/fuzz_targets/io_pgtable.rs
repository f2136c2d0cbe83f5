//! AMD v1 page tables against a map of pages and a naive walk of the words, with allocations that
//! fail.

#![no_main]
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_fuzz::amd;
use lychgate_fuzz::pages::PagePool;
use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, Config, Dirty, Error, Gather, PageTable, Stop, Translation,
};
use lychgate_types::{Iova, Memory, PhysAddr, PhysRun, Prot};

/// Pages near which something ends: a table of each level, a root of each size, the space.
const EDGES: [u64; 8] = [0x400, 0, 1 << 9, 1 << 18, 1 << 27, 1 << 36, 1 << 45, (1 << 52) - 0x400];
/// The dirty bit of an entry (48882 2.2.3 Table 15).
const DIRTY: u64 = 1 << 6;

#[derive(Arbitrary, Debug)]
struct Input {
    levels: u8,
    /// Leaf sizes not to use, from 8 KiB on: the granule stays 4 KiB.
    without: u32,
    /// Width of IOVAs.
    bits: u8,
    operations: Vec<Operation>,
}

#[derive(Arbitrary, Debug)]
enum Operation {
    Map {
        page: Page,
        runs: Vec<Run>,
        prot: u8,
        memory: Option<u8>,
    },
    Unmap {
        page: Page,
        len: Len,
        whole_leaves: bool,
    },
    Grow {
        bits: u8,
        memory: Option<u8>,
    },
    /// Hardware writes to a page.
    Write {
        page: Page,
    },
    ReadDirty {
        page: Page,
        len: Len,
        clear: bool,
    },
    /// Ranges that are not multiples of the granule, empty, or beyond the end.
    Odd {
        iova: u64,
        len: u64,
        phys: u64,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Page {
    edge: u8,
    offset: i16,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Run {
    frame: u16,
    aligned: bool,
    len: Len,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Pages(u8),
    Order(u8),
}

impl Page {
    fn number(self) -> u64 {
        let edge = EDGES[usize::from(self.edge) % EDGES.len()];
        edge.saturating_add_signed(i64::from(self.offset % 0x400)) & ((1 << 52) - 1)
    }
}

impl Len {
    fn pages(self) -> u64 {
        match self {
            Self::Pages(pages) => u64::from(pages) + 1,
            Self::Order(order) => 1 << (order % 11),
        }
    }
}

/// A page of the model: its frame and rights.
type Leaf = (u64, Prot);

/// A table, what should be in it, and the root that hardware was last told.
struct Bench<'a> {
    memory: &'a PagePool,
    table: PageTable<AmdV1, &'a PagePool>,
    pages: BTreeMap<u64, Leaf>,
    /// Leaves that hardware has written to, by first page: number of pages.
    dirty: BTreeMap<u64, u64>,
    root: (u64, u32),
    /// Last page of the aperture.
    last: u64,
}

impl<'a> Bench<'a> {
    fn new(memory: &'a PagePool, input: &Input) -> Option<Self> {
        let bits = 20 + u32::from(input.bits) % 45;
        let levels = 1 + u32::from(input.levels) % 6;
        let page_sizes = !(u64::from(input.without) << 13);
        let config = Config { levels, page_sizes, ..Config::new(bits, AmdV1Options::default()) };
        let table = match PageTable::new(memory, config) {
            Ok(table) => table,
            Err(Error::Unsupported(_)) => return None,
            Err(error) => panic!("{error}"),
        };
        assert_eq!(table.granule(), 4096);
        let root = (table.root().table.get(), table.root().levels);
        let last = table.aperture().end().get() >> 12;
        let (pages, dirty) = (BTreeMap::new(), BTreeMap::new());
        Some(Self { memory, table, pages, dirty, root, last })
    }

    fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Map { page, runs, prot, memory } => {
                let rights = [Prot::READ | Prot::WRITE, Prot::READ, Prot::WRITE];
                let prot = rights[usize::from(*prot) % rights.len()];
                self.map(page.number(), runs, prot, *memory);
            }
            Operation::Unmap { page, len, whole_leaves } => {
                self.unmap(page.number(), len.pages(), *whole_leaves);
            }
            Operation::Grow { bits, memory } => {
                let last = (u64::MAX >> (u32::from(*bits) % 52)).min(self.last << 12 | 0xfff);
                if self.grow(last, *memory) {
                    assert!(self.table.reaches(Iova::new(last)));
                }
            }
            Operation::Write { page } => self.write(page.number()),
            Operation::ReadDirty { page, len, clear } => {
                self.read_dirty(page.number(), len.pages(), *clear);
            }
            Operation::Odd { iova, len, phys } => self.odd(*iova, *len, *phys),
        }
    }

    /// Gives whether there was memory for it.
    fn grow(&mut self, last: u64, memory: Option<u8>) -> bool {
        let before = self.table.root();
        let mut told = None;
        let grown = self.with(memory, || {
            self.table.grow(Iova::new(last), |root| {
                assert_eq!(self.table.root(), before, "both roots translate meanwhile");
                told = Some(root);
            })
        });
        match grown {
            Ok(()) => {}
            Err(Error::OutOfMemory) => {
                assert!(memory.is_some() && told.is_none());
                assert_eq!(self.table.root(), before);
                return false;
            }
            Err(error) => panic!("{error}"),
        }
        if let Some(root) = told {
            assert!(root.levels > before.levels);
            self.root = (root.table.get(), root.levels);
        }
        let root = self.table.root();
        assert_eq!((root.table.get(), root.levels), self.root);
        true
    }

    fn map(&mut self, page: u64, runs: &[Run], prot: Prot, memory: Option<u8>) {
        let runs: Vec<PhysRun> = runs
            .iter()
            .take(8)
            .map(|run| {
                let frame = u64::from(run.frame);
                let frame = if run.aligned { frame << 4 } else { frame };
                PhysRun { start: PhysAddr::new(frame << 12), len: run.len.pages() << 12 }
            })
            .collect();
        let count: u64 = runs.iter().map(|run| run.len >> 12).sum();
        let mut gather = Gather::new();
        let mut mapped = self.try_map(page, &runs, prot, memory, &mut gather);
        if let Err(Error::BeyondTop { levels }) = mapped {
            assert!(gather.is_empty() && levels > self.root.1);
            if !self.grow((page + count - 1) << 12, None) {
                return;
            }
            mapped = self.try_map(page, &runs, prot, memory, &mut gather);
        }
        let last = page.checked_add(count.wrapping_sub(1));
        let taken = last.and_then(|last| self.pages.range(page..=last).next());
        let taken = taken.map(|(&page, _)| page);
        match mapped {
            Ok(bytes) => {
                assert_eq!((bytes, taken), (count << 12, None));
                let frames = runs.iter().flat_map(|run| {
                    let first = run.start.get() >> 12;
                    first..first + (run.len >> 12)
                });
                self.pages.extend((page..).zip(frames.map(|frame| (frame, prot))));
            }
            Err(Error::AlreadyMapped { at }) => {
                assert_eq!(Some(at.get() >> 12), taken, "the first byte that is taken");
            }
            Err(Error::OutOfMemory) => assert!(memory.is_some()),
            Err(Error::Empty) => assert_eq!(count, 0),
            Err(Error::Overflow) => assert!(page + count > 1 << 52),
            Err(Error::IovaOutOfRange { .. }) => assert!(page + count - 1 > self.last),
            Err(error) => panic!("{error}"),
        }
        self.finish(&mut gather, page, count);
    }

    fn try_map(
        &self,
        page: u64,
        runs: &[PhysRun],
        prot: Prot,
        memory: Option<u8>,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        self.with(memory, || self.table.map_batch(Iova::new(page << 12), runs, prot, gather))
    }

    /// Runs `f` with so many allocations left.
    fn with<R>(&self, memory: Option<u8>, f: impl FnOnce() -> R) -> R {
        if let Some(left) = memory {
            self.memory.fail_after(Some(usize::from(left % 8)));
        }
        let result = f();
        self.memory.fail_after(None);
        result
    }

    fn unmap(&mut self, page: u64, count: u64, whole_leaves: bool) {
        let iova = Iova::new(page << 12);
        let mut gather = Gather::new();
        let (bytes, stop) = if whole_leaves {
            let bytes = self.table.unmap_whole_leaves(iova, count << 12, &mut gather);
            (bytes, None)
        } else {
            let unmapped = self.table.unmap(iova, count << 12, &mut gather);
            (unmapped.map(|unmapped| unmapped.bytes), unmapped.ok().and_then(|done| done.stop))
        };
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(Error::Overflow) => return assert!(page + count > 1 << 52),
            Err(Error::IovaOutOfRange { .. }) => return assert!(page + count - 1 > self.last),
            Err(error) => panic!("{error}"),
        };
        let done = bytes >> 12;
        for gone in page..page + done {
            assert!(self.pages.remove(&gone).is_some(), "{gone:#x} was not mapped");
        }
        self.dirty.retain(|first, _| *first < page || *first >= page + done);
        if !whole_leaves {
            assert!(done <= count);
            self.check_stop(page, count, done, stop);
        } else if done < count && done != 0 {
            assert!(!self.pages.contains_key(&(page + done)), "only a hole ends it");
        }
        assert_eq!(gather.range(), iova.span(bytes));
        self.finish(&mut gather, page, count.max(done));
    }

    /// What ended an unmap is there.
    fn check_stop(&self, page: u64, count: u64, done: u64, stop: Option<Stop>) {
        match stop {
            None => assert_eq!(done, count),
            Some(Stop::Hole) => assert!(!self.pages.contains_key(&(page + done))),
            Some(Stop::Leaf { start, size }) => {
                let (first, pages) = (start.get() >> 12, size >> 12);
                assert!((first..first + pages).contains(&(page + done)));
                assert!(first < page + done || first + pages > page + count);
                for page in first..first + pages {
                    assert!(self.pages.contains_key(&page), "a leaf maps what is mapped");
                }
            }
        }
    }

    fn write(&mut self, page: u64) {
        let path = self.table.path(Iova::new(page << 12));
        let Some(Translation { page_size, .. }) = path.translation else {
            return assert!(!self.pages.contains_key(&page));
        };
        let leaf = path.steps().last().expect("a translation has an entry");
        self.memory.fetch_or_u64(leaf.at(), DIRTY).expect("tables are in memory");
        let pages = page_size >> 12;
        self.dirty.insert(page & !(pages - 1), pages);
    }

    fn read_dirty(&mut self, page: u64, count: u64, clear: bool) {
        let then = if clear { Dirty::Clear } else { Dirty::Keep };
        let mut gather = Gather::new();
        let mut seen = BTreeMap::new();
        let mut record = |iova: Iova, len: u64| {
            assert_eq!(seen.insert(iova.get() >> 12, len >> 12), None, "told once");
        };
        let read = self.table.read_dirty(
            Iova::new(page << 12),
            count << 12,
            then,
            &mut gather,
            &mut record,
        );
        match read {
            Ok(()) => {}
            Err(Error::Overflow) => return assert!(page + count > 1 << 52),
            Err(Error::IovaOutOfRange { .. }) => return assert!(page + count - 1 > self.last),
            Err(error) => panic!("{error}"),
        }
        let inside = |first: &u64, pages: &u64| *first < page + count && page < first + pages;
        let expected: BTreeMap<u64, u64> = self
            .dirty
            .iter()
            .filter(|(first, pages)| inside(first, pages))
            .map(|(&first, &pages)| (first, pages))
            .collect();
        assert_eq!(seen, expected);
        if clear {
            self.dirty.retain(|first, pages| !inside(first, pages));
            assert_eq!(gather.is_empty(), expected.is_empty());
        }
        assert_eq!(gather.dead_tables(), 0);
        gather.release(self.memory);
    }

    /// What is refused changes nothing.
    fn odd(&mut self, iova: u64, len: u64, phys: u64) {
        if (iova | len | phys) & 0xfff == 0 {
            return;
        }
        let mut gather = Gather::new();
        let start = Iova::new(iova);
        let run = PhysRun { start: PhysAddr::new(phys), len };
        let refused = self.table.map_batch(start, &[run], Prot::READ, &mut gather);
        assert!(refused.is_err());
        if (iova | len) & 0xfff != 0 {
            assert!(self.table.unmap(start, len, &mut gather).is_err());
            let keep = Dirty::Keep;
            let read = self.table.read_dirty(start, len, keep, &mut gather, &mut |_, _| {});
            assert!(read.is_err());
        }
        assert!(gather.is_empty());
    }

    /// Checks what a gather asks for, and does it.
    fn finish(&self, gather: &mut Gather, page: u64, count: u64) {
        if let Some(range) = gather.range() {
            assert!(range.start().get() >> 12 >= page);
            assert!(range.end().get() >> 12 < page + count);
        }
        assert_eq!(gather.removed_tables(), gather.dead_tables() != 0);
        let live = self.memory.live();
        let dead = gather.dead_tables();
        gather.release(self.memory);
        assert_eq!(self.memory.live(), live - dead);
    }

    /// Every page, and those next to it, lead where the model says, by the table's own walk and by
    /// that of hardware.
    fn check(&self) {
        let near = self.pages.keys().flat_map(|&page| [page.wrapping_sub(1), page, page + 1]);
        let mut last = None;
        for page in near.filter(|page| *page < 1 << 52) {
            if last.is_some_and(|last| page <= last) {
                continue;
            }
            last = Some(page);
            let iova = page << 12 | 0x123;
            let walked = self.table.walk(Iova::new(iova));
            let hardware = amd::walk(self.memory, self.root.0, self.root.1, iova);
            let Some(&(frame, prot)) = self.pages.get(&page) else {
                assert_eq!((walked, hardware), (None, None), "{page:#x} is not mapped");
                continue;
            };
            let walked = walked.expect("it is mapped");
            let hardware = hardware.expect("it is mapped");
            assert_eq!(walked.phys.get(), frame << 12 | 0x123);
            assert_eq!(walked.prot, prot | Prot::CACHE);
            assert_eq!((walked.phys.get(), walked.page_size), (hardware.phys, hardware.size));
            assert_eq!(hardware.read, prot.contains(Prot::READ));
            assert_eq!(hardware.write, prot.contains(Prot::WRITE));
        }
    }
}

fuzz_target!(|input: Input| {
    let memory = PagePool::new();
    if let Some(mut bench) = Bench::new(&memory, &input) {
        for operation in input.operations.iter().take(64) {
            bench.apply(operation);
        }
        bench.check();
    }
    assert_eq!(memory.live(), 0, "every table is given back");
});
