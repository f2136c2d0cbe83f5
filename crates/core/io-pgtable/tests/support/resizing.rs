//! Random histories in which leaves are cut and joined, written to by hardware and read for it,
//! against a plain model that knows of leaves by their first IOVA only.

use std::collections::BTreeMap;
use std::ops::Bound;

use lychgate_io_pgtable::{
    Dirty, Error, Format, Gather, PageTable, Root, SizeChange, SizeChanges, Stop,
};
use lychgate_types::{HeapPages, Iova, Memory, Pages, PhysAddr, Prot};
use proptest::prelude::*;

use super::histories::{RW, Subject, all_prots};

/// In units of the format's granule.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Maps to the frames `delta` further on.
    Map {
        range: Range,
        delta: u64,
        prot: Prot,
    },
    Unmap {
        range: Range,
    },
    Cut {
        range: Range,
        memory_for: Option<usize>,
    },
    CutDown {
        range: Range,
        order: u32,
        memory_for: Option<usize>,
    },
    Join {
        range: Range,
        memory_for: Option<usize>,
    },
    /// Hardware writes to a page.
    Write {
        page: u64,
    },
    ReadDirty {
        range: Range,
        clear: bool,
    },
}

/// First granule and number of granules.
pub(crate) type Range = (u64, u64);

/// More leaves than this, and a history takes too long.
const MOST_LEAVES: usize = 3000;

/// Histories of up to `steps` operations on three neighbouring tables, around the end of a table of
/// some level, of which each decodes `order` bits, in an aperture of 2^`bits` granules. Most of the
/// memory is consecutive.
pub(crate) fn history(order: u32, bits: u32, steps: usize) -> impl Strategy<Value = Vec<Op>> {
    let table = 1u64 << order;
    let bases = (1..4u32)
        .map(|level| 1u64 << (order * level))
        .filter(|edge| edge + 2 * table <= 1 << bits)
        .map(|edge| edge - table);
    let bases: Vec<u64> = bases.chain([0]).collect();
    let range = move || {
        let any = (0..3 * table, 1..table);
        let aligned =
            (0..3 * table, 0..=order).prop_map(|(at, bits)| (at >> bits << bits, 1 << bits));
        let tables = (0..3u64, 1..3u64).prop_map(move |(at, tables)| (at * table, tables * table));
        let range = prop_oneof![2 => any, 3 => aligned, 3 => tables];
        range.prop_map(move |(page, pages): (u64, u64)| (page, pages.min(3 * table - page)))
    };
    let delta = prop_oneof![8 => Just(1 << (2 * order)), 1 => Just(16u64), 1 => 0..64u64];
    let prot = prop_oneof![8 => Just(RW), 1 => prop::sample::select(all_prots())];
    let memory = || prop_oneof![4 => Just(None), 1 => (0..4usize).prop_map(Some)];
    let op = prop_oneof![
        3 => (range(), delta, prot).prop_map(|(range, delta, prot)| Op::Map { range, delta, prot }),
        2 => range().prop_map(|range| Op::Unmap { range }),
        3 => (range(), memory()).prop_map(|(range, memory_for)| Op::Cut { range, memory_for }),
        2 => (range(), 0..=order, memory())
            .prop_map(|(range, order, memory_for)| Op::CutDown { range, order, memory_for }),
        4 => (range(), memory()).prop_map(|(range, memory_for)| Op::Join { range, memory_for }),
        4 => (0..3 * table).prop_map(|page| Op::Write { page }),
        2 => (range(), any::<bool>()).prop_map(|(range, clear)| Op::ReadDirty { range, clear }),
    ];
    // A leaf of two levels up, cut at any page.
    let large = 1u64 << (2 * order);
    let piece = (0..large, 1..large).prop_map(move |(at, n)| (large + at, n.min(large - at)));
    let large_op = prop_oneof![
        3 => Just(Op::Map { range: (large, large), delta: large, prot: RW }),
        3 => (piece, memory()).prop_map(|(range, memory_for)| Op::Cut { range, memory_for }),
        1 => Just(Op::CutDown { range: (large, large), order: order + 3, memory_for: None }),
        2 => memory().prop_map(move |memory_for| Op::Join { range: (large, large), memory_for }),
        1 => (0..large).prop_map(move |page| Op::Write { page: large + page }),
    ];
    let whole = Op::Map { range: (0, 3 * table), delta: 1 << (2 * order), prot: RW };
    let ops = prop::collection::vec(op, 1..steps);
    let large_ops = prop::collection::vec(large_op, 0..6);
    let parts = (prop::sample::select(bases), ops, large_ops, any::<bool>());
    parts.prop_map(move |(base, mut ops, large_ops, mapped)| {
        if mapped {
            ops.insert(0, whole.clone());
        }
        ops.iter_mut().for_each(|op| op.move_by(base));
        if base.saturating_add(3 * table) <= large {
            ops.extend(large_ops);
        }
        ops
    })
}

