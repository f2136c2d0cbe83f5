//! The AMD-Vi driver: what [`lychgate_iommu`] asks of an IOMMU, done with AMD 48882's registers,
//! tables and commands.
//!
//! The driver reaches the hardware by [`Mmio`] and by memory that it allocated from [`Pages`],
//! in no other way. It uses host ("v1") page tables, and neither ATS, PASIDs, page requests nor
//! interrupt remapping: interrupts of devices pass unmapped.
//!
//! # Locks
//! In the order in which they may be held together: the devices, the device table, the command
//! queue, the control register. The event log's lock comes before the control register's, and the
//! domain ids' is never held with another. Mapping takes none of them, unless the page table grows;
//! unmapping takes the command queue's for as long as it takes to store a few commands.

mod blocks;
mod command_queue;
mod config;
mod device_table;
mod domain;
mod domain_ids;
mod event_log;
mod hardware;
#[cfg(test)]
mod tests;

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;

use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, Domain, Driver, FaultSink, HwInfo,
    PagingDomain, ProbeError, ReservedKind, ReservedRegion, UserData,
};
use lychgate_types::{Iova, Lock, Locks, Mmio, Pages, Prot, RequesterId};

pub use config::{Config, InitError};

use crate::spec::ranges;
use domain::V1Domain;
use event_log::EventLog;
use hardware::Hardware;

/// `IOMMU_HW_INFO_TYPE_AMD` (`include/uapi/linux/iommufd.h`).
pub const HW_INFO_TYPE_AMD: u32 = 4;

/// The driver of one AMD IOMMU.
///
/// Dropping it blocks all its devices. The hardware goes on using the device table, which is
/// therefore never freed.
pub struct AmdVi<P: Pages + 'static, L: Locks> {
    hardware: Arc<Hardware<P, L>>,
    events: EventLog<P, L>,
    devices: L::Mutex<BTreeMap<RequesterId, Device>>,
}

/// A device that was probed.
struct Device {
    /// The other requester ids that its requests may carry.
    aliases: Vec<RequesterId>,
    /// What it is attached to; keeps the page tables that its device table entry names.
    domain: Domain,
}

impl<P: Pages + 'static, L: Locks> AmdVi<P, L> {
    /// Takes the IOMMU over from whatever used it before and enables it with every requester id
    /// blocked.
    ///
    /// Faults go to `sink`; the embedder calls [`AmdVi::handle_interrupt`] for the IOMMU's own
    /// interrupt.
    ///
    /// # Errors
    /// [`InitError::NoHostTranslation`] when the hardware has no host page tables,
    /// [`InitError::OutOfMemory`], and [`InitError::Hardware`] when it does not do what its
    /// registers tell it.
    pub fn new(
        mmio: Arc<dyn Mmio>,
        pages: Arc<P>,
        sink: Arc<dyn FaultSink>,
        config: Config,
    ) -> Result<Self, InitError> {
        let hardware = Arc::new(Hardware::new(mmio, pages, config)?);
        let events = EventLog::new(Arc::clone(&hardware), sink)?;
        let driver = Self { hardware, events, devices: L::Mutex::new(BTreeMap::new()) };
        driver.hardware.start(driver.events.base())?;
        Ok(driver)
    }

    /// Serves the IOMMU's interrupt: reports the events that the log holds, and restarts the log if
    /// it has overflowed. Gives whether there was still more to do when it had done its share; then
    /// the embedder calls it again soon, as no further interrupt may come.
    ///
    /// Call it when the interrupt arrives, or at any time, from any thread, but never from within a
    /// register access of the driver itself: a model that interrupts on the thread which writes its
    /// registers must leave the handler to another thread, or to later.
    pub fn handle_interrupt(&self) -> bool {
        self.events.handle_interrupt()
    }

    /// How often the command queue had to be restarted after the hardware had refused a command.
    pub fn command_queue_restarts(&self) -> u64 {
        self.hardware.restarts()
    }

    /// Whether the hardware has ceased to complete commands. What needs a command then fails;
    /// nothing that the hardware might still use is freed.
    pub fn stalled(&self) -> bool {
        self.hardware.stalled()
    }

    /// The driver's own type of a paging domain, if the domain is one of this very IOMMU.
    fn own<'a>(&self, domain: &'a Domain) -> Option<&'a V1Domain<P, L>> {
        match domain {
            Domain::Paging(domain) => domain
                .as_any()
                .downcast_ref::<V1Domain<P, L>>()
                .filter(|domain| Arc::ptr_eq(domain.hardware(), &self.hardware)),
            _ => None,
        }
    }

    /// Moves the device table entries `ids` to `domain`.
    fn program(&self, ids: &[RequesterId], domain: &Domain) -> Result<(), AttachError> {
        match domain {
            Domain::Blocked => {
                // What could fail is the wait for hardware that does not answer any more; there is
                // nothing further to do about the device then.
                let _ = self.hardware.program(ids, || device_table::BLOCKED);
                Ok(())
            }
            Domain::Identity => self
                .hardware
                .program(ids, || device_table::IDENTITY)
                .map_err(|_| AttachError::Hardware),
            Domain::Paging(_) => {
                let domain = self.own(domain).ok_or(AttachError::Incompatible)?;
                self.hardware.program(ids, || domain.dte()).map_err(|_| AttachError::Hardware)
            }
            _ => Err(AttachError::Incompatible),
        }
    }

    /// Takes the device out of the map and gives its requester ids to whoever shares them.
    fn let_go(
        &self,
        devices: &mut BTreeMap<RequesterId, Device>,
        id: RequesterId,
    ) -> Option<Domain> {
        let device = devices.remove(&id)?;
        for requester in ids(id, &device.aliases) {
            let sharer = devices.iter().find(|(other, sharer)| {
                **other == requester || sharer.aliases.contains(&requester)
            });
            let domain = sharer.map_or(&Domain::Blocked, |(_, sharer)| &sharer.domain);
            if self.program(&[requester], domain).is_err() {
                let _ = self.program(&[requester], &Domain::Blocked);
            }
        }
        if let Some(domain) = self.own(&device.domain) {
            domain.detached();
        }
        Some(device.domain)
    }
}

