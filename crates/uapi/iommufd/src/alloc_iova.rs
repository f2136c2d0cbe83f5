//! Where a mapping goes when the caller leaves it open (`iopt_alloc_iova`).

use std::ops::RangeInclusive;

use crate::mm::PAGE_SIZE;

/// The largest alignment that is looked for: the size of a transparent huge page.
const HUGE_PAGE_SIZE: u64 = 2 << 20;

/// The range that is searched when nothing restricts it: IOVA 0 is never given out.
pub(crate) const SEARCHED: RangeInclusive<u64> = PAGE_SIZE..=u64::MAX - PAGE_SIZE;

/// How an IOVA has to lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Wanted {
    /// Bytes, not 0.
    pub(crate) len: u64,
    /// A power of two.
    pub(crate) alignment: u64,
    /// Offset in the page that the IOVA shares with the memory.
    pub(crate) page_offset: u64,
}

impl Wanted {
    /// For `len` bytes, below half of the address space, of memory at `position`: aligned as the
    /// memory is, as far as the length makes that useful and large pages reach.
    pub(crate) fn new(len: u64, position: u64) -> Self {
        let natural = len.next_power_of_two();
        let alignment = match position {
            0 => natural,
            _ => natural.min(position & position.wrapping_neg()),
        };
        Self { len, alignment: alignment.min(HUGE_PAGE_SIZE), page_offset: position % PAGE_SIZE }
    }

    /// The first place in `first..=last`, if there is one.
    pub(crate) fn place(&self, first: u64, last: u64) -> Option<u64> {
        let aligned = first.checked_add(self.alignment - 1)? & !(self.alignment - 1);
        let start = aligned | self.page_offset;
        let fits = start < last && last - start >= self.len - 1;
        fits.then_some(start)
    }

    /// The first place in `first..=last` that overlaps none of `used`. Each of the two lists is
    /// ascending; they may overlap one another.
    pub(crate) fn search(
        &self,
        first: u64,
        last: u64,
        used: [&mut dyn Iterator<Item = RangeInclusive<u64>>; 2],
    ) -> Option<u64> {
        // The search begins where it would in an empty range.
        let mut at = self.place(first, last)?;
        let [left, right] = used;
        let (mut left, mut right) = (left.peekable(), right.peekable());
        loop {
            let next = match (left.peek(), right.peek()) {
                (Some(a), Some(b)) if a.start() <= b.start() => left.next(),
                (_, Some(_)) => right.next(),
                (Some(_), None) => left.next(),
                (None, None) => None,
            };
            let Some(next) = next.filter(|next| *next.start() <= last) else {
                return self.place(at, last);
            };
            if at < *next.start()
                && let Some(found) = self.place(at, *next.start() - 1)
            {
                return Some(found);
            }
            if at <= *next.end() {
                at = next.end().checked_add(1)?;
            }
            if at > last {
                return None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alignment_is_the_memorys_but_no_more_than_length_or_huge_pages_ask_for() {
        assert_eq!(Wanted::new(0x1000, 0x20_0000).alignment, 0x1000);
        assert_eq!(Wanted::new(0x3000, 0x20_0000).alignment, 0x4000);
        assert_eq!(Wanted::new(0x40_0000, 0x1000).alignment, 0x1000);
        assert_eq!(Wanted::new(1 << 30, 1 << 30).alignment, 2 << 20);
        assert_eq!(Wanted::new(0x3000, 0).alignment, 0x4000);
        assert_eq!(
            Wanted::new(0x3000, 0x1200),
            Wanted { len: 0x3000, alignment: 0x200, page_offset: 0x200 }
        );
    }

    #[test]
    fn the_lowest_hole_that_fits_is_taken() {
        let wanted = Wanted::new(0x2000, 0x2000);
        let reserved = [0x1000..=0x1fff, 0x9000..=0x9fff];
        let areas = [0x4000..=0x4fff, 0x7000..=0xafff];
        let found =
            wanted.search(0x1000, 0xffff, [&mut reserved.into_iter(), &mut areas.into_iter()]);
        assert_eq!(found, Some(0x2000));
        let reserved = [0x1000..=0x2fff, 0x9000..=0x9fff];
        let areas = [0x4000..=0x4fff, 0x7000..=0xafff];
        let found =
            wanted.search(0x1000, 0xffff, [&mut reserved.into_iter(), &mut areas.into_iter()]);
        assert_eq!(found, Some(0xc000), "0x5000..0x7000 is a hole, but not aligned");
    }

    #[test]
    fn there_may_be_no_place() {
        let none = || std::iter::empty::<RangeInclusive<u64>>();
        let search = |len, first, last| {
            Wanted::new(len, 0x1000).search(first, last, [&mut none(), &mut none()])
        };
        assert_eq!(search(0x2000, 0x1000, 0x2ffe), None);
        assert_eq!(search(0x2000, 0x1000, 0x2fff), Some(0x1000));
        assert_eq!(search(0x1000, u64::MAX - 0x100, u64::MAX), None);
        let all = Wanted::new(0x1000, 0x1000).search(
            0x1000,
            u64::MAX,
            [&mut std::iter::once(0..=u64::MAX), &mut none()],
        );
        assert_eq!(all, None);
    }
}
