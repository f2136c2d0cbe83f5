//! Reading the tables: where an IOVA leads, and by which entries.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages, PhysAddr, Prot};

use crate::format::{Format, LEVELS_LIMIT, table_entries};
use crate::table::{PageTable, Root};
use crate::words;

/// Where an IOVA leads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The physical address of the very byte.
    pub phys: PhysAddr,
    /// Size in bytes of the leaf that maps it, a power of two; the leaf is aligned to its
    /// size in both address spaces.
    pub page_size: u64,
    /// What the leaf allows.
    pub prot: Prot,
}

/// One entry that a walk read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Step {
    /// Level of the table, 0 for the one whose entries map granules (AMD and VT-d count from 1).
    pub level: u32,
    /// The table.
    pub table: PhysAddr,
    /// Index of the entry in it.
    pub index: usize,
    /// The entry as it stands.
    pub entry: u64,
}

impl Step {
    /// Physical address of the entry.
    pub const fn at(&self) -> PhysAddr {
        self.table.wrapping_add(self.index as u64 * 8)
    }
}

/// The whole way of a walk, for people who ask why.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Path {
    steps: [Option<Step>; LEVELS_LIMIT],
    /// Where it led, or `None` when the last entry is not present or the IOVA is out of reach.
    pub translation: Option<Translation>,
}

impl Path {
    /// The entries that were read, from the root down. None when the IOVA is out of reach.
    pub fn steps(&self) -> impl Iterator<Item = Step> + '_ {
        self.steps.iter().flatten().copied()
    }
}

impl<F: Format, P: Pages> PageTable<F, P> {
    /// Where `iova` leads (`iova_to_phys`), or `None` when nothing is mapped there.
    #[inline(always)]
    pub fn walk(&self, iova: Iova) -> Option<Translation> {
        let root = self.root();
        if !self.in_reach(root, iova.get()) {
            return None;
        }
        let word = self.word_at(root, 0, iova.get());
        match word.and_then(|word| Self::granule_at(iova.get(), words::load(word))) {
            Some(translation) => Some(translation),
            None => self.walk_to_any(root, iova.get()),
        }
    }

    /// What `entry`, at level 0, says if it is a leaf of one granule.
    #[inline(always)]
    pub(crate) fn granule_at(iova: u64, entry: u64) -> Option<Translation> {
        let (mask, value) = F::plain_leaf(0);
        if entry & mask == value { Self::translation(iova, 0, entry) } else { None }
    }

    /// As [`Self::walk`], without its short way.
    #[inline(never)]
    pub(crate) fn walk_anywhere(&self, iova: Iova) -> Option<Translation> {
        let root = self.root();
        if self.in_reach(root, iova.get()) { self.walk_to_any(root, iova.get()) } else { None }
    }

    /// As [`Self::walk`] for an IOVA in reach, wherever the walk may end.
    #[inline(never)]
    fn walk_to_any(&self, root: Root, iova: u64) -> Option<Translation> {
        let (level, entry) = self.lookup(root, iova)?;
        Self::translation(iova, level, entry)
    }

    /// The entries that a walk for `iova` reads, and where they lead.
    pub fn path(&self, iova: Iova) -> Path {
        let mut path = Path { steps: [None; LEVELS_LIMIT], translation: None };
        let root = self.root();
        if !self.in_reach(root, iova.get()) {
            return path;
        }
        let mut table = root.table;
        let mut words = self.root_words(root);
        for (level, step) in (0..root.levels).rev().zip(&mut path.steps) {
            let index = self.index(root, level, iova.get());
            let Some(entry) = words.get(index).map(words::load) else {
                break;
            };
            *step = Some(Step { level, table, index, entry });
            if level != 0 && F::is_present(entry) && F::is_table(level, entry) {
                table = F::table_address(entry);
                words = self.table_words(table);
            } else {
                path.translation = Self::translation(iova.get(), level, entry);
                break;
            }
        }
        path
    }

