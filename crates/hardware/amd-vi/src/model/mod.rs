//! The model: an AMD IOMMU as software and devices see it, written from AMD 48882.
//!
//! [`AmdVi`] is the registers ([`Mmio`]), the port in front of the devices ([`IommuPort`]) and the
//! PCI function that carries the capability block and the IOMMU's own MSI
//! ([`lychgate_model::PciFunction`]). It reads device table, page tables and interrupt tables from
//! memory as hardware does, with its own code: it shares nothing with the driver but
//! [`crate::spec`].
//!
//! Not modelled, and reported absent in the feature registers: guest translation (GTSup = 0, so
//! GV = 1 is an illegal device table entry), ATS and page requests, device table segments, the
//! guest virtual APIC, SNP, the hardware vIOMMU and performance counters.
//!
//! With [`Config::checking`] the model checks its driver: it is as unhelpful as the specification
//! allows, and [`lychgate_model::Audit::audit`] gives every copy that the tables contradict.
//!
//! # What waits for what
//!
//! Every request holds the gate for reading from the look at its device table entry until its
//! access to memory is over. Commands and register writes that change a translation hold it for
//! writing. So an invalidation finds no access that could still use what it removes, and no walk
//! whose result could be stored after it. Events are logged and interrupts sent when nothing is
//! held: their handlers come back through the registers.

pub use audit::rules;
pub use function::CAPABILITY_OFFSET;

mod audit;
mod cached;
mod commands;
mod device_table;
mod event_log;
mod fault;
mod function;
mod interrupt;
mod registers;
mod ring;
mod runs;
mod special;
#[cfg(test)]
mod tests;
mod translate;
mod walk;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use lychgate_model::{
    Aborted, Access, Checking, ConfigSpace, FaultAccess, FaultObserver, FaultRecord, IommuPort,
    Msi, Policy, Translation,
};
use lychgate_types::{BusError, Iova, Memory, Mmio, Pasid, PhysAddr, PhysRun, RequesterId};

use crate::spec::registers::{DeviceTableBase, XtInterrupt};
use crate::spec::{Control, Efr, Efr2};
use audit::Ledger;
use cached::Caches;
use fault::Fault;
use registers::Registers;
use runs::Runs;

/// What this IOMMU is: its feature registers and how its caches behave.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Extended Feature Register. Features that are not modelled read as 0 whatever this says:
    /// modelled are PreFSup, PPRSup (registers and commands), XTSup, IASup, GASup, HATS, HASup and
    /// HDSup.
    pub efr: Efr,
    /// Extended Feature 2 Register; modelled are NumIntRemapSup and HTRangeIgnore.
    pub efr2: Efr2,
    /// How every cache chooses what to forget.
    pub policy: Policy,
    /// Physical and virtual address bits that the capability block reports, 40 to 64.
    pub pa_bits: u8,
    /// See [`Config::pa_bits`].
    pub va_bits: u8,
    /// Whether devices may have IOTLBs (the capability's IotlbSup): INVALIDATE_IOTLB_PAGES exists.
    pub iotlb_sup: bool,
    /// Whether the model checks its driver ([`lychgate_model::Audit`]): it is then as unhelpful as it
    /// may be, and remembers where its copies came from. Makes sense with [`Policy::Adversarial`].
    pub checking: Option<Checking>,
    /// Where the firmware put the registers, a multiple of 16 KiB; locked if not 0.
    pub mmio_base: PhysAddr,
}

impl Default for Config {
    /// Six levels, host access and dirty bits, INVALIDATE_IOMMU_ALL, 128-bit interrupt entries with
    /// 32-bit destinations and 2048 of them a device.
    fn default() -> Self {
        Self {
            efr: Efr::default()
                .with_xt_sup(true)
                .with_ia_sup(true)
                .with_ga_sup(true)
                .with_hats(2)
                .with_ha_sup(true)
                .with_hd_sup(true),
            efr2: Efr2::default().with_num_int_remap_sup(1),
            policy: Policy::Plain,
            pa_bits: 52,
            va_bits: 64,
            iotlb_sup: true,
            checking: None,
            mmio_base: PhysAddr::new(0),
        }
    }
}

