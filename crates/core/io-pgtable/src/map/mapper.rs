//! A map in progress: runs of frames become leaves, the largest that fit, in tables made on the way.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages, PhysAddr, PhysRun};

use crate::error::Error;
use crate::format::{
    Format, LEVELS_LIMIT, item_shift, leaf_entries, leaf_level, span_shift, table_bytes,
    table_entries,
};
use crate::gather::Gather;
use crate::table::{PageTable, Root};
use crate::words;

/// A map in progress. `iova` is the first byte that is not mapped yet.
pub(super) struct Mapper<'a, F: Format, P: Pages> {
    table: &'a PageTable<F, P>,
    gather: &'a mut Gather,
    attributes: u64,
    pub(super) iova: u64,
    root: Root,
    sizes: u64,
    /// The tables on the way to `seen`, by level, from `lowest` up to the root.
    path: [&'a [AtomicU64]; LEVELS_LIMIT],
    lowest: u32,
    seen: u64,
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

    pub(super) fn map_all(&mut self, runs: &[PhysRun]) -> Result<(), Error> {
        let mut rest = runs;
        while let Some((run, mut tail)) = rest.split_first() {
            let granules = self.map_granules(rest);
            if granules != 0 {
                rest = rest.get(granules..).unwrap_or(&[]);
                continue;
            }
            let mut len = run.len;
            while let Some((next, after)) = tail.split_first()
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

    /// Maps runs of one granule each that make no larger leaf, as long as they come and the table at
    /// hand has free entries for them. Gives their number.
    #[inline(always)]
    fn map_granules(&mut self, runs: &[PhysRun]) -> usize {
        if self.lowest != 0 || !self.same_table(0, self.iova) {
            return 0;
        }
        let index = self.table.index(self.root, 0, self.iova);
        let slots = self.path[0].get(index..).unwrap_or(&[]);
        // The last run has none after it to tell whether that continues it.
        let most = runs.len().saturating_sub(1).min(slots.len());
        let mut count = self.map_granules_singly(slots, runs, 0, most.min(index & 1));
        if count == index & 1 {
            count = self.map_granules_at_once(index, slots, runs, count);
            count = self.map_granules_singly(slots, runs, count, most);
        }
        self.table.pages.clean(slots.get(..count).unwrap_or(&[]));
        let bytes = (count as u64) << F::GRANULE_SHIFT;
        self.iova = self.iova.wrapping_add(bytes);
        count
    }

    /// Goes on with [`Self::map_granules`] from `done` up to `most`; gives how far it came.
    #[inline(always)]
    fn map_granules_singly(
        &self,
        slots: &[AtomicU64],
        runs: &[PhysRun],
        done: usize,
        most: usize,
    ) -> usize {
        let slots = slots.get(done..most).unwrap_or(&[]);
        let runs = runs.get(done..).unwrap_or(&[]);
        let following = runs.get(1..).unwrap_or(&[]);
        let mut count = done;
        for ((word, run), next) in slots.iter().zip(runs).zip(following) {
            if run.len != 1 << F::GRANULE_SHIFT
                || continues::<F>(run, next)
                || words::load(word) != 0
            {
                break;
            }
            words::store(word, F::leaf(0, F::GRANULE_SHIFT, run.start, self.attributes));
            count += 1;
        }
        count
    }

    /// As [`Self::map_granules_singly`] from `done` on, as long as [`GRANULES_AT_ONCE`] can be mapped
    /// after one test. `slots` begin at `index` of the table, and `index + done` is even.
    ///
    /// A larger leaf begins at a multiple of its size: only there it matters whether runs continue
    /// each other.
    #[inline(always)]
    fn map_granules_at_once(
        &self,
        index: usize,
        slots: &[AtomicU64],
        runs: &[PhysRun],
        done: usize,
    ) -> usize {
        let larger = self.sizes >> F::GRANULE_SHIFT & !1;
        let every_other = larger & 2 != 0;
        let stride = GRANULES_AT_ONCE.min(1 << larger.trailing_zeros().min(16));
        let first = (index + done).wrapping_neg() & (stride - 1);
        let mut count = done;
        let window = |count| {
            let words = slots.get(count..)?.first_chunk::<GRANULES_AT_ONCE>()?;
            Some((words, runs.get(count..)?.first_chunk::<{ GRANULES_AT_ONCE + 1 }>()?))
        };
        while let Some((words, window)) = window(count) {
            let (runs, _) = window.as_chunks::<2>();
            let lens = window.iter().take(GRANULES_AT_ONCE);
            let lens = lens.fold(0, |all, run| all | (run.len ^ (1 << F::GRANULE_SHIFT)));
            let joins = if every_other {
                runs.iter().fold(false, |any, [run, next]| any | continues::<F>(run, next))
            } else {
                let pair = |at: usize| window.get(at..).and_then(|rest| rest.first_chunk::<2>());
                let joins = |at| pair(at).is_some_and(|[run, next]| continues::<F>(run, next));
                joins(first)
                    || (stride < GRANULES_AT_ONCE
                        && (first + stride..GRANULES_AT_ONCE).step_by(stride).any(joins))
            };
            if joins || lens != 0 || !words::all_clear(words) {
                break;
            }
            for (word, run) in words.iter().zip(window) {
                words::store(word, F::leaf(0, F::GRANULE_SHIFT, run.start, self.attributes));
            }
            count += GRANULES_AT_ONCE;
        }
        count
    }

    /// Maps one physically contiguous run.
    fn map_run(&mut self, phys: u64, len: u64) -> Result<(), Error> {
        let (mut phys, mut left) = (phys, len);
        while left != 0 {
            let leaves = best_leaves(self.sizes, self.iova, phys, left);
            let level = leaf_level::<F>(leaves.shift);
            let mut rest = leaves.count << leaves.shift;
            left -= rest;
            while rest != 0 {
                let done = self.map_in_table(level, leaves.shift, phys, rest)?;
                phys = phys.wrapping_add(done);
                self.iova = self.iova.wrapping_add(done);
                rest -= done;
            }
        }
        Ok(())
    }

    /// Maps as much of `len` bytes, whole leaves of 2^`shift`, as lies in one table of `level`.
    /// Gives the bytes.
    fn map_in_table(&mut self, level: u32, shift: u32, phys: u64, len: u64) -> Result<u64, Error> {
        let item = item_shift::<F>(level);
        let first = self.table.index(self.root, level, self.iova);
        let entries = if level + 1 == self.root.levels {
            self.table.root_words(self.root).len()
        } else {
            table_entries::<F>()
        };
        let mut bytes = len.min((entries.saturating_sub(first) as u64) << item);
        if F::LINEAR_BITS < 64 {
            let piece = 1u64 << (F::LINEAR_BITS & 63);
            bytes = bytes.min(piece - (phys & (piece - 1)));
        }
        let count = usize::try_from(bytes >> item).map_err(|_| Error::Corrupt)?;
        let run = Run { level, shift, first, count, phys };
        if let Some(words) = self.table_at(level, &run)? {
            let slots = words.get(first..first + count).ok_or(Error::Corrupt)?;
            if !words::all_clear(slots) {
                self.clear_way(level, slots)?;
            }
            self.write(slots, &run);
            self.table.pages.clean(slots);
        }
        Ok(bytes)
    }

    /// The table of `level` for the IOVA at hand, made if need be. `None` when it was made
    /// with `run` in it.
    fn table_at(&mut self, level: u32, run: &Run) -> Result<Option<&'a [AtomicU64]>, Error> {
        let mut here = self.lowest.max(level);
        while here + 1 < self.root.levels && !self.same_table(here, self.iova) {
            here += 1;
        }
        self.lowest = here;
        self.seen = self.iova;
        loop {
            let words = *self.path.get(here as usize).ok_or(Error::Corrupt)?;
            if here == level {
                return Ok(Some(words));
            }
            let index = self.table.index(self.root, here, self.iova);
            let word = words.get(index).ok_or(Error::Corrupt)?;
            let mut entry = words::load(word);
            if entry == 0 {
                let fill = (here == level + 1).then_some(run);
                match self.make_table(word, here, fill)? {
                    Made::Ours(table) => {
                        here -= 1;
                        self.enter(here, table)?;
                        if fill.is_some() {
                            return Ok(None);
                        }
                        continue;
                    }
                    Made::Theirs(theirs) => entry = theirs,
                }
            }
            if !F::is_present(entry) || !F::is_table(here, entry) {
                return Err(Error::AlreadyMapped { at: Iova::new(self.iova) });
            }
            self.table.finish_clean(word, entry);
            here -= 1;
            self.enter(here, self.table.table_words(F::table_address(entry)))?;
        }
    }

    fn enter(&mut self, level: u32, words: &'a [AtomicU64]) -> Result<(), Error> {
        if words.is_empty() {
            return Err(Error::Corrupt);
        }
        *self.path.get_mut(level as usize).ok_or(Error::Corrupt)? = words;
        self.lowest = level;
        Ok(())
    }

    /// Makes the table that `word`, an entry at `level` that was 0, is to lead to, holding `fill` or
    /// nothing, and installs it once it is complete.
    fn make_table(
        &self,
        word: &AtomicU64,
        level: u32,
        fill: Option<&Run>,
    ) -> Result<Made<'a>, Error> {
        let pages = &self.table.pages;
        let bytes = table_bytes::<F>(0);
        let at = match fill {
            // Filling costs less than zeroing first and testing afterwards.
            Some(_) => pages.alloc_uninit(bytes)?,
            None => pages.alloc(bytes)?,
        };
        let words = self.table.table_words(at);
        if let Some(run) = fill {
            let slots = words
                .get(..run.first)
                .zip(words.get(run.first..run.first + run.count))
                .zip(words.get(run.first + run.count..));
            let Some(((before, slots), after)) = slots else {
                pages.free(at, bytes);
                return Err(Error::Corrupt);
            };
            words::fill(before, 0, 0);
            self.write(slots, run);
            words::fill(after, 0, 0);
        }
        pages.clean(words);
        let entry = F::table(&self.table.options, level, at);
        match words::publish(word, entry) {
            Ok(()) => {
                pages.clean(core::slice::from_ref(word));
                if F::CLEAN_DONE != 0 {
                    words::update(word, |entry| Some(entry | F::CLEAN_DONE));
                }
                Ok(Made::Ours(words))
            }
            Err(theirs) => {
                pages.free(at, bytes);
                Ok(Made::Theirs(theirs))
            }
        }
    }

    /// Writes the entries of `run` to its `slots`.
    #[inline(always)]
    fn write(&self, slots: &[AtomicU64], run: &Run) {
        let mut phys = PhysAddr::new(run.phys);
        if run.shift == item_shift::<F>(run.level) {
            let first = F::leaf(run.level, run.shift, phys, self.attributes);
            // Most runs are of granules: there the step is a constant.
            if run.level == 0 {
                words::fill(slots, first, F::address(PhysAddr::new(1 << F::GRANULE_SHIFT)));
            } else {
                words::fill(slots, first, F::address(PhysAddr::new(1 << run.shift)));
            }
            return;
        }
        for slots in slots.chunks(leaf_entries::<F>(run.level, run.shift)) {
            write_leaf::<F>(slots, run.level, run.shift, phys, self.attributes);
            phys = phys.wrapping_add(1 << run.shift);
        }
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

    /// Whether `iova` lies in the table of `level` that the path holds.
    #[inline(always)]
    const fn same_table(&self, level: u32, iova: u64) -> bool {
        let span = span_shift::<F>(level);
        span >= 64 || (self.seen ^ iova) >> span == 0
    }
}

/// Runs of one granule that are looked at together.
const GRANULES_AT_ONCE: usize = 32;

/// Whether `next` continues `run`, a run of one granule.
#[inline(always)]
fn continues<F: Format>(run: &PhysRun, next: &PhysRun) -> bool {
    next.start == run.start.wrapping_add(1 << F::GRANULE_SHIFT)
}

/// Entries to write in one table of `level`: `count` from index `first`, leaves of 2^`shift` bytes
/// of consecutive memory from `phys`.
struct Run {
    level: u32,
    shift: u32,
    first: usize,
    count: usize,
    phys: u64,
}

/// A table, by who installed it.
enum Made<'a> {
    Ours(&'a [AtomicU64]),
    /// Another thread was faster; this is its entry.
    Theirs(u64),
}

/// Writes one leaf to all the entries that it takes.
#[inline(always)]
pub(super) fn write_leaf<F: Format>(
    slots: &[AtomicU64],
    level: u32,
    shift: u32,
    phys: PhysAddr,
    attributes: u64,
) {
    let first = F::leaf(level, shift, phys, attributes);
    words::fill(slots, first, F::replica_step(level, shift));
}

/// `count` leaves of 2^`shift` bytes.
struct Leaves {
    shift: u32,
    count: u64,
}

/// The largest leaf for the start of a run, and how many of them until a larger one fits. All
/// arguments are multiples of the lowest size in `sizes`, and `len` is not 0.
#[inline(always)]
const fn best_leaves(sizes: u64, iova: u64, phys: u64, len: u64) -> Leaves {
    let not_larger = u64::MAX >> len.leading_zeros();
    let align = (iova | phys) & (iova | phys).wrapping_neg();
    // For both addresses 0, `align - 1` wraps to all ones: everything is aligned.
    let aligned = align | align.wrapping_sub(1);
    let shift = 63 - (sizes & not_larger & aligned).leading_zeros();
    let larger = sizes & !((2 << shift) - 1);
    let next = larger & larger.wrapping_neg();
    let mut bytes = len;
    if next != 0 && (iova ^ phys) & (next - 1) == 0 {
        let until = iova.wrapping_neg() & (next - 1);
        if until != 0 && until < len && len - until >= next {
            bytes = until;
        }
    }
    Leaves { shift, count: bytes >> shift }
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