impl Op {
    fn move_by(&mut self, base: u64) {
        match self {
            Self::Map { range, .. }
            | Self::Unmap { range }
            | Self::Cut { range, .. }
            | Self::CutDown { range, .. }
            | Self::Join { range, .. }
            | Self::ReadDirty { range, .. } => range.0 += base,
            Self::Write { page } => *page += base,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Leaf {
    size: u64,
    phys: u64,
    prot: Prot,
    /// As the format encodes permissions: what cannot be told apart later may still differ in this.
    attributes: u64,
    dirty: bool,
}

/// What a table should hold.
struct Model {
    leaves: BTreeMap<u64, Leaf>,
    sizes: u64,
    granule_shift: u32,
    index_bits: u32,
    changes: SizeChanges,
}

/// What a refused change is about.
#[derive(Debug, PartialEq, Eq)]
struct Refused {
    at: u64,
    size: u64,
}

impl Model {
    fn at(&self, iova: u64) -> Option<(u64, Leaf)> {
        let (&start, &leaf) = self.leaves.range(..=iova).next_back()?;
        (iova - start < leaf.size).then_some((start, leaf))
    }

    /// Leaves that intersect a range.
    fn within(&self, first: u64, last: u64) -> Vec<(u64, Leaf)> {
        let before = self.at(first).map_or(first, |(start, _)| start);
        self.leaves.range(before..=last).map(|(&start, &leaf)| (start, leaf)).collect()
    }

    fn taken(&self, first: u64, last: u64) -> Option<u64> {
        self.within(first, last).first().map(|&(start, _)| start.max(first))
    }

    /// The bytes that one entry of the table spans in which leaves of `size` are.
    fn item(&self, size: u64) -> u64 {
        let level = (size.ilog2() - self.granule_shift) / self.index_bits;
        1 << (self.granule_shift + self.index_bits * level)
    }

    /// The largest page at the start of `room` bytes that is `allowed`.
    fn largest(&self, at: u64, phys: u64, room: u64, allowed: impl Fn(u64) -> bool) -> u64 {
        let fits = |size: &u64| {
            let fits = *size <= room && (at | phys) & (size - 1) == 0;
            fits && self.sizes & size != 0 && allowed(*size)
        };
        (0..63).rev().map(|bit| 1u64 << bit).find(fits).expect("ranges are of granules")
    }

    fn fill(&mut self, start: u64, leaf: Leaf, allowed: impl Fn(u64, u64) -> bool) {
        let mut done = 0;
        while done < leaf.size {
            let (at, phys) = (start + done, leaf.phys + done);
            let size = self.largest(at, phys, leaf.size - done, |size| allowed(at, size));
            self.leaves.insert(at, Leaf { size, phys, ..leaf });
            done += size;
        }
    }

    fn unmap(&mut self, first: u64, len: u64) -> (u64, Option<Stop>) {
        let mut done = 0;
        while done < len {
            let Some((start, leaf)) = self.at(first + done) else {
                return (done, Some(Stop::Hole));
            };
            if start != first + done || leaf.size > len - done {
                let start = Iova::new(start);
                return (done, Some(Stop::Leaf { start, size: leaf.size }));
            }
            self.leaves.remove(&start);
            done += leaf.size;
        }
        (done, None)
    }

    /// Whether a leaf may stay as it is when a range is cut.
    fn stays(start: u64, size: u64, first: u64, last: u64, largest: u64) -> bool {
        let end = start + (size - 1);
        end < first || last < start || (first <= start && end <= last && size <= largest)
    }

    /// The leaves that a cut must replace.
    fn to_cut(&self, first: u64, last: u64, largest: u64) -> Vec<u64> {
        let stays = |start, leaf: &Leaf| Self::stays(start, leaf.size, first, last, largest);
        let within = self.within(first, last).into_iter();
        within.filter(|(start, leaf)| !stays(*start, leaf)).map(|(start, _)| start).collect()
    }

    /// Cuts one leaf, or says that the format does not let it.
    fn cut(&mut self, start: u64, first: u64, last: u64, largest: u64) -> Result<(), Refused> {
        let leaf = self.leaves.remove(&start).expect("it is there");
        let allowed = |at, size| Self::stays(at, size, first, last, largest);
        self.fill(start, leaf, allowed);
        let parts = self.within(start, start + (leaf.size - 1));
        let item = self.item(leaf.size);
        let tables = parts.iter().any(|(_, part)| part.size < item);
        let in_place = |change| change == SizeChange::InPlace;
        if (leaf.size > item && !in_place(self.changes.runs))
            || (tables && !in_place(self.changes.tables))
        {
            for (part, _) in parts {
                self.leaves.remove(&part);
            }
            self.leaves.insert(start, leaf);
            return Err(Refused { at: start, size: leaf.size });
        }
        Ok(())
    }

    /// Joins what can be joined. Gives the bytes from first to last that changed, and whether
    /// something was held back.
    fn join(&mut self, first: u64, last: u64) -> (Option<(u64, u64)>, bool) {
        let mut changed: Option<(u64, u64)> = None;
        let mut held_back = false;
        for size in (0..63).map(|bit| 1u64 << bit).filter(|size| self.sizes & size != 0) {
            let item = self.item(size);
            let starts: Vec<u64> =
                self.within(first, last).iter().map(|&(start, _)| start).collect();
            for start in starts {
                let end = start.checked_add(size - 1);
                if start & (size - 1) != 0 || start < first || end.is_none_or(|end| end > last) {
                    continue;
                }
                let Some(joined) = self.whole(start, size) else {
                    continue;
                };
                let parts = self.within(start, start + (size - 1));
                // They lie in one table: that of the joined leaf, or the one that it displaces.
                let least = if size > item { item } else { item >> self.index_bits };
                if parts.iter().any(|(_, part)| part.size < least) {
                    continue;
                }
                let rule = if size == item { self.changes.tables } else { self.changes.runs };
                if rule == SizeChange::BreakBeforeMake {
                    held_back = true;
                    continue;
                }
                for (part, _) in parts {
                    self.leaves.remove(&part);
                }
                self.leaves.insert(start, joined);
                let end = start + (size - 1);
                let (low, high) = changed.unwrap_or((start, end));
                changed = Some((low.min(start), high.max(end)));
            }
        }
        (changed, held_back)
    }

    /// The leaf that smaller ones make together, if they do.
    fn whole(&self, start: u64, size: u64) -> Option<Leaf> {
        let first = *self.leaves.get(&start)?;
        let mut whole = Leaf { size, ..first };
        if first.size >= size || first.phys & (size - 1) != 0 {
            return None;
        }
        let mut done = 0;
        while done < size {
            let part = *self.leaves.get(&(start + done))?;
            let expected = Leaf { size: part.size, phys: first.phys + done, ..first };
            if (Leaf { dirty: first.dirty, ..part }) != expected {
                return None;
            }
            whole.dirty |= part.dirty;
            done += part.size;
        }
        Some(whole)
    }
}

/// What a fresh leaf that can be written counts as, and whether that can be cleared.
fn dirty_rules<F: Format + Clone>(subject: &Subject<'_, F>) -> (bool, bool) {
    let pages = HeapPages::new();
    let table = PageTable::<F, _>::new(&pages, subject.config.clone()).unwrap();
    let mut gather = Gather::new();
    table.map(Iova::new(0), PhysAddr::new(0), table.granule(), RW, &mut gather).unwrap();
    let [fresh, again] = [0, 1].map(|_| {
        let mut seen = false;
        let len = table.granule();
        let mut record = |_, _| seen = true;
        table.read_dirty(Iova::new(0), len, Dirty::Clear, &mut gather, &mut record).unwrap();
        seen
    });
    gather.release(&pages);
    (fresh, again)
}

struct Bench<'a, F: Format> {
    subject: &'a Subject<'a, F>,
    table: PageTable<F, &'a HeapPages>,
    model: Model,
    last: u64,
    /// [`dirty_rules`].
    fresh_is_dirty: bool,
    always_dirty: bool,
}

impl<F: Format + Clone> Subject<'_, F> {
    /// Applies `ops`; table, model and decoder agree at every step, and nothing leaks.
    pub(crate) fn run_resizing(&self, ops: &[Op]) {
        let pages = HeapPages::new();
        let table = PageTable::<F, _>::new(&pages, self.config.clone()).unwrap();
        let (fresh_is_dirty, always_dirty) = dirty_rules(self);
        let model = Model {
            leaves: BTreeMap::new(),
            sizes: table.page_sizes(),
            granule_shift: F::GRANULE_SHIFT,
            index_bits: F::INDEX_BITS,
            changes: table.size_changes(),
        };
        let last = table.aperture().end().get();
        let mut bench = Bench { subject: self, table, model, last, fresh_is_dirty, always_dirty };
        for (step, op) in ops.iter().enumerate() {
            bench.apply(op);
            bench.check(step);
            assert_eq!(pages.live(), bench.tables(), "tables that nothing leads to");
        }
        drop(bench);
        assert_eq!(pages.live(), 0);
    }
}

impl<F: Format + Clone> Subject<'_, F> {
    /// Cuts a leaf of every size that has smaller ones to pages near its ends, with memory that ends
    /// at every allocation; then joins it again likewise. What fails has changed nothing.
    pub(crate) fn memory_may_end_while_leaves_change(&self) {
        let pages = HeapPages::new();
        let table = PageTable::<F, _>::new(&pages, self.config.clone()).unwrap();
        let granule = table.granule();
        let half = table.aperture().end().get() / 2 + 1;
        let reach = F::GRANULE_SHIFT + F::INDEX_BITS * table.root().levels;
        let sizes = (0..reach.min(63)).map(|bit| table.page_sizes() & 1 << bit);
        let mut allocations = 0;
        for size in sizes.filter(|&size| size > 4 * granule && size <= half) {
            let mut gather = Gather::new();
            let (iova, phys) = (Iova::new(half - size), PhysAddr::new(size));
            table.map(iova, phys, size, RW, &mut gather).unwrap();
            // Empty tables may have been in the way.
            gather.release(&pages);
            let inner = (Iova::new(iova.get() + granule), size - 2 * granule);
            let live = pages.live();
            let translation = table.walk(inner.0);
            assert_eq!(translation.unwrap().page_size, size);
            for memory in 0.. {
                pages.fail_after(memory);
                let result = table.cut(inner.0, inner.1, &mut gather);
                pages.fail_after(usize::MAX);
                if let Ok(cut) = result {
                    assert_eq!(cut, 1);
                    allocations += memory;
                    break;
                }
                assert_eq!(result, Err(Error::OutOfMemory));
                assert!(gather.is_empty());
                assert_eq!((pages.live(), table.walk(inner.0)), (live, translation));
            }
            gather.release(&pages);
            assert_eq!(table.walk(iova).unwrap().page_size, granule);
            for memory in 0.. {
                pages.fail_after(memory);
                let result = table.join(iova, size, &mut gather);
                pages.fail_after(usize::MAX);
                gather.release(&pages);
                if result.is_ok() {
                    break;
                }
                assert_eq!(result.map(|_| ()), Err(Error::OutOfMemory));
                let there = table.walk(inner.0).unwrap();
                assert_eq!(Some(there.phys), translation.map(|there| there.phys));
            }
            // It comes back where each table on the way can become a leaf.
            let whole = table.walk(inner.0).unwrap().page_size == size;
            assert_eq!(whole, self.comes_back(size, table.page_sizes()));
            assert_eq!(table.unmap(iova, size, &mut gather).unwrap().bytes, size);
            gather.release(&pages);
        }
        assert!(allocations > 0);
        drop(table);
        assert_eq!(pages.live(), 0);
    }

