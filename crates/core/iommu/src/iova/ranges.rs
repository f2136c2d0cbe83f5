//! The free ranges of a space, by address, so that the highest one that fits is found in
//! logarithmic time however fragmented the space is.

use alloc::vec;
use alloc::vec::Vec;

/// What an allocation asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Want {
    /// Length, not 0.
    pub(super) bytes: u64,
    /// The start is a multiple of it: a power of two, not below `bytes`, below twice of it.
    pub(super) align: u64,
    /// The highest last byte.
    pub(super) limit: u64,
}

/// A balanced (AVL) tree of ranges that neither overlap nor touch, in an arena of nodes.
///
/// Each node knows the largest block, a power of two that is aligned to itself, that any range
/// below it holds. A request of such a block needs no other look at a range that cannot hold it,
/// where a tree that knows lengths alone has to try each range that is long enough and lies badly.
#[derive(Debug)]
pub(super) struct FreeRanges {
    /// Node 0 is nobody: no height, no block.
    nodes: Vec<Node>,
    root: u32,
    /// Unused nodes, chained through `left`.
    unused: u32,
}

#[derive(Clone, Copy, Debug, Default)]
struct Node {
    first: u64,
    last: u64,
    left: u32,
    right: u32,
    height: u8,
    /// The largest block in the range itself: 1 + log2 of its bytes.
    block: u8,
    /// The largest block below and here.
    best: u8,
}

impl FreeRanges {
    /// No range is free.
    pub(super) fn new() -> Self {
        Self { nodes: vec![Node::default()], root: 0, unused: 0 }
    }

    /// Takes up to `count` (not 0) neighbouring pieces as `want` asks, the highest first fit, and then
    /// downwards while they follow each other and none begins below `floor`. Gives the first
    /// byte of the lowest one and how many there are.
    ///
    /// With more than one, `want.bytes` is `want.align`. The first piece may lie below `floor`.
    pub(super) fn take(&mut self, want: &Want, count: u64, floor: u64) -> Option<(u64, u64)> {
        let least = if want.bytes == want.align { 1 } else { 0 } + want.align.trailing_zeros();
        let (at, highest) = self.highest(self.root, want, least)?;
        let Node { first, last, .. } = *self.node(at);
        let below = highest.saturating_sub(first.max(floor)) / want.align;
        let count = count.min(below + 1);
        let lowest = highest - (count - 1) * want.align;
        self.cut(first, last, lowest, highest + (want.bytes - 1));
        Some((lowest, count))
    }

    /// Takes exactly `first..=last` if all of it is free.
    pub(super) fn take_range(&mut self, first: u64, last: u64) -> bool {
        let Some(free) = self.at_or_below(first).filter(|free| free.1 >= last) else {
            return false;
        };
        self.cut(free.0, free.1, first, last);
        true
    }

    /// Whether all of `first..=last` is free.
    pub(super) fn contains(&self, first: u64, last: u64) -> bool {
        self.at_or_below(first).is_some_and(|free| free.1 >= last)
    }

    /// Makes `first..=last` free, as one with what touches it. `false`, and nothing has
    /// changed, when a part is free already.
    pub(super) fn put(&mut self, first: u64, last: u64) -> bool {
        let before = self.at_or_below(first);
        let after = self.above(first);
        if before.is_some_and(|before| before.1 >= first)
            || after.is_some_and(|after| after.0 <= last)
        {
            return false;
        }
        let before = before.filter(|before| before.1.checked_add(1) == Some(first));
        let after = after.filter(|after| last.checked_add(1) == Some(after.0));
        match (before, after) {
            (None, None) => self.root = self.insert(self.root, first, last),
            (Some(before), None) => self.resize(self.root, before.0, before.0, last),
            (None, Some(after)) => self.resize(self.root, after.0, first, after.1),
            (Some(before), Some(after)) => {
                self.root = self.remove(self.root, after.0);
                self.resize(self.root, before.0, before.0, after.1);
            }
        }
        true
    }

