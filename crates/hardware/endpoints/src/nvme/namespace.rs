//! Namespaces: storage cut into logical blocks.

use std::fmt;
use std::sync::Arc;

use crate::storage::Storage;

/// A namespace: logical blocks on a storage. Read-only storage makes a read-only namespace; bytes
/// beyond the last whole block are not reachable.
#[derive(Clone)]
pub struct Namespace {
    /// Where the blocks are kept. Controllers may share it.
    pub storage: Arc<dyn Storage>,
    /// Log2 of the bytes of a logical block, 9 to 12.
    pub lba_shift: u8,
    /// Namespace Globally Unique Identifier; all zeros for none. It must differ between all
    /// namespaces that one system sees.
    pub nguid: [u8; 16],
}

impl Namespace {
    /// A namespace of 512-byte blocks without an identifier.
    pub fn new(storage: Arc<dyn Storage>) -> Self {
        Self { storage, lba_shift: 9, nguid: [0; 16] }
    }

    /// Number of logical blocks.
    pub fn blocks(&self) -> u64 {
        self.storage.len() >> self.lba_shift
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Namespace")
            .field("blocks", &self.blocks())
            .field("lba_shift", &self.lba_shift)
            .field("read_only", &self.storage.read_only())
            .finish_non_exhaustive()
    }
}
