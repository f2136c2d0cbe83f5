//! I/O page faults: a device asks for a page that is not there and waits (`include/linux/iommu.h`,
//! `struct iopf_fault`; PCIe Base 5.0 10.4).
//!
//! Faults of a device come one by one; those of one group belong together and are answered once,
//! when the last one has come.

use alloc::collections::BTreeMap;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use lychgate_types::{Errno, Iova, Pasid, RequesterId};

use crate::driver::Driver;
use crate::error::AttachError;
use crate::handle::{AttachHandle, DomainKind};
use crate::subsystem::{Device, DeviceId, Iommu};

/// One page request (`struct iommu_fault_page_request`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PageFault {
    /// With which PASID.
    pub pasid: Option<Pasid>,
    /// Page Request Group Index.
    pub group: u32,
    /// Whether it is the last one of its group (`LAST_PAGE`).
    pub last: bool,
    /// Whether the answer must name the PASID.
    pub response_needs_pasid: bool,
    /// `IOMMU_FAULT_PERM_*`: bit 0 read, 1 write, 2 execute, 3 privileged.
    pub perm: u32,
    /// The page.
    pub iova: Iova,
    /// Private data of the device, 0 where the architecture has none.
    pub private_data: [u64; 2],
}

/// How a group of faults is answered (`enum iommu_page_response_code`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PageResponse {
    /// The page is there: try again.
    Success,
    /// It will never be: do not try again.
    Invalid,
    /// Nothing will be: do not ask any more.
    Failure,
}

/// A closed group of faults that waits for its one answer. One that is dropped is answered
/// [`PageResponse::Invalid`], so that no device waits for ever.
pub struct FaultGroup {
    driver: Arc<dyn Driver>,
    device: DeviceId,
    requester: RequesterId,
    faults: Vec<PageFault>,
    answered: bool,
}

impl FaultGroup {
    /// The faults in the order in which they came; the last one closes the group.
    pub fn faults(&self) -> &[PageFault] {
        &self.faults
    }

    /// The device that waits.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Answers the device.
    pub fn respond(mut self, response: PageResponse) {
        self.answer(response);
    }

    fn answer(&mut self, response: PageResponse) {
        if !core::mem::replace(&mut self.answered, true)
            && let Some(last) = self.faults.last()
        {
            self.driver.page_response(self.requester, last, response);
        }
    }
}

impl Drop for FaultGroup {
    fn drop(&mut self) {
        self.answer(PageResponse::Invalid);
    }
}

impl fmt::Debug for FaultGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultGroup")
            .field("requester", &self.requester)
            .field("faults", &self.faults)
            .finish_non_exhaustive()
    }
}

/// Faults of a device whose group is not closed yet (`struct iommu_fault_param`).
#[derive(Default)]
pub(crate) struct Partial(BTreeMap<u32, Vec<PageFault>>);

/// Page requests of one device whose group never closes: more are not kept.
const MAX_PARTIAL: usize = 512;

impl Partial {
    /// Forgets every group that is not closed (`iopf_queue_discard_partial`).
    pub(crate) fn discard(&mut self) {
        self.0.clear();
    }

    fn keep(&mut self, fault: PageFault) -> Result<(), Errno> {
        if self.0.values().map(Vec::len).sum::<usize>() >= MAX_PARTIAL {
            return Err(Errno::ENOMEM);
        }
        self.0.entry(fault.group).or_default().push(fault);
        Ok(())
    }

    fn close(&mut self, fault: PageFault) -> Vec<PageFault> {
        let mut faults = self.0.remove(&fault.group).unwrap_or_default();
        faults.push(fault);
        faults
    }
}

impl Iommu {
    /// A device asks for a page (`iommu_report_device_fault`). The fault goes to the handle of what
    /// its PASID is attached to, or, where a guest owns the PASID table, to that of the nested domain
    /// of the requester itself.
    ///
    /// `ENODEV` for an unknown device and one that is attached to nothing which handles faults at
    /// all; `EINVAL` when nobody handles this one: the device is then told so. `ENOMEM` when a device
    /// leaves too many groups open.
    pub fn report_page_fault(&mut self, device: DeviceId, fault: PageFault) -> Result<(), Errno> {
        let state = self.devices.get_mut(&device).ok_or(Errno::ENODEV)?;
        if state.fault_users == 0 {
            return Err(Errno::ENODEV);
        }
        if !fault.last {
            return state.partial.keep(fault);
        }
        let group = FaultGroup {
            driver: Arc::clone(&state.driver),
            device,
            requester: state.info.bdf.requester,
            faults: state.partial.close(fault),
            answered: false,
        };
        let handle = self.fault_handle(device, fault.pasid).ok_or(Errno::EINVAL)?;
        // Whoever cannot take the group, for want of memory perhaps, gives it back.
        if let Err(group) = handle.page_fault(group) {
            group.respond(PageResponse::Failure);
        }
        Ok(())
    }

    /// Forgets the faults of a device whose groups are not closed: the device was reset
    /// (`iopf_queue_discard_partial`).
    pub fn discard_partial_faults(&mut self, device: DeviceId) {
        if let Some(state) = self.devices.get_mut(&device) {
            state.partial.discard();
        }
    }

    fn fault_handle(
        &self,
        device: DeviceId,
        pasid: Option<Pasid>,
    ) -> Option<Arc<dyn AttachHandle>> {
        let device = self.devices.get(&device)?;
        let group = self.groups.get(&device.group)?;
        let attached = match pasid {
            None => Some(&group.attached),
            Some(pasid) => group.pasids.get(&pasid).or_else(|| {
                let guest_owns = device.driver.user_pasid_table(device.info.bdf.requester);
                let nested = group.attached.domain.kind() == DomainKind::Nested;
                (guest_owns && nested).then_some(&group.attached)
            }),
        };
        let handles = attached.filter(|attached| attached.handles_faults())?;
        handles.handle.clone()
    }
}

impl Device {
    /// One more attachment of the device handles faults, or will.
    pub(crate) fn add_fault_user(&mut self) -> Result<(), AttachError> {
        if self.fault_users == 0 {
            self.driver.enable_page_requests(self.info.bdf.requester)?;
        }
        self.fault_users = self.fault_users.saturating_add(1);
        Ok(())
    }

    /// One attachment less does.
    pub(crate) fn drop_fault_user(&mut self) {
        self.fault_users = self.fault_users.saturating_sub(1);
        if self.fault_users == 0 {
            self.driver.disable_page_requests(self.info.bdf.requester);
            self.partial.discard();
        }
    }
}
