//! The way of an interrupt (AMD 48882 2.2.5, 2.1.2 Table 3).

use lychgate_model::{FaultCause, Msi};
use lychgate_types::{BusError, PhysAddr, RequesterId};

use super::cached::CachedIrte;
use super::device_table::Illegal;
use super::fault::{Fault, Flags};
use super::special::{Purpose, purpose};
use super::{AmdVi, Requested, Settings};
use crate::spec::dte::{INT_CTL_FORWARD, INT_CTL_REMAP};
use crate::spec::event::REQUEST_INTERRUPT;
use crate::spec::irte::{
    BYTES_32, BYTES_128, INT_TYPE_ARBITRATED, IRTE32_RESERVED, IRTE128_RESERVED,
};
use crate::spec::registers::XtInterrupt;
use crate::spec::{Dte, Irte32, Irte128};

/// Delivery modes in an MSI's data, bits 10:8 (Intel SDM 3A 11.11.2).
const DELIVERY_FIXED: u32 = 0;
const DELIVERY_LOWEST_PRIORITY: u32 = 1;
const DELIVERY_NMI: u32 = 4;
const DELIVERY_INIT: u32 = 5;
const DELIVERY_EXT_INT: u32 = 7;

/// An entry, whatever its size: what becomes of the interrupt.
#[derive(Clone, Copy)]
struct Mapping {
    enabled: bool,
    quiet: bool,
    reserved: bool,
    int_type: u64,
    logical: bool,
    destination: u64,
    vector: u64,
}

impl AmdVi {
    /// The message that leaves on the processor's side.
    pub(super) fn remap(
        &self,
        settings: &Settings,
        requester: RequesterId,
        address: u64,
        data: u32,
    ) -> Result<(u64, u32), Fault> {
        if !settings.control.iommu_en() {
            return Ok((address, data));
        }
        let (purpose, _) = purpose(address, !self.config.efr2.ht_range_ignore());
        if purpose != Purpose::Interrupt {
            return Err(Fault::silent(address, FaultCause::Interrupt));
        }
        let requested = Requested::interrupt(requester);
        let dte = self.entry_for(settings, requested, address)?;
        if !dte.iv() {
            return Ok((address, data));
        }
        self.check_interrupt_half(dte)
            .map_err(|illegal| Fault::illegal_entry(requested, address, illegal == Illegal::Bit))?;
        let aborted =
            || Fault::invalid_request(requested, address, REQUEST_INTERRUPT, FaultCause::Interrupt);
        let wide_index = settings.control.num_int_remap_mode() == 1;
        if !wide_index {
            let passes = match data >> 8 & 7 {
                DELIVERY_FIXED | DELIVERY_LOWEST_PRIORITY => None,
                DELIVERY_NMI => Some(dte.nmi_pass()),
                DELIVERY_INIT => Some(dte.init_pass()),
                DELIVERY_EXT_INT => Some(dte.eint_pass()),
                _ => Some(false),
            };
            match passes {
                Some(true) => return Ok((address, data)),
                Some(false) => return Err(aborted()),
                None => {}
            }
        }
        match dte.int_ctl() {
            INT_CTL_FORWARD => return Ok((address, data)),
            INT_CTL_REMAP => {}
            _ => return Err(aborted()),
        }
        let index = u64::from(data & if wide_index { 0x7ff } else { 0x1ff });
        self.mapped(settings, dte, requested, address, index)
            .map_err(|fault| self.as_the_entry_logs_it(dte, requested, fault))
    }

    /// The message that entry `index` of the device's table says.
    fn mapped(
        &self,
        settings: &Settings,
        dte: Dte,
        requested: Requested,
        address: u64,
        index: u64,
    ) -> Result<(u64, u32), Fault> {
        let fault =
            |flags| Fault::page(requested, Some(dte), address, FaultCause::Interrupt, flags);
        if index >= 1 << dte.int_tab_len() {
            return Err(fault(Flags::NONE).suppressed_if(dte.ig()));
        }
        let mapping = self
            .interrupt_entry(settings, dte, requested.requester, index)
            .map_err(|error| Fault::table(requested, dte, address, error.at))?;
        if !mapping.enabled {
            return Err(fault(Flags::NONE).suppressed_if(mapping.quiet || dte.ig()));
        }
        if mapping.reserved {
            return Err(fault(Flags::RESERVED).suppressed_if(mapping.quiet));
        }
        if mapping.int_type > INT_TYPE_ARBITRATED {
            return Err(fault(Flags::BAD).suppressed_if(mapping.quiet));
        }
        let msi = message(mapping.destination, mapping.logical, mapping.int_type, mapping.vector);
        Ok((msi.address, msi.data))
    }

