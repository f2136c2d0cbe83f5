//! The vfio-pci driver of one function: what it does with the hardware when the device is opened,
//! used, reset and closed (`vfio_pci_core.c`).

mod info;
mod ioeventfd;
mod regions;
mod saved;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommu::DeviceId;
use lychgate_iommufd::Client;
use lychgate_iommufd::error::{Result, refuse};
use lychgate_model::PciFunction;
use lychgate_types::{Bdf, Errno};

use self::ioeventfd::IoEventFds;
use self::saved::SavedState;
use crate::config::{
    Effect, PCI_CAP_ID_PM, PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MASTER,
    PCI_COMMAND_MEMORY, PCI_PM_CTRL, VirtualConfig, change_command, read16,
};
use crate::irq::{Hardware, Interrupts, IntxLine, Irqs};

/// What a vfio-pci driver is given.
pub struct Parts {
    /// The function that it drives.
    pub function: Arc<dyn PciFunction>,
    /// The function as the IOMMU core knows it.
    pub device: DeviceId,
    /// Where the function is.
    pub bdf: Bdf,
    /// The interrupt controller.
    pub interrupts: Arc<dyn Interrupts>,
    /// The memory that clients map: a sparse file in which BAR `i` is at `i << 40`, its mappable part
    /// shared with the function. `None` when no BAR has a mappable part.
    pub regions: Option<OwnedFd>,
}

/// One function bound to vfio-pci.
pub struct VfioPciDevice {
    parts: Parts,
    line: Arc<IntxLine>,
    /// Whether the user may reach memory: decoding is on and the function is not in D3hot.
    memory_enabled: AtomicBool,
    opened: Mutex<Option<Opened>>,
}

/// What an open device has.
struct Opened {
    config: VirtualConfig,
    irqs: Irqs,
    ioeventfds: IoEventFds,
    /// Where the MSI-X table is, which the user does not reach: BAR, offset, length in bytes.
    msix_table: Option<(u8, u64, u64)>,
    /// The function as it was when the device was opened.
    initial: SavedState,
    power: PowerState,
}

/// Power states of a function, as far as memory decoding depends on them.
enum PowerState {
    /// D0 to D2.
    On,
    /// D3hot, and what the function may lose in it.
    D3Hot(SavedState),
}

impl VfioPciDevice {
    /// Binds to a function. It is left alone until the device is opened.
    pub fn new(parts: Parts) -> Self {
        Self {
            parts,
            line: Arc::default(),
            memory_enabled: AtomicBool::new(false),
            opened: Mutex::new(None),
        }
    }

    /// Where the function is.
    pub fn bdf(&self) -> Bdf {
        self.parts.bdf
    }

    /// The function as the IOMMU core knows it.
    pub fn device_id(&self) -> DeviceId {
        self.parts.device
    }

    /// The function drives its INTx pin. May be called with any lock of the function held.
    pub fn intx(&self, asserted: bool) {
        self.line.drive(asserted);
    }

