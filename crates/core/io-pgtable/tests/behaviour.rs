//! What callers rely on, one property at a time, on AMD v1 tables.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

mod support {
    pub(crate) mod decoder;
}

use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, Config, Dirty, Error, Gather, PageTable, Stop, Unmapped,
};
use lychgate_types::{Errno, HeapPages, Iova, Memory, PhysAddr, PhysRun, Prot};
use support::decoder::{Decoded, decode};

const RW: Prot = Prot::READ.union(Prot::WRITE);
const K4: u64 = 1 << 12;
const M1: u64 = 1 << 20;
const M2: u64 = 1 << 21;
const G1: u64 = 1 << 30;
const G512: u64 = 1 << 39;
const T1: u64 = 1 << 40;

type Table<'a> = PageTable<AmdV1, &'a HeapPages>;

fn config(iova_bits: u32) -> Config<AmdV1> {
    Config::new(iova_bits, AmdV1Options::default())
}

fn table(pages: &HeapPages, levels: u32) -> Table<'_> {
    let config = Config { levels, ..config(64) };
    PageTable::new(pages, config).unwrap()
}

fn map(table: &Table<'_>, iova: u64, phys: u64, len: u64) -> Result<(), Error> {
    let mut gather = Gather::new();
    let result = table.map(Iova::new(iova), PhysAddr::new(phys), len, RW, &mut gather);
    gather.release(table.pages());
    result
}

fn unmap(table: &Table<'_>, iova: u64, len: u64) -> Result<Unmapped, Error> {
    let mut gather = Gather::new();
    let result = table.unmap(Iova::new(iova), len, &mut gather);
    gather.release(table.pages());
    result
}

fn all(bytes: u64) -> Result<Unmapped, Error> {
    Ok(Unmapped { bytes, stop: None })
}

fn read(pages: &HeapPages, table: &Table<'_>, iova: u64) -> Option<Decoded> {
    let root = table.root();
    decode(pages, root.table.get(), root.levels, iova).unwrap()
}

fn page_size(table: &Table<'_>, iova: u64) -> u64 {
    table.walk(Iova::new(iova)).unwrap().page_size
}

#[test]
fn every_power_of_two_but_512_gib_is_one_leaf() {
    let pages = HeapPages::new();
    let table = table(&pages, 6);
    for shift in (12..=51).filter(|&shift| shift != 39) {
        let size = 1u64 << shift;
        let phys = if shift == 51 { 0 } else { size };
        map(&table, size, phys, size).unwrap();
        for at in [size, size + size / 2 + 3, size + (size - 1)] {
            let leaf = read(&pages, &table, at).unwrap();
            assert_eq!(leaf.page, size);
            assert_eq!(leaf.phys, phys + (at - size));
        }
        assert_eq!(unmap(&table, size, size), all(size));
        assert_eq!(read(&pages, &table, size), None);
    }
    map(&table, G512, G512, G512).unwrap();
    assert_eq!(page_size(&table, G512), G512 / 2);
    map(&table, 4 * T1, 4 * T1, 4 * T1).unwrap();
    assert_eq!(page_size(&table, 4 * T1), 4 * T1);
}

#[test]
fn a_leaf_never_lies_above_the_root() {
    let pages = HeapPages::new();
    let table = table(&pages, 1);
    map(&table, 0, 0, M2).unwrap();
    assert_eq!(page_size(&table, 0), M1);
    assert_eq!(read(&pages, &table, M2 - 1).unwrap().phys, M2 - 1);
}

#[test]
fn permissions_and_coherence_are_what_was_asked() {
    let pages = HeapPages::new();
    for force_coherent in [false, true] {
        let config = Config::<AmdV1>::new(48, AmdV1Options { force_coherent });
        let table = PageTable::new(&pages, config).unwrap();
        let mut gather = Gather::new();
        for (n, prot) in [(1, Prot::NONE), (2, Prot::READ), (3, Prot::WRITE), (4, RW)] {
            let (iova, phys) = (Iova::new(n * K4), PhysAddr::new(n * K4));
            table.map(iova, phys, K4, prot, &mut gather).unwrap();
            let leaf = read(&pages, &table, n * K4).unwrap();
            assert_eq!(leaf.read, prot.contains(Prot::READ));
            assert_eq!(leaf.write, prot.contains(Prot::WRITE));
            assert_eq!(leaf.force_coherent, force_coherent);
            let cache = if force_coherent { Prot::CACHE } else { Prot::NONE };
            assert_eq!(table.walk(iova).unwrap().prot, prot | cache);
        }
    }
}

