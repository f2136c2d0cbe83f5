//! The device table: finding an entry, and what makes one illegal (AMD 48882 2.2.2).

use lychgate_model::FaultCause;
use lychgate_types::{PhysAddr, RequesterId};

use super::fault::{Fault, Flags};
use super::{AmdVi, Requested, Settings};
use crate::spec::dte::{BYTES, INT_CTL_REMAP, INT_TAB_LEN_MAX, IO_CTL_TRANSLATE, RESERVED};
use crate::spec::{Dte, Efr};

/// Why there is no entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum NoEntry {
    /// The DeviceID lies beyond the table.
    BeyondTable,
    /// Memory does not answer here.
    Memory(PhysAddr),
}

/// A reserved bit or value in an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Illegal {
    /// A bit that must be 0: the event's RZ.
    Bit,
    /// A field with a value that means nothing, or that needs an absent feature.
    Value,
}

impl AmdVi {
    /// The entry of a device, from the cache or from memory.
    pub(super) fn device_entry(
        &self,
        settings: &Settings,
        device: RequesterId,
    ) -> Result<Dte, NoEntry> {
        if let Some(dte) = self.caches.device(device) {
            return Ok(dte);
        }
        let dte = self.entry_in_memory(settings, device)?;
        self.caches.insert_device(device, dte);
        self.note_device(settings, device, dte);
        Ok(dte)
    }

    /// The entry of a device as it is in memory.
    pub(super) fn entry_in_memory(
        &self,
        settings: &Settings,
        device: RequesterId,
    ) -> Result<Dte, NoEntry> {
        let at = entry_at(settings, device).ok_or(NoEntry::BeyondTable)?;
        self.fetch_entry(at)
    }

    /// As [`AmdVi::device_entry`] for a request, whose failure is an event: IO_PAGE_FAULT beyond
    /// the table.
    pub(super) fn entry_for(
        &self,
        settings: &Settings,
        requested: Requested,
        at: u64,
    ) -> Result<Dte, Fault> {
        self.device_entry(settings, requested.requester).map_err(|error| match error {
            NoEntry::BeyondTable => {
                Fault::page(requested, None, at, FaultCause::DeviceEntry, Flags::NONE)
            }
            NoEntry::Memory(table) => Fault::device_table(requested, at, table),
        })
    }

    /// Reads an entry as one access: hardware reads 256 bits at once, so a value that memory never
    /// held must not be seen while software stores the words one after the other. Two equal reads
    /// in a row are such a value.
    fn fetch_entry(&self, at: PhysAddr) -> Result<Dte, NoEntry> {
        const TRIES: usize = 8;
        let read = || {
            let mut words = [0; 4];
            for (word, at) in words.iter_mut().zip((at.get()..).step_by(8).map(PhysAddr::new)) {
                *word = self.memory.load_u64(at).map_err(|error| NoEntry::Memory(error.at))?;
            }
            Ok(words)
        };
        let mut words = read()?;
        for _ in 0..TRIES {
            let again = read()?;
            if again == words {
                break;
            }
            words = again;
        }
        Ok(Dte(words))
    }

    /// Checks bits 127:0, which count when V is set.
    pub(super) fn check_translation_half(&self, dte: Dte) -> Result<(), Illegal> {
        let efr = self.config.efr;
        if dte.0[0] & RESERVED[0] != 0 || dte.0[1] & RESERVED[1] != 0 || dte.sats() {
            return Err(Illegal::Bit);
        }
        // No guest translation (GTSup = 0), so no GIoV (GIoSup) and no page requests (EPHSup).
        if dte.gv() || dte.giov() || dte.ppr() || dte.gprp() {
            return Err(Illegal::Bit);
        }
        let had = match dte.had() {
            0 => true,
            1 => efr.ha_sup(),
            3 => efr.ha_sup() && efr.hd_sup(),
            _ => false,
        };
        if !had || dte.mode() > max_mode(efr) || dte.glx() == 3 || dte.io_ctl() > IO_CTL_TRANSLATE {
            return Err(Illegal::Value);
        }
        Ok(())
    }

    /// Checks bits 255:128, which count when IV is set.
    pub(super) fn check_interrupt_half(&self, dte: Dte) -> Result<(), Illegal> {
        if dte.0[2] & RESERVED[2] != 0 || dte.0[3] & RESERVED[3] != 0 || dte.vimu_en() {
            return Err(Illegal::Bit);
        }
        if dte.int_tab_len() > INT_TAB_LEN_MAX || dte.int_ctl() > INT_CTL_REMAP {
            return Err(Illegal::Value);
        }
        Ok(())
    }
}

/// Where the entry of a device is; `None` beyond the table.
pub(super) fn entry_at(settings: &Settings, device: RequesterId) -> Option<PhysAddr> {
    let offset = u64::from(device.get()) * BYTES;
    let there = offset < (settings.device_table.size() + 1) * 4096;
    there.then(|| settings.device_table.base().wrapping_add(offset))
}

/// Greatest Mode: HATS 0 to 2 are four to six levels, 3 is no host translation.
fn max_mode(efr: Efr) -> u64 {
    match efr.hats() {
        3 => 0,
        hats => hats + 4,
    }
}
