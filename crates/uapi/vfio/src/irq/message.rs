//! MSI and MSI-X, programmed into the function as a host driver programs them (PCIe Base 5.0 7.7.1,
//! 7.7.2 and 6.1.4).

use std::collections::BTreeMap;
use std::sync::Arc;

use lychgate_iommufd::Client;
use lychgate_iommufd::Refusal;
use lychgate_iommufd::error::{Result, refuse};
use lychgate_model::{Msi, PciFunction};
use lychgate_types::Errno;

use super::{Handler, Hardware, Interrupts, Trigger, eventfd};
use crate::config::{
    PCI_CAP_ID_MSI, PCI_CAP_ID_MSIX, PCI_COMMAND, PCI_COMMAND_INTX_DISABLE, PCI_COMMAND_MEMORY,
    PCI_MSI_FLAGS, PCI_MSI_FLAGS_ENABLE, PCI_MSI_FLAGS_QSIZE, change_command, read16, read32,
};

const MSIX_ENABLE: u16 = 1 << 15;
const MSIX_MASKALL: u16 = 1 << 14;
const ENTRY_SIZE: u64 = 16;
const ENTRY_MASKED: u32 = 1;

/// The message-signalled interrupts of a function, enabled.
pub(super) struct Messages {
    kind: Kind,
    vectors: BTreeMap<u32, Vector>,
}

#[derive(Clone, Copy)]
enum Kind {
    Msi { capability: u16, log2: u8 },
    Msix { capability: u16, bar: u8, table: u64, entries: u32 },
}

/// A vector of the controller, and where its interrupts go.
struct Vector {
    msi: Msi,
    trigger: Arc<Trigger>,
}

impl Messages {
    /// Takes `wanted` vectors and enables the capability, every vector masked. The inner error says
    /// how many vectors there could be, when MSI has fewer.
    pub(super) fn enable(
        hardware: &Hardware<'_>,
        msix: bool,
        wanted: u32,
    ) -> Result<std::result::Result<Self, u32>> {
        if wanted == 0 {
            return refuse(Errno::ERANGE, "no vector is asked for");
        }
        let kind = match Kind::of(hardware, msix, wanted) {
            Some(kind) => kind,
            None => return refuse(Errno::EINVAL, "the function lacks the capability"),
        };
        let mut messages = Self { kind, vectors: BTreeMap::new() };
        let taken = match kind {
            Kind::Msi { log2, .. } if log2 > 0 => {
                match messages.take_block(hardware.interrupts, wanted, log2) {
                    Err(Errno::ENOSPC) => return Ok(Err(1)),
                    other => other,
                }
            }
            _ => (0..wanted).try_for_each(|vector| messages.take(hardware.interrupts, vector)),
        };
        if let Err(errno) = taken {
            messages.free(hardware.interrupts);
            return Err(Refusal::new(errno, "the machine has no vector left"));
        }
        messages.program(hardware.function);
        Ok(Ok(messages))
    }

    pub(super) fn is_msix(&self) -> bool {
        matches!(self.kind, Kind::Msix { .. })
    }

    /// The log2 of the number of MSI vectors; `None` for MSI-X.
    pub(super) fn msi_log2(&self) -> Option<u8> {
        match self.kind {
            Kind::Msi { log2, .. } => Some(log2),
            Kind::Msix { .. } => None,
        }
    }

