//! Random histories of a table of any format against the plain model, read back by the table's own
//! walk and by a decoder that a test brings.

use std::collections::BTreeSet;

use lychgate_io_pgtable::{Config, Dirty, Error, Format, Gather, PageTable, Root, Stop};
use lychgate_types::{HeapPages, Iova, Memory, PhysAddr, PhysRun, Prot};
use proptest::prelude::*;

use super::model::{End, Model};

pub(crate) const RW: Prot = Prot::READ.union(Prot::WRITE);

/// What an independent reading of a table says of one address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Decoded {
    pub phys: u64,
    pub page: u64,
    pub prot: Prot,
    /// Hardware has recorded a write in the entry that it read, or would behave as if.
    pub dirty: bool,
}

/// `Ok(None)` where nothing is mapped; an error for what no table may hold.
pub(crate) type Reading = Result<Option<Decoded>, String>;

/// A second reading of a format: it knows the specification, a root and physical memory. Told of a
/// write, it records it as hardware does.
pub(crate) type Reader = dyn Fn(&dyn Memory, u64, u32, u64, bool) -> Reading;

/// A format under test.
pub(crate) struct Subject<'a, F: Format> {
    pub config: Config<F>,
    pub read: &'a Reader,
    /// What a mapping of these permissions really allows; `None` when it must be refused.
    pub allows: fn(Prot) -> Option<Prot>,
}

/// In units of the format's granule.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Map { page: u64, runs: Vec<(u64, u64)>, prot: Prot, memory_for: Option<usize> },
    Unmap { page: u64, pages: u64 },
}

/// Operations around the ends of tables of each level, of which each decodes `order` bits, in an
/// aperture of 2^`bits` granules.
pub(crate) fn op(order: u32, bits: u32) -> impl Strategy<Value = Op> {
    let near = prop_oneof![0..(1u64 << (order + 2)), (0..64u64).prop_map(|n| n * 16)];
    let page = (near, 0..5u32, any::<bool>()).prop_map(move |(near, level, below)| {
        let edge = 1u64 << (order * level).min(bits);
        let page = if below { edge.saturating_sub(near) } else { edge + near };
        page.min((1 << bits) - 1)
    });
    let length = || {
        prop_oneof![
            4 => 1..40u64,
            3 => (0..=order + if order > 9 { 0 } else { 2 }).prop_map(|bits| 1u64 << bits),
            1 => Just(3 << (order - 1)),
        ]
    };
    let frame = prop_oneof![
        0..1u64 << 13,
        (0..16u64).prop_map(move |n| n << order),
        (0..64u64).prop_map(|n| n * 16),
    ];
    // Single pages some of which continue each other, at every place of a table.
    let piece = prop_oneof![3 => 1..3u64, 1 => 14..80u64];
    let pieces = prop::collection::vec((frame.clone(), piece), 1..24).prop_map(|pieces| {
        let singles = |(frame, pages)| (0..pages).map(move |n| (frame + n, 1));
        pieces.into_iter().flat_map(singles).collect()
    });
    let runs = prop_oneof![
        3 => prop::collection::vec((frame, length()), 1..4),
        1 => pieces,
        1 => prop::collection::vec((0..0x4000u64, Just(1u64)), 1..0x100),
    ];
    let prot = prop_oneof![3 => Just(RW), 2 => Just(Prot::READ), 1 => any_prot()];
    let memory_for = prop_oneof![4 => Just(None), 1 => (0..6usize).prop_map(Some)];
    prop_oneof![
        1 => (page.clone(), runs, prot, memory_for).prop_map(|(page, runs, prot, memory_for)| {
            Op::Map { page, runs, prot, memory_for }
        }),
        1 => (page, length()).prop_map(|(page, pages)| Op::Unmap { page, pages }),
    ]
}

