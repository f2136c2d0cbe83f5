//! Page after page through a cursor.

use lychgate_io_pgtable::{Format, Gather, PageTable};
use lychgate_types::{Iova, PhysRun};

use super::contender::{RW, Table};
use super::pool::Pool;

/// The crate's own table, through a cursor that each call makes anew and takes from page to page.
pub(crate) struct ByCursor<F: Format>(pub(crate) PageTable<F, &'static Pool>);

impl<F: Format> ByCursor<F> {
    /// Walks for each IOVA with one cursor; gives the sum of where they lead.
    #[inline(never)]
    pub(crate) fn walk_with_one(&self, iovas: &[u64]) -> u64 {
        let mut cursor = self.0.cursor();
        iovas.iter().fold(0, |sum: u64, &iova| {
            sum.wrapping_add(cursor.walk(Iova::new(iova)).map_or(0, |there| there.phys.get()))
        })
    }
}

impl<F: Format> Table for ByCursor<F> {
    #[inline(never)]
    fn map(&mut self, iova: u64, runs: &[PhysRun], leaf: u64) {
        let mut gather = Gather::new();
        let mut cursor = self.0.cursor();
        let mut iova = Iova::new(iova);
        for run in runs {
            let mut phys = run.start;
            for _ in 0..run.len / leaf {
                assert!(cursor.map(iova, phys, leaf, RW, &mut gather).is_ok());
                iova = iova.wrapping_add(leaf);
                phys = phys.wrapping_add(leaf);
            }
        }
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64, leaf: u64) {
        let mut gather = Gather::new();
        let mut cursor = self.0.cursor();
        let mut iova = Iova::new(iova);
        for _ in 0..len / leaf {
            let unmapped = cursor.unmap(iova, leaf, &mut gather);
            assert!(unmapped.is_ok_and(|unmapped| unmapped.bytes == leaf));
            iova = iova.wrapping_add(leaf);
        }
        gather.release(self.0.pages());
    }

    #[inline(never)]
    fn walk(&mut self, iova: u64) -> u64 {
        self.walk_with_one(&[iova])
    }
}
