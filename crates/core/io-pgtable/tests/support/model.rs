//! What a page table should hold, as plainly as possible: an ordered map of leaves.

use std::collections::BTreeMap;

use lychgate_types::Prot;

/// One leaf.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Leaf {
    pub size: u64,
    pub phys: u64,
    pub prot: Prot,
}

/// Leaves by their first IOVA.
#[derive(Clone, Debug, Default)]
pub(crate) struct Model {
    pub leaves: BTreeMap<u64, Leaf>,
}

/// What ends an unmap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum End {
    Complete,
    Hole,
    Leaf { start: u64, size: u64 },
}

impl Model {
    /// The leaf that holds `iova`.
    pub(crate) fn at(&self, iova: u64) -> Option<(u64, Leaf)> {
        let (&start, &leaf) = self.leaves.range(..=iova).next_back()?;
        (iova - start < leaf.size).then_some((start, leaf))
    }

    /// The first IOVA of the range that is mapped.
    pub(crate) fn first_mapped(&self, iova: u64, len: u64) -> Option<u64> {
        if self.at(iova).is_some() {
            return Some(iova);
        }
        let next = self.leaves.range(iova..).next();
        next.map(|(&start, _)| start).filter(|start| start - iova < len)
    }

    /// Maps runs over a range that is free, with the largest of `sizes` at each point.
    pub(crate) fn map(&mut self, iova: u64, runs: &[(u64, u64)], prot: Prot, sizes: u64) {
        let mut merged: Vec<(u64, u64)> = Vec::new();
        for &(phys, len) in runs {
            match merged.last_mut() {
                Some(last) if last.0 + last.1 == phys => last.1 += len,
                _ => merged.push((phys, len)),
            }
        }
        let mut at = iova;
        for (mut phys, mut len) in merged {
            while len != 0 {
                let size = (0..63)
                    .rev()
                    .map(|bit| 1u64 << bit)
                    .find(|size| sizes & size != 0 && *size <= len && (at | phys) & (size - 1) == 0)
                    .expect("runs are multiples of the granule");
                self.leaves.insert(at, Leaf { size, phys, prot });
                (at, phys, len) = (at + size, phys + size, len - size);
            }
        }
    }

    /// Unmaps up to a hole or a leaf that is only partly in the range.
    pub(crate) fn unmap(&mut self, iova: u64, len: u64) -> (u64, End) {
        let mut done = 0;
        while done < len {
            let Some((start, leaf)) = self.at(iova + done) else {
                return (done, End::Hole);
            };
            if start != iova + done || leaf.size > len - done {
                let size = leaf.size;
                return (done, End::Leaf { start, size });
            }
            self.leaves.remove(&start);
            done += leaf.size;
        }
        (done, End::Complete)
    }
}
