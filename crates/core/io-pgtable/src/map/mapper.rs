//! A map in progress: runs of frames become leaves, the largest that fit, in tables made on the way.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages, PhysAddr, PhysRun};

use crate::error::Error;
use crate::format::{
    Format, LEVELS_LIMIT, item_shift, leaf_level, span_shift, table_bytes, table_entries,
};
use crate::gather::Gather;
use crate::table::{PageTable, Root};
use crate::words;

use super::leaves::Leaves;

/// A map in progress. `iova` is the first byte that is not mapped yet.
pub(super) struct Mapper<'a, F: Format, P: Pages> {
    pub(super) table: &'a PageTable<F, P>,
    gather: &'a mut Gather,
    pub(super) attributes: u64,
    pub(super) iova: u64,
    pub(super) root: Root,
    pub(super) sizes: u64,
    /// The tables on the way to `seen`, by level, from `lowest` up to the root; empty where one was passed
    /// without a look.
    path: [&'a [AtomicU64]; LEVELS_LIMIT],
    lowest: u32,
    seen: u64,
}

/// Where entries of a level go for the IOVA at hand.
pub(super) enum Place<'a> {
    /// Into this table.
    Table(&'a [AtomicU64]),
    /// Into a table that is to be made, and that this word of the level above is to lead to.
    Missing(&'a AtomicU64),
}

impl<'a, F: Format, P: Pages> Mapper<'a, F, P> {
    pub(super) fn new(
        table: &'a PageTable<F, P>,
        root: Root,
        iova: u64,
        attributes: u64,
        gather: &'a mut Gather,
    ) -> Self {
        let top = root.levels.saturating_sub(1);
        let mut path: [&[AtomicU64]; LEVELS_LIMIT] = [&[]; LEVELS_LIMIT];
        if let Some(slot) = path.get_mut(top as usize) {
            *slot = table.root_words(root);
        }
        Self {
            table,
            gather,
            attributes,
            iova,
            root,
            sizes: table.sizes_below(root.levels),
            path,
            lowest: top,
            seen: iova,
        }
    }

    /// Maps `runs`, of which `granules` says that each is one granule.
    pub(super) fn map_all(&mut self, runs: &[PhysRun], granules: bool) -> Result<(), Error> {
        let mut rest = runs;
        while let [run, tail @ ..] = rest {
            let mut tail = tail;
            let scattered = granules || starts_with_granules::<F>(rest);
            if scattered {
                let done = self.map_granules(rest, granules)?;
                if done != 0 {
                    rest = rest.get(done..).unwrap_or(&[]);
                    continue;
                }
            }
            let mut len = run.len;
            while let [next, after @ ..] = tail
                && (next.len == 0 || next.start.get() == run.start.get().wrapping_add(len))
            {
                len += next.len;
                tail = after;
            }
            self.map_run(run.start.get(), len)?;
            rest = tail;
        }
        Ok(())
    }

    /// Maps one physically contiguous run.
    fn map_run(&mut self, phys: u64, len: u64) -> Result<(), Error> {
        let (mut phys, mut left) = (phys, len);
        while left != 0 {
            let leaves = Leaves::best(self.sizes, self.iova, phys, left);
            match leaf_level::<F>(leaves.shift) {
                0 => self.map_leaves_of::<0>(leaves, phys),
                1 => self.map_leaves_of::<1>(leaves, phys),
                level => self.map_leaves(level, leaves, phys),
            }?;
            phys = phys.wrapping_add(leaves.bytes);
            left -= leaves.bytes;
        }
        Ok(())
    }

    /// [`Self::map_leaves`] for a level of usual sizes, so that shifts and steps are constants.
    #[inline(never)]
    fn map_leaves_of<const LEVEL: u32>(&mut self, leaves: Leaves, phys: u64) -> Result<(), Error> {
        self.map_leaves(LEVEL, leaves, phys)
    }

    /// Maps `leaves` of memory from `phys`, table by table of `level`.
    #[inline(always)]
    fn map_leaves(&mut self, level: u32, leaves: Leaves, phys: u64) -> Result<(), Error> {
        let item = item_shift::<F>(level);
        let (mut phys, mut left) = (phys, leaves.bytes);
        while left != 0 {
            let first = self.table.index(self.root, level, self.iova);
            let mut bytes = left.min((self.entries(level).saturating_sub(first) as u64) << item);
            if F::LINEAR_BITS < 64 {
                let piece = 1u64 << (F::LINEAR_BITS & 63);
                bytes = bytes.min(piece - (phys & (piece - 1)));
            }
            let count = usize::try_from(bytes >> item).map_err(|_| Error::Corrupt)?;
            match self.place(level)? {
                Place::Table(words) => {
                    let slots = words.get(first..first + count).ok_or(Error::Corrupt)?;
                    if !words::all_clear(slots) {
                        self.clear_way(level, slots)?;
                    }
                    leaves.write::<F>(slots, level, phys, self.attributes);
                    self.table.pages.clean(slots);
                }
                Place::Missing(word) => {
                    let new = self.new_table(first, count)?;
                    leaves.write::<F>(new.slots, level, phys, self.attributes);
                    if !self.install(word, level, &new)? {
                        continue;
                    }
                }
            }
            phys = phys.wrapping_add(bytes);
            self.iova = self.iova.wrapping_add(bytes);
            left -= bytes;
        }
        Ok(())
    }

    /// Entries of the tables of `level`.
    #[inline(always)]
    pub(super) fn entries(&self, level: u32) -> usize {
        if F::ROOT_EXTRA_BITS != 0 && level + 1 == self.root.levels {
            self.table.root_words(self.root).len()
        } else {
            table_entries::<F>()
        }
    }

    /// Where the entries of `level` for the IOVA at hand go. Tables above are made if need be.
    #[inline(always)]
    pub(super) fn place(&mut self, level: u32) -> Result<Place<'a>, Error> {
        let mut here = self.lowest.max(level);
        while here + 1 < self.root.levels && !(self.knows(here) && self.same_table(here, self.iova))
        {
            here += 1;
        }
        self.lowest = here;
        self.seen = self.iova;
        if here > level + 1
            && let Some(words) = self.table.table_at(self.root, level + 1, self.iova)
        {
            // Faster than by what is below, and mostly the case.
            for skipped in self.path.iter_mut().take(here as usize).skip(level as usize + 2) {
                *skipped = &[];
            }
            here = level + 1;
            self.enter(here, words)?;
        }
        loop {
            let words = *self.path.get(here as usize).ok_or(Error::Corrupt)?;
            if here == level {
                return Ok(Place::Table(words));
            }
            let index = self.table.index(self.root, here, self.iova);
            let word = words.get(index).ok_or(Error::Corrupt)?;
            let mut entry = words::load(word);
            if entry == 0 {
                if here == level + 1 {
                    return Ok(Place::Missing(word));
                }
                if self.make_empty(word, here - 1)? {
                    here -= 1;
                    continue;
                }
                entry = words::load(word);
            }
            if !F::is_plain_table(here, entry) {
                return Err(Error::AlreadyMapped { at: Iova::new(self.iova) });
            }
            self.table.finish_clean(word, entry);
            here -= 1;
            self.enter(here, self.table.table_words(F::table_address(entry)))?;
        }
    }

    #[inline(always)]
    fn enter(&mut self, level: u32, words: &'a [AtomicU64]) -> Result<(), Error> {
        if words.is_empty() {
            return Err(Error::Corrupt);
        }
        *self.path.get_mut(level as usize).ok_or(Error::Corrupt)? = words;
        self.lowest = level;
        Ok(())
    }

    /// Memory for a table, all 0 but for `count` entries from `first`, which the caller writes.
    #[inline(always)]
    pub(super) fn new_table(&self, first: usize, count: usize) -> Result<New<'a>, Error> {
        let bytes = table_bytes::<F>(0);
        // Filling costs less than zeroing first and testing afterwards.
        let at = self.table.pages.alloc_uninit(bytes)?;
        let words = self.table.table_words(at);
        let parts = words.split_at_checked(first).and_then(|(before, rest)| {
            rest.split_at_checked(count).map(|(slots, after)| (before, slots, after))
        });
        let Some((before, slots, after)) = parts else {
            self.table.pages.free(at, bytes);
            return Err(Error::Corrupt);
        };
        words::fill(before, 0, 0);
        words::fill(after, 0, 0);
        Ok(New { at, words, slots })
    }

    /// Makes `word`, an entry above `level` that was 0, lead to a table that is complete. Gives whether
    /// it did; otherwise another thread was faster, and the new one is gone.
    #[inline(always)]
    pub(super) fn install(
        &mut self,
        word: &AtomicU64,
        level: u32,
        new: &New<'a>,
    ) -> Result<bool, Error> {
        let pages = &self.table.pages;
        pages.clean(new.words);
        if words::publish(word, F::table(&self.table.options, level + 1, new.at)).is_err() {
            pages.free(new.at, table_bytes::<F>(0));
            return Ok(false);
        }
        pages.clean(core::slice::from_ref(word));
        if F::CLEAN_DONE != 0 {
            words::update(word, |entry| Some(entry | F::CLEAN_DONE));
        }
        self.enter(level, new.words)?;
        Ok(true)
    }

    /// As [`Self::install`], for a table with nothing in it.
    #[cold]
    #[inline(never)]
    fn make_empty(&mut self, word: &AtomicU64, level: u32) -> Result<bool, Error> {
        let at = self.table.pages.alloc(table_bytes::<F>(0))?;
        let words = self.table.table_words(at);
        self.install(word, level, &New { at, words, slots: &[] })
    }

    /// Takes empty tables below `slots`, which begin at the IOVA at hand, out of the way.
    #[cold]
    #[inline(never)]
    fn clear_way(&mut self, level: u32, slots: &[AtomicU64]) -> Result<(), Error> {
        let item = item_shift::<F>(level);
        for (word, offset) in slots.iter().zip(0u64..) {
            let start = self.iova.wrapping_add(offset << item);
            if let Some(at) = self.table.first_mapped(level, words::load(word), start) {
                return Err(Error::AlreadyMapped { at: Iova::new(at) });
            }
        }
        for word in slots {
            let entry = words::load(word);
            if F::is_present(entry) {
                self.table.bury_below(level, entry, self.gather);
            }
        }
        self.gather.add(self.iova, (slots.len() as u64) << item);
        Ok(())
    }

    /// Whether the path holds a table of `level`.
    #[inline(always)]
    fn knows(&self, level: u32) -> bool {
        self.path.get(level as usize).is_some_and(|words| !words.is_empty())
    }

    /// Whether `iova` lies in the table of `level` that the path holds.
    #[inline(always)]
    const fn same_table(&self, level: u32, iova: u64) -> bool {
        let span = span_shift::<F>(level);
        span >= 64 || (self.seen ^ iova) >> span == 0
    }
}

