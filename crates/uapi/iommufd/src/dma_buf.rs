//! Memory of devices that is mapped through dma-bufs (`iopt_map_dmabuf`).
//!
//! Such memory is one physical range. It has no pages that could be pinned or counted, and no
//! processor reaches it through an IOAS. Its exporter may take it back at any time, as vfio-pci does
//! when a device is reset: every domain forgets it then, for good. The area stays, leads nowhere, and
//! can only be unmapped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use lychgate_types::{Errno, PhysAddr, PhysRun};

use crate::context::Context;
use crate::observer::Event;

/// A file that stands for memory of a device (`struct dma_buf`).
pub trait DmaBuf: Send + Sync {
    /// Size in bytes, not 0.
    fn size(&self) -> u64;

    /// Begins to use the memory, and gives where it is: as much as [`DmaBuf::size`] says.
    /// `ENODEV` when it is revoked; `EOPNOTSUPP` when it is not in one piece, and for what is not to
    /// be reached by devices.
    ///
    /// When it is revoked later on, [`Importer::revoke`] is called before the device's memory goes,
    /// once, as long as the importer lives.
    fn attach(&self, importer: Weak<dyn Importer>) -> Result<PhysRun, Errno>;
}

/// Who uses the memory of a dma-buf.
pub trait Importer: Send + Sync {
    /// No device reaches the memory when this returns (`invalidate_mappings`). Called with no lock
    /// held that [`DmaBuf::attach`] takes.
    fn revoke(&self);
}

/// A use of a dma-buf by a context.
pub(crate) struct Import {
    context: Weak<Context>,
    buffer: Arc<dyn DmaBuf>,
    start: OnceLock<PhysAddr>,
    /// Changed with the context's lock held.
    revoked: AtomicBool,
}

impl Import {
    /// Attaches to a dma-buf. No lock of the context may be held.
    pub(crate) fn new(context: Weak<Context>, buffer: Arc<dyn DmaBuf>) -> Result<Arc<Self>, Errno> {
        let (start, revoked) = (OnceLock::new(), AtomicBool::new(false));
        let import = Arc::new(Self { context, buffer, start, revoked });
        let me: Weak<Self> = Arc::downgrade(&import);
        let run = import.buffer.attach(me)?;
        let _ = import.start.set(run.start);
        Ok(import)
    }

    /// Whether it leads nowhere any more. Asked with the context's lock held.
    pub(crate) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Where `len` bytes at `position` of the buffer are.
    pub(crate) fn frames(&self, position: u64, len: u64) -> PhysRun {
        let start = self.start.get().copied().unwrap_or_default();
        PhysRun { start: start.wrapping_add(position), len }
    }
}

impl Importer for Import {
    fn revoke(&self) {
        let Some(context) = self.context.upgrade() else {
            return;
        };
        let mut state = context.lock();
        if !self.is_revoked() {
            for ioas in state.objects.ioases_mut() {
                let serial = ioas.serial;
                ioas.table.revoke(self, |iova, len| {
                    context.observer.event(&Event::Unmapped { ioas: serial, iova, len });
                });
            }
            self.revoked.store(true, Ordering::Relaxed);
        }
    }
}
