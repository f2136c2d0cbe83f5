//! What a checking model remembers besides its copies: where each came from, and when one was used
//! although the tables had changed.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use lychgate_model::{CacheKind, Checking, Span, StaleUse};
use lychgate_types::RequesterId;

use super::super::walk::Path;

/// Most copies whose origin is remembered; beyond that their findings name no words.
const MOST_ORIGINS: usize = 1 << 18;

/// Most copies that are fetched again after an invalidation.
const MOST_REFETCHED: usize = 512;

/// One copy: its kind, its tag (a DomainID or a DeviceID) and its addresses.
pub(in super::super) type Key = (CacheKind, u16, Span);

/// Where a copy came from.
#[derive(Clone, Copy)]
pub(in super::super) struct Origin {
    /// Whose request or neighbour.
    pub(in super::super) device: RequesterId,
    /// The root table and Mode of that device's entry; 0 for copies of entries themselves.
    pub(in super::super) root: (u64, u64),
    /// The entries that were read on the way from the deepest directory that was cached.
    pub(in super::super) path: Path,
}

/// The memory of a checking model.
pub(in super::super) struct Ledger {
    pub(in super::super) checking: Checking,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    origins: HashMap<Key, Origin>,
    used: HashMap<Key, StaleUse>,
    /// Every device whose entry was ever looked at.
    known: BTreeSet<u16>,
    /// Translations that were invalidated since the last fetch ahead, by DomainID.
    invalidated: Vec<(u16, u64)>,
    /// Devices whose entries were.
    entries: BTreeSet<u16>,
}

impl Ledger {
    pub(in super::super) fn new(checking: Checking) -> Self {
        Self { checking, state: Mutex::default() }
    }

    /// A copy was made.
    pub(in super::super) fn filled(&self, key: Key, origin: Origin) {
        let mut state = self.lock();
        state.used.remove(&key);
        if state.origins.len() < MOST_ORIGINS || state.origins.contains_key(&key) {
            state.origins.insert(key, origin);
        }
    }

    /// A copy answered a request although the tables say something else.
    pub(in super::super) fn used_stale(&self, key: Key, by: StaleUse) {
        let mut state = self.lock();
        state.used.entry(key).and_modify(|used| used.times += 1).or_insert(by);
    }

    /// A device's entry was looked at.
    pub(in super::super) fn saw(&self, device: RequesterId) {
        self.lock().known.insert(device.get());
    }

    /// A device's entry was invalidated: it may be fetched again at once.
    pub(in super::super) fn invalidated_entry(&self, device: RequesterId) {
        let mut state = self.lock();
        state.known.insert(device.get());
        if self.checking.fetch_ahead {
            state.entries.insert(device.get());
        }
    }

    /// A translation was invalidated: it may be fetched again at once.
    pub(in super::super) fn invalidated(&self, domain: u16, at: u64) {
        let mut state = self.lock();
        if self.checking.fetch_ahead && state.invalidated.len() < MOST_REFETCHED {
            state.invalidated.push((domain, at));
        }
    }

    /// What was invalidated since the last call: devices, and translations by DomainID.
    pub(super) fn take_invalidated(&self) -> (BTreeSet<u16>, Vec<(u16, u64)>) {
        let mut state = self.lock();
        (std::mem::take(&mut state.entries), std::mem::take(&mut state.invalidated))
    }

    pub(super) fn known(&self) -> Vec<RequesterId> {
        self.lock().known.iter().copied().map(RequesterId::new).collect()
    }

    /// What is known of a copy, which is then forgotten.
    pub(super) fn take(&self, key: &Key) -> (Option<Origin>, Option<StaleUse>) {
        let mut state = self.lock();
        (state.origins.remove(key), state.used.remove(key))
    }

    /// Forgets copies that have gone, for which `there` is false.
    pub(super) fn retain(&self, there: impl Fn(&Key) -> bool) {
        let mut state = self.lock();
        state.origins.retain(|key, _| there(key));
        state.used.retain(|key, _| there(key));
    }

    pub(super) fn origins(&self) -> usize {
        self.lock().origins.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
