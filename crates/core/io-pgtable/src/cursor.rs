//! A place in a page table that is kept from one page to its neighbours.

use core::fmt;
use core::sync::atomic::Ordering;

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages, PhysAddr, PhysRun, Prot};

use crate::error::Error;
use crate::format::{Format, LEVELS_LIMIT, span_shift};
use crate::gather::Gather;
use crate::table::{PageTable, Root};
use crate::unmap::Unmapped;
use crate::walk::Translation;
use crate::words;

/// Maps, unmaps and walks one page after the other, with the way to the leaf table remembered: what
/// [`PageTable`] does, with the same results, errors and rules for callers, but without a walk for each
/// neighbour of the last page. What is not a single granule goes to the table itself; so does what lies
/// where there is no leaf table.
///
/// # Why it may remember
///
/// A table is taken out only by a call whose range covers all that the table translates. While the
/// caller of a cursor's method has its range to itself, as the
/// [crate's rules](crate#rules-for-callers) want for every call, nobody can take out the leaf table that
/// holds it, nor a table above. So it is enough that the way stands when a call begins.
///
/// Whether it does, each call asks the entries themselves: from the root down, each must still be what it
/// was. A table is looked at only once the entry above has proven that it is in use; if all of them
/// say what they said, the leaf table is where a walk would end now, whatever has come and gone in
/// between. These loads are of words that stay in the cache and do not wait for each other, unlike those of
/// a walk. There is no counter that all threads share, and nothing to tell a cursor when tables go:
/// between its calls, tables may be unmapped, freed, used anew or grown on top by anyone, on the
/// same range too.
///
/// A cursor is for one thread; each can have its own.
pub struct Cursor<'t, F: Format, P: Pages> {
    table: &'t PageTable<F, P>,
    /// The root word at which the way begins; 0 when there is no way.
    root: u64,
    /// An IOVA that the leaf table translates.
    seen: u64,
    /// The entries on the way by the level below them, as many as the root has levels, less one.
    way: [Passed<'t>; LEVELS_LIMIT - 1],
    leaves: &'t [AtomicU64],
}

/// An entry that led to a table.
#[derive(Clone, Copy)]
struct Passed<'t> {
    word: &'t AtomicU64,
    entry: u64,
}

impl<F: Format, P: Pages> PageTable<F, P> {
    /// A cursor that has not been anywhere yet.
    pub const fn cursor(&self) -> Cursor<'_, F, P> {
        // No entry that leads to a table is 0, so this stands for none.
        let none = Passed { word: self.root_word(), entry: 0 };
        Cursor { table: self, root: 0, seen: 0, way: [none; LEVELS_LIMIT - 1], leaves: &[] }
    }
}

impl<'t, F: Format, P: Pages> Cursor<'t, F, P> {
    /// As [`PageTable::map`].
    ///
    /// # Errors
    /// As [`PageTable::map`].
    #[inline(always)]
    pub fn map(
        &mut self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<(), Error> {
        let table = self.table;
        if len == 1 << F::GRANULE_SHIFT {
            let attributes = table.single_attributes(0, iova.get(), phys, prot);
            if attributes != 0
                && let Some(word) = self.word_at(iova.get())
                && table.put_single(0, word, phys, attributes)
            {
                return Ok(());
            }
        }
        table.map_any(iova.get(), &[PhysRun { start: phys, len }], prot, gather).map(|_| ())
    }

    /// As [`PageTable::unmap`].
    ///
    /// # Errors
    /// As [`PageTable::unmap`].
    #[inline(always)]
    pub fn unmap(&mut self, iova: Iova, len: u64, gather: &mut Gather) -> Result<Unmapped, Error> {
        let table = self.table;
        if len == 1 << F::GRANULE_SHIFT
            && table.holds_single(0, iova.get())
            && let Some(word) = self.word_at(iova.get())
            && table.take_single(0, word, iova.get(), gather)
        {
            return Ok(Unmapped { bytes: 1 << F::GRANULE_SHIFT, stop: None });
        }
        table.unmap_any(iova.get(), len, gather)
    }

    /// As [`PageTable::walk`].
    #[inline(always)]
    pub fn walk(&mut self, iova: Iova) -> Option<Translation> {
        let (first, last) = self.table.aperture().into_inner();
        if iova < first || iova > last {
            return None;
        }
        let entry = self.word_at(iova.get()).map(words::load);
        match entry.and_then(|entry| PageTable::<F, P>::granule_at(iova.get(), entry)) {
            Some(translation) => Some(translation),
            None => self.table.walk_anywhere(iova),
        }
    }

    /// The entry of level 0 for `iova`, in the aperture, if there is a leaf table for it.
    #[inline(always)]
    fn word_at(&mut self, iova: u64) -> Option<&'t AtomicU64> {
        if (self.seen ^ iova) >> span_shift::<F>(0) == 0 && self.stands() {
            self.leaves.get(self.table.index(Root::of(self.root), 0, iova))
        } else {
            self.seek(iova)
        }
    }

    /// Whether a walk would come the way that is remembered.
    #[inline(always)]
    fn stands(&self) -> bool {
        let levels = Root::of(self.root).levels;
        macro_rules! step {
            ($level:literal) => {
                if $level < F::MAX_LEVELS
                    && ($level < F::MIN_LEVELS || levels > $level)
                    && words::load(self.way[$level - 1].word) != self.way[$level - 1].entry
                {
                    return false;
                }
            };
        }
        if self.root != self.table.root_word().load(Ordering::Acquire) {
            return false;
        }
        step!(5);
        step!(4);
        step!(3);
        step!(2);
        step!(1);
        true
    }

    /// Walks to the leaf table for `iova`, and remembers the way.
    #[inline(never)]
    fn seek(&mut self, iova: u64) -> Option<&'t AtomicU64> {
        self.root = 0;
        let table = self.table;
        let root_word = table.root_word().load(Ordering::Acquire);
        let root = Root::of(root_word);
        if !table.in_reach(root, iova) {
            return None;
        }
        let mut words = table.root_words(root);
        for level in (1..root.levels).rev() {
            let word = words.get(table.index(root, level, iova))?;
            let entry = words::load(word);
            if !F::is_plain_table(level, entry) {
                return None;
            }
            table.finish_clean(word, entry);
            *self.way.get_mut(level as usize - 1)? = Passed { word, entry };
            words = table.table_words(F::table_address(entry));
        }
        self.root = root_word;
        self.seen = iova;
        self.leaves = words;
        words.get(table.index(root, 0, iova))
    }
}

impl<F: Format, P: Pages> fmt::Debug for Cursor<'_, F, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cursor")
            .field("table", self.table)
            .field("at", &(self.root != 0).then(|| Iova::new(self.seen)))
            .finish()
    }
}
