//! How often each page of a chunk is pinned.

use std::collections::BTreeMap;
use std::ops::Range;

/// Pages of a block.
const BLOCK: u32 = 512;

/// Pin counts of the pages of one chunk. Pins of whole blocks are kept as one number, so that a
/// guest's memory costs hundreds of counts and not hundreds of thousands.
#[derive(Debug, Default)]
pub(crate) struct Pins {
    blocks: BTreeMap<u32, Block>,
    /// Sum of all counts.
    total: u64,
}

#[derive(Debug, Default)]
struct Block {
    /// Pins of every page of the block.
    whole: u32,
    /// Pins of single pages, besides.
    pages: Option<Box<[u32]>>,
}

impl Pins {
    /// Counts one pin more for each page.
    pub(crate) fn add(&mut self, pages: Range<u32>) {
        for (block, part) in blocks(pages) {
            let block = self.blocks.entry(block).or_default();
            self.total += u64::from(part.end - part.start);
            if part.end - part.start == BLOCK {
                block.whole = block.whole.saturating_add(1);
            } else {
                for count in block.part(part) {
                    *count = count.saturating_add(1);
                }
            }
        }
    }

    /// Counts one pin less for each page. Gives the number of pages that were not pinned at all: a
    /// caller that unpins what it did not pin.
    pub(crate) fn remove(&mut self, pages: Range<u32>) -> u32 {
        let mut missing = 0;
        for (number, part) in blocks(pages) {
            let len = part.end - part.start;
            let Some(block) = self.blocks.get_mut(&number) else {
                missing += len;
                continue;
            };
            let lacking = block.remove(part);
            missing += lacking;
            self.total = self.total.saturating_sub(u64::from(len - lacking));
            if block.is_free() {
                self.blocks.remove(&number);
            }
        }
        missing
    }

    /// How often a page is pinned.
    pub(crate) fn count(&self, page: u32) -> u32 {
        self.blocks.get(&(page / BLOCK)).map_or(0, |block| {
            let pages = block.pages.as_deref().unwrap_or(&[]);
            block.whole + pages.get((page % BLOCK) as usize).copied().unwrap_or(0)
        })
    }

    /// The sum of all counts.
    pub(crate) fn total(&self) -> u64 {
        self.total
    }
}

impl Block {
    fn part(&mut self, part: Range<u32>) -> &mut [u32] {
        let pages = self.pages.get_or_insert_with(|| vec![0; BLOCK as usize].into());
        pages.get_mut(part.start as usize..part.end as usize).unwrap_or(&mut [])
    }

    fn remove(&mut self, part: Range<u32>) -> u32 {
        if part.end - part.start == BLOCK && self.whole > 0 {
            self.whole -= 1;
            return 0;
        }
        // A pin of the whole block is undone in parts: it becomes one of each page.
        if self.whole > 0 && self.part(part.clone()).contains(&0) {
            self.whole -= 1;
            for count in self.part(0..BLOCK) {
                *count = count.saturating_add(1);
            }
        }
        let mut missing = 0;
        for count in self.part(part) {
            match count.checked_sub(1) {
                Some(less) => *count = less,
                None => missing += 1,
            }
        }
        missing
    }

    fn is_free(&self) -> bool {
        let pages = self.pages.as_deref().unwrap_or(&[]);
        self.whole == 0 && pages.iter().all(|count| *count == 0)
    }
}

/// The blocks that a range of pages touches, with the part of each, counted in it.
fn blocks(pages: Range<u32>) -> impl Iterator<Item = (u32, Range<u32>)> {
    let (start, end) = (pages.start, pages.end.max(pages.start));
    (start / BLOCK..end.div_ceil(BLOCK)).filter_map(move |block| {
        let first = block * BLOCK;
        let part = start.max(first) - first..end.min(first + BLOCK) - first;
        (!part.is_empty()).then_some((block, part))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Pins that are undone in other pieces than they were made, against a plain array.
        #[test]
        fn counts_are_those_of_a_plain_array(
            steps in prop::collection::vec((any::<bool>(), 0_u32..4, 0_u32..1400, 1_u32..1400), 1..40),
        ) {
            let mut pins = Pins::default();
            let mut plain = vec![0_u32; 4096];
            for (add, blocks, start, len) in steps {
                // Whole blocks as often as not.
                let range = if blocks > 0 { start / 512 * 512..start / 512 * 512 + blocks * 512 } else { start..start + len };
                let counts = &mut plain[range.start as usize..range.end as usize];
                if add {
                    counts.iter_mut().for_each(|count| *count += 1);
                    pins.add(range);
                } else {
                    let missing = counts.iter().filter(|count| **count == 0).count();
                    counts.iter_mut().for_each(|count| *count = count.saturating_sub(1));
                    prop_assert_eq!(pins.remove(range), u32::try_from(missing).unwrap());
                }
            }
            for (page, count) in (0..).zip(&plain) {
                prop_assert_eq!(pins.count(page), *count);
            }
            prop_assert_eq!(pins.total(), plain.iter().map(|count| u64::from(*count)).sum::<u64>());
            prop_assert_eq!(pins.total() == 0, pins.blocks.is_empty());
        }
    }
}