#[test]
fn a_failed_allocation_at_any_point_leaves_the_range_unmapped() {
    // Crosses a 1 GiB boundary, with pages of several sizes and scattered ones.
    let start = 5 * G1 - 3 * M2 - 5 * K4;
    let runs: Vec<_> = (0..40)
        .map(|n| (0x1_0000_0000 + n * 0x3000, K4))
        .chain([(G1 + 35 * K4, 7 * M2), (0x8000_1000, 3000 * K4)])
        .map(|(start, len)| PhysRun { start: PhysAddr::new(start), len })
        .collect();
    let len: u64 = runs.iter().map(|run| run.len).sum();
    let attempt = |allocations: usize| {
        let pages = HeapPages::new();
        let table = table(&pages, 5);
        map(&table, start - K4, 0x7000, K4).unwrap();
        map(&table, start + len, 0x9000, K4).unwrap();
        let mut gather = Gather::new();
        pages.fail_after(allocations);
        let result = table.map_batch(Iova::new(start), &runs, RW, &mut gather);
        pages.fail_after(usize::MAX);
        if result.is_ok() {
            assert_eq!(result, Ok(len));
            assert!(gather.is_empty());
            assert_eq!(unmap(&table, start, len), all(len));
        } else {
            assert_eq!(result, Err(Error::OutOfMemory));
            for at in (start..start + len).step_by(4096) {
                assert_eq!(read(&pages, &table, at), None, "{allocations} {at:#x}");
            }
            if let Some(range) = gather.range() {
                assert_eq!(range.start().get(), start);
                assert!(range.end().get() < start + len);
            }
            gather.release(&pages);
        }
        assert_eq!(read(&pages, &table, start - K4).unwrap().phys, 0x7000);
        assert_eq!(read(&pages, &table, start + len).unwrap().phys, 0x9000);
        drop(table);
        assert_eq!(pages.live(), 0);
        result.is_err()
    };
    let failures = (0..).take_while(|&allocations| attempt(allocations)).count();
    assert!(failures >= 6, "the map takes {failures} tables");
}

#[test]
fn a_failed_map_says_what_to_invalidate() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    map(&table, 4 * M2, 0, K4).unwrap();
    let mut gather = Gather::new();
    let result = table.map(Iova::new(2 * M2), PhysAddr::new(K4), 3 * M2, RW, &mut gather);
    assert_eq!(result, Err(Error::AlreadyMapped { at: Iova::new(4 * M2) }));
    assert_eq!(gather.range(), Iova::new(2 * M2).span(2 * M2));
    assert!(gather.removed_tables());
    assert_eq!(gather.dead_tables(), 2);
    gather.release(&pages);
}

#[test]
fn a_map_over_something_changes_nothing() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    map(&table, M2 + 7 * K4, 0, K4).unwrap();
    map(&table, 4 * M2, M2, M2).unwrap();
    let taken = |at| Err(Error::AlreadyMapped { at: Iova::new(at) });
    assert_eq!(map(&table, M2 + 7 * K4, K4, K4), taken(M2 + 7 * K4));
    assert_eq!(map(&table, M2, 8 * M2, M2), taken(M2 + 7 * K4));
    assert_eq!(map(&table, 0, 0, G1), taken(M2 + 7 * K4));
    assert_eq!(map(&table, 4 * M2 + K4, 0, K4), taken(4 * M2 + K4));
    assert_eq!(map(&table, 4 * M2 - K4, K4, M2), taken(4 * M2));
    assert_eq!(unmap(&table, M2 + 7 * K4, K4), all(K4));
    assert_eq!(unmap(&table, 4 * M2, M2), all(M2));
    map(&table, 0, 0, G1).unwrap();
}

#[test]
fn a_large_leaf_takes_empty_tables_out() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    for iova in [0, 3 * M2, 5 * M2 + K4] {
        map(&table, iova, 0, K4).unwrap();
        assert_eq!(unmap(&table, iova, K4), all(K4));
    }
    let live = pages.live();
    let mut gather = Gather::new();
    table.map(Iova::new(0), PhysAddr::new(0), G1, RW, &mut gather).unwrap();
    assert_eq!(page_size(&table, 0), G1);
    assert_eq!(gather.range(), Iova::new(0).span(G1));
    // Three tables of granules and the one above them, whose parent entry is at level 2.
    assert_eq!(gather.dead_tables(), 4);
    assert_eq!(gather.table_levels(), 0b110);
    assert_eq!(pages.live(), live);
    gather.release(&pages);
    assert_eq!(pages.live(), live - 4);
}

