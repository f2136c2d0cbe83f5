//! Batches of single pages, whatever lies among them: they are mapped many at a time.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "tests fail by panicking")]

mod support {
    pub(crate) mod model;
}

use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, Config, Error, Format, Gather, PageTable, RiscvFirstStage, RiscvOptions,
};
use lychgate_types::{HeapPages, Iova, PhysAddr, PhysRun, Prot};
use support::model::{End, Model};

const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Maps a batch from page `first` of a table of which page `taken` is taken, and compares every
/// page with the model.
fn check<F: Format>(config: Config<F>, first: u64, runs: &[(u64, u64)], taken: Option<u64>) {
    let pages = HeapPages::new();
    let table = PageTable::<F, _>::new(&pages, config).unwrap();
    let (mut model, mut gather) = (Model::default(), Gather::new());
    // The table of granules is there already.
    for page in [511].into_iter().chain(taken) {
        table.map(Iova::new(page << 12), PhysAddr::new(0), 4096, RW, &mut gather).unwrap();
        model.map(page << 12, &[(0, 4096)], RW, table.page_sizes());
    }
    let bytes: Vec<_> = runs.iter().map(|(at, pages)| (at << 12, pages << 12)).collect();
    let batch: Vec<_> =
        bytes.iter().map(|&(start, len)| PhysRun { start: PhysAddr::new(start), len }).collect();
    let result = table.map_batch(Iova::new(first << 12), &batch, RW, &mut gather);
    let len = bytes.iter().map(|(_, len)| len).sum();
    if let Some(at) = model.first_mapped(first << 12, len) {
        assert_eq!(taken, Some(at >> 12));
        assert_eq!(result, Err(Error::AlreadyMapped { at: Iova::new(at) }));
    } else {
        model.map(first << 12, &bytes, RW, table.page_sizes());
        assert_eq!(result, Ok(len));
    }
    gather.release(&pages);
    for page in 0..512 {
        let there = table.walk(Iova::new(page << 12));
        let expected =
            model.at(page << 12).map(|(at, leaf)| (leaf.phys + ((page << 12) - at), leaf.size));
        assert_eq!(there.map(|there| (there.phys.get(), there.page_size)), expected, "{page}");
    }
    if taken.is_none() {
        let unmapped = table.unmap(Iova::new(first << 12), len, &mut gather).unwrap();
        assert_eq!((unmapped.bytes, End::Complete), model.unmap(first << 12, len));
        gather.release(&pages);
    }
}

fn everywhere(first: u64, runs: &[(u64, u64)], taken: Option<u64>) {
    check(Config::<AmdV1>::new(39, AmdV1Options::default()), first, runs, taken);
    check(Config::<RiscvFirstStage>::new(38, RiscvOptions::default()), first, runs, taken);
}

/// Pages of which none continues another, but for `pages` of them from `at` on, which are those
/// from frame `frame`.
fn batch(len: u64, at: u64, pages: u64, frame: u64) -> Vec<(u64, u64)> {
    let frame_of = |n| if n >= at && n - at < pages { frame + (n - at) } else { 0x10_0001 + 2 * n };
    (0..len).map(|n| (frame_of(n), 1)).collect()
}

#[test]
fn single_pages_that_continue_each_other_make_large_leaves_wherever_they_begin() {
    for first in 0..36 {
        for leaf in (64..192).step_by(16) {
            // The page of the batch at which an aligned leaf of 64 KiB can begin.
            everywhere(first, &batch(240, leaf - first, 16, 0x400), None);
        }
        everywhere(first, &batch(240, 100, 3, 0x401), None);
    }
}

#[test]
fn longer_runs_may_lie_among_single_pages() {
    for first in [0, 1, 2, 31] {
        for place in 0..100 {
            let mut runs = batch(100, 0, 0, 0);
            runs[place] = (0x2001, 5);
            everywhere(first, &runs, None);
            runs[place] = (0x2001, 0);
            everywhere(first, &runs, None);
        }
    }
}

#[test]
fn a_taken_page_anywhere_takes_the_whole_batch_back() {
    for first in [0, 1, 30] {
        for taken in first..first + 100 {
            everywhere(first, &batch(100, 0, 0, 0), Some(taken));
        }
    }
}

#[test]
fn lengths_that_add_up_to_more_than_there_is_are_refused() {
    let pages = HeapPages::new();
    let config = Config::<AmdV1>::new(64, AmdV1Options::default());
    let table = PageTable::new(&pages, config).unwrap();
    let mut gather = Gather::new();
    for count in [1 << 13, (1 << 13) + 1] {
        let runs = vec![PhysRun { start: PhysAddr::new(0), len: 1 << 51 }; count];
        let result = table.map_batch(Iova::new(0), &runs, RW, &mut gather);
        assert_eq!(result, Err(Error::Overflow));
    }
    assert!(gather.is_empty());
    assert_eq!(pages.live(), 1);
}
