//! Where entries are: in sets of ways, or in maps that only grow.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash};

use super::Span;
use super::hash::Fast;

/// The entries of a cache.
#[derive(Debug)]
pub(super) enum Store<T, V> {
    Sets(Sets<T, V>),
    Forever(Forever<T, V>),
}

impl<T: Copy + Eq + Hash, V: Copy> Store<T, V> {
    pub(super) fn lookup(&self, tag: T, at: u64) -> Option<(Span, V)> {
        match self {
            Self::Sets(sets) => sets.lookup(tag, at),
            Self::Forever(maps) => maps.lookup(tag, at),
        }
    }

    pub(super) fn insert(&mut self, tag: T, span: Span, value: V) {
        match self {
            Self::Sets(sets) => sets.insert(tag, span, value),
            Self::Forever(maps) => maps.insert(tag, span, value),
        }
    }

    pub(super) fn remove(&mut self, tag: T, span: Span) {
        match self {
            Self::Sets(sets) => sets.remove(tag, span),
            Self::Forever(maps) => maps.remove(tag, span),
        }
    }

    pub(super) fn invalidate(&mut self, tag: T, first: u64, last: u64) {
        match self {
            Self::Sets(sets) => sets.invalidate(tag, first, last),
            Self::Forever(maps) => maps.invalidate(tag, first, last),
        }
    }

    pub(super) fn retain(&mut self, keep: impl FnMut(T, Span, &V) -> bool) {
        match self {
            Self::Sets(sets) => sets.retain(keep),
            Self::Forever(maps) => maps.retain(keep),
        }
    }

    pub(super) fn clear(&mut self) {
        match self {
            Self::Sets(sets) => sets.retain(|_, _, _| false),
            Self::Forever(maps) => {
                maps.spaces.clear();
                maps.len = 0;
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Sets(sets) => sets.orders.len,
            Self::Forever(maps) => maps.len(),
        }
    }
}

/// Which orders occur, so that a lookup probes no other.
#[derive(Debug)]
struct Orders {
    count: Box<[usize; 65]>,
    present: u128,
    len: usize,
}

impl Orders {
    fn new() -> Self {
        Self { count: Box::new([0; 65]), present: 0, len: 0 }
    }

    fn add(&mut self, order: u8) {
        if let Some(count) = self.count.get_mut(usize::from(order)) {
            *count += 1;
            self.len += 1;
            self.present |= 1 << order;
        }
    }

    fn remove(&mut self, order: u8) {
        if let Some(count) = self.count.get_mut(usize::from(order)) {
            *count = count.saturating_sub(1);
            self.len = self.len.saturating_sub(1);
            if *count == 0 {
                self.present &= !(1 << order);
            }
        }
    }

    /// The orders that occur, smallest first.
    fn iter(&self) -> impl Iterator<Item = u8> + use<> {
        let mut rest = self.present;
        std::iter::from_fn(move || {
            let order = u8::try_from(rest.trailing_zeros()).ok().filter(|&o| o <= 64)?;
            rest &= rest - 1;
            Some(order)
        })
    }
}

/// The spans of one order that meet `first..=last`, if they are at most `limit`.
fn spans(order: u8, first: u64, last: u64, limit: usize) -> Option<impl Iterator<Item = Span>> {
    let shift = u32::from(order);
    let low = first.checked_shr(shift).unwrap_or(0);
    let high = last.checked_shr(shift).unwrap_or(0);
    let few = high.checked_sub(low)? < limit as u64;
    few.then(|| {
        (low..=high).map(move |index| Span { start: index.checked_shl(shift).unwrap_or(0), order })
    })
}

const WAYS: usize = 4;

type Set<T, V> = [Option<Slot<T, V>>; WAYS];

/// A set-associative cache.
#[derive(Debug)]
pub(super) struct Sets<T, V> {
    sets: Box<[Set<T, V>]>,
    victim: usize,
    orders: Orders,
}

#[derive(Clone, Copy, Debug)]
struct Slot<T, V> {
    tag: T,
    span: Span,
    value: V,
}

impl<T: Copy + Eq + Hash, V: Copy> Sets<T, V> {
    pub(super) fn new(entries: usize) -> Self {
        let sets = entries.clamp(1, 1 << 24).div_ceil(WAYS).next_power_of_two();
        Self { sets: vec![[None; WAYS]; sets].into_boxed_slice(), victim: 0, orders: Orders::new() }
    }

    fn lookup(&self, tag: T, at: u64) -> Option<(Span, V)> {
        self.orders.iter().find_map(|order| {
            let span = Span::around(at, order);
            let set = self.sets.get(self.set_of(tag, span))?;
            let hit = set.iter().flatten().find(|slot| slot.span == span && slot.tag == tag)?;
            Some((span, hit.value))
        })
    }