    /// All ranges, upwards.
    pub(super) fn all(&self) -> Vec<(u64, u64)> {
        let mut all = Vec::new();
        let mut next = self.above_or_at(0);
        while let Some(range) = next {
            all.push(range);
            next = self.above(range.0);
        }
        all
    }

    /// The highest place for `want` below `at`: the node and the first byte. A range whose `best` is
    /// below `least` cannot hold it.
    fn highest(&self, at: u32, want: &Want, least: u32) -> Option<(u32, u64)> {
        let mut at = at;
        loop {
            let node = self.node(at);
            if at == 0 || u32::from(node.best) < least {
                return None;
            }
            if node.first <= want.limit {
                let here = || node.highest(want).map(|start| (at, start));
                let found = self.highest(node.right, want, least).or_else(here);
                if found.is_some() {
                    return found;
                }
            }
            at = node.left;
        }
    }

    /// Takes `from..=to` out of the range `first..=last`.
    fn cut(&mut self, first: u64, last: u64, from: u64, to: u64) {
        match (from == first, to == last) {
            (true, true) => self.root = self.remove(self.root, first),
            (true, false) => self.resize(self.root, first, to + 1, last),
            (false, true) => self.resize(self.root, first, first, from - 1),
            (false, false) => {
                self.resize(self.root, first, first, from - 1);
                self.root = self.insert(self.root, to + 1, last);
            }
        }
    }

    /// The range that begins last, at `key` or below.
    fn at_or_below(&self, key: u64) -> Option<(u64, u64)> {
        let (mut at, mut found) = (self.root, None);
        while at != 0 {
            let node = self.node(at);
            if node.first <= key {
                found = Some((node.first, node.last));
                at = node.right;
            } else {
                at = node.left;
            }
        }
        found
    }

    /// The range that begins first, at `key` or above.
    fn above_or_at(&self, key: u64) -> Option<(u64, u64)> {
        let (mut at, mut found) = (self.root, None);
        while at != 0 {
            let node = self.node(at);
            if node.first >= key {
                found = Some((node.first, node.last));
                at = node.left;
            } else {
                at = node.right;
            }
        }
        found
    }

    /// The range that begins first above `key`.
    fn above(&self, key: u64) -> Option<(u64, u64)> {
        self.above_or_at(key.checked_add(1)?)
    }

    /// Inserts a range that begins nowhere below `at` yet; gives the new top.
    fn insert(&mut self, at: u32, first: u64, last: u64) -> u32 {
        if at == 0 {
            return self.new_node(first, last);
        }
        if first < self.node(at).first {
            let left = self.insert(self.node(at).left, first, last);
            self.node_mut(at).left = left;
        } else {
            let right = self.insert(self.node(at).right, first, last);
            self.node_mut(at).right = right;
        }
        self.balance(at)
    }

    /// Removes the range that begins at `first`; gives the new top.
    fn remove(&mut self, at: u32, first: u64) -> u32 {
        if at == 0 {
            return 0;
        }
        let Node { left, right, first: here, .. } = *self.node(at);
        if first < here {
            self.node_mut(at).left = self.remove(left, first);
        } else if first > here {
            self.node_mut(at).right = self.remove(right, first);
        } else {
            if left == 0 || right == 0 {
                self.node_mut(at).left = self.unused;
                self.unused = at;
                return left | right;
            }
            // The next range moves here.
            let mut next = right;
            while self.node(next).left != 0 {
                next = self.node(next).left;
            }
            let Node { first: next_first, last: next_last, block, .. } = *self.node(next);
            let right = self.remove(right, next_first);
            let node = self.node_mut(at);
            (node.first, node.last, node.block) = (next_first, next_last, block);
            node.right = right;
        }
        self.balance(at)
    }