#[test]
fn tables_are_freed_by_release_alone() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    map(&table, G1, K4, G1).unwrap();
    map(&table, 0, 0, K4).unwrap();
    let live = pages.live();
    let mut gather = Gather::new();
    let unmapped = table.unmap(Iova::new(G1), G1, &mut gather);
    assert_eq!(unmapped, all(G1));
    assert_eq!(gather.dead_tables(), 513);
    assert_eq!(gather.leaf_sizes(), K4);
    assert!(gather.removed_tables());
    assert_eq!(pages.live(), live);
    gather.release(&pages);
    assert!(gather.is_empty() && !gather.removed_tables());
    assert_eq!(pages.live(), live - 513);
}

#[test]
fn one_gather_serves_many_unmaps() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    let mut gather = Gather::new();
    for iova in [9 * M2, 4 * M2, 40 * M2] {
        map(&table, iova, K4, M2).unwrap();
        let unmapped = table.unmap(Iova::new(iova), M2, &mut gather);
        assert_eq!(unmapped, all(M2));
    }
    assert_eq!(gather.range(), Iova::new(4 * M2).span(37 * M2));
    assert_eq!(gather.dead_tables(), 3);
    let live = pages.live();
    gather.release(&pages);
    assert_eq!(pages.live(), live - 3);
}

#[test]
fn an_unmap_ends_at_a_hole_or_before_a_leaf_that_is_larger() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    map(&table, 0, K4, 512 * K4).unwrap();
    map(&table, M2 + K4, 0, K4).unwrap();
    map(&table, 2 * M2, M2, M2).unwrap();
    let stopped = |bytes, stop| Ok(Unmapped { bytes, stop: Some(stop) });
    let large = Stop::Leaf { start: Iova::new(2 * M2), size: M2 };
    assert_eq!(unmap(&table, 0, G1), stopped(M2, Stop::Hole));
    assert_eq!(unmap(&table, M2 + K4, M2), stopped(K4, Stop::Hole));
    assert_eq!(unmap(&table, 2 * M2, M1), stopped(0, large));
    assert_eq!(unmap(&table, 2 * M2 + M1, M1), stopped(0, large));
    assert_eq!(page_size(&table, 3 * M2 - 1), M2);

    let mut gather = Gather::new();
    map(&table, 2 * M2 - K4, 0, K4).unwrap();
    let iova = Iova::new(2 * M2 - K4);
    let bytes = table.unmap_whole_leaves(iova, 2 * K4, &mut gather);
    assert_eq!(bytes, Ok(M2 + K4));
    assert_eq!(gather.range(), iova.span(M2 + K4));
    // Never towards lower addresses.
    map(&table, 2 * M2, M2, M2).unwrap();
    let bytes = table.unmap_whole_leaves(Iova::new(2 * M2 + M1), M1, &mut gather);
    assert_eq!(bytes, Ok(0));
}

#[test]
fn an_unmap_that_stops_inside_a_table_keeps_what_comes_behind() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    map(&table, 0, K4, G1).unwrap();
    assert_eq!(unmap(&table, 300 * M2 + 9 * K4, K4), all(K4));
    let expected = Unmapped { bytes: 300 * M2 + 9 * K4, stop: Some(Stop::Hole) };
    assert_eq!(unmap(&table, 0, G1), Ok(expected));
    assert_eq!(read(&pages, &table, 300 * M2 + 8 * K4), None);
    let behind = 300 * M2 + 10 * K4;
    assert_eq!(read(&pages, &table, behind).unwrap().phys, behind + K4);
    assert_eq!(unmap(&table, behind, G1 - behind), all(G1 - behind));
}

#[test]
fn growth_tells_hardware_before_anyone_maps() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    map(&table, 0x5000, 0x7000, K4).unwrap();
    assert_eq!(map(&table, G512, 0, K4), Err(Error::BeyondTop { levels: 4 }));
    let top = Iova::new(u64::MAX);
    assert_eq!(map(&table, u64::MAX - 0xfff, 0, K4), Err(Error::BeyondTop { levels: 6 }));
    assert!(table.reaches(Iova::new(G512 - 1)) && !table.reaches(Iova::new(G512)));

    let old = table.root();
    let mut told = Vec::new();
    table
        .grow(top, |new| {
            for root in [old, new] {
                let leaf = decode(&pages, root.table.get(), root.levels, 0x5123).unwrap();
                assert_eq!(leaf.unwrap().phys, 0x7123);
            }
            assert_eq!(table.root(), old);
            assert_eq!(table.grow(top, |_| ()), Err(Error::Growing));
            told.push(new);
        })
        .unwrap();
    assert_eq!(told, [table.root()]);
    assert_eq!(table.root().levels, 6);
    table.grow(top, |_| told.clear()).unwrap();
    assert_eq!(told.len(), 1);
    // The old root is a table like others now; it goes only after an invalidation.
    let mut gather = Gather::new();
    map(&table, u64::MAX - 0xfff, 0x3000, K4).unwrap();
    assert_eq!(read(&pages, &table, u64::MAX).unwrap().phys, 0x3fff);
    let unmapped = table.unmap(Iova::new(0x5000), K4, &mut gather);
    assert_eq!(unmapped, all(K4));
    assert_eq!(gather.dead_tables(), 0);
    drop(table);
    assert_eq!(pages.live(), 0);
}