    /// Sets the eventfds of the vectors from `start`. After an error those vectors have none.
    pub(super) fn set_block(
        &mut self,
        hardware: &Hardware<'_>,
        client: &dyn Client,
        start: u32,
        fds: &[i32],
    ) -> Result<()> {
        for (vector, &fd) in (start..).zip(fds) {
            if let Err(refusal) = self.set(hardware, client, vector, fd) {
                for vector in start..=vector {
                    self.clear(hardware.function, vector);
                }
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// Signals the vectors from `start` that `which` names: loopback.
    pub(super) fn signal(&self, start: u32, which: impl Iterator<Item = bool>) {
        for (vector, _) in (start..).zip(which).filter(|(_, signal)| *signal) {
            if let Some(vector) = self.vectors.get(&vector) {
                vector.trigger.signal();
            }
        }
    }

    /// Writes all of it to the function, which may have lost it in a reset.
    pub(super) fn program(&self, function: &dyn PciFunction) {
        change_command(function, 0, PCI_COMMAND_INTX_DISABLE);
        match self.kind {
            Kind::Msi { capability, log2 } => self.program_msi(function, capability, log2),
            Kind::Msix { capability, entries, .. } => {
                // Function mask on while the table is written: 6.1.4.
                set_msix_control(function, capability, MSIX_ENABLE | MSIX_MASKALL);
                for vector in 0..entries {
                    self.mask(function, vector, true);
                }
                for (&vector, entry) in &self.vectors {
                    self.program_entry(function, vector, entry.msi);
                    self.mask(function, vector, !entry.trigger.is_set());
                }
                set_msix_control(function, capability, MSIX_ENABLE);
            }
        }
    }

    /// Disables the capability and gives the vectors back.
    pub(super) fn disable(mut self, function: &dyn PciFunction, interrupts: &dyn Interrupts) {
        let vectors: Vec<u32> = self.vectors.keys().copied().collect();
        for vector in vectors {
            self.clear(function, vector);
        }
        match self.kind {
            Kind::Msi { capability, .. } => {
                let at = capability + PCI_MSI_FLAGS;
                let flags = read16(function, at) & !(PCI_MSI_FLAGS_ENABLE | PCI_MSI_FLAGS_QSIZE);
                function.config_write(at, &flags.to_le_bytes());
            }
            Kind::Msix { capability, .. } => set_msix_control(function, capability, 0),
        }
        change_command(function, PCI_COMMAND_INTX_DISABLE, 0);
        self.free(interrupts);
    }

    /// Sets the eventfd of one vector (`vfio_msi_set_vector_signal`).
    fn set(
        &mut self,
        hardware: &Hardware<'_>,
        client: &dyn Client,
        vector: u32,
        fd: i32,
    ) -> Result<()> {
        self.clear(hardware.function, vector);
        if fd < 0 {
            return Ok(());
        }
        if !self.vectors.contains_key(&vector) {
            if !self.is_msix() {
                return refuse(Errno::EINVAL, "MSI was enabled with fewer vectors");
            }
            self.take(hardware.interrupts, vector)
                .map_err(|errno| Refusal::new(errno, "the machine has no vector left"))?;
        }
        let eventfd = eventfd(client, fd)?;
        if let Some(entry) = self.vectors.get(&vector) {
            entry.trigger.set(eventfd);
            // The table is memory of the device, which may have lost it: written again each time.
            self.program_entry(hardware.function, vector, entry.msi);
            self.mask(hardware.function, vector, false);
        }
        Ok(())
    }

    /// Masks a vector and takes its eventfd away. The vector itself stays until all are disabled.
    fn clear(&mut self, function: &dyn PciFunction, vector: u32) {
        if let Some(entry) = self.vectors.get(&vector).filter(|entry| entry.trigger.is_set()) {
            self.mask(function, vector, true);
            entry.trigger.set(None);
        }
    }

    fn take(&mut self, interrupts: &dyn Interrupts, vector: u32) -> Result<(), Errno> {
        let trigger = Arc::new(Trigger::default());
        let msi = interrupts.request(handler(&trigger))?;
        self.vectors.insert(vector, Vector { msi, trigger });
        Ok(())
    }

    /// Takes a block of vectors that share one message but for the low bits of the data.
    fn take_block(
        &mut self,
        interrupts: &dyn Interrupts,
        wanted: u32,
        log2: u8,
    ) -> Result<(), Errno> {
        let triggers: Vec<Arc<Trigger>> = (0..1u32 << log2).map(|_| Arc::default()).collect();
        let handlers: Vec<Handler> = triggers.iter().map(handler).collect();
        let first = interrupts.request_block(&handlers)?;
        for (vector, trigger) in (0..).zip(triggers) {
            let msi = Msi { data: first.data | vector, ..first };
            self.vectors.insert(vector, Vector { msi, trigger });
        }
        // What rounding up added belongs to nobody.
        while let Some((&last, _)) =
            self.vectors.last_key_value().filter(|(last, _)| **last >= wanted)
        {
            if let Some(unused) = self.vectors.remove(&last) {
                interrupts.free(unused.msi);
            }
        }
        Ok(())
    }

    fn free(&mut self, interrupts: &dyn Interrupts) {
        for vector in std::mem::take(&mut self.vectors).into_values() {
            interrupts.free(vector.msi);
        }
    }

    fn program_msi(&self, function: &dyn PciFunction, capability: u16, log2: u8) {
        let Some(first) = self.vectors.get(&0).map(|vector| vector.msi) else { return };
        let layout = MsiLayout::of(function, capability);
        let [a, b, c, d, e, f, g, h] = first.address.to_le_bytes();
        function.config_write(capability + 4, &[a, b, c, d]);
        if layout.wide {
            function.config_write(capability + 8, &[e, f, g, h]);
        }
        let [low, high, ..] = first.data.to_le_bytes();
        function.config_write(layout.data, &[low, high]);
        if let Some(mask) = layout.mask {
            let open = self.vectors.iter().filter(|(_, vector)| vector.trigger.is_set());
            let open = open.fold(0u32, |open, (vector, _)| open | 1 << (vector & 31));
            function.config_write(mask, &(!open).to_le_bytes());
        }
        let flags = read16(function, capability + PCI_MSI_FLAGS) & !PCI_MSI_FLAGS_QSIZE;
        let flags = flags | u16::from(log2) << 4 | PCI_MSI_FLAGS_ENABLE;
        function.config_write(capability + PCI_MSI_FLAGS, &flags.to_le_bytes());
    }

    /// Writes an MSI-X table entry; it is masked. Nothing to do for MSI.
    fn program_entry(&self, function: &dyn PciFunction, vector: u32, msi: Msi) {
        if let Kind::Msix { bar, table, .. } = self.kind {
            let entry = table + u64::from(vector) * ENTRY_SIZE;
            let [a, b, c, d, e, f, g, h] = msi.address.to_le_bytes();
            with_memory(function, || {
                function.bar_write(bar, entry, &[a, b, c, d]);
                function.bar_write(bar, entry + 4, &[e, f, g, h]);
                function.bar_write(bar, entry + 8, &msi.data.to_le_bytes());
            });
        }
    }

    /// Masks or unmasks a vector, where that can be.
    fn mask(&self, function: &dyn PciFunction, vector: u32, masked: bool) {
        match self.kind {
            Kind::Msix { bar, table, .. } => {
                let control = table + u64::from(vector) * ENTRY_SIZE + 12;
                let value = if masked { ENTRY_MASKED } else { 0 };
                with_memory(function, || function.bar_write(bar, control, &value.to_le_bytes()));
            }
            Kind::Msi { capability, .. } => {
                if let Some(at) = MsiLayout::of(function, capability).mask {
                    let bit = 1u32 << (vector & 31);
                    let old = read32(function, at);
                    let new = if masked { old | bit } else { old & !bit };
                    function.config_write(at, &new.to_le_bytes());
                }
            }
        }
    }
}

impl Kind {
    fn of(hardware: &Hardware<'_>, msix: bool, wanted: u32) -> Option<Self> {
        if msix {
            let capability = hardware.capability(PCI_CAP_ID_MSIX)?.start;
            let (bar, table, len) = hardware.msix_table()?;
            let entries = u32::try_from(len / ENTRY_SIZE).ok()?;
            Some(Self::Msix { capability, bar, table, entries })
        } else {
            let capability = hardware.capability(PCI_CAP_ID_MSI)?.start;
            let log2 = u8::try_from(wanted.checked_next_power_of_two()?.ilog2()).ok()?;
            Some(Self::Msi { capability, log2 })
        }
    }
}

/// Where the registers of an MSI capability are.
struct MsiLayout {
    wide: bool,
    data: u16,
    mask: Option<u16>,
}

impl MsiLayout {
    fn of(function: &dyn PciFunction, capability: u16) -> Self {
        let flags = read16(function, capability + PCI_MSI_FLAGS);
        let wide = flags & 1 << 7 != 0;
        let data = capability + if wide { 0xc } else { 8 };
        Self { wide, data, mask: (flags & 1 << 8 != 0).then_some(data + 4) }
    }
}

fn handler(trigger: &Arc<Trigger>) -> Handler {
    let trigger = Arc::clone(trigger);
    Arc::new(move || trigger.signal())
}

/// Runs `f` with memory decoding on, whatever the user has in the command register.
fn with_memory(function: &dyn PciFunction, f: impl FnOnce()) {
    let command = read16(function, PCI_COMMAND);
    change_command(function, 0, PCI_COMMAND_MEMORY);
    f();
    if command & PCI_COMMAND_MEMORY == 0 {
        change_command(function, PCI_COMMAND_MEMORY, 0);
    }
}

fn set_msix_control(function: &dyn PciFunction, capability: u16, value: u16) {
    let at = capability + 2;
    let flags = read16(function, at) & !(MSIX_ENABLE | MSIX_MASKALL);
    function.config_write(at, &(flags | value).to_le_bytes());
}
