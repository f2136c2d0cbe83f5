//! Ranges of IOVA that an IOAS must not use.

use std::ops::RangeInclusive;

use lychgate_iommu::GroupId;

/// Why a range is reserved; everything of one owner goes at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ReservedBy {
    /// A device reserves it: the number of its object.
    Device(u32),
    /// A page table cannot hold it: the number of its object.
    PageTable(u32),
    /// The devices of a VFIO group that is in the container will not be able to use it.
    Group(GroupId),
    /// A test wants it so.
    Selftest,
}

/// Reserved ranges, which may overlap.
#[derive(Default)]
pub(crate) struct Reserved {
    entries: Vec<(RangeInclusive<u64>, ReservedBy)>,
    /// The same addresses as ascending ranges that neither overlap nor touch.
    merged: Vec<RangeInclusive<u64>>,
}

impl Reserved {
    /// Reserves `range`.
    pub(crate) fn add(&mut self, range: RangeInclusive<u64>, by: ReservedBy) {
        self.entries.push((range, by));
        self.merge();
    }

    /// Removes whatever `by` reserves.
    pub(crate) fn remove(&mut self, by: ReservedBy) {
        self.entries.retain(|(_, owner)| *owner != by);
        self.merge();
    }

    /// Whether an address of `first..=last` is reserved.
    pub(crate) fn overlaps(&self, first: u64, last: u64) -> bool {
        self.merged.iter().any(|range| *range.start() <= last && first <= *range.end())
    }

    /// Ascending, neither overlapping nor touching.
    pub(crate) fn merged(&self) -> &[RangeInclusive<u64>] {
        &self.merged
    }

    /// The ranges that are not reserved, ascending.
    pub(crate) fn holes(&self) -> Vec<RangeInclusive<u64>> {
        let mut holes = Vec::with_capacity(self.merged.len() + 1);
        let mut from = Some(0);
        for range in &self.merged {
            if let Some(first) = from
                && first < *range.start()
            {
                holes.push(first..=*range.start() - 1);
            }
            from = range.end().checked_add(1);
        }
        if let Some(first) = from {
            holes.push(first..=u64::MAX);
        }
        holes
    }

    fn merge(&mut self) {
        self.merged = merge(self.entries.iter().map(|(range, _)| range.clone()).collect());
    }
}

/// `ranges`, ascending, with those that overlap or touch made one.
pub(crate) fn merge(mut ranges: Vec<RangeInclusive<u64>>) -> Vec<RangeInclusive<u64>> {
    ranges.sort_by_key(|range| *range.start());
    let mut merged: Vec<RangeInclusive<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if *range.start() <= last.end().saturating_add(1) => {
                *last = *last.start()..=*last.end().max(range.end());
            }
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: ReservedBy = ReservedBy::Device(1);
    const B: ReservedBy = ReservedBy::PageTable(1);

    #[test]
    fn holes_are_what_no_owner_reserves() {
        let mut reserved = Reserved::default();
        assert_eq!(reserved.holes(), [0..=u64::MAX]);
        reserved.add(0xfee0_0000..=0xfeef_ffff, A);
        reserved.add(1 << 48..=u64::MAX, B);
        reserved.add(0xfee0_8000..=0xfef0_0fff, B);
        assert_eq!(reserved.holes(), [0..=0xfedf_ffff, 0xfef0_1000..=(1 << 48) - 1]);
        reserved.remove(B);
        assert_eq!(reserved.holes(), [0..=0xfedf_ffff, 0xfef0_0000..=u64::MAX]);
        assert!(reserved.overlaps(0, 0xfee0_0000) && !reserved.overlaps(0, 0xfedf_ffff));
    }

    #[test]
    fn nothing_is_left_when_everything_is_reserved() {
        let mut reserved = Reserved::default();
        reserved.add(0..=u64::MAX - 1, A);
        reserved.add(u64::MAX..=u64::MAX, B);
        assert_eq!(reserved.merged(), [0..=u64::MAX]);
        assert!(reserved.holes().is_empty());
    }
}
