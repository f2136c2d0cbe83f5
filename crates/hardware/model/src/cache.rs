//! The cache that every IOMMU model keeps its copies in: device entries, PASID-level entries,
//! table-walk entries, leaf translations, interrupt entries.
//!
//! An entry covers a naturally aligned power-of-two block of addresses under a tag, which is
//! whatever the architecture says distinguishes entries: a domain id, a domain id and a PASID, a
//! VMID and an ASID, or nothing at all where the address is itself an id. Nothing leaves except by
//! an invalidation or by the [`Policy`].

mod hash;
mod stores;
#[cfg(test)]
mod tests;

use std::hash::Hash;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use stores::{Forever, Sets, Store};

/// How a cache chooses what to forget. All of them are what some hardware does.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Policy {
    /// Set-associative with eviction.
    #[default]
    Plain,
    /// Forgets only what it is told to forget. The number of entries is bounded by
    /// [`ADVERSARIAL_ENTRIES`], and only there half of them go at once.
    Adversarial,
    /// Set-associative, and forgets at random besides; the seed decides when.
    EvictRandom(u64),
}

/// Most entries that one cache holds under [`Policy::Adversarial`].
pub const ADVERSARIAL_ENTRIES: usize = 1 << 20;

/// The addresses that an entry covers: 2^`order` from `start`, a multiple of that.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Span {
    /// First address.
    pub start: u64,
    /// log2 of the number of addresses, 0 to 64.
    pub order: u8,
}

impl Span {
    /// The span of this order that holds `at`.
    pub const fn around(at: u64, order: u8) -> Self {
        Self { start: at & !low_bits(order), order }
    }

    /// Last address.
    pub const fn last(self) -> u64 {
        self.start | low_bits(self.order)
    }

    /// Whether an address of `first..=last` is one of these.
    pub const fn intersects(self, first: u64, last: u64) -> bool {
        self.start <= last && first <= self.last()
    }
}

/// A cache of `V` by tag `T` and address. Every method may be called from any thread.
///
/// The cache itself does not order a fill after a walk against an invalidation: a model excludes
/// the two from each other.
#[derive(Debug)]
pub struct Cache<T, V> {
    store: RwLock<Store<T, V>>,
    forget: Option<Forgetful>,
}

impl<T: Copy + Eq + Hash, V: Copy> Cache<T, V> {
    /// An empty cache. `entries` is the size of the set-associative policies, at least 1, rounded
    /// up to a power of two of at least 4.
    pub fn new(policy: Policy, entries: usize) -> Self {
        let store = match policy {
            Policy::Plain | Policy::EvictRandom(_) => Store::Sets(Sets::new(entries)),
            Policy::Adversarial => Store::Forever(Forever::new(ADVERSARIAL_ENTRIES)),
        };
        let forget = match policy {
            Policy::EvictRandom(seed) => Some(Forgetful::new(seed)),
            Policy::Plain | Policy::Adversarial => None,
        };
        Self { store: RwLock::new(store), forget }
    }

    /// The entry with this tag that covers `at`, the smallest if several do.
    pub fn lookup(&self, tag: T, at: u64) -> Option<(Span, V)> {
        let found = self.read().lookup(tag, at);
        if let (Some((span, _)), Some(forget)) = (&found, &self.forget)
            && forget.now()
        {
            self.write().remove(tag, *span);
            return None;
        }
        found
    }

    /// Hands `visit` the entries of `tag` that cover `first..=last` one after the other, each the
    /// smallest around its address, until an address is not covered or `visit` gives false. Gives
    /// the first address that was not visited, `None` if all were.
    ///
    /// `visit` runs with the cache locked: it must not call the cache.
    pub fn visit(
        &self,
        tag: T,
        first: u64,
        last: u64,
        mut visit: impl FnMut(Span, &V) -> bool,
    ) -> Option<u64> {
        let mut at = first;
        let store = self.read();
        let lost = loop {
            let Some((span, value)) = store.lookup(tag, at) else { return Some(at) };
            if self.forget.as_ref().is_some_and(Forgetful::now) {
                break span;
            }
            if !visit(span, &value) {
                return Some(at);
            }
            match span.last().checked_add(1) {
                Some(next) if next <= last => at = next,
                _ => return None,
            }
        };
        drop(store);
        self.write().remove(tag, lost);
        Some(at)
    }

    /// Stores an entry; one with the same tag and span is replaced.
    pub fn insert(&self, tag: T, span: Span, value: V) {
        self.write().insert(tag, span, value);
    }

    /// Forgets every entry of `tag` that covers an address of `first..=last`.
    pub fn invalidate(&self, tag: T, first: u64, last: u64) {
        self.write().invalidate(tag, first, last);
    }

    /// Forgets every entry for which `keep` is false: for commands that name part of a tag.
    pub fn retain(&self, keep: impl FnMut(T, Span, &V) -> bool) {
        self.write().retain(keep);
    }

    /// Forgets everything.
    pub fn clear(&self) {
        self.write().clear();
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.read().len()
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn read(&self) -> RwLockReadGuard<'_, Store<T, V>> {
        self.store.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Store<T, V>> {
        self.store.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Decides for each hit whether the entry was lost just before it.
#[derive(Debug)]
struct Forgetful {
    state: AtomicU64,
}

impl Forgetful {
    const ONE_IN: u64 = 16;
    /// The increment of SplitMix64, the odd number nearest 2^64 over the golden ratio.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

    fn new(seed: u64) -> Self {
        Self { state: AtomicU64::new(seed) }
    }

    fn now(&self) -> bool {
        let state = self.state.fetch_add(Self::STEP, Ordering::Relaxed);
        hash::scramble(state.wrapping_add(Self::STEP)).is_multiple_of(Self::ONE_IN)
    }
}

const fn low_bits(order: u8) -> u64 {
    if order >= 64 { u64::MAX } else { (1 << order) - 1 }
}
