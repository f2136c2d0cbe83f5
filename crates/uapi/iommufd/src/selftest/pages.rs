//! Memory of the mock hardware's tables.

use std::sync::Arc;

use lychgate_types::sync::AtomicU64;
use lychgate_types::{OutOfMemory, Pages, PhysAddr};

use crate::fault_injection::{Step, should_fail};

/// The machine's memory, each allocation of which can be made to fail.
#[derive(Clone)]
pub(super) struct MockPages(Arc<dyn Pages>);

impl MockPages {
    pub(super) fn new(pages: Arc<dyn Pages>) -> Self {
        Self(pages)
    }
}

fn step(bytes: u64) -> Result<(), OutOfMemory> {
    let order = (bytes >> 12).checked_ilog2().unwrap_or(0);
    if should_fail(Step::Pages { order }) { Err(OutOfMemory) } else { Ok(()) }
}

impl Pages for MockPages {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        step(bytes)?;
        self.0.alloc(bytes)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        step(bytes)?;
        self.0.alloc_uninit(bytes)
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        self.0.free(at, bytes);
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        self.0.words(at, count)
    }

    fn clean(&self, words: &[AtomicU64]) {
        self.0.clean(words);
    }
}
