//! What is allocated, in builds with debug assertions: frees on the hit path are then checked too.

#[cfg(debug_assertions)]
use alloc::collections::BTreeMap;
use core::fmt;
use core::marker::PhantomData;

#[cfg(debug_assertions)]
use lychgate_types::Lock;
use lychgate_types::Locks;

use super::error::FreeError;

/// Every range that is allocated: first byte and length. Without debug assertions, nothing.
pub(super) struct Ledger<L: Locks> {
    #[cfg(debug_assertions)]
    allocated: L::Mutex<BTreeMap<u64, u64>>,
    locks: PhantomData<fn() -> L>,
}

#[cfg(debug_assertions)]
impl<L: Locks> Ledger<L> {
    pub(super) fn new() -> Self {
        Self { allocated: L::Mutex::new(BTreeMap::new()), locks: PhantomData }
    }

    pub(super) fn enter(&self, iova: u64, bytes: u64) {
        let other = self.allocated.with(|allocated| allocated.insert(iova, bytes));
        debug_assert_eq!(other, None, "{iova:#x} was given twice: it was freed twice before");
    }

    pub(super) fn strike(&self, iova: u64, bytes: u64) -> Result<(), FreeError> {
        self.allocated.with(|allocated| {
            if allocated.get(&iova) != Some(&bytes) {
                return Err(FreeError::NotAllocated);
            }
            allocated.remove(&iova);
            Ok(())
        })
    }
}

#[cfg(not(debug_assertions))]
impl<L: Locks> Ledger<L> {
    pub(super) const fn new() -> Self {
        Self { locks: PhantomData }
    }

    #[inline(always)]
    pub(super) const fn enter(&self, _iova: u64, _bytes: u64) {}

    #[inline(always)]
    pub(super) const fn strike(&self, _iova: u64, _bytes: u64) -> Result<(), FreeError> {
        Ok(())
    }
}

impl<L: Locks> fmt::Debug for Ledger<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ledger").finish_non_exhaustive()
    }
}