/// Every combination of permissions.
pub(crate) fn all_prots() -> Vec<Prot> {
    let bits = [Prot::READ, Prot::WRITE, Prot::CACHE, Prot::NOEXEC, Prot::MMIO, Prot::PRIV];
    let of = |n: usize| {
        let chosen = bits.iter().enumerate().filter(|(bit, _)| n >> bit & 1 == 1);
        chosen.fold(Prot::NONE, |all, (_, &bit)| all | bit)
    };
    (0..1 << bits.len()).map(of).collect()
}

fn any_prot() -> impl Strategy<Value = Prot> {
    prop::sample::select(all_prots())
}

impl<F: Format + Clone> Subject<'_, F> {
    /// Applies `ops`; table, model and decoder agree at every step, and nothing leaks.
    pub(crate) fn run(&self, ops: &[Op]) {
        let pages = HeapPages::new();
        let table = PageTable::<F, _>::new(&pages, self.config.clone()).unwrap();
        let mut model = Model::default();
        let last = table.aperture().end().get();
        for op in ops {
            let mut gather = Gather::new();
            match op {
                Op::Map { page, runs, prot, memory_for } => {
                    let iova = page << F::GRANULE_SHIFT;
                    let bytes: Vec<_> = runs
                        .iter()
                        .map(|(at, n)| (at << F::GRANULE_SHIFT, n << F::GRANULE_SHIFT))
                        .collect();
                    let len: u64 = bytes.iter().map(|(_, len)| len).sum();
                    let runs = phys_runs(&bytes);
                    pages.fail_after(memory_for.unwrap_or(usize::MAX));
                    let result = table.map_batch(Iova::new(iova), &runs, *prot, &mut gather);
                    pages.fail_after(usize::MAX);
                    let taken = model.first_mapped(iova, len);
                    match result {
                        Ok(mapped) => {
                            assert_eq!((mapped, taken), (len, None));
                            let allowed = (self.allows)(*prot).expect("mapped with no encoding");
                            model.map(iova, &bytes, allowed, table.page_sizes());
                        }
                        Err(Error::AlreadyMapped { at }) => assert_eq!(taken, Some(at.get())),
                        Err(Error::OutOfMemory) => assert!(memory_for.is_some()),
                        Err(Error::Permissions) => assert_eq!((self.allows)(*prot), None),
                        Err(Error::IovaOutOfRange { .. }) => assert!(iova + (len - 1) > last),
                        Err(error) => panic!("{error}"),
                    }
                }
                Op::Unmap { page, pages } => {
                    let (iova, len) = (page << F::GRANULE_SHIFT, pages << F::GRANULE_SHIFT);
                    match table.unmap(Iova::new(iova), len, &mut gather) {
                        Err(Error::IovaOutOfRange { .. }) => assert!(iova + (len - 1) > last),
                        Err(error) => panic!("{error}"),
                        Ok(unmapped) => {
                            let (bytes, end) = model.unmap(iova, len);
                            assert_eq!((unmapped.bytes, unmapped.stop), (bytes, stop(end)));
                            assert_eq!(gather.range(), Iova::new(iova).span(bytes));
                        }
                    }
                }
            }
            let (live, dead) = (pages.live(), gather.dead_tables());
            gather.release(table.pages());
            assert_eq!(pages.live(), live - dead);
            self.check(&table, &model);
        }
        drop(table);
        assert_eq!(pages.live(), 0);
    }

    /// Compares three opinions at the ends of every leaf and next to them.
    fn check(&self, table: &PageTable<F, &HeapPages>, model: &Model) {
        let Root { table: root, levels } = table.root();
        let mut places = BTreeSet::from([0, table.aperture().end().get()]);
        for (&start, leaf) in &model.leaves {
            let last = start + (leaf.size - 1);
            places.extend([start, last, start.saturating_sub(1), last.wrapping_add(1)]);
            places.insert(start + leaf.size / 2 + 5);
        }
        for at in places.into_iter().filter(|&at| at <= table.aperture().end().get()) {
            let walk = table.walk(Iova::new(at));
            let decoded = (self.read)(*table.pages(), root.get(), levels, at, false);
            let decoded = decoded.unwrap_or_else(|why| panic!("{at:#x}: {why}"));
            let Some((start, leaf)) = model.at(at) else {
                assert_eq!((walk, decoded), (None, None), "{at:#x} is not mapped");
                continue;
            };
            let (walk, decoded) = (walk.expect("mapped"), decoded.expect("mapped"));
            assert_eq!(walk.phys.get(), leaf.phys + (at - start), "{at:#x}");
            assert_eq!((walk.page_size, walk.prot), (leaf.size, leaf.prot), "{at:#x}");
            let expected = (walk.phys.get(), walk.page_size, walk.prot);
            assert_eq!((decoded.phys, decoded.page, decoded.prot), expected, "{at:#x}");
            assert_eq!(table.path(Iova::new(at)).translation, Some(walk));
        }
    }

    /// Maps leaves of every size with every combination of permissions, at frames with the highest
    /// address bits set, and reads them back.
    pub(crate) fn every_permission_comes_back(&self) {
        let output_last = u64::MAX >> (64 - self.config.output_bits);
        for prot in all_prots() {
            let pages = HeapPages::new();
            let table = PageTable::<F, _>::new(&pages, self.config.clone()).unwrap();
            let mut model = Model::default();
            for size in sizes(&table) {
                let (iova, phys) = (size, output_last - (size - 1));
                if iova + (size - 1) > table.aperture().end().get() {
                    continue;
                }
                let mut gather = Gather::new();
                let (at, frame) = (Iova::new(iova), PhysAddr::new(phys));
                let result = table.map(at, frame, size, prot, &mut gather);
                let Some(allowed) = (self.allows)(prot) else {
                    assert_eq!(result, Err(Error::Permissions));
                    continue;
                };
                result.unwrap();
                model.map(iova, &[(phys, size)], allowed, table.page_sizes());
                assert_eq!(model.at(iova).unwrap().1.size, size);
                self.check(&table, &model);
                let beyond = Error::OutputOutOfRange { phys: PhysAddr::new(phys + 2 * size - 1) };
                let result =
                    table.map(Iova::new(0), PhysAddr::new(phys + size), size, prot, &mut gather);
                assert_eq!(result, Err(beyond));
                assert_eq!(table.unmap(at, size, &mut gather).unwrap().bytes, size);
                gather.release(&pages);
                model = Model::default();
                self.check(&table, &model);
            }
        }
    }

    /// Lets memory end at every allocation of a map that crosses tables of every level and mixes
    /// leaf sizes: what was mapped stays, nothing of the map does, and nothing leaks.
    pub(crate) fn memory_may_end_at_every_allocation(&self) {
        let granule = 1u64 << F::GRANULE_SHIFT;
        for failing in 0.. {
            let pages = HeapPages::new();
            let table = PageTable::<F, _>::new(&pages, self.config.clone()).unwrap();
            let mut model = Model::default();
            let mut gather = Gather::new();
            table.map(Iova::new(0), PhysAddr::new(0), granule, RW, &mut gather).unwrap();
            let rw = (self.allows)(RW).unwrap();
            model.map(0, &[(0, granule)], rw, table.page_sizes());
            // Around the end of the highest table below the root: two tables of every level.
            let middle = 1u64 << (F::GRANULE_SHIFT + F::INDEX_BITS * (self.config.levels - 1));
            let block = granule << F::INDEX_BITS;
            let middle = middle.min(table.aperture().end().get() / 2 + 1).max(4 * block);
            let start = middle - block - granule;
            let bytes = [(16 * block - granule, granule + block + block + granule)];
            pages.fail_after(failing);
            let runs = phys_runs(&bytes);
            let result = table.map_batch(Iova::new(start), &runs, RW, &mut gather);
            pages.fail_after(usize::MAX);
            gather.release(&pages);
            match result {
                Ok(_) => model.map(start, &bytes, rw, table.page_sizes()),
                Err(error) => assert_eq!(error, Error::OutOfMemory),
            }
            self.check(&table, &model);
            drop(table);
            assert_eq!(pages.live(), 0);
            if result.is_ok() {
                // At least the tables of granules on both sides.
                assert!(failing >= 2);
                return;
            }
        }
    }

    /// Lets hardware write through some leaves of every size and reads the records; `at_first`
    /// says whether a fresh leaf that can be written counts as written.
    pub(crate) fn writes_are_recorded(&self, at_first: bool) {
        let pages = HeapPages::new();
        let table = PageTable::<F, _>::new(&pages, self.config.clone()).unwrap();
        let Root { table: root, levels } = table.root();
        let write = |at: u64| (self.read)(&pages, root.get(), levels, at, true).unwrap().unwrap();
        let mut gather = Gather::new();
        let mut leaves = Vec::new();
        for size in sizes(&table).filter(|size| 4 * size <= table.aperture().end().get()) {
            let at = Iova::new(2 * size);
            table.map(at, PhysAddr::new(size), size, RW, &mut gather).unwrap();
            leaves.push((at, size));
        }
        let read_only = Iova::new(0);
        table.map(read_only, PhysAddr::new(0), table.granule(), Prot::READ, &mut gather).unwrap();
        let all = table.aperture().end().get() / 2 + 1;
        let scan = |then, gather: &mut Gather| {
            let mut seen = Vec::new();
            let mut record = |at, size| seen.push((at, size));
            table.read_dirty(Iova::new(0), all, then, gather, &mut record).unwrap();
            seen
        };
        let fresh = scan(Dirty::Clear, &mut gather);
        assert_eq!(fresh, if at_first { leaves.clone() } else { vec![] });
        gather.release(&pages);
        for (at, size) in &leaves {
            assert!(write(at.get() + size / 2 + 8).dirty);
            assert_eq!(scan(Dirty::Keep, &mut gather), [(*at, *size)]);
            assert!(gather.is_empty());
            assert_eq!(scan(Dirty::Clear, &mut gather), [(*at, *size)]);
            assert_eq!(gather.range(), at.span(*size));
            gather.release(&pages);
            assert_eq!(scan(Dirty::Keep, &mut gather), []);
            let clean = (self.read)(&pages, root.get(), levels, at.get(), false).unwrap().unwrap();
            assert!(!clean.dirty && clean.prot.contains(Prot::WRITE));
            assert_eq!(table.walk(*at).unwrap().prot, (self.allows)(RW).unwrap());
        }
    }
}

