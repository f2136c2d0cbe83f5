//! What an IO address space holds, as a map of ranges.

use std::collections::BTreeMap;

use lychgate_types::Prot;

/// Consecutive bytes from one source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First IOVA.
    pub first: u64,
    /// Last IOVA.
    pub last: u64,
    /// Which source.
    pub source: Source,
    /// The source's byte at `first`.
    pub offset: u64,
    /// What devices may do with it.
    pub prot: Prot,
}

/// Where pages come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The client's address space; offsets are virtual addresses.
    Memory,
    /// The client's file with this descriptor.
    File(i32),
}

/// Disjoint ranges of IOVA. How they were cut into areas is not kept.
#[derive(Clone, Debug, Default)]
pub struct Content(BTreeMap<u64, Piece>);

impl Content {
    /// The pieces, ascending.
    pub fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.0.values()
    }

    /// Adds a piece where nothing is.
    pub fn insert(&mut self, piece: Piece) {
        assert!(piece.first <= piece.last);
        assert_eq!(self.within(piece.first, piece.last), [], "{piece:x?} is mapped over this");
        self.0.insert(piece.first, piece);
    }

    /// Removes a range of which every byte is there.
    pub fn remove(&mut self, first: u64, last: u64) {
        let mut at = Some(first);
        for piece in self.within(first, last) {
            assert_eq!(Some(piece.first), at, "a hole in what was unmapped");
            at = piece.last.checked_add(1);
        }
        assert_eq!(at, last.checked_add(1), "more was unmapped than was there");
        self.cut(first);
        if let Some(behind) = last.checked_add(1) {
            self.cut(behind);
        }
        self.0.retain(|_, piece| piece.first < first || piece.first > last);
    }

    /// The parts of pieces in `first..=last`, ascending.
    pub fn within(&self, first: u64, last: u64) -> Vec<Piece> {
        let overlapping =
            self.0.values().filter(|piece| piece.first <= last && first <= piece.last);
        overlapping
            .map(|piece| {
                let start = piece.first.max(first);
                Piece {
                    first: start,
                    last: piece.last.min(last),
                    offset: piece.offset.wrapping_add(start - piece.first),
                    ..*piece
                }
            })
            .collect()
    }

    /// Bytes in `first..=last` that are mapped.
    pub fn bytes(&self, first: u64, last: u64) -> u64 {
        self.within(first, last).iter().map(|piece| piece.last - piece.first + 1).sum()
    }

    /// Makes `at` the first byte of its piece.
    fn cut(&mut self, at: u64) {
        let Some((_, piece)) = self.0.range_mut(..at).next_back() else {
            return;
        };
        if piece.last < at {
            return;
        }
        let offset = piece.offset.wrapping_add(at - piece.first);
        let right = Piece { first: at, offset, ..*piece };
        piece.last = at - 1;
        self.0.insert(at, right);
    }
}