    fn insert(&mut self, tag: T, span: Span, value: V) {
        let index = self.set_of(tag, span);
        let Some(set) = self.sets.get_mut(index) else {
            return;
        };
        let same = |slot: &Option<Slot<T, V>>| {
            slot.as_ref().is_some_and(|slot| slot.span == span && slot.tag == tag)
        };
        let way = set
            .iter()
            .position(same)
            .or_else(|| set.iter().position(Option::is_none))
            .unwrap_or_else(|| {
                self.victim = (self.victim + 1) % WAYS;
                self.victim
            });
        let before = set[way].replace(Slot { tag, span, value });
        if let Some(before) = before {
            self.orders.remove(before.span.order);
        }
        self.orders.add(span.order);
    }

    fn remove(&mut self, tag: T, span: Span) {
        let index = self.set_of(tag, span);
        for way in self.sets.get_mut(index).into_iter().flatten() {
            if way.is_some_and(|slot| slot.span == span && slot.tag == tag) {
                *way = None;
                self.orders.remove(span.order);
            }
        }
    }

    fn invalidate(&mut self, tag: T, first: u64, last: u64) {
        let mut scan = false;
        for order in self.orders.iter() {
            match spans(order, first, last, self.sets.len()) {
                Some(spans) => spans.for_each(|span| self.remove(tag, span)),
                None => scan = true,
            }
        }
        if scan {
            self.retain(|t, span, _| t != tag || !span.intersects(first, last));
        }
    }

    fn retain(&mut self, mut keep: impl FnMut(T, Span, &V) -> bool) {
        if self.orders.len == 0 {
            return;
        }
        for way in self.sets.iter_mut().flatten() {
            if let Some(slot) = way
                && !keep(slot.tag, slot.span, &slot.value)
            {
                self.orders.remove(slot.span.order);
                *way = None;
            }
        }
    }

    fn set_of(&self, tag: T, span: Span) -> usize {
        let hash = Fast::default().hash_one((tag, span));
        // The number of sets is a power of two that fits a `usize`.
        usize::try_from(hash & (self.sets.len() as u64 - 1)).unwrap_or(0)
    }
}

/// A cache that never chooses to forget, up to a bound: a map for each tag, so that emptying a tag
/// costs what it held.
#[derive(Debug)]
pub(super) struct Forever<T, V> {
    spaces: HashMap<T, Space<V>, Fast>,
    len: usize,
    bound: usize,
}

#[derive(Debug)]
struct Space<V> {
    entries: HashMap<Span, V, Fast>,
    orders: Orders,
}

impl<T: Copy + Eq + Hash, V: Copy> Forever<T, V> {
    pub(super) fn new(bound: usize) -> Self {
        Self { spaces: HashMap::default(), len: 0, bound }
    }

    fn lookup(&self, tag: T, at: u64) -> Option<(Span, V)> {
        let space = self.spaces.get(&tag)?;
        space.orders.iter().find_map(|order| {
            let span = Span::around(at, order);
            Some((span, *space.entries.get(&span)?))
        })
    }

    fn insert(&mut self, tag: T, span: Span, value: V) {
        if self.len >= self.bound {
            let mut odd = false;
            self.retain(|_, _, _| {
                odd = !odd;
                odd
            });
        }
        let space = self
            .spaces
            .entry(tag)
            .or_insert_with(|| Space { entries: HashMap::default(), orders: Orders::new() });
        if space.entries.insert(span, value).is_none() {
            space.orders.add(span.order);
            self.len += 1;
        }
    }

    fn remove(&mut self, tag: T, span: Span) {
        if let Some(space) = self.spaces.get_mut(&tag) {
            let before = space.orders.len;
            space.remove(span);
            self.len -= before - space.orders.len;
        }
    }

    fn invalidate(&mut self, tag: T, first: u64, last: u64) {
        let Some(space) = self.spaces.get_mut(&tag) else {
            return;
        };
        let before = space.orders.len;
        let mut scan = false;
        for order in space.orders.iter() {
            match spans(order, first, last, space.orders.len) {
                Some(spans) => spans.for_each(|span| space.remove(span)),
                None => scan = true,
            }
        }
        if scan {
            space.retain(|span, _| !span.intersects(first, last));
        }
        self.len -= before - space.orders.len;
        if space.orders.len == 0 {
            self.spaces.remove(&tag);
        }
    }

    fn retain(&mut self, mut keep: impl FnMut(T, Span, &V) -> bool) {
        let mut len = 0;
        self.spaces.retain(|&tag, space| {
            space.retain(|span, value| keep(tag, span, value));
            len += space.orders.len;
            space.orders.len != 0
        });
        self.len = len;
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl<V> Space<V> {
    fn remove(&mut self, span: Span) {
        if self.entries.remove(&span).is_some() {
            self.orders.remove(span.order);
        }
    }

    fn retain(&mut self, mut keep: impl FnMut(Span, &V) -> bool) {
        let orders = &mut self.orders;
        self.entries.retain(|&span, value| {
            let kept = keep(span, value);
            if !kept {
                orders.remove(span.order);
            }
            kept
        });
    }
}
