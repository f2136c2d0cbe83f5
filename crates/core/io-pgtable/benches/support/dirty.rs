//! Reading the record of writes of a GiB of pages.

use std::sync::atomic::Ordering;

use lychgate_io_pgtable::{Dirty, Format, Gather, PageTable, Step};
use lychgate_types::{Iova, Pages, PhysAddr, PhysRun};

use super::contender::map;
use super::pool::Pool;

/// A table in which a GiB is mapped in its smallest pages.
pub(crate) struct Tracked<F: Format>(PageTable<F, &'static Pool>);

const START: u64 = 1 << 30;
const LEN: u64 = 1 << 30;

impl<F: Format> Tracked<F> {
    pub(crate) fn new(table: PageTable<F, &'static Pool>) -> Self {
        let frames = PhysAddr::new((4 << 30) + table.granule());
        map(&table, START, &[PhysRun { start: frames, len: LEN }]);
        Self(table)
    }

    /// Pages that are mapped.
    pub(crate) fn pages(&self) -> u64 {
        LEN / self.0.granule()
    }

    /// Records a write in every page of which the number is a multiple of `every`, as hardware would.
    pub(crate) fn write(&self, every: u64) {
        for n in (0..self.pages()).step_by(usize::try_from(every).unwrap_or(usize::MAX)) {
            let path = self.0.path(Iova::new(START + n * self.0.granule()));
            let Some(leaf) = path.steps().last() else {
                continue;
            };
            let word = self.0.pages().words(leaf.at(), 1);
            if let Some((word, entry)) = word.first().zip(written::<F>(leaf)) {
                word.store(entry.to_le(), Ordering::Relaxed);
            }
        }
    }

    /// Reads the record and clears it; gives how many pages were written.
    #[inline(never)]
    pub(crate) fn read(&self) -> u64 {
        let mut gather = Gather::new();
        let mut count = 0;
        let read =
            self.0.read_dirty(Iova::new(START), LEN, Dirty::Clear, &mut gather, &mut |_, _| {
                count += 1;
            });
        assert!(read.is_ok());
        gather.release(self.0.pages());
        count
    }
}

/// The entry that hardware makes of that of `leaf` when it records a write: the one that software cleans
/// to what is there.
fn written<F: Format>(leaf: Step) -> Option<u64> {
    (0..64).map(|bit| leaf.entry ^ 1 << bit).find(|&entry| {
        F::is_present(entry) && F::is_dirty(entry) && F::make_clean(entry) == leaf.entry
    })
}
