//! Merging of reserved regions (Linux, `iommu_insert_resv_region`).

use alloc::vec::Vec;

use crate::driver::ReservedRegion;

/// Sorts regions by their first byte, and merges those of one kind that overlap or touch. A merged
/// region allows what any of its parts allows.
pub(crate) fn merge(mut regions: Vec<ReservedRegion>) -> Vec<ReservedRegion> {
    regions.sort_by_key(|region| (region.first, region.kind));
    let mut merged: Vec<ReservedRegion> = Vec::with_capacity(regions.len());
    for region in regions {
        let before = merged.iter_mut().rev().find(|other| other.kind == region.kind);
        match before {
            Some(before) if joins(before, &region) => {
                before.last = before.last.max(region.last);
                before.prot |= region.prot;
            }
            _ => merged.push(region),
        }
    }
    merged
}

/// Whether `after`, which does not start before `before`, overlaps it or follows it at once.
fn joins(before: &ReservedRegion, after: &ReservedRegion) -> bool {
    match before.last.checked_add(1) {
        Some(next) => after.first <= next,
        None => true,
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use lychgate_types::{Iova, Prot};

    use super::*;
    use crate::driver::ReservedKind;

    fn region(first: u64, last: u64, kind: ReservedKind) -> ReservedRegion {
        ReservedRegion { first: Iova::new(first), last: Iova::new(last), prot: Prot::READ, kind }
    }

    #[test]
    fn regions_of_one_kind_that_overlap_or_touch_become_one() {
        let merged = merge(vec![
            region(0x3000, 0x3fff, ReservedKind::Msi),
            region(0x1000, 0x1fff, ReservedKind::Msi),
            region(0x1800, 0x2fff, ReservedKind::Msi),
            region(0x5000, 0x5fff, ReservedKind::Msi),
        ]);
        assert_eq!(
            merged,
            [region(0x1000, 0x3fff, ReservedKind::Msi), region(0x5000, 0x5fff, ReservedKind::Msi),]
        );
    }

    #[test]
    fn regions_of_different_kinds_stay_apart_and_are_sorted_by_start_then_kind() {
        let merged = merge(vec![
            region(0x1000, 0x4fff, ReservedKind::Msi),
            region(0x2000, 0x2fff, ReservedKind::Direct),
            region(0x1000, 0x1fff, ReservedKind::Direct),
        ]);
        assert_eq!(
            merged,
            [
                region(0x1000, 0x2fff, ReservedKind::Direct),
                region(0x1000, 0x4fff, ReservedKind::Msi),
            ]
        );
    }

    #[test]
    fn a_region_may_end_at_the_last_address() {
        let top = region(0xffff_0000, u64::MAX, ReservedKind::Reserved);
        let inside = region(0xffff_ffff, 0xffff_ffff_0000, ReservedKind::Reserved);
        assert_eq!(merge(vec![inside, top]), [top]);
    }
}
