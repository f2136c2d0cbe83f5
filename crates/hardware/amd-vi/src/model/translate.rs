//! The way of a memory request (AMD 48882 2.1, 2.2.2 Table 8).

use lychgate_model::{FaultCause, Translation};
use lychgate_types::PhysAddr;

use super::cached::Allowed;
use super::device_table::Illegal;
use super::fault::{Fault, Flags};
use super::runs::Runs;
use super::special::{Purpose, purpose};
use super::{AmdVi, Requested, Settings};
use crate::spec::Dte;
use crate::spec::dte::{IO_CTL_ABORT, IO_CTL_FORWARD, SYS_MGT_FORWARD, SYS_MGT_TRANSLATE};
use crate::spec::event::{
    IO_PAGE_FAULT, REQUEST_INTERRUPT_READ, REQUEST_PORT_IO, REQUEST_RESERVED_RANGE,
    REQUEST_SYSTEM_MANAGEMENT,
};

/// What happens to the addresses from one up to `last`.
struct Way {
    last: u64,
    translated: bool,
}

impl AmdVi {
    /// Appends the physical memory of `request` to `runs`.
    pub(super) fn translate(
        &self,
        settings: &Settings,
        request: &Translation,
        runs: &mut Runs,
    ) -> Result<(), Fault> {
        let start = request.start.get();
        let Some(span) = request.start.span(request.len) else {
            // No transaction passes the end of the address space, so no event describes one.
            return match request.len {
                0 => Ok(()),
                _ => Err(Fault::silent(start, FaultCause::OutOfReach)),
            };
        };
        let last = span.end().get();
        if !settings.control.iommu_en() {
            runs.push(PhysAddr::new(start), request.len);
            return Ok(());
        }
        let requested = Requested::memory(request);
        let dte = self.entry_for(settings, requested, start)?;
        if dte.v() {
            self.check_translation_half(dte).map_err(|illegal| {
                Fault::illegal_entry(requested, start, illegal == Illegal::Bit)
            })?;
        }
        let mut at = start;
        loop {
            let end = self
                .translate_from(settings, dte, requested, at, last, runs)
                .map_err(|fault| self.as_the_entry_logs_it(dte, requested, fault))?;
            if end >= last {
                return Ok(());
            }
            at = end + 1;
        }
    }

    /// Appends the physical memory of `at` and of what follows it on the same way, up to `last`.
    /// Gives the last address that was done.
    fn translate_from(
        &self,
        settings: &Settings,
        dte: Dte,
        requested: Requested,
        at: u64,
        last: u64,
        runs: &mut Runs,
    ) -> Result<u64, Fault> {
        let way = self.way(settings, dte, requested, at)?;
        let end = way.last.min(last);
        let identity = PhysAddr::new(at);
        if !way.translated {
            runs.push(identity, end - at + 1);
            return Ok(end);
        }
        let fault = |cause, flags| Fault::page(requested, Some(dte), at, cause, flags);
        if !dte.tv() {
            return Err(fault(FaultCause::Blocked, Flags::NONE));
        }
        if requested.pasid.is_some() {
            return Err(fault(FaultCause::Pasid, Flags::NONE));
        }
        if dte.mode() == 0 {
            let allowed = Allowed { read: dte.ir(), write: dte.iw() };
            if !allowed.permits(requested.write) {
                return Err(fault(FaultCause::Permission, Flags::PERMISSION));
            }
            runs.push(identity, end - at + 1);
            return Ok(end);
        }
        self.pages(dte, requested, at, end, runs)?;
        Ok(end)
    }

    /// Whether `at` is translated, passes as it is, or is not allowed, by the special ranges, V,
    /// and the exclusion range.
    fn way(
        &self,
        settings: &Settings,
        dte: Dte,
        requested: Requested,
        at: u64,
    ) -> Result<Way, Fault> {
        let (purpose, mut last) = purpose(at, !self.config.efr2.ht_range_ignore());
        let invalid =
            |kind| Err(Fault::invalid_request(requested, at, kind, FaultCause::SpecialRange));
        let forwarded = match purpose {
            Purpose::Ordinary => !dte.v(),
            // A write here is an interrupt only as a single dword, which never comes this way.
            Purpose::Interrupt if requested.write => return invalid(REQUEST_RESERVED_RANGE),
            Purpose::Interrupt => return invalid(REQUEST_INTERRUPT_READ),
            Purpose::Reserved => return invalid(REQUEST_RESERVED_RANGE),
            Purpose::SystemManagement if dte.v() => match dte.sys_mgt() {
                SYS_MGT_FORWARD => true,
                SYS_MGT_TRANSLATE => false,
                _ => return invalid(REQUEST_SYSTEM_MANAGEMENT),
            },
            Purpose::PortIo if dte.v() => match dte.io_ctl() {
                IO_CTL_ABORT => return invalid(REQUEST_PORT_IO),
                IO_CTL_FORWARD => true,
                _ => false,
            },
            Purpose::SystemManagement | Purpose::PortIo => true,
        };
        if forwarded {
            return Ok(Way { last, translated: false });
        }
        if let Some(exclusion) = settings.exclusion
            && (exclusion.every_device || dte.ex())
        {
            if (exclusion.first..=exclusion.last).contains(&at) {
                return Ok(Way { last: last.min(exclusion.last), translated: false });
            }
            if at < exclusion.first {
                last = last.min(exclusion.first - 1);
            }
        }
        Ok(Way { last, translated: true })
    }

    /// Applies SA and SE, which speak of I/O page faults alone.
    pub(super) fn as_the_entry_logs_it(
        &self,
        dte: Dte,
        requested: Requested,
        fault: Fault,
    ) -> Fault {
        let page_fault = fault.event.is_some_and(|event| event.code() == IO_PAGE_FAULT);
        if !page_fault || !dte.v() || fault.suppressed {
            return fault;
        }
        let suppressed = dte.sa() || dte.se() && !self.caches.first_fault(requested.requester);
        fault.suppressed_if(suppressed)
    }
}
