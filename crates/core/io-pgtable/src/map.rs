//! Mapping: the entry points, their checks, and the short ways for a single leaf.

use lychgate_types::{Iova, Pages, PhysAddr, PhysRun, Prot};

use crate::error::Error;
use crate::format::{Format, item_shift, leaf_entries, leaf_level};
use crate::gather::Gather;
use crate::table::{PageTable, Root};
use crate::words;

use mapper::{Mapper, write_leaf};

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
    #[inline]
    pub fn map_batch(
        &self,
        iova: Iova,
        runs: &[PhysRun],
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        if let [run] = runs
            && run.len == 1 << F::GRANULE_SHIFT
            && self.map_granule(iova.get(), run.start, prot)
        {
            return Ok(1 << F::GRANULE_SHIFT);
        }
        self.map_any(iova.get(), runs, prot, gather)
    }

    /// As [`Self::map_batch`], for anything but the short way of a single granule.
    #[inline(never)]
    fn map_any(
        &self,
        iova: u64,
        runs: &[PhysRun],
        prot: Prot,
        gather: &mut Gather,
    ) -> Result<u64, Error> {
        if let [run] = runs
            && self.map_leaf(iova, *run, prot)
        {
            return Ok(run.len);
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
        let len = self.check_runs(iova, runs)?;
        let last = iova.checked_add(len - 1).ok_or(Error::Overflow)?;
        if iova < self.first || last > self.last {
            return Err(Error::IovaOutOfRange { iova: Iova::new(iova), last: Iova::new(last) });
        }
        let root = self.root();
        self.check_reach(root, last)?;
        let attributes = F::attributes(&self.options, prot).ok_or(Error::Permissions)?;
        let mut mapper = Mapper::new(self, root, iova, attributes, gather);
        match mapper.map_all(runs) {
            Ok(()) => Ok(len),
            Err(error) => {
                let done = mapper.iova.wrapping_sub(iova);
                self.undo(root, iova, done, gather);
                Err(error)
            }
        }
    }

    /// Checks all that can be checked of the frames; gives their sum, at least 1.
    #[inline(always)]
    fn check_runs(&self, iova: u64, runs: &[PhysRun]) -> Result<u64, Error> {
        let (mut starts, mut lens, mut total) = (0u64, 0u64, 0u64);
        for run in runs {
            starts |= run.start.get();
            lens |= run.len;
            total = total.wrapping_add(run.len);
        }
        // No start is above all starts' bits together, and no length above all lengths'. What holds
        // for these holds for each; what does not is looked at one by one.
        let fits = starts.checked_add(lens).is_some_and(|beyond| beyond <= self.output_last);
        let aligned = (iova | starts | lens) & (self.granule() - 1) == 0;
        let sums = lens.checked_mul(runs.len() as u64).is_some();
        if fits && aligned && sums && total != 0 {
            return Ok(total);
        }
        self.check_runs_one_by_one(iova, runs)
    }

    /// As [`Self::check_runs`], for runs of which one is wrong, or near the end of what fits.
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
        if bits & (self.granule() - 1) != 0 {
            return Err(Error::Misaligned { granule: self.granule() });
        }
        if highest > self.output_last {
            return Err(Error::OutputOutOfRange { phys: PhysAddr::new(highest) });
        }
        Ok(total)
    }

    /// The short way: one granule that passes every check, where all tables exist and nothing is
    /// mapped. Gives whether it was that; if not, nothing has changed.
    #[inline(always)]
    fn map_granule(&self, iova: u64, phys: PhysAddr, prot: Prot) -> bool {
        let root = self.root();
        let attributes = self.leaf_attributes(root, iova, phys, F::GRANULE_SHIFT, prot);
        if attributes == 0 {
            return false;
        }
        let Some(word) = self.word_at(root, 0, iova) else {
            return false;
        };
        if words::load(word) != 0 {
            return false;
        }
        words::store(word, F::leaf(0, F::GRANULE_SHIFT, phys, attributes));
        self.pages.clean(core::slice::from_ref(word));
        true
    }

    /// As [`Self::map_granule`], for a run that is one leaf of any size.
    #[inline(always)]
    fn map_leaf(&self, iova: u64, run: PhysRun, prot: Prot) -> bool {
        let root = self.root();
        if !run.len.is_power_of_two() || self.sizes_below(root.levels) & run.len == 0 {
            return false;
        }
        let shift = run.len.trailing_zeros();
        let attributes = self.leaf_attributes(root, iova, run.start, shift, prot);
        if attributes == 0 {
            return false;
        }
        let level = leaf_level::<F>(shift);
        // Spelled out for the levels of usual sizes, so that the walks to them have constant shifts.
        let table = match level {
            0 => self.table_at(root, 0, iova),
            1 => self.table_at(root, 1, iova),
            2 => self.table_at(root, 2, iova),
            _ => self.table_at(root, level, iova),
        };
        let Some(rest) = table.and_then(|table| table.get(self.index(root, level, iova)..)) else {
            return false;
        };
        if shift == item_shift::<F>(level) {
            match rest.first() {
                Some(word) if words::load(word) == 0 => {
                    words::store(word, F::leaf(level, shift, run.start, attributes));
                    self.pages.clean(core::slice::from_ref(word));
                    true
                }
                _ => false,
            }
        } else {
            match rest.get(..leaf_entries::<F>(level, shift)) {
                Some(slots) if words::all_clear(slots) => {
                    write_leaf::<F>(slots, level, shift, run.start, attributes);
                    self.pages.clean(slots);
                    true
                }
                _ => false,
            }
        }
    }

    /// Checks one leaf of 2^`shift` bytes, a size that the table has or the granule; gives its
    /// attributes if nothing is wrong, otherwise 0.
    #[inline(always)]
    fn leaf_attributes(
        &self,
        root: Root,
        iova: u64,
        phys: PhysAddr,
        shift: u32,
        prot: Prot,
    ) -> u64 {
        let within = (1u64 << shift) - 1;
        let last = iova | within;
        let aligned = (iova | phys.get()) & within == 0 && self.within_granule <= within;
        let in_range = self.first <= iova
            && last <= self.last
            && self.root_reaches(root, last)
            && phys.get() | within <= self.output_last;
        if aligned && in_range { self.attributes(prot) } else { 0 }
    }

    /// Takes the `done` bytes from `iova` back that a failed map has written.
    #[cold]
    #[inline(never)]
    fn undo(&self, root: Root, iova: u64, done: u64, gather: &mut Gather) {
        if done != 0 {
            // What this call has mapped begins and ends with its own leaves: nothing can stop it.
            let _ = self.unmap_range(root, iova, done, gather);
        }
    }
}
