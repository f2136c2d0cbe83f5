//! Mapping: the entry points, their checks, and the short ways for a single leaf.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages, PhysAddr, PhysRun, Prot};

use crate::error::Error;
use crate::format::{Format, item_shift, leaf_level, span_shift};
use crate::gather::Gather;
use crate::table::{PageTable, Root};
use crate::words;

use leaves::Leaves;
use mapper::Mapper;

mod granules;
mod leaves;
mod mapper;

impl<F: Format, P: Pages> PageTable<F, P> {
    /// Maps `len` bytes from `iova` to consecutive physical memory from `phys`: a
    /// [`PageTable::map_batch`] of one run.
    ///
    /// # Errors
    /// As [`PageTable::map_batch`].
    #[inline]
    pub fn map(
        &self,
        iova: Iova,
        phys: PhysAddr,
        len: u64,
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<(), Error> {
        self.map_batch(iova, &[PhysRun { start: phys, len }], prot, gather).map(|_| ())
    }

    /// Maps the frames of `runs`, in order, at consecutive IOVAs from `iova`, with the largest
    /// leaves that both addresses allow; runs that continue each other count as one. Gives the number
    /// of bytes.
    ///
    /// Empty tables in the way of a large leaf are taken out through `gather`.
    ///
    /// # Errors
    /// On an error nothing of the range stays mapped that was not before; if leaves had been
    /// written, `gather` says what to invalidate. Tables that were made on the way
    /// may stay, empty, for later maps.
    ///
    /// [`Error::Empty`], [`Error::Misaligned`], [`Error::Overflow`], [`Error::IovaOutOfRange`],
    /// [`Error::OutputOutOfRange`], [`Error::BeyondTop`] and [`Error::Permissions`] come before any
    /// change; [`Error::AlreadyMapped`], [`Error::OutOfMemory`] and [`Error::Corrupt`] on the way.
    #[inline(always)]
    pub fn map_batch(
        &self,
        iova: Iova,
        runs: &[PhysRun],
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        if let [run] = runs
            && run.len == 1 << F::GRANULE_SHIFT
            && self.map_single(0, iova.get(), run.start, prot)
        {
            return Ok(1 << F::GRANULE_SHIFT);
        }
        self.map_any(iova.get(), runs, prot, gather)
    }

    /// As [`Self::map_batch`], for anything but the short way of a single granule.
    #[inline(never)]
    pub(crate) fn map_any(
        &self,
        iova: u64,
        runs: &[PhysRun],
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        if let [run] = runs {
            let done = if run.len == 1 << item_shift::<F>(1) {
                self.map_single(1, iova, run.start, prot)
            } else if run.len == 1 << item_shift::<F>(2) {
                self.map_single(2, iova, run.start, prot)
            } else {
                // More than a leaf table holds goes to tables that are not there yet, mostly.
                let few = run.len < 1 << span_shift::<F>(0) || self.page_sizes & run.len != 0;
                few && self.map_in_table(iova, *run, prot)
            };
            if done {
                return Ok(run.len);
            }
        }
        self.map_runs(iova, runs, prot, gather)
    }

    #[inline(never)]
    fn map_runs(
        &self,
        iova: u64,
        runs: &[PhysRun],
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        let Checked { len, granules } = self.check_runs(iova, runs)?;
        let last = iova.checked_add(len - 1).ok_or(Error::Overflow)?;
        if iova < self.first || last > self.last {
            return Err(Error::IovaOutOfRange { iova: Iova::new(iova), last: Iova::new(last) });
        }
        let root = self.root();
        self.check_reach(root, last)?;
        let attributes = F::attributes(&self.options, prot).ok_or(Error::Permissions)?;
        let mut mapper = Mapper::new(self, root, iova, attributes, gather);
        match mapper.map_all(runs, granules) {
            Ok(()) => Ok(len),
            Err(error) => {
                let done = mapper.iova.wrapping_sub(iova);
                self.undo(root, iova, done, gather);
                Err(error)
            }
        }
    }

    /// Checks all that can be checked of the frames.
    #[inline(always)]
    fn check_runs(&self, iova: u64, runs: &[PhysRun]) -> Result<Checked, Error> {
        let (mut starts, mut lens, mut total) = (0u64, 0u64, 0u64);
        let mut look = |run: &PhysRun| {
            starts |= run.start.get();
            lens |= run.len;
            total = total.wrapping_add(run.len);
        };
        let (windows, rest) = runs.as_chunks::<8>();
        windows.iter().flatten().for_each(&mut look);
        rest.iter().for_each(look);
        // No start is above all starts' bits together, and no length above all lengths'. What holds
        // for these holds for each; what does not is looked at one by one.
        let count = runs.len() as u64;
        let fits = starts.checked_add(lens).is_some_and(|beyond| beyond <= self.output_last);
        let aligned = (iova | starts | lens) & self.within_granule == 0;
        let sums = lens.checked_mul(count).is_some();
        if fits && aligned && sums && total != 0 {
            // Each length is a granule or nothing, and their sum says that none is nothing.
            let granule = 1 << F::GRANULE_SHIFT;
            let granules = lens == granule && total == granule * count;
            return Ok(Checked { len: total, granules });
        }
        let len = self.check_runs_one_by_one(iova, runs)?;
        Ok(Checked { len, granules: false })
    }

    /// As [`Self::check_runs`], for runs of which one is wrong, or near the end of what fits; gives
    /// their sum, at least 1.
    #[cold]
    #[inline(never)]
    fn check_runs_one_by_one(&self, iova: u64, runs: &[PhysRun]) -> Result<u64, Error> {
        let mut total = 0u64;
        let mut bits = iova;
        let mut highest = 0;
        for run in runs {
            let start = run.start.get();
            bits |= start | run.len;
            total = total.checked_add(run.len).ok_or(Error::Overflow)?;
            let last = match run.len.checked_sub(1) {
                Some(rest) => start.checked_add(rest).ok_or(Error::Overflow)?,
                None => 0,
            };
            highest = last.max(highest);
        }
        if total == 0 {
            return Err(Error::Empty);
        }
        if bits & self.within_granule != 0 {
            return Err(Error::Misaligned { granule: self.granule() });
        }
        if highest > self.output_last {
            return Err(Error::OutputOutOfRange { phys: PhysAddr::new(highest) });
        }
        Ok(total)
    }

    /// The short way: one leaf of the size that one entry of `level`, a constant, spans. It passes
    /// every check, all tables exist, and nothing is mapped. Gives whether it was that; if not, nothing
    /// has changed.
    #[inline(always)]
    fn map_single(&self, level: u32, iova: u64, phys: PhysAddr, prot: Prot) -> bool {
        let root = self.root();
        let attributes = self.single_attributes(level, iova, phys, prot);
        if attributes == 0 || !self.root_reaches(root, iova) {
            return false;
        }
        let word = self.word_at(root, level, iova);
        word.is_some_and(|word| self.put_single(level, word, phys, attributes))
    }

    /// Checks all but the reach of one leaf of the size that one entry of `level` spans; gives its
    /// attributes, or 0 when something is wrong.
    #[inline(always)]
    pub(crate) fn single_attributes(
        &self,
        level: u32,
        iova: u64,
        phys: PhysAddr,
        prot: Prot,
    ) -> u64 {
        let size = 1 << item_shift::<F>(level);
        if self.page_sizes & size == 0
            || (iova | phys.get()) & (size - 1) != 0
            || iova < self.first
            || iova | (size - 1) > self.last
            || (level != 0 && phys.get() | (size - 1) > self.output_last)
            // Physical addresses have no fewer bits than a granule.
            || phys.get() > self.output_last
        {
            return 0;
        }
        self.attributes(prot)
    }

    /// Puts a leaf that was checked in `word`, an entry of `level`, if nothing is there.
    #[inline(always)]
    pub(crate) fn put_single(
        &self,
        level: u32,
        word: &AtomicU64,
        phys: PhysAddr,
        attributes: u64,
    ) -> bool {
        if words::load(word) != 0 {
            return false;
        }
        words::store(word, F::leaf(level, item_shift::<F>(level), phys, attributes));
        self.pages.clean(core::slice::from_ref(word));
        true
    }

    /// As [`Self::map_single`], for a run that becomes leaves of one size in one table.
    #[inline(never)]
    fn map_in_table(&self, iova: u64, run: PhysRun, prot: Prot) -> bool {
        let (phys, len) = (run.start.get(), run.len);
        let rest = len.wrapping_sub(1);
        let (Some(last), Some(phys_last)) = (iova.checked_add(rest), phys.checked_add(rest)) else {
            return false;
        };
        let root = self.root();
        let attributes = self.attributes(prot);
        if len == 0
            || (iova | phys | len) & self.within_granule != 0
            || iova < self.first
            || last > self.last
            || !self.root_reaches(root, last)
            || phys_last > self.output_last
            || attributes == 0
        {
            return false;
        }
        let leaves = Leaves::best(self.sizes_below(root.levels), iova, phys, len);
        if leaves.bytes != len {
            return false;
        }
        // Spelled out for the levels of usual sizes, so that the walks to them have constant shifts.
        match leaf_level::<F>(leaves.shift) {
            0 => self.write_where_clear(root, 0, iova, phys, leaves, attributes),
            1 => self.write_where_clear(root, 1, iova, phys, leaves, attributes),
            2 => self.write_where_clear(root, 2, iova, phys, leaves, attributes),
            level => self.write_where_clear(root, level, iova, phys, leaves, attributes),
        }
    }

    /// Maps `leaves` if they lie in one table of `level` that is there, and clear in their place.
    #[inline(always)]
    fn write_where_clear(
        &self,
        root: Root,
        level: u32,
        iova: u64,
        phys: u64,
        leaves: Leaves,
        attributes: u64,
    ) -> bool {
        let Some(table) = self.table_at(root, level, iova) else {
            return false;
        };
        let first = self.index(root, level, iova);
        let Some(slots) = leaves.slots::<F>(level, phys, table.get(first..).unwrap_or(&[])) else {
            return false;
        };
        if !words::all_clear(slots) {
            return false;
        }
        leaves.write::<F>(slots, level, phys, attributes);
        self.pages.clean(slots);
        true
    }

    /// Takes the `done` bytes from `iova` back that a failed map has written.
    #[cold]
    #[inline(never)]
    fn undo(&self, root: Root, iova: u64, done: u64, gather: &mut Gather) {
        if done != 0 {
            // All of it is mapped, by leaves of its own: nothing can stop this.
            let _ = self.sweep(root, iova, done, true, gather);
        }
    }
}

/// What a look at all the frames of a batch tells.
struct Checked {
    /// The sum of their lengths, at least 1.
    len: u64,
    /// Whether each is a single granule.
    granules: bool,
}
