//! Which blocks to invalidate for a range.

use crate::spec::size::Block;

/// One or two blocks that hold `first..=last`: a command names a naturally aligned power of two
/// (AMD 48882 2.4.3).
///
/// A range that one block would hold only because it crosses a boundary of a large power of two is
/// cut there: each half is then at most doubled, while the one block could be the whole space.
pub(super) fn covering(first: u64, last: u64) -> (Block, Option<Block>) {
    let whole = Block::covering(first, last);
    if whole.start == first && whole.last() == last {
        return (whole, None);
    }
    // The upper half of the block that holds both begins between them.
    let middle = whole.last() - (whole.last() - whole.start) / 2;
    if first >= middle || last < middle {
        return (whole, None);
    }
    let low = Block::covering(first, middle - 1);
    let high = Block::covering(middle, last);
    if low.order + 1 == whole.order && high.order + 1 == whole.order {
        return (whole, None);
    }
    (low, Some(high))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_aligned_power_of_two_is_one_block() {
        let one = Block { start: 0x1000, order: 12 };
        assert_eq!(covering(0x1000, 0x1fff), (one, None));
        assert_eq!(covering(0, u64::MAX), (Block::ALL, None));
    }

    #[test]
    fn two_pages_across_a_large_boundary_are_two_blocks() {
        let block = |start| Block { start, order: 12 };
        assert_eq!(
            covering((1 << 40) - 0x1000, (1 << 40) + 0xfff),
            (block((1 << 40) - 0x1000), Some(block(1 << 40)))
        );
    }

    proptest! {
        #[test]
        fn the_blocks_hold_the_range_and_less_than_twice_as_much(
            first in 0..u64::MAX >> 13,
            pages in 1..1_u64 << 20,
        ) {
            let (first, last) = (first << 12, (first + pages) * 4096 - 1);
            let (low, high) = covering(first, last);
            let size = |block: Block| u128::from(block.last() - block.start) + 1;
            prop_assert!(low.start <= first);
            let end = match high {
                Some(high) => {
                    prop_assert_eq!(low.last() + 1, high.start);
                    high.last()
                }
                None => low.last(),
            };
            prop_assert!(end >= last);
            let total = size(low) + high.map_or(0, size);
            prop_assert!(total < 2 * (u128::from(last - first) + 1));
        }
    }
}
