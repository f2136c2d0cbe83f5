//! The command buffer (AMD 48882 2.4).
//!
//! Commands run in order on the thread that rings the doorbell or starts the buffer, so every
//! COMPLETION_WAIT finds everything before it done. One doorbell runs at most as many commands as
//! the buffer holds.

use std::sync::PoisonError;

use lychgate_types::{PhysAddr, RequesterId};

use super::registers::Registers;
use super::ring::Ring;
use super::{AmdVi, Settings};
use crate::spec::command::{
    COMPLETE_PPR_REQUEST, COMPLETION_WAIT, INVALIDATE_DEVTAB_ENTRY, INVALIDATE_INTERRUPT_TABLE,
    INVALIDATE_IOMMU_ALL, INVALIDATE_IOMMU_PAGES, INVALIDATE_IOTLB_PAGES, PREFETCH_IOMMU_PAGES,
    PRG_FAILURE, PRG_INVALID, PRG_SUCCESS,
};
use crate::spec::event::{COMMAND_HARDWARE_ERROR, HARDWARE_MASTER_ABORT, ILLEGAL_COMMAND_ERROR};
use crate::spec::registers::RING_ENTRY_BYTES;
use crate::spec::{Command, Event};

/// Why fetching stops at a command.
enum Halt {
    /// An unknown opcode, a reserved bit, or a device that the command does not fit.
    Illegal,
    /// Memory does not answer here.
    Memory(PhysAddr),
}

impl AmdVi {
    /// Runs the commands between head and tail, if the buffer runs.
    pub(super) fn process_commands(&self, registers: &mut Registers) {
        let ring = registers.commands;
        let tail = ring.offset(ring.tail);
        if !ring.running || ring.offset(ring.head) == tail {
            return;
        }
        // From here on no request is on its way, until the last of these commands is done.
        let settings = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let mut head = ring.offset(ring.head);
        let tail = self.last_due(&ring, head, tail);
        while head != tail {
            let at = ring.entry(head);
            if let Err(halt) = self.run_at(&settings, registers, at) {
                registers.commands.running = false;
                let event = match halt {
                    Halt::Illegal => {
                        Event::default().with_code(ILLEGAL_COMMAND_ERROR).with_address(at.get())
                    }
                    Halt::Memory(at) => Event::default()
                        .with_code(COMMAND_HARDWARE_ERROR)
                        .with_hardware_type(HARDWARE_MASTER_ABORT)
                        .with_address(at.get()),
                };
                registers.log(&*self.memory, event);
                break;
            }
            head = ring.next(head);
        }
        registers.commands.head = head;
        self.refetch(&settings);
    }

    /// The end of the commands that have to be carried out now. All of them, unless the model checks
    /// its driver: nothing promises that a command is done before a COMPLETION_WAIT behind it is
    /// (2.4.1), so what stands behind the last one waits for the next, unless the ring fills up.
    fn last_due(&self, ring: &Ring, head: u64, tail: u64) -> u64 {
        if !self.ledger.as_ref().is_some_and(|ledger| ledger.checking.late_commands) {
            return tail;
        }
        let (mut at, mut due, mut waiting) = (head, head, 0u64);
        while at != tail {
            let opcode = self.memory.load_u64(ring.entry(at)).map(|word| word >> 60);
            at = ring.next(at);
            waiting += RING_ENTRY_BYTES;
            if opcode.is_err() || opcode == Ok(COMPLETION_WAIT) || waiting > ring.bytes() / 2 {
                due = at;
            }
        }
        due
    }

    fn run_at(
        &self,
        settings: &Settings,
        registers: &mut Registers,
        at: PhysAddr,
    ) -> Result<(), Halt> {
        let load = |at| self.memory.load_u64(at).map_err(|error| Halt::Memory(error.at));
        let command = Command([load(at)?, load(at.wrapping_add(8))?]);
        let reserved = Command::reserved(command.opcode()).ok_or(Halt::Illegal)?;
        if command.0[0] & reserved[0] != 0 || command.0[1] & reserved[1] != 0 {
            return Err(Halt::Illegal);
        }
        let device = RequesterId::new((command.device_id() & 0xffff) as u16);
        match command.opcode() {
            COMPLETION_WAIT => {
                if command.wait_s() {
                    self.memory
                        .store_u64(command.store_address(), command.store_data())
                        .map_err(|error| Halt::Memory(error.at))?;
                }
                if command.wait_i() {
                    registers.record_completion();
                }
                Ok(())
            }
            INVALIDATE_DEVTAB_ENTRY => {
                self.caches.forget_device(device);
                if let Some(ledger) = &self.ledger {
                    ledger.invalidated_entry(device);
                }
                Ok(())
            }
            INVALIDATE_IOMMU_PAGES => {
                // Guest translations (GN) do not exist without GTSup.
                if !command.gn() {
                    let domain = (command.domain_id() & 0xffff) as u16;
                    let (block, pde) = (command.block(), command.pde());
                    match &self.ledger {
                        None => self.caches.forget_pages(domain, block, pde, None),
                        Some(ledger) => {
                            let mut gone = |at| ledger.invalidated(domain, at);
                            self.caches.forget_pages(domain, block, pde, Some(&mut gone));
                        }
                    }
                }
                Ok(())
            }
            INVALIDATE_IOTLB_PAGES if self.config.iotlb_sup => self.check_iotlb(settings, device),
            INVALIDATE_INTERRUPT_TABLE => {
                self.caches.forget_interrupts(device);
                Ok(())
            }
            // A hint, and one whose failures are not logged: taking it is never required.
            PREFETCH_IOMMU_PAGES if self.config.efr.pre_f_sup() => Ok(()),
            // No request can be pending, as no device can make one: the answer has no addressee.
            COMPLETE_PPR_REQUEST if self.config.efr.ppr_sup() => match command.prg_code() {
                PRG_SUCCESS | PRG_INVALID | PRG_FAILURE => Ok(()),
                _ => Err(Halt::Illegal),
            },
            INVALIDATE_IOMMU_ALL if self.config.efr.ia_sup() => {
                self.caches.clear();
                Ok(())
            }
            _ => Err(Halt::Illegal),
        }
    }

    /// INVALIDATE_IOTLB_PAGES is for devices whose entry has I set. No device in front of this
    /// model has an IOTLB, so there is nothing to wait for.
    fn check_iotlb(&self, settings: &Settings, device: RequesterId) -> Result<(), Halt> {
        match self.device_entry(settings, device) {
            Ok(dte) if dte.v() && dte.i() => Ok(()),
            _ => Err(Halt::Illegal),
        }
    }
}