    fn comes_back(&self, size: u64, sizes: u64) -> bool {
        let level = (size.ilog2() - F::GRANULE_SHIFT) / F::INDEX_BITS;
        let item = |level| 1u64 << (F::GRANULE_SHIFT + F::INDEX_BITS * level);
        (1..=level).all(|level| sizes & item(level) != 0)
    }
}

impl<F: Format + Clone> Bench<'_, F> {
    fn range(&self, (page, pages): Range) -> Option<(u64, u64, u64)> {
        let (first, len) = (page << F::GRANULE_SHIFT, pages << F::GRANULE_SHIFT);
        let last = first + (len - 1);
        (last <= self.last).then_some((first, last, len))
    }

    /// Runs `f` with so many allocations left.
    fn with<R>(&self, memory_for: Option<usize>, f: impl FnOnce() -> R) -> R {
        self.table.pages().fail_after(memory_for.unwrap_or(usize::MAX));
        let result = f();
        self.table.pages().fail_after(usize::MAX);
        result
    }

    fn finish(&self, gather: &mut Gather) {
        // Here caches would be invalidated.
        self.table.settle(gather);
        gather.release(self.table.pages());
        assert!(gather.is_empty());
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Map { range, delta, prot } => self.map(range, delta, prot),
            Op::Unmap { range } => {
                let Some((first, _, len)) = self.range(range) else { return };
                let mut gather = Gather::new();
                let unmapped = self.table.unmap(Iova::new(first), len, &mut gather).unwrap();
                let (bytes, stop) = self.model.unmap(first, len);
                assert_eq!((unmapped.bytes, unmapped.stop), (bytes, stop));
                self.finish(&mut gather);
            }
            Op::Cut { range, memory_for } => self.cut(range, None, memory_for),
            Op::CutDown { range, order, memory_for } => {
                self.cut(range, Some(1 << (F::GRANULE_SHIFT + order)), memory_for);
            }
            Op::Join { range, memory_for } => self.join(range, memory_for),
            Op::Write { page } => {
                let at = page << F::GRANULE_SHIFT | 0x18;
                if let Some((start, leaf)) = self.model.at(at)
                    && leaf.prot.contains(Prot::WRITE)
                {
                    let Root { table, levels } = self.table.root();
                    let read = self.subject.read;
                    let there = read(*self.table.pages(), table.get(), levels, at, true);
                    assert!(there.unwrap().unwrap().dirty);
                    self.model.leaves.get_mut(&start).unwrap().dirty = true;
                }
            }
            Op::ReadDirty { range, clear } => {
                let Some((first, last, len)) = self.range(range) else { return };
                let then = if clear { Dirty::Clear } else { Dirty::Keep };
                self.read_dirty(first, last, len, then);
            }
        }
    }

    fn map(&mut self, range: Range, delta: u64, prot: Prot) {
        let Some((first, last, len)) = self.range(range) else { return };
        let phys = first + (delta << F::GRANULE_SHIFT);
        if (phys + len) >> self.subject.config.output_bits != 0 {
            return;
        }
        let mut gather = Gather::new();
        let frames = PhysAddr::new(phys);
        let result = self.table.map(Iova::new(first), frames, len, prot, &mut gather);
        self.finish(&mut gather);
        let Some(allowed) = (self.subject.allows)(prot) else {
            assert_eq!(result, Err(Error::Permissions));
            return;
        };
        if let Some(at) = self.model.taken(first, last) {
            assert_eq!(result, Err(Error::AlreadyMapped { at: Iova::new(at) }));
            return;
        }
        assert_eq!(result, Ok(()));
        let attributes = F::attributes(&self.subject.config.options, prot).unwrap();
        let dirty = self.fresh_is_dirty && allowed.contains(Prot::WRITE);
        let leaf = Leaf { size: len, phys, prot: allowed, attributes, dirty };
        self.model.fill(first, leaf, |_, _| true);
    }

    fn cut(&mut self, range: Range, largest: Option<u64>, memory_for: Option<usize>) {
        let Some((first, last, len)) = self.range(range) else { return };
        let limit = largest.unwrap_or(u64::MAX);
        let leaves = self.model.to_cut(first, last, limit);
        let bytes: u64 = leaves.iter().map(|start| self.model.leaves[start].size).sum();
        if self.model.leaves.len() as u64 + bytes.min(len) / limit.min(bytes.max(1))
            > MOST_LEAVES as u64
        {
            return;
        }
        let mut gather = Gather::new();
        let iova = Iova::new(first);
        let result = self.with(memory_for, || match largest {
            None => self.table.cut(iova, len, &mut gather),
            Some(largest) => self.table.cut_down(iova, len, largest, &mut gather),
        });
        let mut changed: Option<(u64, u64)> = None;
        let mut cut = 0;
        let mut refused = None;
        for start in leaves {
            let leaf = self.model.leaves[&start];
            if matches!(result, Err(Error::OutOfMemory)) {
                // Leaves are cut in order: this is the one that memory was wanting for?
                let there = self.table.walk(Iova::new(start)).unwrap();
                if there.page_size == leaf.size {
                    break;
                }
            }
            if let Err(error) = self.model.cut(start, first, last, limit) {
                refused = Some(error);
                break;
            }
            cut += 1;
            let (low, _) = changed.unwrap_or((start, 0));
            changed = Some((low, start + (leaf.size - 1)));
        }
        match result {
            Ok(leaves) => assert_eq!((leaves, refused), (cut, None)),
            Err(Error::OutOfMemory) => assert!(memory_for.is_some() && refused.is_none()),
            Err(Error::BreakBeforeMake { at, size }) => {
                assert_eq!(refused, Some(Refused { at: at.get(), size }));
            }
            Err(error) => panic!("{error}"),
        }
        assert_eq!(gather.range(), changed.map(|(low, high)| Iova::new(low)..=Iova::new(high)));
        assert_eq!(gather.dead_tables(), 0);
        self.finish(&mut gather);
    }

    fn join(&mut self, range: Range, memory_for: Option<usize>) {
        let Some((first, last, len)) = self.range(range) else { return };
        let mut gather = Gather::new();
        let probes = self.probes(first, last);
        let result = self.with(memory_for, || self.table.join(Iova::new(first), len, &mut gather));
        let before = self.tables();
        let dead = gather.dead_tables();
        match result {
            Ok(joined) => {
                let (changed, held_back) = self.model.join(first, last);
                assert_eq!(joined.leaves == 0, changed.is_none());
                assert_eq!(joined.needs_break.is_some(), held_back);
                let changed = changed.map(|(low, high)| Iova::new(low)..=Iova::new(high));
                assert_eq!(gather.range(), changed);
            }
            Err(Error::OutOfMemory) => {
                assert!(memory_for.is_some());
                self.adopt(first, last);
            }
            Err(error) => panic!("{error}"),
        }
        assert!(self.table.pages().live() >= before + dead);
        self.check_dirty();
        for (iova, word) in probes {
            self.write_by_old_table(iova, word);
        }
        self.finish(&mut gather);
    }

    /// The first and the last page in the range that can be written, and the entries that map them.
    fn probes(&self, first: u64, last: u64) -> Vec<(u64, PhysAddr)> {
        let leaves = self.model.within(first, last).into_iter();
        let mut written = leaves.filter(|(_, leaf)| leaf.prot.contains(Prot::WRITE));
        let ends = [written.next(), written.next_back()];
        let entry = |start| self.table.path(Iova::new(start)).steps().last().unwrap().at();
        ends.into_iter().flatten().map(|(start, _)| (start, entry(start))).collect()
    }

    /// Hardware writes to a page by the entry that mapped it before a join, which may be in a table
    /// that has been displaced: it has not been told to forget it.
    fn write_by_old_table(&mut self, iova: u64, word: PhysAddr) {
        let memory = *self.table.pages();
        let entry = memory.load_u64(word).unwrap();
        assert!(F::is_present(entry), "the table is as it was");
        memory.store_u64(word, F::make_dirty(entry)).unwrap();
        let (start, _) = self.model.at(iova).unwrap();
        self.model.leaves.get_mut(&start).unwrap().dirty = true;
    }

    /// Takes over how far a join has come before memory ended: what it has made is made of what was
    /// there.
    fn adopt(&mut self, first: u64, last: u64) {
        let mut at = first;
        while at <= last {
            let Some((start, leaf)) = self.model.at(at) else {
                let next = self.model.leaves.range((Bound::Excluded(at), Bound::Unbounded)).next();
                let Some((&next, _)) = next else { return };
                at = next;
                continue;
            };
            let there = self.table.walk(Iova::new(start)).unwrap();
            let mut size = leaf.size;
            if there.page_size != leaf.size {
                size = there.page_size;
                let whole = self.model.whole(start, size).expect("joined of parts that fit");
                for (part, _) in self.model.within(start, start + (size - 1)) {
                    self.model.leaves.remove(&part);
                }
                self.model.leaves.insert(start, whole);
            }
            let Some(next) = start.checked_add(size) else { return };
            at = next;
        }
    }

    fn read_dirty(&mut self, first: u64, last: u64, len: u64, then: Dirty) {
        let mut seen = Vec::new();
        let mut gather = Gather::new();
        let mut record = |iova: Iova, size| seen.push((iova.get(), size));
        self.table.read_dirty(Iova::new(first), len, then, &mut gather, &mut record).unwrap();
        let dirty = self.model.within(first, last).into_iter().filter(|(_, leaf)| leaf.dirty);
        let expected: Vec<_> = dirty.map(|(start, leaf)| (start, leaf.size)).collect();
        assert_eq!(seen, expected);
        if then == Dirty::Clear && !self.always_dirty {
            for (start, _) in expected {
                self.model.leaves.get_mut(&start).unwrap().dirty = false;
            }
        }
        self.finish(&mut gather);
    }

    /// Compares model, walk and decoder in some leaves, others at each step, and what is dirty in
    /// all.
    fn check(&mut self, step: usize) {
        let Root { table: root, levels } = self.table.root();
        let every = self.model.leaves.len() / 100 + 1;
        for (&start, leaf) in self.model.leaves.iter().skip(step % every).step_by(every) {
            let end = start + (leaf.size - 1);
            for at in [start.wrapping_sub(1), start, start + leaf.size / 2 + 5, end, end + 1] {
                let inside = (start..=end).contains(&at);
                if at > self.last || (!inside && self.model.at(at).is_some()) {
                    continue;
                }
                let walk = self.table.walk(Iova::new(at));
                let read = self.subject.read;
                let decoded = read(*self.table.pages(), root.get(), levels, at, false);
                let decoded = decoded.unwrap_or_else(|why| panic!("{at:#x}: {why}"));
                if !inside {
                    assert_eq!((walk, decoded), (None, None), "{at:#x} is not mapped");
                    continue;
                }
                let (walk, decoded) = (walk.expect("mapped"), decoded.expect("mapped"));
                let expected = (leaf.phys + (at - start), leaf.size, leaf.prot);
                assert_eq!((walk.phys.get(), walk.page_size, walk.prot), expected, "{at:#x}");
                assert_eq!((decoded.phys, decoded.page, decoded.prot), expected, "{at:#x}");
                assert!(leaf.dirty || !decoded.dirty, "{at:#x} was not written");
            }
        }
        self.check_dirty();
    }

    fn check_dirty(&mut self) {
        let len = self.last & !(self.table.granule() - 1);
        self.read_dirty(0, len - 1, len, Dirty::Keep);
    }

    /// Tables that the root leads to, and itself.
    fn tables(&self) -> usize {
        let Root { table, levels } = self.table.root();
        let entries = 1 << (F::INDEX_BITS + self.subject.config.root_extra_bits);
        1 + self.tables_below(table, levels - 1, entries)
    }

    fn tables_below(&self, table: PhysAddr, level: u32, entries: usize) -> usize {
        if level == 0 {
            return 0;
        }
        let words = self.table.pages().words(table, entries).iter();
        let entries =
            words.map(|word| u64::from_le(word.load(std::sync::atomic::Ordering::Relaxed)));
        let tables = entries.filter(|&entry| F::is_present(entry) && F::is_table(level, entry));
        tables
            .map(|entry| {
                1 + self.tables_below(F::table_address(entry), level - 1, 1 << F::INDEX_BITS)
            })
            .sum()
    }
}
