use alloc::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Balanced, in order, apart, and each node right about what is below it. Gives height and best.
fn check(tree: &FreeRanges, at: u32, seen: &mut Vec<(u64, u64)>) -> (u8, u8) {
    if at == 0 {
        return (0, 0);
    }
    let node = *tree.node(at);
    let left = check(tree, node.left, seen);
    if let Some(before) = seen.last() {
        assert!(before.1 + 1 < node.first, "ranges touch or are out of order");
    }
    seen.push((node.first, node.last));
    let right = check(tree, node.right, seen);
    assert!(left.0.abs_diff(right.0) <= 1);
    let expected = (1 + left.0.max(right.0), node.block.max(left.1).max(right.1));
    assert_eq!((node.height, node.best), expected);
    expected
}

fn ranges(tree: &FreeRanges) -> Vec<(u64, u64)> {
    let mut seen = Vec::new();
    check(tree, tree.root, &mut seen);
    assert_eq!(tree.all(), seen);
    seen
}

/// The plain model: which units are free.
#[derive(Clone)]
struct Units(Vec<bool>);

const FIRST: u64 = 1;
const LAST: u64 = 400;

fn index(unit: u64) -> usize {
    usize::try_from(unit).unwrap()
}

impl Units {
    fn free(&self, first: u64, last: u64) -> bool {
        (first..=last).all(|unit| self.0[index(unit)])
    }

    fn set(&mut self, first: u64, last: u64, free: bool) {
        (first..=last).for_each(|unit| self.0[index(unit)] = free);
    }

    fn highest(&self, want: &Want) -> Option<u64> {
        (FIRST..=LAST).rev().filter(|start| start % want.align == 0).find(|start| {
            let last = start + want.bytes - 1;
            last <= want.limit.min(LAST) && self.free(*start, last)
        })
    }

    fn ranges(&self) -> Vec<(u64, u64)> {
        let mut all: Vec<(u64, u64)> = Vec::new();
        for unit in (FIRST..=LAST).filter(|unit| self.0[index(*unit)]) {
            match all.last_mut() {
                Some(range) if range.1 + 1 == unit => range.1 = unit,
                _ => all.push((unit, unit)),
            }
        }
        all
    }
}

#[derive(Clone, Debug)]
enum Op {
    Take { bytes: u64, limit: u64, count: u64, floor: u64 },
    TakeRange(u64, u64),
    Put(u64, u64),
}

fn op() -> impl Strategy<Value = Op> {
    let span = || (FIRST..=LAST, 0..40_u64).prop_map(|(at, len)| (at, (at + len).min(LAST)));
    prop_oneof![
        4 => (1..40_u64, 0..=LAST + 50, 1..6_u64, 0..LAST).prop_map(|(bytes, limit, count, floor)| {
            Op::Take { bytes, limit, count, floor }
        }),
        1 => span().prop_map(|(first, last)| Op::TakeRange(first, last)),
        4 => span().prop_map(|(first, last)| Op::Put(first, last)),
    ]
}

proptest! {
    #[test]
    fn it_does_what_a_list_of_units_does(ops in prop::collection::vec(op(), 1..200)) {
        let mut tree = FreeRanges::new();
        let mut units = Units(vec![false; index(LAST + 1)]);
        for op in ops {
            match op {
                Op::Take { bytes, limit, count, floor } => {
                    let want = Want { bytes, align: bytes.next_power_of_two(), limit };
                    let count = if bytes == want.align { count } else { 1 };
                    let taken = tree.take(&want, count, floor);
                    // One piece after the other gives the same, as long as they follow each other.
                    let mut expected: Option<(u64, u64)> = None;
                    while let Some(start) = units.highest(&want) {
                        match &mut expected {
                            None => expected = Some((start, 1)),
                            Some((lowest, n)) if *n < count && start >= floor
                                && start + want.align == *lowest => (*lowest, *n) = (start, *n + 1),
                            Some(_) => break,
                        }
                        units.set(start, start + bytes - 1, false);
                        if count == 1 {
                            break;
                        }
                    }
                    prop_assert_eq!(taken, expected);
                }
                Op::TakeRange(first, last) => {
                    let free = units.free(first, last);
                    prop_assert_eq!(tree.contains(first, last), free);
                    prop_assert_eq!(tree.take_range(first, last), free);
                    if free {
                        units.set(first, last, false);
                    }
                }
                Op::Put(first, last) => {
                    let taken = (first..=last).all(|unit| !units.0[index(unit)]);
                    prop_assert_eq!(tree.put(first, last), taken);
                    if taken {
                        units.set(first, last, true);
                    }
                }
            }
            prop_assert_eq!(ranges(&tree), units.ranges());
        }
    }

    #[test]
    fn the_largest_block_of_a_range_is_known(first in 1..5000_u64, len in 0..3000_u64) {
        let holds = |log2: u32| {
            let start = first.next_multiple_of(1 << log2);
            start + (1 << log2) - 1 <= first + len
        };
        let expected = (0..13).rev().find(|log2| holds(*log2)).unwrap();
        prop_assert_eq!(u32::from(largest_block(first, first + len)), expected + 1);
    }
}

#[test]
fn the_whole_of_64_bits_but_0_is_a_range_like_any_other() {
    let mut tree = FreeRanges::new();
    assert!(tree.put(1, u64::MAX));
    let top = Want { bytes: 1 << 63, align: 1 << 63, limit: u64::MAX };
    assert_eq!(tree.take(&top, 1, 0), Some((1 << 63, 1)));
    assert_eq!(tree.take(&top, 1, 0), None);
    assert_eq!(ranges(&tree), [(1, (1 << 63) - 1)]);
    assert!(tree.put(1 << 63, u64::MAX));
    assert!(!tree.put(u64::MAX, u64::MAX));
    assert_eq!(ranges(&tree), [(1, u64::MAX)]);
}

#[test]
fn nodes_are_used_again() {
    let mut tree = FreeRanges::new();
    let mut expected = BTreeMap::new();
    for round in 0..50 {
        for n in 0..100 {
            assert!(tree.put(1 + n * 10, 2 + n * 10 + round % 3));
            expected.insert(1 + n * 10, 2 + n * 10 + round % 3);
        }
        assert_eq!(ranges(&tree), expected.clone().into_iter().collect::<Vec<_>>());
        while let Some((first, last)) = expected.pop_last() {
            assert!(tree.take_range(first, last));
        }
        assert_eq!(ranges(&tree), []);
    }
    assert_eq!(tree.nodes.len(), 101);
}
