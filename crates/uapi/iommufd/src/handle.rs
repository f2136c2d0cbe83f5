//! What an attachment leaves with the core, for faults to find their device and their queue
//! (`struct iommufd_attach_handle`).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_iommu::{AttachHandle, FaultGroup};

use crate::fault_queue::FaultQueue;

/// One attachment of a group, or of a PASID of it.
pub(crate) struct Handle {
    /// Distinct for each attachment in the life of the process.
    serial: u64,
    /// The number of the device that was attached first.
    device: u32,
    faults: Option<Arc<FaultQueue>>,
}

impl Handle {
    /// For device `device`, whose faults go to `faults`.
    pub(crate) fn new(device: u32, faults: Option<Arc<FaultQueue>>) -> Arc<Self> {
        static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);
        let serial = NEXT_SERIAL.fetch_add(1, Ordering::Relaxed);
        Arc::new(Self { serial, device, faults })
    }

    /// The attachment has ended: what was not answered is answered now.
    pub(crate) fn end(&self) {
        if let Some(faults) = &self.faults {
            faults.end(self.serial);
        }
    }
}

impl AttachHandle for Handle {
    fn handles_faults(&self) -> bool {
        self.faults.is_some()
    }

    fn page_fault(&self, group: FaultGroup) -> Result<(), FaultGroup> {
        match &self.faults {
            Some(faults) => {
                faults.report(group, self.device, self.serial);
                Ok(())
            }
            None => Err(group),
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
