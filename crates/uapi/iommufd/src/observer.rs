//! What happens to DMA mappings, for whoever keeps a journal of it.

use lychgate_types::{Bdf, Prot};

/// One change that a call made. Observers know which call it is: they run inside of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Event {
    /// An area was added.
    Mapped {
        /// Distinct for each IOAS in the life of the machine.
        ioas: u64,
        /// First IOVA.
        iova: u64,
        /// Length in bytes.
        len: u64,
        /// Rights that were asked for.
        prot: Prot,
    },
    /// An area was removed, or the memory of a device that it leads to was taken back; then the area
    /// is removed later on.
    Unmapped {
        /// As in `Mapped`.
        ioas: u64,
        /// First IOVA.
        iova: u64,
        /// Length in bytes.
        len: u64,
    },
    /// A device was attached to an IOAS, through a page table of it.
    Attached {
        /// Which device.
        device: Bdf,
        /// As in `Mapped`.
        ioas: u64,
    },
    /// A device is attached to nothing.
    Detached {
        /// Which device.
        device: Bdf,
    },
}

/// Who hears of changes. Called with locks held: it must not call back.
pub trait Observer: Send + Sync {
    /// A change was made.
    fn event(&self, event: &Event);
}

/// Hears nothing.
impl Observer for () {
    fn event(&self, _: &Event) {}
}