    /// Entry `index` of the device's table. A 128-bit one is cached except for its destination,
    /// which software may change without a command.
    fn interrupt_entry(
        &self,
        settings: &Settings,
        dte: Dte,
        device: RequesterId,
        index: u64,
    ) -> Result<Mapping, BusError> {
        let cached = self.caches.interrupt(device, index);
        let wide = settings.control.ga_en();
        if let (Some(CachedIrte::Short(irte)), false) = (cached, wide) {
            return Ok(Mapping::short(irte));
        }
        let now = self.interrupt_in_memory(settings, dte, index);
        let xt = settings.control.xt_en();
        if let (Some(CachedIrte::Long(irte)), true) = (cached, wide) {
            let destination = match now {
                Ok(CachedIrte::Long(now)) => now,
                _ => irte,
            };
            return Ok(Mapping::long(
                irte.with_destination_low(destination.destination_low())
                    .with_destination_high(destination.destination_high()),
                xt,
            ));
        }
        let irte = now?;
        self.caches.insert_interrupt(device, index, irte);
        Ok(match irte {
            CachedIrte::Short(irte) => Mapping::short(irte),
            CachedIrte::Long(irte) => Mapping::long(irte, xt),
        })
    }

    /// Entry `index` of the device's table as it is in memory.
    pub(super) fn interrupt_in_memory(
        &self,
        settings: &Settings,
        dte: Dte,
        index: u64,
    ) -> Result<CachedIrte, BusError> {
        if settings.control.ga_en() {
            let at = dte.int_table_root().wrapping_add(index * BYTES_128);
            return self.fetch_irte(at).map(CachedIrte::Long);
        }
        // The words of the table are 64 bits; an entry is half of one.
        let at = dte.int_table_root().wrapping_add(index * BYTES_32);
        let word = self.memory.load_u64(at.align_down(8))?;
        let half = if at.is_aligned(8) { word } else { word >> 32 };
        Ok(CachedIrte::Short(Irte32([half & 0xffff_ffff])))
    }

    /// Reads a 128-bit entry as one access; see [`AmdVi::device_entry`].
    fn fetch_irte(&self, at: PhysAddr) -> Result<Irte128, BusError> {
        const TRIES: usize = 8;
        let read = || Ok([self.memory.load_u64(at)?, self.memory.load_u64(at.wrapping_add(8))?]);
        let mut words = read()?;
        for _ in 0..TRIES {
            let again = read()?;
            if again == words {
                break;
            }
            words = again;
        }
        Ok(Irte128(words))
    }
}

impl Mapping {
    fn short(irte: Irte32) -> Self {
        Self {
            enabled: irte.remap_en(),
            quiet: irte.sup_iopf(),
            reserved: irte.0[0] & IRTE32_RESERVED != 0,
            int_type: irte.int_type(),
            logical: irte.dm(),
            destination: irte.destination(),
            vector: irte.vector(),
        }
    }

    fn long(irte: Irte128, xt: bool) -> Self {
        let destination = if xt {
            irte.destination_high() << 24 | irte.destination_low()
        } else {
            irte.destination_low() & 0xff
        };
        Self {
            enabled: irte.remap_en(),
            quiet: irte.sup_iopf(),
            // GuestMode needs GAMSup.
            reserved: irte.guest_mode() || irte.0[1] & IRTE128_RESERVED[1] != 0,
            int_type: irte.int_type(),
            logical: irte.dm(),
            destination,
            vector: irte.vector(),
        }
    }
}

/// The IOMMU's own interrupt as an XT register describes it.
pub(super) fn xt_message(xt: XtInterrupt) -> Msi {
    let destination = xt.destination_high() << 24 | xt.destination_low();
    message(destination, xt.dest_mode(), u64::from(xt.del_mode()), xt.vector())
}

/// An edge-triggered message to an APIC id of 32 bits: its upper 24 in address bits 63:40, as the
/// processor's side of an interrupt remapper takes them.
fn message(destination: u64, logical: bool, delivery: u64, vector: u64) -> Msi {
    Msi {
        address: 0xfee0_0000
            | (destination & 0xff) << 12
            | u64::from(logical) << 2
            | destination >> 8 << 40,
        data: (vector & 0xff) as u32 | ((delivery & 7) as u32) << 8,
    }
}