impl Config {
    /// The features as the registers report them: what is asked for, as far as it is modelled.
    fn modelled(mut self) -> Self {
        let asked = self.efr;
        self.efr = Efr::default()
            .with_pre_f_sup(asked.pre_f_sup())
            .with_ppr_sup(asked.ppr_sup())
            .with_xt_sup(asked.xt_sup())
            .with_ia_sup(asked.ia_sup())
            .with_ga_sup(asked.ga_sup())
            .with_hats(asked.hats())
            .with_ha_sup(asked.ha_sup())
            .with_hd_sup(asked.hd_sup());
        self.efr2 = Efr2::default()
            .with_num_int_remap_sup(self.efr2.num_int_remap_sup() & 1)
            .with_ht_range_ignore(self.efr2.ht_range_ignore());
        self
    }
}

/// Where the IOMMU's own message-signalled interrupts go. They are not remapped. Called without any
/// lock of the model, so the handler may access the registers.
pub type MsiSink = Arc<dyn Fn(Msi) + Send + Sync>;

/// One AMD IOMMU.
pub struct AmdVi {
    config: Config,
    memory: Arc<dyn Memory>,
    msi: MsiSink,
    observer: Option<Arc<dyn FaultObserver>>,
    /// Before `gate` in lock order; never taken while the gate is held for reading.
    registers: Mutex<Registers>,
    gate: RwLock<Settings>,
    caches: Caches,
    /// What a checking model remembers.
    ledger: Option<Ledger>,
    config_space: Mutex<ConfigSpace>,
}

/// The registers that requests depend on.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
struct Settings {
    control: Control,
    device_table: DeviceTableBase,
    exclusion: Option<Exclusion>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Exclusion {
    first: u64,
    last: u64,
    every_device: bool,
}

/// An interrupt of the IOMMU itself, decided while the registers were locked.
struct Raised {
    xt: Option<XtInterrupt>,
}

impl AmdVi {
    /// An IOMMU as after reset: every request passes untranslated.
    pub fn new(config: Config, memory: Arc<dyn Memory>, msi: MsiSink) -> Self {
        let config = config.modelled();
        Self {
            config,
            memory,
            msi,
            observer: None,
            registers: Mutex::new(Registers::new(&config)),
            gate: RwLock::default(),
            caches: Caches::new(config.policy),
            ledger: config.checking.map(Ledger::new),
            config_space: Mutex::new(function::config_space()),
        }
    }

    /// The same, with somebody to tell of every stopped request.
    #[must_use]
    pub fn observed_by(mut self, observer: Arc<dyn FaultObserver>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// Runs `f` with the registers locked; interrupts that it raised leave afterwards.
    fn with_registers<R>(&self, f: impl FnOnce(&mut Registers) -> R) -> R {
        let mut registers = self.registers.lock().unwrap_or_else(PoisonError::into_inner);
        let result = f(&mut registers);
        let raised = registers.take_raised();
        drop(registers);
        if let Some(raised) = raised {
            self.send_interrupt(&raised);
        }
        result
    }

    fn send_interrupt(&self, raised: &Raised) {
        let msi = match raised.xt {
            Some(xt) => Some(interrupt::xt_message(xt)),
            None => {
                let mut space = self.config_space.lock().unwrap_or_else(PoisonError::into_inner);
                space.raise_msi(0)
            }
        };
        if let Some(msi) = msi {
            (self.msi)(msi);
        }
    }

    fn write_register(&self, offset: u64, value: u64, mask: u64) {
        self.with_registers(|registers| {
            let before = registers.settings();
            registers.write(offset, value, mask);
            let after = registers.settings();
            if before != after {
                *self.gate.write().unwrap_or_else(PoisonError::into_inner) = after;
            }
            self.process_commands(registers);
        });
    }

    /// Logs a fault and tells the observer. The gate is not held.
    fn report(
        &self,
        fault: &Fault,
        requester: RequesterId,
        pasid: Option<Pasid>,
        access: FaultAccess,
    ) {
        if let Some(event) = fault.event.filter(|_| !fault.suppressed) {
            self.with_registers(|registers| registers.log(&*self.memory, event));
        }
        if let Some(observer) = &self.observer {
            observer.fault(&FaultRecord {
                requester,
                pasid,
                at: fault.at,
                access,
                cause: fault.cause,
                suppressed: fault.suppressed,
            });
        }
    }
}

impl fmt::Debug for AmdVi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AmdVi").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Mmio for AmdVi {
    fn read32(&self, offset: u64) -> u32 {
        let word = self.read64(offset & !7);
        let half = if offset & 4 == 0 { word } else { word >> 32 };
        (half & 0xffff_ffff) as u32
    }