    /// Whether the aperture holds `iova` and a walk from `root` can tell it from other IOVAs.
    #[inline(always)]
    pub(crate) fn in_reach(&self, root: Root, iova: u64) -> bool {
        self.first <= iova && iova <= self.last && self.root_reaches(root, iova)
    }

    /// Walks to the leaf, or the entry that is not present, for an IOVA in reach of `root`; gives its
    /// level and the entry. `None` only when a table is corrupt.
    ///
    /// The walk is one block per level rather than a loop, so that every shift is a constant.
    #[inline(always)]
    fn lookup(&self, root: Root, iova: u64) -> Option<(u32, u64)> {
        let mut table = whole::<F>(self.root_words(root))?;
        macro_rules! step {
            ($level:literal) => {
                if $level < F::MAX_LEVELS && root.levels > $level {
                    let entry = words::load(table.get(self.index(root, $level, iova))?);
                    if !F::is_present(entry) || !F::is_table($level, entry) {
                        return Some(($level, entry));
                    }
                    table = whole::<F>(self.table_words(F::table_address(entry)))?;
                }
            };
        }
        step!(5);
        step!(4);
        step!(3);
        step!(2);
        step!(1);
        Some((0, words::load(table.get(self.index(root, 0, iova))?)))
    }

    /// The table of `level` in which a walk for an IOVA in reach of `root` ends, if nothing but
    /// tables lead there. `level` is a constant wherever this matters.
    ///
    /// One block per level, as in [`Self::lookup`]; a format's fewest levels need no test.
    #[inline(always)]
    pub(crate) fn table_at(&self, root: Root, level: u32, iova: u64) -> Option<&[AtomicU64]> {
        let mut table = whole::<F>(self.root_words(root))?;
        macro_rules! step {
            ($level:literal) => {
                if $level > level
                    && $level < F::MAX_LEVELS
                    && ($level < F::MIN_LEVELS || root.levels > $level)
                {
                    let word = table.get(self.index(root, $level, iova))?;
                    let entry = words::load(word);
                    if !F::is_plain_table($level, entry) {
                        return None;
                    }
                    self.finish_clean(word, entry);
                    table = whole::<F>(self.table_words(F::table_address(entry)))?;
                }
            };
        }
        step!(5);
        step!(4);
        step!(3);
        step!(2);
        step!(1);
        if level < F::MIN_LEVELS || root.levels > level { Some(table) } else { None }
    }

    /// The entry for `iova` in the table of [`Self::table_at`].
    #[inline(always)]
    pub(crate) fn word_at(&self, root: Root, level: u32, iova: u64) -> Option<&AtomicU64> {
        self.table_at(root, level, iova)?.get(self.index(root, level, iova))
    }

    /// Makes sure that hardware can see the table entry in `word`, which another thread may have
    /// stored and not cleaned yet.
    #[inline(always)]
    pub(crate) fn finish_clean(&self, word: &AtomicU64, entry: u64) {
        if F::CLEAN_DONE != 0 && entry & F::CLEAN_DONE == 0 {
            self.pages.clean(core::slice::from_ref(word));
        }
    }

    /// What `entry`, at which the walk for `iova` ended, says.
    #[inline(always)]
    fn translation(iova: u64, level: u32, entry: u64) -> Option<Translation> {
        if !F::is_present(entry) || (level != 0 && F::is_table(level, entry)) {
            return None;
        }
        let page_size = 1 << F::leaf_shift(level, entry);
        let phys = F::leaf_address(level, entry).wrapping_add(iova & (page_size - 1));
        Some(Translation { phys, page_size, prot: F::prot(level, entry) })
    }
}

/// The words of a table if they are all there. Told once, the compiler need not check each index.
#[inline(always)]
const fn whole<F: Format>(words: &[AtomicU64]) -> Option<&[AtomicU64]> {
    if words.len() >= table_entries::<F>() { Some(words) } else { None }
}