/// The leaf sizes of a table, ascending.
fn sizes<F: Format>(table: &PageTable<F, &HeapPages>) -> impl Iterator<Item = u64> {
    let reach = table.root().levels * F::INDEX_BITS + F::GRANULE_SHIFT;
    let sizes = table.page_sizes();
    (0..reach.min(63)).map(|bit| 1u64 << bit).filter(move |size| sizes & size != 0)
}

fn phys_runs(bytes: &[(u64, u64)]) -> Vec<PhysRun> {
    let run = |&(start, len): &(u64, u64)| PhysRun { start: PhysAddr::new(start), len };
    bytes.iter().map(run).collect()
}

const fn stop(end: End) -> Option<Stop> {
    match end {
        End::Complete => None,
        End::Hole => Some(Stop::Hole),
        End::Leaf { start, size } => Some(Stop::Leaf { start: Iova::new(start), size }),
    }
}

/// The leaf sizes, the levels and the wide bits of the root that a configuration gets.
pub(crate) fn geometry<F: Format + Clone>(config: &Config<F>) -> Result<(u64, u32, u32), Error> {
    let pages = HeapPages::new();
    let table = PageTable::<F, _>::new(&pages, config.clone())?;
    Ok((table.page_sizes(), table.root().levels, config.root_extra_bits))
}
