//! Faults of requests, and the events that describe them (AMD 48882 2.5.3 to 2.5.10).

use lychgate_model::FaultCause;
use lychgate_types::{Iova, PhysAddr};

use super::Requested;
use crate::spec::event::{
    DEV_TAB_HARDWARE_ERROR, HARDWARE_MASTER_ABORT, ILLEGAL_DEV_TABLE_ENTRY, INVALID_DEVICE_REQUEST,
    IO_PAGE_FAULT, PAGE_TAB_HARDWARE_ERROR,
};
use crate::spec::{Dte, Event};

/// Why a request stopped, and what the log says of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fault {
    pub(super) at: Iova,
    pub(super) cause: FaultCause,
    /// `None` when no event describes it.
    pub(super) event: Option<Event>,
    /// Not logged, because the device or the interrupt entry says so.
    pub(super) suppressed: bool,
}

/// The flags that tell I/O page faults apart.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub(super) struct Flags {
    /// The entry was present.
    pub(super) pr: bool,
    /// Permission was missing.
    pub(super) pe: bool,
    /// A reserved bit was set.
    pub(super) rz: bool,
}

impl Flags {
    /// Not present, out of reach, or no entry at all.
    pub(super) const NONE: Self = Self { pr: false, pe: false, rz: false };
    /// Present without permission.
    pub(super) const PERMISSION: Self = Self { pr: true, pe: true, rz: false };
    /// Present with a reserved bit set.
    pub(super) const RESERVED: Self = Self { pr: true, pe: false, rz: true };
    /// Present with an impossible level, size or type.
    pub(super) const BAD: Self = Self { pr: true, pe: false, rz: false };
}

impl Fault {
    /// IO_PAGE_FAULT. `dte` is `None` where the device has no entry.
    pub(super) fn page(
        requested: Requested,
        dte: Option<Dte>,
        at: u64,
        cause: FaultCause,
        flags: Flags,
    ) -> Self {
        let domain = dte.filter(|dte| dte.v()).map_or(0, Dte::domain_id);
        let event = describe(IO_PAGE_FAULT, requested, domain)
            .with_pr(flags.pr)
            .with_pe(flags.pe)
            .with_rz(flags.rz)
            .with_address(at);
        Self::logged(at, cause, event)
    }

    /// ILLEGAL_DEV_TABLE_ENTRY; `rz`: a reserved bit, else a reserved value.
    pub(super) fn illegal_entry(requested: Requested, at: u64, rz: bool) -> Self {
        let event =
            describe(ILLEGAL_DEV_TABLE_ENTRY, requested, 0).with_rz(rz).with_address(at & !3);
        Self::logged(at, FaultCause::DeviceEntry, event)
    }

    /// DEV_TAB_HARDWARE_ERROR: the entry at `table` could not be read.
    pub(super) fn device_table(requested: Requested, at: u64, table: PhysAddr) -> Self {
        let event = Event::default()
            .with_code(DEV_TAB_HARDWARE_ERROR)
            .with_device_id(u64::from(requested.requester.get()))
            .with_i(requested.interrupt)
            .with_rw(requested.write)
            .with_hardware_type(HARDWARE_MASTER_ABORT)
            .with_address(table.get());
        Self::logged(at, FaultCause::TableMemory(table), event)
    }

    /// PAGE_TAB_HARDWARE_ERROR: the table entry at `table` could not be read or updated.
    pub(super) fn table(requested: Requested, dte: Dte, at: u64, table: PhysAddr) -> Self {
        let domain = if dte.v() { dte.domain_id() } else { 0 };
        let event = describe(PAGE_TAB_HARDWARE_ERROR, requested, domain)
            .with_hardware_type(HARDWARE_MASTER_ABORT)
            .with_address(table.get());
        Self::logged(at, FaultCause::TableMemory(table), event)
    }

    /// INVALID_DEVICE_REQUEST of this type, without translation request.
    pub(super) fn invalid_request(
        requested: Requested,
        at: u64,
        request_type: u64,
        cause: FaultCause,
    ) -> Self {
        // The type takes the place of the flags above bit 56.
        let pasid = requested.pasid.map_or(0, |pasid| u64::from(pasid.get()));
        let event = Event::default()
            .with_code(INVALID_DEVICE_REQUEST)
            .with_device_id(u64::from(requested.requester.get()))
            .with_pasid_high(pasid >> 16)
            .with_domain_or_pasid(pasid & 0xffff)
            .with_gn(requested.pasid.is_some())
            .with_request_type(request_type)
            .with_address(at);
        Self::logged(at, cause, event)
    }

    /// A request that no event describes.
    pub(super) fn silent(at: u64, cause: FaultCause) -> Self {
        Self { at: Iova::new(at), cause, event: None, suppressed: false }
    }

    #[must_use]
    pub(super) fn suppressed_if(mut self, suppressed: bool) -> Self {
        self.suppressed |= suppressed;
        self
    }

    fn logged(at: u64, cause: FaultCause, event: Event) -> Self {
        Self { at: Iova::new(at), cause, event: Some(event), suppressed: false }
    }
}

/// The fields that the events of translation share: GN and the PASID for a request with one, else
/// the DomainID.
fn describe(code: u64, requested: Requested, domain: u64) -> Event {
    let event = Event::default()
        .with_code(code)
        .with_device_id(u64::from(requested.requester.get()))
        .with_i(requested.interrupt)
        .with_rw(requested.write);
    match requested.pasid {
        Some(pasid) => event
            .with_gn(true)
            .with_pasid_high(u64::from(pasid.get() >> 16))
            .with_domain_or_pasid(u64::from(pasid.get() & 0xffff)),
        None => event.with_domain_or_pasid(domain),
    }
}
