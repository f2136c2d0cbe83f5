//! The physical memory of one transfer, adjacent runs merged.

use lychgate_model::Span;
use lychgate_types::{PhysAddr, PhysRun};

const INLINE: usize = 16;

/// Runs in the order of the data; the first few without an allocation.
pub(super) struct Runs {
    few: [PhysRun; INLINE],
    len: usize,
    /// All of them, once they are more than [`INLINE`].
    many: Vec<PhysRun>,
}

impl Runs {
    pub(super) const fn new() -> Self {
        Self {
            few: [PhysRun { start: PhysAddr::new(0), len: 0 }; INLINE],
            len: 0,
            many: Vec::new(),
        }
    }

    /// Appends `len` bytes at `start`.
    pub(super) fn push(&mut self, start: PhysAddr, len: u64) {
        let last = match self.many.last_mut() {
            Some(last) => Some(last),
            None => self.len.checked_sub(1).and_then(|last| self.few.get_mut(last)),
        };
        if let Some(last) = last
            && last.start.checked_add(last.len) == Some(start)
            && let Some(both) = last.len.checked_add(len)
        {
            last.len = both;
            return;
        }
        let run = PhysRun { start, len };
        if !self.many.is_empty() {
            self.many.push(run);
        } else if let Some(free) = self.few.get_mut(self.len) {
            *free = run;
            self.len += 1;
        } else {
            self.many.reserve(4 * INLINE);
            self.many.extend_from_slice(&self.few);
            self.many.push(run);
        }
    }

    /// Appends the part from `at` up to `last` of a page that covers `span` and lies at `page`.
    /// Gives the address after it, 0 at the end of the address space.
    pub(super) fn push_page(&mut self, span: Span, page: PhysAddr, at: u64, last: u64) -> u64 {
        let end = span.last().min(last);
        self.push(page.wrapping_add(at - span.start), end - at + 1);
        end.wrapping_add(1)
    }

    pub(super) fn as_slice(&self) -> &[PhysRun] {
        if self.many.is_empty() { self.few.get(..self.len).unwrap_or(&[]) } else { &self.many }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_runs_merge_and_order_is_kept_beyond_the_inline_ones() {
        let mut runs = Runs::new();
        let mut expected = Vec::new();
        for run in 0..100u64 {
            let start = PhysAddr::new(0x100_0000 - run * 0x2000);
            runs.push(start, 0x800);
            runs.push(start.wrapping_add(0x800), 0x800);
            expected.push(PhysRun { start, len: 0x1000 });
            assert_eq!(runs.as_slice(), expected);
        }
    }
}