    /// The file that clients map.
    pub(crate) fn backing(&self) -> Option<BorrowedFd<'_>> {
        self.parts.regions.as_ref().map(AsFd::as_fd)
    }

    /// Makes the function ready for its user: quiet, reset, memory decoding on, bus mastering off
    /// (`vfio_pci_core_enable`).
    pub(crate) fn enable(&self) {
        let function = self.function();
        let memory =
            if function.bars().iter().any(Option::is_some) { PCI_COMMAND_MEMORY } else { 0 };
        change_command(function, PCI_COMMAND_MASTER, memory);
        let before = SavedState::of(function, &VirtualConfig::new(function));
        reset(function, &before);
        change_command(function, PCI_COMMAND_INTX_DISABLE, 0);
        let config = VirtualConfig::new(function);
        let opened = Opened {
            initial: SavedState::of(function, &config),
            msix_table: self.hardware(&config).msix_table(),
            config,
            irqs: Irqs::default(),
            ioeventfds: IoEventFds::default(),
            power: PowerState::On,
        };
        self.line.set_disabled(false);
        self.update_memory_enabled(&opened);
        *self.lock() = Some(opened);
    }

    /// Takes the function back from its user: DMA and interrupts stop, and it is reset
    /// (`vfio_pci_core_disable`).
    pub(crate) fn disable(&self) {
        let Some(mut opened) = self.lock().take() else { return };
        let function = self.function();
        self.set_power(&mut opened, 0);
        self.memory_enabled.store(false, Ordering::Release);
        change_command(function, PCI_COMMAND_MASTER, 0);
        let Opened { config, mut irqs, ioeventfds, initial, .. } = opened;
        irqs.disable(&self.hardware(&config));
        drop(ioeventfds);
        self.line.set_disabled(false);
        reset(function, &initial);
    }

    /// `VFIO_DEVICE_RESET`, or the same asked for in configuration space: what is virtual stays, the
    /// hardware gets back what a driver of the host would restore.
    pub(crate) fn reset(&self) -> Result<()> {
        self.with_opened(|opened| {
            self.reset_opened(opened);
            Ok(())
        })
    }

    /// The function's part in a reset of its bus, whether it is open or not.
    pub(crate) fn bus_reset(&self) {
        let mut opened = self.lock();
        match opened.as_mut() {
            Some(opened) => self.reset_opened(opened),
            None => {
                let function = self.function();
                reset(function, &SavedState::of(function, &VirtualConfig::new(function)));
            }
        }
    }

    fn reset_opened(&self, opened: &mut Opened) {
        self.set_power(opened, 0);
        let function = self.function();
        reset(function, &SavedState::of(function, &opened.config));
        opened.irqs.restore(&self.hardware(&opened.config));
    }

    /// `VFIO_DEVICE_SET_IRQS`.
    pub(crate) fn set_irqs(&self, client: &dyn Client, argument: u64) -> Result<i32> {
        self.with_opened(|opened| opened.irqs.set(&self.hardware(&opened.config), client, argument))
    }

    /// Reads configuration space as the user sees it; the range lies inside.
    fn config_read(&self, opened: &Opened, at: u16, to: &mut [u8]) {
        opened.config.read(self.function(), at, to);
    }

    /// Writes configuration space; the range lies inside.
    fn config_write(&self, opened: &mut Opened, at: u16, from: &[u8]) {
        let (mut at, mut rest) = (at, from);
        while !rest.is_empty() {
            let msi = opened.irqs.msi();
            let (len, effect) = opened.config.write_piece(self.function(), at, rest, msi);
            match effect {
                Effect::None => {}
                Effect::Command => {
                    self.update_memory_enabled(opened);
                    let disabled = opened.config.command() & PCI_COMMAND_INTX_DISABLE != 0;
                    self.line.set_disabled(disabled);
                }
                Effect::PowerState(state) => self.set_power(opened, state),
                Effect::Reset => self.reset_opened(opened),
            }
            at = at.saturating_add(u16::try_from(len).unwrap_or(u16::MAX));
            rest = rest.get(len.max(1)..).unwrap_or(&[]);
        }
    }

    /// Moves the function to a power state, 0 to 3. D3hot may lose what the function holds
    /// (PCI Bus Power Management 1.2 5.4), so it is kept.
    fn set_power(&self, opened: &mut Opened, state: u8) {
        let function = self.function();
        let Some(pm) = opened.config.capability(PCI_CAP_ID_PM) else { return };
        let at = pm.start + PCI_PM_CTRL;
        if state == 3 && matches!(opened.power, PowerState::On) {
            opened.power = PowerState::D3Hot(SavedState::of(function, &opened.config));
        }
        let control = (read16(function, at) & !3) | u16::from(state);
        function.config_write(at, &control.to_le_bytes());
        if state != 3
            && let PowerState::D3Hot(saved) = std::mem::replace(&mut opened.power, PowerState::On)
        {
            saved.restore(function);
            opened.irqs.restore(&self.hardware(&opened.config));
        }
        self.update_memory_enabled(opened);
    }

    fn update_memory_enabled(&self, opened: &Opened) {
        let enabled = opened.config.command() & PCI_COMMAND_MEMORY != 0
            && matches!(opened.power, PowerState::On);
        self.memory_enabled.store(enabled, Ordering::Release);
    }

    fn hardware<'a>(&'a self, config: &'a VirtualConfig) -> Hardware<'a> {
        Hardware {
            function: self.function(),
            interrupts: &*self.parts.interrupts,
            line: &self.line,
            config,
        }
    }

    fn function(&self) -> &dyn PciFunction {
        &*self.parts.function
    }

    fn lock(&self) -> MutexGuard<'_, Option<Opened>> {
        self.opened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the open device; `EINVAL` when it is not open.
    fn with_opened<R>(&self, f: impl FnOnce(&mut Opened) -> Result<R>) -> Result<R> {
        match self.lock().as_mut() {
            Some(opened) => f(opened),
            None => refuse(Errno::EINVAL, "the device is not open"),
        }
    }
}

/// Function level reset with interrupts off, after which the function is as `saved`
/// (`pci_reset_function`).
fn reset(function: &dyn PciFunction, saved: &SavedState) {
    function.config_write(PCI_COMMAND, &PCI_COMMAND_INTX_DISABLE.to_le_bytes());
    function.reset();
    saved.restore(function);
}