/// A table that nothing leads to yet.
pub(super) struct New<'a> {
    at: PhysAddr,
    words: &'a [AtomicU64],
    /// The entries that its maker asked for.
    pub(super) slots: &'a [AtomicU64],
}

/// Whether the first two of `runs` are granules.
#[inline(always)]
fn starts_with_granules<F: Format>(runs: &[PhysRun]) -> bool {
    let granule = 1 << F::GRANULE_SHIFT;
    matches!(runs, [one, two, ..] if one.len == granule && two.len == granule)
}

impl<F: Format, P: Pages> PageTable<F, P> {
    /// The first mapped byte below `entry` at `level`, which begins at `start`.
    fn first_mapped(&self, level: u32, entry: u64, start: u64) -> Option<u64> {
        if !F::is_present(entry) {
            return None;
        }
        if level == 0 || !F::is_table(level, entry) {
            return Some(start);
        }
        let item = item_shift::<F>(level - 1);
        let words = self.table_words(F::table_address(entry));
        words.iter().zip(0u64..).find_map(|(word, offset)| {
            let start = start.wrapping_add(offset << item);
            self.first_mapped(level - 1, words::load(word), start)
        })
    }

    /// Hands the table that `entry` at `level` leads to, and all below, to the gather.
    fn bury_below(&self, level: u32, entry: u64, gather: &mut Gather) {
        if level == 0 || !F::is_table(level, entry) {
            return;
        }
        let table = F::table_address(entry);
        if level > 1 {
            for word in self.table_words(table) {
                let entry = words::load(word);
                if F::is_present(entry) {
                    self.bury_below(level - 1, entry, gather);
                }
            }
        }
        gather.bury(&self.pages, table, table_bytes::<F>(0), level);
    }
}
