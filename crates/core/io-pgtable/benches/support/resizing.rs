//! Cutting large leaves into the smallest pages, and joining those again.

use lychgate_io_pgtable::{Format, Gather, PageTable, SizeChange};
use lychgate_types::{Iova, PhysAddr, PhysRun};

use super::contender::map;
use super::pool::Pool;
use super::rows::Shape;

/// A table with a few large leaves.
pub(crate) struct Resized<F: Format> {
    table: PageTable<F, &'static Pool>,
    block: u64,
}

const START: u64 = 1 << 30;
const BLOCKS: u64 = 8;

impl<F: Format> Resized<F> {
    /// `None` where the format has no large leaves that can become tables in place.
    pub(crate) fn new(table: PageTable<F, &'static Pool>, shape: &Shape) -> Option<Self> {
        let block = shape.block.filter(|_| table.size_changes().tables == SizeChange::InPlace)?;
        let frames = PhysRun { start: PhysAddr::new(START), len: BLOCKS * block };
        map(&table, START.next_multiple_of(block), &[frames]);
        Some(Self { table, block })
    }

    /// Smallest pages that are cut, and joined.
    pub(crate) fn pages(&self) -> u64 {
        BLOCKS * self.block / self.table.granule()
    }

    fn blocks(&self) -> impl Iterator<Item = Iova> {
        let first = START.next_multiple_of(self.block);
        (0..BLOCKS).map(move |n| Iova::new(first + n * self.block))
    }

    /// Cuts every leaf into pages.
    pub(crate) fn cut(&self) {
        for iova in self.blocks() {
            cut(&self.table, iova, self.block);
        }
    }

    /// Joins all pages into leaves as they were.
    pub(crate) fn join(&self) {
        for iova in self.blocks() {
            join(&self.table, iova, self.block);
        }
    }
}

#[inline(never)]
fn cut<F: Format>(table: &PageTable<F, &'static Pool>, iova: Iova, len: u64) {
    let mut gather = Gather::new();
    let cut = table.cut_down(iova, len, table.granule(), &mut gather);
    assert!(cut.is_ok_and(|cut| cut != 0));
    gather.release(table.pages());
}

#[inline(never)]
fn join<F: Format>(table: &PageTable<F, &'static Pool>, iova: Iova, len: u64) {
    let mut gather = Gather::new();
    let joined = table.join(iova, len, &mut gather);
    assert!(joined.is_ok_and(|joined| joined.leaves != 0));
    // Here hardware would be told to forget the pages.
    table.settle(&gather);
    gather.release(table.pages());
}
