//! The bus between the functions and memory: every transfer passes the IOMMU, every interrupt the
//! IOMMU's interrupt side and the interrupt controller.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, Weak};

use lychgate_model::{
    Access, DmaError, DmaRequest, FileBytes, IommuPort, Msi, Translation, Upstream,
};
use lychgate_types::{BusError, Iova, Memory, PhysRun, RequesterId};
use lychgate_vfio::VfioPciDevice;

use crate::faults::{Abort, Faults};
use crate::interrupts::InterruptController;
use crate::memory::PhysicalMemory;

/// The way of all functions to the rest of the machine.
pub(crate) struct Bus {
    iommu: Arc<dyn IommuPort>,
    memory: Arc<PhysicalMemory>,
    interrupts: Arc<InterruptController>,
    faults: Arc<Faults>,
    pins: RwLock<HashMap<RequesterId, Weak<VfioPciDevice>>>,
}

impl Bus {
    pub(crate) fn new(
        iommu: Arc<dyn IommuPort>,
        memory: Arc<PhysicalMemory>,
        interrupts: Arc<InterruptController>,
        faults: Arc<Faults>,
    ) -> Self {
        Self { iommu, memory, interrupts, faults, pins: RwLock::default() }
    }

    /// Connects a function's INTx pin to the driver that is bound to it.
    pub(crate) fn connect_pin(&self, requester: RequesterId, driver: &Arc<VfioPciDevice>) {
        let mut pins = self.pins.write().unwrap_or_else(PoisonError::into_inner);
        pins.insert(requester, Arc::downgrade(driver));
    }

    fn transfer(
        &self,
        request: &DmaRequest<'_>,
        access: Access,
        copy: &mut dyn FnMut(&[PhysRun]) -> Result<(), BusError>,
    ) -> Result<(), DmaError> {
        self.try_transfer(request, access, copy).map_err(|stopped| {
            let unreachable = matches!(stopped, Stopped::Copy(_));
            self.report(request, access, stopped.at(), unreachable)
        })
    }

    /// Translates, and hands the memory to `copy`.
    fn try_transfer(
        &self,
        request: &DmaRequest<'_>,
        access: Access,
        copy: &mut dyn FnMut(&[PhysRun]) -> Result<(), BusError>,
    ) -> Result<(), Stopped> {
        let one;
        let many;
        let translations = match request.segments {
            [segment] => {
                one = [translation(request, segment.start, segment.len, access)];
                &one[..]
            }
            _ => {
                many = merged(request, access);
                &many[..]
            }
        };
        let mut unreachable = false;
        let result = self.iommu.with_translation(translations, &mut |runs| {
            let copied = copy(runs);
            unreachable = copied.is_err();
            copied
        });
        result.map_err(|aborted| {
            if unreachable { Stopped::Copy(aborted.at) } else { Stopped::Iommu(aborted.at) }
        })
    }

    fn report(
        &self,
        request: &DmaRequest<'_>,
        access: Access,
        at: Iova,
        unreachable: bool,
    ) -> DmaError {
        let abort = Abort {
            requester: request.requester,
            pasid: request.pasid,
            access,
            iova: at,
            initiator: request.initiator.to_string(),
        };
        self.faults.aborted(abort, unreachable);
        DmaError { at }
    }
}

/// Where a transfer ended, and by whom.
enum Stopped {
    Iommu(Iova),
    Copy(Iova),
}

impl Stopped {
    fn at(&self) -> Iova {
        let (Self::Iommu(at) | Self::Copy(at)) = self;
        *at
    }
}

fn translation(request: &DmaRequest<'_>, start: Iova, len: u64, access: Access) -> Translation {
    Translation { requester: request.requester, pasid: request.pasid, start, len, access }
}

/// The segments, those merged that follow each other.
fn merged(request: &DmaRequest<'_>, access: Access) -> Vec<Translation> {
    let mut merged: Vec<Translation> = Vec::with_capacity(request.segments.len());
    for segment in request.segments {
        match merged.last_mut() {
            Some(last) if last.start.checked_add(last.len) == Some(segment.start) => {
                last.len += segment.len;
            }
            _ => merged.push(translation(request, segment.start, segment.len, access)),
        }
    }
    merged
}

impl Upstream for Bus {
    fn read(&self, request: &DmaRequest<'_>, to: &mut [u8]) -> Result<(), DmaError> {
        self.transfer(request, Access::Read, &mut |runs| self.memory.read_runs(runs, to))
    }

    fn write(&self, request: &DmaRequest<'_>, from: &[u8]) -> Result<(), DmaError> {
        self.transfer(request, Access::Write, &mut |runs| self.memory.write_runs(runs, from))
    }

    fn write_from(
        &self,
        request: &DmaRequest<'_>,
        from: &FileBytes<'_>,
    ) -> Option<Result<(), DmaError>> {
        let copy = &mut |runs: &[PhysRun]| self.memory.write_runs_from(runs, from);
        match self.try_transfer(request, Access::Write, copy) {
            Ok(()) => Some(Ok(())),
            Err(Stopped::Iommu(at)) => Some(Err(self.report(request, Access::Write, at, false))),
            Err(Stopped::Copy(_)) => None,
        }
    }

    fn msi(&self, requester: RequesterId, address: u64, data: u32) {
        match self.iommu.remap_msi(requester, address, data) {
            Some((address, data)) => {
                self.interrupts.deliver(Msi { address, data });
            }
            None => {
                let abort = Abort {
                    requester,
                    pasid: None,
                    access: Access::Write,
                    iova: Iova::new(address),
                    initiator: format!("interrupt, data {data:#x}"),
                };
                self.faults.aborted(abort, false);
            }
        }
    }

    fn intx(&self, requester: RequesterId, asserted: bool) {
        let driver = {
            let pins = self.pins.read().unwrap_or_else(PoisonError::into_inner);
            pins.get(&requester).and_then(Weak::upgrade)
        };
        if let Some(driver) = driver {
            driver.intx(asserted);
        }
    }
}
