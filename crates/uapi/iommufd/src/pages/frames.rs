//! The frames of pages that were pinned together.

use std::sync::Arc;

use lychgate_types::{PhysAddr, PhysRun};

use crate::mm::PAGE_SIZE;

/// Frames of consecutive pages. Who holds it knows how many.
#[derive(Clone)]
pub(super) enum Frames {
    /// One behind the other.
    Run(PhysAddr),
    /// Pages `skip` and following of what one pin gave. Parts of it share the table, so that cutting
    /// them costs the same however scattered they are.
    Scattered { table: Arc<[Run]>, skip: u64 },
}

/// Frames one behind the other, up to the next of the table.
pub(super) struct Run {
    /// Counted from the first page of the table.
    page: u64,
    start: PhysAddr,
}

impl Frames {
    /// Frames as a pin gave them: whole pages, not none.
    pub(super) fn new(runs: &[PhysRun]) -> Self {
        if let [run] = runs {
            return Self::Run(run.start);
        }
        let mut page = 0;
        let table = runs
            .iter()
            .map(|run| {
                let entry = Run { page, start: run.start };
                page += run.len / PAGE_SIZE;
                entry
            })
            .collect();
        Self::Scattered { table, skip: 0 }
    }

    /// The frames from page `pages` on.
    pub(super) fn skip(&self, pages: u64) -> Self {
        match self {
            Self::Run(start) => Self::Run(start.wrapping_add(pages * PAGE_SIZE)),
            Self::Scattered { table, skip } => {
                Self::Scattered { table: Arc::clone(table), skip: skip + pages }
            }
        }
    }

    /// Appends the first `pages` frames to `runs`, joining adjacent ones.
    pub(super) fn append(&self, pages: u64, runs: &mut Vec<PhysRun>) {
        match self {
            Self::Run(start) => join(runs, PhysRun { start: *start, len: pages * PAGE_SIZE }),
            Self::Scattered { table, skip } => {
                let end = skip + pages;
                let first = table.partition_point(|run| run.page <= *skip).saturating_sub(1);
                let parts = table.get(first..).unwrap_or_default();
                let nexts = parts.iter().skip(1).map(|run| run.page).chain([u64::MAX]);
                for (run, next) in parts.iter().zip(nexts).take_while(|(run, _)| run.page < end) {
                    let from = run.page.max(*skip);
                    join(
                        runs,
                        PhysRun {
                            start: run.start.wrapping_add((from - run.page) * PAGE_SIZE),
                            len: (next.min(end) - from) * PAGE_SIZE,
                        },
                    );
                }
            }
        }
    }
}

fn join(runs: &mut Vec<PhysRun>, more: PhysRun) {
    match runs.last_mut() {
        Some(last) if last.start.checked_add(last.len) == Some(more.start) => last.len += more.len,
        _ => runs.push(more),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(page: u64, pages: u64) -> PhysRun {
        PhysRun { start: PhysAddr::new(page * PAGE_SIZE), len: pages * PAGE_SIZE }
    }

    fn part(frames: &Frames, skip: u64, pages: u64) -> Vec<PhysRun> {
        let mut runs = Vec::new();
        frames.skip(skip).append(pages, &mut runs);
        runs
    }

    #[test]
    fn a_part_is_made_of_exactly_its_pages() {
        let all = [run(10, 2), run(20, 1), run(30, 4)];
        let frames = Frames::new(&all);
        assert_eq!(part(&frames, 0, 7), all);
        assert_eq!(part(&frames, 1, 2), [run(11, 1), run(20, 1)]);
        assert_eq!(part(&frames, 2, 1), [run(20, 1)]);
        assert_eq!(part(&frames, 4, 3), [run(31, 3)]);
        let twice = frames.skip(1).skip(2);
        assert_eq!(part(&twice, 1, 1), [run(31, 1)]);
    }

    #[test]
    fn parts_that_touch_become_one_run() {
        let one = Frames::new(&[run(10, 4)]);
        let mut runs = part(&one, 1, 1);
        one.skip(2).append(2, &mut runs);
        assert_eq!(runs, [run(11, 3)]);
    }
}