#[test]
fn growth_without_memory_changes_nothing() {
    let pages = HeapPages::new();
    let table = table(&pages, 1);
    let (root, live) = (table.root(), pages.live());
    for allowed in 0..5 {
        pages.fail_after(allowed);
        let mut told = false;
        let result = table.grow(Iova::new(u64::MAX), |_| told = true);
        assert_eq!((result, told), (Err(Error::OutOfMemory), false));
        assert_eq!((table.root(), pages.live()), (root, live));
    }
    pages.fail_after(5);
    assert_eq!(table.grow(Iova::new(u64::MAX), |_| ()), Ok(()));
}

#[test]
fn a_write_is_reported_whichever_copy_recorded_it() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    map(&table, M2, M2, K4 * 16).unwrap();
    map(&table, M2 + 64 * K4, K4, 2 * K4).unwrap();
    map(&table, G1, G1, G1).unwrap();
    let record = |iova: u64| {
        let step = table.path(Iova::new(iova)).steps().last().unwrap();
        pages.fetch_or_u64(step.at(), 1 << 6).unwrap();
    };
    record(M2 + 11 * K4);
    record(M2 + 65 * K4);
    record(G1);
    let dirty = |iova: u64, len: u64, then: Dirty| {
        let mut found = Vec::new();
        let mut gather = Gather::new();
        let mut record = |start: Iova, size: u64| found.push((start.get(), size));
        table.read_dirty(Iova::new(iova), len, then, &mut gather, &mut record).unwrap();
        (found, gather.range())
    };
    let all = vec![(M2, 16 * K4), (M2 + 65 * K4, K4), (G1, G1)];
    assert_eq!(dirty(0, G512, Dirty::Keep), (all.clone(), None));
    assert_eq!(dirty(M2 + 65 * K4, K4, Dirty::Keep).0, all[1..2]);
    assert_eq!(dirty(M2 + 64 * K4, K4, Dirty::Keep).0, []);
    // A range that begins inside a leaf is told of the whole leaf, and cleans it.
    let inside = dirty(M2 + 15 * K4, K4, Dirty::Clear);
    assert_eq!(inside, (all[..1].to_vec(), Iova::new(M2).span(16 * K4)));
    let rest = dirty(0, G512, Dirty::Clear);
    assert_eq!(rest.0, all[1..]);
    assert_eq!(rest.1, Some(Iova::new(M2 + 65 * K4)..=Iova::new(2 * G1 - 1)));
    assert_eq!(dirty(0, G512, Dirty::Clear), (vec![], None));
    // The leaves are otherwise as they were.
    assert_eq!(read(&pages, &table, M2 + 11 * K4).unwrap().page, 16 * K4);
}

#[test]
fn ranges_are_checked_before_anything_changes() {
    let pages = HeapPages::new();
    let config = Config {
        aperture: Iova::new(M2)..=Iova::new(G1 - 1),
        output_bits: 40,
        page_sizes: !0xfff_u64 << 1,
        ..config(64)
    };
    let table = PageTable::new(&pages, config).unwrap();
    assert_eq!(table.granule(), 2 * K4);
    let last = |iova: u64, last: u64| {
        Err(Error::IovaOutOfRange { iova: Iova::new(iova), last: Iova::new(last) })
    };
    let misaligned = Err(Error::Misaligned { granule: 2 * K4 });
    assert_eq!(map(&table, M2, 0, 0), Err(Error::Empty));
    assert_eq!(map(&table, M2, 0, K4), misaligned);
    assert_eq!(map(&table, M2 + K4, 0, 2 * K4), misaligned);
    assert_eq!(map(&table, M2, K4, 2 * K4), misaligned);
    assert_eq!(map(&table, 0, 0, 2 * K4), last(0, 2 * K4 - 1));
    assert_eq!(map(&table, G1, 0, 2 * K4), last(G1, G1 + 2 * K4 - 1));
    assert_eq!(map(&table, 0u64.wrapping_sub(2 * K4), 0, 4 * K4), Err(Error::Overflow));
    assert_eq!(map(&table, M2, 0u64.wrapping_sub(2 * K4), 4 * K4), Err(Error::Overflow));
    let beyond = PhysAddr::new(T1 + 2 * K4 - 1);
    assert_eq!(map(&table, M2, T1 - 2 * K4, 4 * K4), Err(Error::OutputOutOfRange { phys: beyond }));
    assert_eq!(unmap(&table, M2, 0), Err(Error::Empty));
    assert_eq!(unmap(&table, G1 - 2 * K4, 4 * K4).map(|_| ()), last(G1 - 2 * K4, G1 + 2 * K4 - 1));
    assert_eq!(table.walk(Iova::new(0)), None);
    assert_eq!(table.path(Iova::new(G1)).steps().count(), 0);
    map(&table, G1 - 2 * K4, T1 - 2 * K4, 2 * K4).unwrap();
    assert_eq!(pages.live(), 3);
    let runs = [(0, u64::MAX - 0x1fff), (0, u64::MAX - 0x1fff)]
        .map(|(start, len)| PhysRun { start: PhysAddr::new(start), len });
    let mut gather = Gather::new();
    let result = table.map_batch(Iova::new(M2), &runs, RW, &mut gather);
    assert_eq!(result, Err(Error::Overflow));
}