    /// Turns the range that begins at `key` into `first..=last`, which keeps its place in the order.
    fn resize(&mut self, at: u32, key: u64, first: u64, last: u64) {
        if at == 0 {
            return;
        }
        let Node { left, right, first: here, .. } = *self.node(at);
        if key < here {
            self.resize(left, key, first, last);
        } else if key > here {
            self.resize(right, key, first, last);
        } else {
            let node = self.node_mut(at);
            (node.first, node.last, node.block) = (first, last, largest_block(first, last));
        }
        self.update(at);
    }

    /// Makes heights below `at` differ by one at most, where they differ by two at most; gives the
    /// new top.
    fn balance(&mut self, at: u32) -> u32 {
        let Node { left, right, .. } = *self.node(at);
        if self.height(left) > self.height(right) + 1 {
            let Node { left: outer, right: inner, .. } = *self.node(left);
            if self.height(inner) > self.height(outer) {
                self.node_mut(at).left = self.rotate_left(left);
            }
            return self.rotate_right(at);
        }
        if self.height(right) > self.height(left) + 1 {
            let Node { left: inner, right: outer, .. } = *self.node(right);
            if self.height(inner) > self.height(outer) {
                self.node_mut(at).right = self.rotate_right(right);
            }
            return self.rotate_left(at);
        }
        self.update(at);
        at
    }

    fn rotate_left(&mut self, at: u32) -> u32 {
        let top = self.node(at).right;
        self.node_mut(at).right = self.node(top).left;
        self.update(at);
        self.node_mut(top).left = at;
        self.update(top);
        top
    }

    fn rotate_right(&mut self, at: u32) -> u32 {
        let top = self.node(at).left;
        self.node_mut(at).left = self.node(top).right;
        self.update(at);
        self.node_mut(top).right = at;
        self.update(top);
        top
    }

    /// Computes what a node knows of those below it.
    fn update(&mut self, at: u32) {
        let node = self.node(at);
        let (left, right) = (self.node(node.left), self.node(node.right));
        let height = 1 + left.height.max(right.height);
        let best = node.block.max(left.best).max(right.best);
        let node = self.node_mut(at);
        (node.height, node.best) = (height, best);
    }

    fn new_node(&mut self, first: u64, last: u64) -> u32 {
        let block = largest_block(first, last);
        let node = Node { first, last, left: 0, right: 0, height: 1, block, best: block };
        if self.unused == 0 {
            self.nodes.push(node);
            // 2^32 nodes would be 160 GiB of them.
            return u32::try_from(self.nodes.len() - 1).unwrap_or(0);
        }
        let at = self.unused;
        self.unused = self.node(at).left;
        *self.node_mut(at) = node;
        at
    }

    fn height(&self, at: u32) -> u8 {
        self.node(at).height
    }

    fn node(&self, at: u32) -> &Node {
        &self.nodes[at as usize]
    }

    fn node_mut(&mut self, at: u32) -> &mut Node {
        &mut self.nodes[at as usize]
    }
}

impl Node {
    /// The highest start for `want` in the range.
    fn highest(&self, want: &Want) -> Option<u64> {
        let last = self.last.min(want.limit);
        let start = last.checked_sub(want.bytes - 1)? & !(want.align - 1);
        (start >= self.first).then_some(start)
    }
}

/// 1 + log2 of the largest power of two that has a multiple of itself in `first..=last` from which
/// as many bytes follow. `first` is not 0.
fn largest_block(first: u64, last: u64) -> u8 {
    let log2 = (last - first + 1).ilog2();
    let start = ((first - 1) >> log2).wrapping_add(1).checked_shl(log2);
    let fits = start.is_some_and(|start| start >= first && last - log2_mask(log2) >= start);
    // A range of at least 2^n bytes holds a block of 2^(n - 1), wherever it lies.
    let log2 = if fits { log2 } else { log2 - 1 };
    u8::try_from(log2 + 1).unwrap_or(0)
}

const fn log2_mask(log2: u32) -> u64 {
    (1 << log2) - 1
}

#[cfg(test)]
mod tests;
