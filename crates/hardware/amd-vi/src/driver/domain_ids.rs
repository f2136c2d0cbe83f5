//! DomainIDs: the tags of cached translations (AMD 48882 2.2.2 Table 7, DomainID).

use alloc::vec::Vec;

/// The DomainID of the identity domain. 0 is left alone: it is what an entry that translates
/// nothing holds.
pub(super) const IDENTITY: u16 = 1;

const FIRST: u16 = 2;

/// Which of the 16-bit ids are free.
pub(super) struct DomainIds {
    /// Ids from here up were never used.
    next: Option<u16>,
    returned: Vec<u16>,
}

impl DomainIds {
    pub(super) const fn new() -> Self {
        Self { next: Some(FIRST), returned: Vec::new() }
    }

    /// An id that no cache of the IOMMU holds.
    pub(super) fn take(&mut self) -> Option<u16> {
        if let Some(id) = self.next {
            self.next = id.checked_add(1);
            return Some(id);
        }
        self.returned.pop()
    }

    /// Gives an id back. The caller has proof that no device table entry carries it and that every
    /// translation tagged with it was invalidated since the last that did.
    pub(super) fn give_back(&mut self, id: u16) {
        self.returned.push(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_run_out_and_come_back() {
        let mut ids = DomainIds::new();
        for expected in FIRST..=u16::MAX {
            assert_eq!(ids.take(), Some(expected));
        }
        assert_eq!(ids.take(), None);
        ids.give_back(77);
        assert_eq!(ids.take(), Some(77));
        assert_eq!(ids.take(), None);
    }
}
