//! Page tables of two formats side by side: what is done to both must come to the same, and to what
//! a plain map of runs says. Leaves are cut and joined, hardware writes by old entries, memory
//! ends.

#![no_main]
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_fuzz::pages::PagePool;
use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, ArmOptions, ArmStage1, ArmStage2, Config, Dirty, Error, Format, Gather,
    Joined, PageTable, RiscvFirstStage, RiscvOptions, SizeChanges, Stop, Translation, Unmapped,
    VtdSecondStage, VtdSecondStageOptions, X86_64, X86_64Options,
};
use lychgate_types::{Iova, Memory, PhysAddr, PhysRun, Prot};

const RW: Prot = Prot::READ.union(Prot::WRITE);
/// What all formats have.
const COMMON_SIZES: u64 = 1 << 12 | 1 << 21 | 1 << 30;
/// IOVAs that all formats take.
const BITS: u32 = 38;
/// Pages near which a table of some level ends.
const EDGES: [u64; 4] = [0x200, 0, 1 << 18, 1 << 25];
/// More entries written than this, and an input takes too long.
const MOST_ENTRIES: u64 = 0x6000;

#[derive(Arbitrary, Debug)]
struct Input {
    formats: [Kind; 2],
    /// Each format with all its sizes: what is mapped is the same then, in which leaves is not.
    own_sizes: bool,
    operations: Vec<Operation>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Kind {
    AmdV1,
    X86,
    VtdSecondStage,
    Riscv,
    ArmStage1,
    ArmStage2,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Operation {
    Map {
        range: Range,
        frames: Frames,
        write: bool,
        memory: Option<u8>,
    },
    MapBatch {
        page: Page,
        frames: [(u16, u8); 4],
        memory: Option<u8>,
    },
    Unmap {
        range: Range,
    },
    Cut {
        range: Range,
        memory: Option<u8>,
    },
    CutDown {
        range: Range,
        order: u8,
        memory: Option<u8>,
    },
    /// Hardware writes to a page by the entry from before the join.
    Join {
        range: Range,
        memory: Option<u8>,
        written: Option<u16>,
    },
    Write {
        page: Page,
    },
    ReadDirty {
        range: Range,
        clear: bool,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Page {
    edge: u8,
    offset: i16,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Range {
    page: Page,
    len: Len,
    /// Begin at a multiple of the largest power of two in the length.
    aligned: bool,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Pages(u8),
    Order(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Frames {
    /// As far away from the IOVA as elsewhere, so that neighbours continue each other.
    Alongside,
    At(u16),
}

impl Page {
    fn number(self) -> u64 {
        let edge = EDGES[usize::from(self.edge) % EDGES.len()];
        edge.saturating_add_signed(i64::from(self.offset % 0x600))
    }
}

impl Range {
    /// First page and number of pages, which the aperture holds.
    fn pages(self) -> (u64, u64) {
        let count = match self.len {
            Len::Pages(pages) => u64::from(pages) + 1,
            Len::Order(order) => 1 << (order % 20),
        };
        let page = self.page.number();
        let page = if self.aligned { page & !((1 << count.ilog2()) - 1) } else { page };
        (page, count)
    }
}

impl Frames {
    fn first(self, page: u64) -> u64 {
        match self {
            Self::Alongside => page + (1 << 18),
            Self::At(frame) => u64::from(frame),
        }
    }
}

/// A page table of any format.
trait Side {
    fn map(
        &self,
        page: u64,
        runs: &[PhysRun],
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<u64, Error>;
    fn unmap(&self, page: u64, count: u64, gather: &mut Gather) -> Unmapped;
    fn cut(
        &self,
        page: u64,
        count: u64,
        largest: Option<u64>,
        gather: &mut Gather,
    ) -> Result<usize, Error>;
    fn join(&self, page: u64, count: u64, gather: &mut Gather) -> Result<Joined, Error>;
    fn walk(&self, page: u64) -> Option<Translation>;
    /// The entry that maps a page.
    fn entry(&self, page: u64) -> Option<PhysAddr>;
    /// Hardware records a write in an entry.
    fn write(&self, entry: PhysAddr);
    fn dirty(&self, page: u64, count: u64, then: Dirty) -> Vec<(u64, u64)>;
    /// Invalidates, takes over what was recorded by then, and frees.
    fn finish(&self, gather: &mut Gather);
    fn memory(&self) -> &PagePool;
}

impl<F: Format> Side for PageTable<F, &PagePool> {
    fn map(
        &self,
        page: u64,
        runs: &[PhysRun],
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        self.map_batch(Iova::new(page << 12), runs, prot, gather)
    }

    fn unmap(&self, page: u64, count: u64, gather: &mut Gather) -> Unmapped {
        self.unmap(Iova::new(page << 12), count << 12, gather).expect("the range is right")
    }

    fn cut(
        &self,
        page: u64,
        count: u64,
        largest: Option<u64>,
        gather: &mut Gather,
    ) -> Result<usize, Error> {
        let iova = Iova::new(page << 12);
        match largest {
            None => self.cut(iova, count << 12, gather),
            Some(largest) => self.cut_down(iova, count << 12, largest, gather),
        }
    }

    fn join(&self, page: u64, count: u64, gather: &mut Gather) -> Result<Joined, Error> {
        self.join(Iova::new(page << 12), count << 12, gather)
    }

    fn walk(&self, page: u64) -> Option<Translation> {
        let there = self.walk(Iova::new(page << 12));
        there.map(|there| Translation { prot: there.prot & RW, ..there })
    }

    fn entry(&self, page: u64) -> Option<PhysAddr> {
        let path = self.path(Iova::new(page << 12));
        path.translation.and(path.steps().last()).map(|step| step.at())
    }

    fn write(&self, entry: PhysAddr) {
        let memory = *self.pages();
        let before = memory.load_u64(entry).expect("an entry is in a table");
        assert!(F::is_present(before), "what hardware may still use stays as it was");
        memory.store_u64(entry, F::make_dirty(before)).expect("an entry is in a table");
    }

    fn dirty(&self, page: u64, count: u64, then: Dirty) -> Vec<(u64, u64)> {
        let (mut seen, mut gather) = (Vec::new(), Gather::new());
        let mut record = |iova: Iova, len: u64| seen.push((iova.get() >> 12, len >> 12));
        self.read_dirty(Iova::new(page << 12), count << 12, then, &mut gather, &mut record)
            .expect("the range is right");
        self.finish(&mut gather);
        seen
    }

    fn finish(&self, gather: &mut Gather) {
        self.settle(gather);
        gather.release(*self.pages());
    }

    fn memory(&self) -> &PagePool {
        self.pages()
    }
}

fn side<'a>(kind: Kind, memory: &'a PagePool, own_sizes: bool) -> Box<dyn Side + 'a> {
    fn make<'a, F: Format>(
        memory: &'a PagePool,
        options: F::Options,
        own_sizes: bool,
    ) -> Box<dyn Side + 'a> {
        let page_sizes = if own_sizes { u64::MAX } else { COMMON_SIZES };
        let mut config = Config { page_sizes, ..Config::new(BITS, options) };
        if F::GROWS {
            config.levels = 4;
        }
        let table = PageTable::<F, _>::new(memory, config).expect("every format has these");
        assert_eq!(table.size_changes(), SizeChanges::IN_PLACE);
        Box::new(table)
    }
    let arm =
        ArmOptions { record_writes: true, force_write_back: false, break_before_make_level: 2 };
    match kind {
        Kind::AmdV1 => make::<AmdV1>(memory, AmdV1Options::default(), own_sizes),
        Kind::X86 => {
            let options = X86_64Options { no_execute: true, record_writes: true };
            make::<X86_64>(memory, options, own_sizes)
        }
        Kind::VtdSecondStage => {
            let options = VtdSecondStageOptions { force_snoop: true };
            make::<VtdSecondStage>(memory, options, own_sizes)
        }
        Kind::Riscv => {
            let options = RiscvOptions { memory_types: false, record_writes: true };
            make::<RiscvFirstStage>(memory, options, own_sizes)
        }
        Kind::ArmStage1 => make::<ArmStage1>(memory, arm, own_sizes),
        Kind::ArmStage2 => make::<ArmStage2>(memory, arm, own_sizes),
    }
}

/// What should be mapped: runs of pages by their first one.
#[derive(Default)]
struct Plain {
    /// Number of pages, first frame, rights.
    runs: BTreeMap<u64, (u64, u64, Prot)>,
    /// Pages that hardware has written to since that was last cleared.
    written: BTreeSet<u64>,
}

impl Plain {
    /// Frame and rights of a page, and the end of its run.
    fn at(&self, page: u64) -> Option<(u64, Prot, u64)> {
        let (&start, &(count, frame, prot)) = self.runs.range(..=page).next_back()?;
        (page < start + count).then(|| (frame + (page - start), prot, start + count))
    }

    /// First page of a range that is mapped.
    fn taken(&self, page: u64, count: u64) -> Option<u64> {
        if self.at(page).is_some() {
            return Some(page);
        }
        self.runs.range(page..page + count).next().map(|(&start, _)| start)
    }

    /// How many pages are mapped without a hole.
    fn mapped(&self, page: u64, count: u64) -> u64 {
        let mut at = page;
        while at < page + count
            && let Some((_, _, end)) = self.at(at)
        {
            at = end;
        }
        at.min(page + count) - page
    }

    fn unmap(&mut self, page: u64, count: u64) {
        let end = page + count;
        let before = self.runs.range(..page).next_back().map(|(&start, &run)| (start, run));
        let within: Vec<_> =
            self.runs.range(page..end).map(|(&start, &run)| (start, run)).collect();
        for (start, (pages, frame, prot)) in before.into_iter().chain(within) {
            if start + pages <= page {
                continue;
            }
            self.runs.remove(&start);
            if start < page {
                self.runs.insert(start, (page - start, frame, prot));
            }
            if start + pages > end {
                self.runs.insert(end, (start + pages - end, frame + (end - start), prot));
            }
        }
        self.written.retain(|written| *written < page || *written >= end);
    }
}

struct Bench<'a> {
    sides: [Box<dyn Side + 'a>; 2],
    own_sizes: bool,
    plain: Plain,
    /// That were written so far, about.
    entries: u64,
}

impl Bench<'_> {
    fn apply(&mut self, operation: Operation) {
        match operation {
            Operation::Map { range, frames, write, memory } => {
                let (page, count) = range.pages();
                let run = (frames.first(page), count);
                let prot = if write { RW } else { Prot::READ };
                self.map(page, &[run], prot, memory);
            }
            Operation::MapBatch { page, frames, memory } => {
                let runs = frames.map(|(frame, count)| (u64::from(frame), u64::from(count) + 1));
                self.map(page.number(), &runs, RW, memory);
            }
            Operation::Unmap { range } => self.unmap(range),
            Operation::Cut { range, memory } => self.cut(range, None, memory),
            Operation::CutDown { range, order, memory } => {
                self.cut(range, Some(1 << (12 + u32::from(order) % 12)), memory);
            }
            Operation::Join { range, memory, written } => self.join(range, memory, written),
            Operation::Write { page } => self.write(page.number()),
            Operation::ReadDirty { range, clear } => self.read_dirty(range, clear),
        }
    }

    /// Runs `f` on both sides, with so many allocations left. A side that has too little memory
    /// does it again with enough; then what it says is its own, and so `None`.
    fn both<R>(
        &self,
        memory: Option<u8>,
        f: impl Fn(&dyn Side, &mut Gather) -> Result<R, Error>,
    ) -> [Result<Option<R>, Error>; 2] {
        [0, 1].map(|index| {
            let side = &*self.sides[index];
            let mut gather = Gather::new();
            let left =
                memory.map(|memory| usize::from(memory % 8) + index * usize::from(memory / 128));
            side.memory().fail_after(left);
            let result = f(side, &mut gather);
            side.memory().fail_after(None);
            side.finish(&mut gather);
            match result {
                Err(Error::OutOfMemory) => {
                    assert!(memory.is_some());
                    let result = f(side, &mut gather);
                    side.finish(&mut gather);
                    result.map(|_| None)
                }
                result => result.map(Some),
            }
        })
    }

    /// Whether an input may still write so many entries; then they are counted.
    fn affords(&mut self, entries: u64) -> bool {
        let affords = self.entries + entries <= MOST_ENTRIES;
        self.entries += if affords { entries } else { 0 };
        affords
    }

    fn map(&mut self, page: u64, runs: &[(u64, u64)], prot: Prot, memory: Option<u8>) {
        let run = |&(frame, count): &(u64, u64)| PhysRun {
            start: PhysAddr::new(frame << 12),
            len: count << 12,
        };
        let count: u64 = runs.iter().map(|(_, count)| count).sum();
        let frames: Vec<PhysRun> = runs.iter().map(run).collect();
        // A long run that no large leaf fits takes as many leaves as it has pages.
        let aligned = runs.iter().all(|(frame, _)| (frame ^ page) & 0x1ff == 0);
        if !self.affords(if aligned { 1024 + count / 512 } else { count }) {
            return;
        }
        let results = self.both(memory, |side, gather| side.map(page, &frames, prot, gather));
        for result in results {
            match (result, self.plain.taken(page, count)) {
                (Ok(bytes), None) => assert!(bytes.is_none_or(|bytes| bytes == count << 12)),
                (Err(Error::AlreadyMapped { at }), taken) => {
                    assert_eq!(Some(at.get() >> 12), taken);
                }
                (result, taken) => panic!("{result:?} where {taken:?} is taken"),
            }
        }
        if self.plain.taken(page, count).is_none() {
            let mut at = page;
            for &(frame, count) in runs {
                self.plain.runs.insert(at, (count, frame, prot));
                at += count;
            }
        }
    }

    fn unmap(&mut self, range: Range) {
        let (page, count) = range.pages();
        if self.own_sizes {
            // Leaves differ: where both end with the range, they end alike.
            self.cut(range, None, None);
        }
        let unmapped = self.both(None, |side, gather| Ok(side.unmap(page, count, gather)));
        let [one, other] =
            unmapped.map(|result| result.expect("it gives none").expect("no memory"));
        assert_eq!(one, other);
        let done = one.bytes >> 12;
        let mapped = self.plain.mapped(page, count);
        match one.stop {
            None => assert_eq!((done, mapped), (count, count)),
            Some(Stop::Hole) => assert_eq!(done, mapped),
            Some(Stop::Leaf { start, size }) => {
                let (first, pages) = (start.get() >> 12, size >> 12);
                assert!(!self.own_sizes, "it was cut");
                assert!(done < mapped && first <= page + done && page + done < first + pages);
                assert!(first < page + done || first + pages > page + count);
            }
        }
        self.plain.unmap(page, done);
    }

    fn cut(&mut self, range: Range, largest: Option<u64>, memory: Option<u8>) {
        let (page, count) = range.pages();
        if largest.is_some_and(|largest| !self.affords((count << 12) / largest)) {
            return;
        }
        let results = self.both(memory, |side, gather| {
            let cut = side.cut(page, count, largest, gather)?;
            assert_eq!(gather.is_empty(), cut == 0);
            assert_eq!(gather.dead_tables(), 0);
            Ok(cut)
        });
        let [one, other] = results.map(|result| result.expect("it can be cut"));
        if !self.own_sizes
            && let (Some(one), Some(other)) = (one, other)
        {
            assert_eq!(one, other);
        }
    }

    fn join(&mut self, range: Range, memory: Option<u8>, written: Option<u16>) {
        let (page, count) = range.pages();
        // Some of them the first page of a table.
        let edge = |offset: u16| if offset & 1 == 0 { offset } else { offset & !0x1ff };
        let written = written.map(|offset| page + u64::from(edge(offset)) % count);
        let written = written.filter(|&page| {
            self.plain.at(page).is_some_and(|(_, prot, _)| prot.contains(Prot::WRITE))
        });
        let results = self.both(memory, |side, gather| {
            let entry = written.and_then(|page| side.entry(page));
            let joined = side.join(page, count, gather);
            // Also when a join has ended early: hardware knows of neither.
            if let Some(entry) = entry {
                side.write(entry);
            }
            let joined = joined?;
            assert_eq!(gather.is_empty(), joined.leaves == 0);
            Ok(joined)
        });
        self.plain.written.extend(written);
        let [one, other] = results.map(|result| result.expect("it can be joined"));
        for joined in [one, other].into_iter().flatten() {
            assert_eq!(joined.needs_break, None);
        }
        if !self.own_sizes
            && let (Some(one), Some(other)) = (one, other)
        {
            assert_eq!(one, other);
        }
    }

    fn write(&mut self, page: u64) {
        let Some((_, prot, _)) = self.plain.at(page) else {
            return;
        };
        if !prot.contains(Prot::WRITE) {
            return;
        }
        for side in &self.sides {
            side.write(side.entry(page).expect("it is mapped"));
        }
        self.plain.written.insert(page);
    }

    fn read_dirty(&mut self, range: Range, clear: bool) {
        let (page, count) = range.pages();
        let then = if clear { Dirty::Clear } else { Dirty::Keep };
        let dirty = [0, 1].map(|index| self.sides[index].dirty(page, count, then));
        for dirty in &dirty {
            for written in self.plain.written.range(page..page + count) {
                let covers =
                    |&(first, pages): &(u64, u64)| (first..first + pages).contains(written);
                assert!(dirty.iter().any(covers), "a write to {written:#x} is not told");
            }
            for &(first, pages) in dirty {
                assert_eq!(self.plain.mapped(first, pages), pages);
            }
        }
        if clear {
            // Of leaves that pass an end of the range, the record is gone altogether.
            let [one, other] = &dirty;
            let gone = |page: &u64| {
                [one, other]
                    .into_iter()
                    .flatten()
                    .any(|(first, pages)| (*first..first + pages).contains(page))
            };
            self.plain.written.retain(|page| !gone(page));
        }
        if !self.own_sizes {
            assert_eq!(dirty[0], dirty[1]);
        }
    }

    /// Every leaf leads where the plain map says, on both sides, and next to the runs there is
    /// nothing.
    fn check(&self) {
        for side in &self.sides {
            for (&start, &(count, frame, prot)) in &self.plain.runs {
                let mut page = start;
                while page < start + count {
                    let there = side.walk(page).expect("it is mapped");
                    let expected = (frame + (page - start)) << 12;
                    assert_eq!((there.phys.get(), there.prot), (expected, prot), "{page:#x}");
                    page = (page | ((there.page_size >> 12) - 1)) + 1;
                }
                for beside in [start.wrapping_sub(1), start + count] {
                    if beside < 1 << (BITS - 12) && self.plain.at(beside).is_none() {
                        assert_eq!(side.walk(beside), None, "{beside:#x} is not mapped");
                    }
                }
            }
        }
        if !self.own_sizes {
            for (&start, &(count, ..)) in &self.plain.runs {
                let mut page = start;
                while page < start + count {
                    let [one, other] = [0, 1].map(|index| self.sides[index].walk(page));
                    assert_eq!(one, other);
                    page = (page | ((one.map_or(4096, |one| one.page_size) >> 12) - 1)) + 1;
                }
            }
        }
    }
}

fuzz_target!(|input: Input| {
    let pools = [PagePool::new(), PagePool::new()];
    let sides = [0, 1].map(|index| side(input.formats[index], &pools[index], input.own_sizes));
    let mut bench =
        Bench { sides, own_sizes: input.own_sizes, plain: Plain::default(), entries: 0 };
    for &operation in input.operations.iter().take(48) {
        bench.apply(operation);
    }
    bench.check();
    drop(bench);
    assert!(pools.iter().all(|pool| pool.live() == 0), "every table is given back");
});