#[test]
fn a_configuration_beyond_the_format_is_refused() {
    let pages = HeapPages::new();
    let refused = |config: Config<AmdV1>| {
        let result = PageTable::new(&pages, config).map(|_| ());
        assert!(matches!(result, Err(Error::Unsupported(_))), "{result:?}");
        assert_eq!(result.map_err(Error::errno), Err(Errno::EOPNOTSUPP));
    };
    let base = || config(48);
    refused(Config { levels: 0, ..base() });
    refused(Config { levels: 7, ..base() });
    refused(Config { output_bits: 53, ..base() });
    refused(Config { output_bits: 11, ..base() });
    refused(Config { page_sizes: 0xfff, ..base() });
    refused(Config { page_sizes: G512, ..base() });
    refused(Config { root_extra_bits: 1, ..base() });
    refused(Config { aperture: Iova::new(1)..=Iova::new(0), ..base() });
    // One level reaches 2 MiB: 1 GiB leaves lie above it.
    refused(Config { levels: 1, page_sizes: G1, ..base() });
    pages.fail_after(0);
    let result = PageTable::<AmdV1, _>::new(&pages, base()).map(|_| ());
    assert_eq!(result, Err(Error::OutOfMemory));
    assert_eq!(pages.live(), 0);
}

#[test]
fn a_path_names_each_entry_as_it_stands() {
    let pages = HeapPages::new();
    let table = table(&pages, 4);
    map(&table, G512 + G1 + M2 + K4, 0xabc000, K4).unwrap();
    let path = table.path(Iova::new(G512 + G1 + M2 + K4 + 0x12));
    let steps: Vec<_> = path.steps().collect();
    assert_eq!(steps.iter().map(|step| step.level).collect::<Vec<_>>(), [3, 2, 1, 0]);
    assert!(steps.iter().all(|step| step.index == 1));
    assert_eq!(steps[0].table, table.root().table);
    for step in &steps {
        assert_eq!(pages.load_u64(step.at()), Ok(step.entry));
    }
    assert_eq!(path.translation.unwrap().phys, PhysAddr::new(0xabc012));
    let hole = table.path(Iova::new(G512));
    assert_eq!(hole.steps().last().map(|step| (step.level, step.entry)), Some((2, 0)));
    assert_eq!(hole.translation, None);
}

#[test]
fn runs_that_continue_each_other_are_one() {
    let pages = HeapPages::new();
    let table = table(&pages, 3);
    let runs: Vec<_> = (0..512)
        .map(|n| PhysRun { start: PhysAddr::new(G1 + n * K4), len: if n == 100 { 0 } else { K4 } })
        .collect();
    let mut gather = Gather::new();
    let mapped = table.map_batch(Iova::new(0), &runs[..100], RW, &mut gather);
    assert_eq!(mapped, Ok(100 * K4));
    assert_eq!(page_size(&table, 0), 64 * K4);
    let mapped = table.map_batch(Iova::new(M2), &runs[256..], RW, &mut gather);
    assert_eq!(mapped, Ok(256 * K4));
    assert_eq!(page_size(&table, M2), M1);
    let mapped = table.map_batch(Iova::new(2 * M2), &runs[99..103], RW, &mut gather);
    assert_eq!(mapped, Ok(3 * K4));
    assert_eq!(table.walk(Iova::new(2 * M2 + K4)).unwrap().phys.get(), G1 + 101 * K4);
}