    fn read64(&self, offset: u64) -> u64 {
        self.with_registers(|registers| registers.read(offset & !7))
    }

    fn write32(&self, offset: u64, value: u32) {
        let value = u64::from(value);
        if offset & 4 == 0 {
            self.write_register(offset & !7, value, 0xffff_ffff);
        } else {
            self.write_register(offset & !7, value << 32, 0xffff_ffff << 32);
        }
    }

    fn write64(&self, offset: u64, value: u64) {
        self.write_register(offset & !7, value, u64::MAX);
    }
}

impl IommuPort for AmdVi {
    /// Work and memory grow with the number of pages that `requests` touch.
    fn with_translation(
        &self,
        requests: &[Translation],
        access: &mut dyn FnMut(&[PhysRun]) -> Result<(), BusError>,
    ) -> Result<(), Aborted> {
        let mut runs = Runs::new();
        let settings = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let refused = requests.iter().find_map(|request| {
            let fault = self.translate(&settings, request, &mut runs).err()?;
            Some((request, fault))
        });
        let Some((request, fault)) = refused else {
            let runs = runs.as_slice();
            return access(runs).map_err(|error| Aborted { at: source(requests, runs, error.at) });
        };
        drop(settings);
        let access = FaultAccess::Memory(request.access);
        self.report(&fault, request.requester, request.pasid, access);
        Err(Aborted { at: fault.at })
    }

    /// A message outside the interrupt ranges is stopped: as an ordinary write it belongs to
    /// [`IommuPort::with_translation`].
    fn remap_msi(&self, requester: RequesterId, address: u64, data: u32) -> Option<(u64, u32)> {
        let settings = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let remapped = self.remap(&settings, requester, address, data);
        drop(settings);
        match remapped {
            Ok(message) => Some(message),
            Err(fault) => {
                self.report(&fault, requester, None, FaultAccess::Interrupt(data));
                None
            }
        }
    }
}

/// The bus address whose translation is `at`, which lies in `runs`.
fn source(requests: &[Translation], runs: &[PhysRun], at: PhysAddr) -> Iova {
    let mut offset = 0u64;
    for run in runs {
        match at.checked_offset_from(run.start) {
            Some(inside) if inside < run.len => {
                offset = offset.saturating_add(inside);
                break;
            }
            _ => offset = offset.saturating_add(run.len),
        }
    }
    for request in requests {
        if offset < request.len {
            return request.start.wrapping_add(offset);
        }
        offset -= request.len;
    }
    // An address outside the runs: all that is known is which transfer it was.
    requests.first().map_or(Iova::new(0), |request| request.start)
}

/// A transaction as events describe it.
#[derive(Clone, Copy, Debug)]
struct Requested {
    requester: RequesterId,
    pasid: Option<Pasid>,
    write: bool,
    interrupt: bool,
}

impl Requested {
    fn memory(request: &Translation) -> Self {
        Self {
            requester: request.requester,
            pasid: request.pasid,
            write: request.access == Access::Write,
            interrupt: false,
        }
    }

    fn interrupt(requester: RequesterId) -> Self {
        Self { requester, pasid: None, write: true, interrupt: true }
    }
}
