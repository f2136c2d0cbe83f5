//! Mapping granules that lie anywhere: a batch of them goes straight into the words of a leaf table.

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Pages, PhysRun};

use crate::error::Error;
use crate::format::Format;
use crate::words;

use super::mapper::{Mapper, Place};

/// Granules that are looked at before the next decision.
const TOGETHER: usize = 16;

impl<F: Format, P: Pages> Mapper<'_, F, P> {
    /// Maps runs from the start of `runs` on, each of one granule, as far as one leaf table goes. Ends
    /// before a run that is no single granule (if `granules`, each is one), may begin a larger leaf, or
    /// goes where something is mapped; gives how many it has mapped.
    pub(super) fn map_granules(
        &mut self,
        runs: &[PhysRun],
        granules: bool,
    ) -> Result<usize, Error> {
        let first = self.table.index(self.root, 0, self.iova);
        let room = self.entries(0).saturating_sub(first);
        let mut most = runs.len().min(room);
        if !granules {
            let single = |run: &&PhysRun| run.len == 1 << F::GRANULE_SHIFT;
            most = runs.iter().take(most).take_while(single).count();
        }
        // Whether the last of them may begin a larger leaf, the run after it tells.
        let seen = runs.get(..most + 1).unwrap_or(runs);
        most = if granules {
            self.before_larger(seen, most, begins::<F, true>)
        } else {
            self.before_larger(seen, most, begins::<F, false>)
        };
        let runs = runs.get(..most).unwrap_or(&[]);
        if runs.is_empty() {
            return Ok(0);
        }
        let count = loop {
            match self.place(0)? {
                Place::Table(words) => {
                    let slots = words.get(first..first + runs.len()).unwrap_or(&[]);
                    let count = self.write_clear(slots, runs);
                    self.table.pages.clean(slots.get(..count).unwrap_or(&[]));
                    break count;
                }
                Place::Missing(word) => {
                    let new = self.new_table(first, runs.len())?;
                    self.write_all(new.slots, runs);
                    if self.install(word, 0, &new)? {
                        break runs.len();
                    }
                }
            }
        };
        self.iova = self.iova.wrapping_add((count as u64) << F::GRANULE_SHIFT);
        Ok(count)
    }

    /// How many of the first `most` of `runs`, all granules, come before one that may begin a larger
    /// leaf with those after it, as `begins` tells.
    #[inline(always)]
    fn before_larger(
        &self,
        runs: &[PhysRun],
        most: usize,
        begins: impl Fn(&PhysRun, &PhysRun, u64) -> bool,
    ) -> usize {
        let larger = self.sizes >> F::GRANULE_SHIFT & !1;
        // Entries from one place where a larger leaf may begin to the next.
        let step = larger & larger.wrapping_neg();
        if step == 0 {
            return most;
        }
        let number = self.iova >> F::GRANULE_SHIFT;
        let Ok(mut at) = usize::try_from(number.wrapping_neg() & (step - 1)) else {
            return most;
        };
        let within = (step << F::GRANULE_SHIFT) - 1;
        if step == 2 {
            // So frequent that it is worth looking at several at once.
            let any = |window: &[PhysRun; TOGETHER]| {
                window.as_chunks().0.iter().any(|[run, next]| begins(run, next, within))
            };
            while let Some(window) = runs.get(at..).and_then(|rest| rest.first_chunk())
                && !any(window)
            {
                at += TOGETHER;
            }
        }
        let step = usize::try_from(step).unwrap_or(usize::MAX);
        while let Some([run, next, ..]) = runs.get(at..)
            && !begins(run, next, within)
        {
            at = at.saturating_add(step);
        }
        at.min(most)
    }

    /// Writes `runs` to as many of `slots` from the start as are clear; gives their number.
    #[inline(always)]
    fn write_clear(&self, slots: &[AtomicU64], runs: &[PhysRun]) -> usize {
        let ((windows, _), (run_windows, _)) = (slots.as_chunks(), runs.as_chunks());
        let mut done = 0;
        for (slots, runs) in windows.iter().zip(run_windows) {
            if !words::all_clear(slots) {
                break;
            }
            self.write_window(slots, runs);
            done += TOGETHER;
        }
        let slots = slots.get(done..).unwrap_or(&[]);
        let runs = runs.get(done..).unwrap_or(&[]);
        for (word, run) in slots.iter().zip(runs) {
            if words::load(word) != 0 {
                break;
            }
            words::store(word, F::leaf(0, F::GRANULE_SHIFT, run.start, self.attributes));
            done += 1;
        }
        done
    }

    #[inline(always)]
    fn write_all(&self, slots: &[AtomicU64], runs: &[PhysRun]) {
        let ((windows, slots), (run_windows, runs)) = (slots.as_chunks(), runs.as_chunks());
        for (slots, runs) in windows.iter().zip(run_windows) {
            self.write_window(slots, runs);
        }
        for (word, run) in slots.iter().zip(runs) {
            words::store(word, F::leaf(0, F::GRANULE_SHIFT, run.start, self.attributes));
        }
    }

    #[inline(always)]
    fn write_window(&self, slots: &[AtomicU64; TOGETHER], runs: &[PhysRun; TOGETHER]) {
        for (word, run) in slots.iter().zip(runs) {
            words::store(word, F::leaf(0, F::GRANULE_SHIFT, run.start, self.attributes));
        }
    }
}

/// Whether `run`, a granule, may begin a larger leaf: `within` are the address bits that are 0 where
/// one begins. After a run of nothing, which there is none of if `GRANULES`, the one behind it tells;
/// this takes it for a yes.
#[inline(always)]
fn begins<F: Format, const GRANULES: bool>(run: &PhysRun, next: &PhysRun, within: u64) -> bool {
    let start = run.start.get();
    let continues = next.start.get() == start.wrapping_add(1 << F::GRANULE_SHIFT);
    (continues && start & within == 0) || (!GRANULES && next.len == 0)
}
