//! What is compared: anything that maps, unmaps and walks, driven by the same loops.

use std::hint::black_box;

use lychgate_io_pgtable::{Format, Gather, PageTable};
use lychgate_types::{Iova, PhysRun, Prot};

use super::machine::wait;
use super::pool::Pool;
use super::rows::Case;

pub(crate) const RW: Prot = Prot::READ.union(Prot::WRITE);

/// One page table, or what stands in for one. Each method is a call, never inlined.
pub(crate) trait Table {
    /// Maps `runs` at consecutive IOVAs from `iova`. Where it must be told, pages are of `leaf` bytes.
    fn map(&mut self, iova: u64, runs: &[PhysRun], leaf: u64);

    /// Unmaps `len` bytes, all mapped in pages of `leaf` bytes if their size must be told.
    fn unmap(&mut self, iova: u64, len: u64, leaf: u64);

    /// The physical address of `iova`, or 0.
    fn walk(&mut self, iova: u64) -> u64;

    /// A walk of which each load needs the one before it, as hardware's do.
    fn dependent_walk(&mut self, iova: u64) -> u64 {
        self.walk(iova)
    }
}

/// A [`Table`] under its loops.
pub(crate) trait Contender {
    /// Maps every place of `case`.
    fn map_all(&mut self, case: &Case);
    /// Unmaps every place of `case`.
    fn unmap_all(&mut self, case: &Case);
    /// Walks for each IOVA, one independent of the other; gives the sum of where they lead.
    fn walk_all(&mut self, iovas: &[u64]) -> u64;
    /// Walks for each IOVA only when the walk before it has ended.
    fn walk_in_turn(&mut self, iovas: &[u64]);
}

impl<T: Table> Contender for T {
    fn map_all(&mut self, case: &Case) {
        if case.isolated {
            for &iova in &case.places {
                wait();
                self.map(iova, &case.runs, case.leaf);
                wait();
            }
        } else {
            for &iova in &case.places {
                self.map(iova, &case.runs, case.leaf);
            }
        }
    }

    fn unmap_all(&mut self, case: &Case) {
        let len = case.len();
        if case.isolated {
            for &iova in &case.places {
                wait();
                self.unmap(iova, len, case.leaf);
                wait();
            }
        } else {
            for &iova in &case.places {
                self.unmap(iova, len, case.leaf);
            }
        }
    }

    fn walk_all(&mut self, iovas: &[u64]) -> u64 {
        iovas.iter().fold(0, |sum: u64, &iova| sum.wrapping_add(self.walk(iova)))
    }

    fn walk_in_turn(&mut self, iovas: &[u64]) {
        let zero = black_box(0);
        let mut last = 0;
        for &iova in iovas {
            last = self.dependent_walk(iova | (last & zero));
        }
        black_box(last);
    }
}

/// The crate's own table.
pub(crate) struct Own<F: Format>(pub(crate) PageTable<F, &'static Pool>);

/// A map as a driver does it.
#[inline(never)]
pub(crate) fn map<F: Format>(table: &PageTable<F, &'static Pool>, iova: u64, runs: &[PhysRun]) {
    let mut gather = Gather::new();
    let mapped = table.map_batch(Iova::new(iova), runs, RW, &mut gather);
    assert!(mapped.is_ok());
    if !gather.is_empty() {
        gather.release(table.pages());
    }
}

/// An unmap as a driver does it, but for the invalidation that no hardware is there to wait for.
#[inline(never)]
pub(crate) fn unmap<F: Format>(table: &PageTable<F, &'static Pool>, iova: u64, len: u64) {
    let mut gather = Gather::new();
    let unmapped = table.unmap(Iova::new(iova), len, &mut gather);
    assert!(unmapped.is_ok_and(|unmapped| unmapped.bytes == len));
    black_box(gather.range());
    gather.release(table.pages());
}

/// `iova_to_phys`.
#[inline(never)]
pub(crate) fn walk<F: Format>(table: &PageTable<F, &'static Pool>, iova: u64) -> u64 {
    let there = table.walk(Iova::new(iova));
    there.map_or(0, |there| there.phys.get())
}

impl<F: Format> Table for Own<F> {
    #[inline(always)]
    fn map(&mut self, iova: u64, runs: &[PhysRun], _leaf: u64) {
        map(&self.0, iova, runs);
    }

    #[inline(always)]
    fn unmap(&mut self, iova: u64, len: u64, _leaf: u64) {
        unmap(&self.0, iova, len);
    }

    #[inline(always)]
    fn walk(&mut self, iova: u64) -> u64 {
        walk(&self.0, iova)
    }
}
