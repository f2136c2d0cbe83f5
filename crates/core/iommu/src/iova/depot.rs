//! Where threads exchange whole magazines of one size class.

use alloc::vec::Vec;

/// Ranges of one class, by their first byte, the last in first out. A magazine never grows
/// beyond the capacity that it was made with; one without any holds nothing.
pub(super) type Magazine = Vec<u64>;

/// Full magazines that wait for a thread. More are not kept, as they keep ranges from coalescing.
const FULL: usize = 32;

/// The magazines of one class and window that no thread has.
#[derive(Debug, Default)]
pub(super) struct Depot {
    full: Vec<Magazine>,
    empty: Vec<Magazine>,
}

impl Depot {
    /// Takes a magazine that is not empty, for the empty one `spent`.
    pub(super) fn take_full(&mut self, spent: &mut Magazine) -> bool {
        let Some(full) = self.full.pop() else {
            return false;
        };
        let spent = core::mem::replace(spent, full);
        self.keep_empty(spent);
        true
    }

    /// Takes an empty magazine for `full`, which is given back when there is no place for it.
    pub(super) fn take_empty(&mut self, full: &mut Magazine) -> Option<Magazine> {
        let empty = self.empty.pop().unwrap_or_else(|| Magazine::with_capacity(full.capacity()));
        let full = core::mem::replace(full, empty);
        if self.full.len() < FULL {
            self.full.push(full);
            return None;
        }
        Some(full)
    }

    /// Keeps the empty magazine for whoever needs one.
    pub(super) fn keep_empty(&mut self, magazine: Magazine) {
        if magazine.capacity() != 0 && self.empty.len() < FULL {
            self.empty.push(magazine);
        }
    }

    /// Takes everything out that is not empty.
    pub(super) fn take_all(&mut self) -> Vec<Magazine> {
        core::mem::take(&mut self.full)
    }
}