impl<P: Pages + 'static, L: Locks> Driver for AmdVi<P, L> {
    fn probe(&self, device: RequesterId, aliases: &[RequesterId]) -> Result<(), ProbeError> {
        let known = ids(device, aliases).all(|id| self.hardware.has(id));
        if !known {
            return Err(ProbeError::NoIommu);
        }
        if self.hardware.stalled() {
            return Err(ProbeError::Hardware);
        }
        self.devices.with(|devices| {
            if devices.contains_key(&device) {
                return Err(ProbeError::Exists);
            }
            // Entries are blocked from the start and after a release. One that another device of
            // the group uses too stays as that device needs it.
            devices.insert(device, Device { aliases: aliases.to_vec(), domain: Domain::Blocked });
            Ok(())
        })
    }

    fn release(&self, device: RequesterId) {
        // The domain may end with the device: outside the lock.
        drop(self.devices.with(|devices| self.let_go(devices, device)));
    }

    fn capable(&self, _device: RequesterId, capability: Capability) -> bool {
        match capability {
            // Device table and page-table reads snoop, and every leaf has FC set.
            Capability::CacheCoherency | Capability::EnforceCacheCoherency => true,
            _ => false,
        }
    }

    fn hw_info(&self, _device: RequesterId, kind: u32) -> Option<HwInfo> {
        if kind != 0 && kind != HW_INFO_TYPE_AMD {
            return None;
        }
        let mut bytes = self.hardware.efr().0[0].to_le_bytes().to_vec();
        bytes.extend(self.hardware.efr2().0[0].to_le_bytes());
        Some(HwInfo { kind: HW_INFO_TYPE_AMD, bytes, max_pasid_log2: 0 })
    }

    fn reserved_regions(&self, _device: RequesterId) -> Vec<ReservedRegion> {
        let region = |range: core::ops::RangeInclusive<u64>, prot, kind| ReservedRegion {
            first: Iova::new(*range.start()),
            last: Iova::new(*range.end()),
            prot,
            kind,
        };
        let mut regions = vec![region(ranges::MSI, Prot::WRITE, ReservedKind::Msi)];
        if !self.hardware.efr2().ht_range_ignore() {
            regions.push(region(ranges::HT, Prot::NONE, ReservedKind::Reserved));
        }
        regions
    }

    fn alloc_paging(
        &self,
        device: RequesterId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        if !self.devices.with(|devices| devices.contains_key(&device)) {
            return Err(AllocError::NoDevice);
        }
        if data.is_some() || flags != AllocFlags::default() {
            return Err(AllocError::Unsupported);
        }
        Ok(Arc::new(V1Domain::new(&self.hardware)?))
    }

    fn attach(
        &self,
        device: RequesterId,
        domain: &Domain,
        _old: &Domain,
    ) -> Result<(), AttachError> {
        let old = self.devices.with(|devices| {
            let state = devices.get_mut(&device).ok_or(AttachError::NoDevice)?;
            let requesters: Vec<RequesterId> = ids(device, &state.aliases).collect();
            if let Some(new) = self.own(domain) {
                new.attaching();
            }
            if let Err(error) = self.program(&requesters, domain) {
                if let Some(new) = self.own(domain) {
                    new.detached();
                }
                return Err(error);
            }
            if let Some(old) = self.own(&state.domain) {
                old.detached();
            }
            Ok(core::mem::replace(&mut state.domain, domain.clone()))
        })?;
        // The old domain may end here: outside the lock.
        drop(old);
        Ok(())
    }
}

impl<P: Pages + 'static, L: Locks> Drop for AmdVi<P, L> {
    fn drop(&mut self) {
        let devices: Vec<RequesterId> =
            self.devices.with(|devices| devices.keys().copied().collect());
        for device in devices {
            self.release(device);
        }
        self.hardware.stop();
        if self.hardware.stalled() {
            self.events.keep();
        }
    }
}

/// The requester ids of a device, its own first.
fn ids(device: RequesterId, aliases: &[RequesterId]) -> impl Iterator<Item = RequesterId> {
    core::iter::once(device).chain(aliases.iter().copied())
}
