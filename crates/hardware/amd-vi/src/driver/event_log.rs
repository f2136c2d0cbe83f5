//! The event log: a ring that hardware fills, and what its entries mean (AMD 48882 2.5).

use alloc::sync::Arc;
use core::sync::atomic::Ordering;

use lychgate_iommu::{FaultReason, FaultReport, FaultSink};
use lychgate_types::{Iova, Lock, Locks, OutOfMemory, Pages, Pasid, RequesterId};

use super::hardware::{Hardware, Ring, Stalled};
use crate::spec::registers::{
    EVENT_HEAD, EVENT_TAIL, RING_ENTRY_BYTES, RING_POINTER, RingBase, STATUS,
};
use crate::spec::{Event, Status, event};

/// The driver's end of the log.
pub(super) struct EventLog<P: Pages, L: Locks> {
    hardware: Arc<Hardware<P, L>>,
    ring: Ring<P>,
    /// Index of the next entry to read.
    head: L::Mutex<u64>,
    sink: Arc<dyn FaultSink>,
}

/// Events that are taken out of the log at once.
const TAKEN: usize = 32;
/// Rounds of one call, in each of which the log is read to its end.
const ROUNDS: usize = 16;
/// Times to look at an entry whose contents have not arrived yet.
const LOOKS: usize = 1 << 16;

impl<P: Pages, L: Locks> EventLog<P, L> {
    pub(super) fn new(
        hardware: Arc<Hardware<P, L>>,
        sink: Arc<dyn FaultSink>,
    ) -> Result<Self, OutOfMemory> {
        let ring = Ring::new(&hardware.pages, hardware.config.event_log_len)?;
        Ok(Self { hardware, ring, head: L::Mutex::new(0), sink })
    }

    /// What the base register holds.
    pub(super) fn base(&self) -> RingBase {
        self.ring.base()
    }

    /// Never frees the log.
    pub(super) fn keep(&self) {
        self.ring.region.keep();
    }

    /// Reports what the log holds. Gives whether there is more than this call's share.
    ///
    /// The interrupt bit is cleared before the log is read, and looked at again after: an event
    /// that comes in between sets it again, perhaps without another interrupt (erratum 1312).
    pub(super) fn handle_interrupt(&self) -> bool {
        for _ in 0..ROUNDS {
            let status = self.hardware.status();
            if !status.event_log_int() && !status.event_overflow() {
                return false;
            }
            let seen = Status::default().with_event_log_int(true);
            self.hardware.mmio.write64(STATUS, seen.0[0]);
            self.report_all();
            if status.event_overflow() {
                self.restart();
                self.sink.faults_lost();
            }
        }
        true
    }

    /// Reports the events up to the tail, without a lock while somebody listens.
    fn report_all(&self) {
        let most = usize::try_from(self.ring.entries()).unwrap_or(usize::MAX);
        for _ in 0..most.div_ceil(TAKEN) {
            let mut taken = [Event::default(); TAKEN];
            let count = self.head.with(|head| self.take(head, &mut taken));
            for event in taken.iter().take(count) {
                if let Some(report) = self.decode(*event) {
                    self.sink.fault(&report);
                }
            }
            if count < TAKEN {
                break;
            }
        }
    }

    /// Takes events out of the log; gives how many.
    fn take(&self, head: &mut u64, to: &mut [Event]) -> usize {
        let mmio = &self.hardware.mmio;
        let tail = (mmio.read64(EVENT_TAIL) & RING_POINTER) / RING_ENTRY_BYTES;
        let tail = self.ring.advance(tail, 0);
        let mut count = 0;
        for slot in to {
            if *head == tail {
                break;
            }
            *slot = self.take_entry(*head);
            *head = self.ring.advance(*head, 1);
            count += 1;
        }
        if count != 0 {
            mmio.write64(EVENT_HEAD, *head * RING_ENTRY_BYTES);
        }
        count
    }

    /// Takes the entry out and leaves zeroes. The interrupt may overtake the entry (errata 732 and
    /// 733): no event has code 0, so one that reads so has not arrived.
    fn take_entry(&self, index: u64) -> Event {
        let Some([first, second]) = self.ring.entry(index) else {
            return Event::default();
        };
        for _ in 0..LOOKS {
            let event = Event([u64::from_le(first.load(Ordering::Acquire)), 0]);
            if event.code() != 0 {
                let address = u64::from_le(second.load(Ordering::Acquire));
                first.store(0, Ordering::Relaxed);
                second.store(0, Ordering::Relaxed);
                return event.with_address(address);
            }
            core::hint::spin_loop();
        }
        Event::default()
    }

    /// Restarts a log that has stopped because it was full (AMD 48882 2.5).
    fn restart(&self) {
        let hardware = &self.hardware;
        hardware.change_control(|control| control.with_event_log_en(false));
        // If it does not stop, enabling it again does no harm.
        let _: Result<(), Stalled> = hardware.await_status(|status| !status.event_log_run());
        self.report_all();
        let seen = Status::default().with_event_overflow(true).with_event_log_int(true);
        hardware.mmio.write64(STATUS, seen.0[0]);
        hardware.change_control(|control| control.with_event_log_en(true));
    }

    /// What an event says of a device; `None` for one that is not about a request.
    fn decode(&self, event: Event) -> Option<FaultReport> {
        let requester = RequesterId::new(low_u16(event.device_id()));
        let mut iova = Iova::new(event.address());
        let reason = match event.code() {
            event::ILLEGAL_DEV_TABLE_ENTRY => FaultReason::Malformed,
            event::IO_PAGE_FAULT => self.page_fault(event, requester),
            event::DEV_TAB_HARDWARE_ERROR | event::PAGE_TAB_HARDWARE_ERROR => {
                // The address is that of the entry, not what the device asked for.
                iova = Iova::new(0);
                FaultReason::Hardware
            }
            event::INVALID_DEVICE_REQUEST | event::INVALID_PPR_REQUEST => {
                FaultReason::InvalidRequest
            }
            event::RMP_PAGE_FAULT => FaultReason::Permission,
            event::RMP_HARDWARE_ERROR => {
                iova = Iova::new(0);
                FaultReason::Hardware
            }
            // A command that was refused halts the command buffer: whoever waits for it restarts it.
            _ => return None,
        };
        Some(FaultReport {
            requester,
            pasid: pasid(event),
            iova,
            write: event.rw(),
            reason,
            raw: [event.0[0], event.0[1], 0, 0],
        })
    }

    fn page_fault(&self, event: Event, requester: RequesterId) -> FaultReason {
        if event.i() {
            FaultReason::InvalidRequest
        } else if event.pe() {
            FaultReason::Permission
        } else if event.pr() {
            FaultReason::Malformed
        } else if self.hardware.dte(requester).tv() {
            FaultReason::NotPresent
        } else {
            FaultReason::Blocked
        }
    }
}

/// The PASID of a request with guest addresses. INVALID_PPR_REQUEST has it elsewhere.
fn pasid(event: Event) -> Option<Pasid> {
    let (low, high) = match event.code() {
        event::INVALID_PPR_REQUEST => (event.0[0] >> 16 & 0xffff, event.0[0] >> 42 & 0xf),
        _ if event.gn() => (event.domain_or_pasid(), event.pasid_high()),
        _ => return None,
    };
    Pasid::new(u32::try_from(high << 16 | low).ok()?)
}

fn low_u16(value: u64) -> u16 {
    value.to_le_bytes().first_chunk().map_or(0, |low| u16::from_le_bytes(*low))
}
