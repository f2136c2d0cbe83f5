//! Configuration space as user space sees it: a shadow of what is emulated, the hardware for the
//! rest (`vfio_pci_config.c`).
//!
//! Every bit is virtual (kept in the shadow) or the hardware's, and writable or not. Accesses are cut
//! into aligned pieces of 1, 2 or 4 bytes inside one capability; bytes that belong to none go to the
//! hardware as they are.

mod layout;

use lychgate_model::{Bar, BarKind, PciFunction};

use self::layout::{Layout, Owner};

pub(crate) use self::layout::{Capability, CapabilityKind};

pub(crate) const PCI_COMMAND: u16 = 0x04;
pub(crate) const PCI_COMMAND_IO: u16 = 1 << 0;
pub(crate) const PCI_COMMAND_MEMORY: u16 = 1 << 1;
pub(crate) const PCI_COMMAND_MASTER: u16 = 1 << 2;
pub(crate) const PCI_COMMAND_INTX_DISABLE: u16 = 1 << 10;
pub(crate) const PCI_BASE_ADDRESS_0: u16 = 0x10;
pub(crate) const PCI_ROM_ADDRESS: u16 = 0x30;
pub(crate) const PCI_INTERRUPT_PIN: u16 = 0x3d;

pub(crate) const PCI_CAP_ID_PM: u8 = 0x01;
pub(crate) const PCI_CAP_ID_VPD: u8 = 0x03;
pub(crate) const PCI_CAP_ID_MSI: u8 = 0x05;
pub(crate) const PCI_CAP_ID_EXP: u8 = 0x10;
pub(crate) const PCI_CAP_ID_MSIX: u8 = 0x11;
pub(crate) const PCI_CAP_ID_AF: u8 = 0x13;

pub(crate) const PCI_MSI_FLAGS: u16 = 2;
pub(crate) const PCI_MSI_FLAGS_ENABLE: u16 = 1 << 0;
pub(crate) const PCI_MSI_FLAGS_QSIZE: u16 = 7 << 4;
pub(crate) const PCI_PM_CTRL: u16 = 4;
pub(crate) const PCI_EXP_DEVCAP: u16 = 4;
pub(crate) const PCI_EXP_DEVCTL: u16 = 8;
pub(crate) const PCI_EXP_DEVCTL2: u16 = 0x28;

const PCI_EXP_DEVCAP_FLR: u32 = 1 << 28;
const PCI_EXP_DEVCTL_PAYLOAD: u16 = 7 << 5;
const PCI_EXP_DEVCTL_READRQ: u16 = 7 << 12;
const PCI_EXP_DEVCTL_FLR: u16 = 1 << 15;
const PCI_AF_CAP: u16 = 3;
const PCI_AF_CAP_TP_FLR: u16 = 3;
const PCI_AF_CTRL: u16 = 4;
const PCI_VPD_ADDR: u16 = 2;
const PCI_VPD_ADDR_F: u16 = 1 << 15;
const PCI_VPD_DATA: u16 = 4;
/// How often VPD is polled before it counts as broken: a model answers at once.
const VPD_POLLS: usize = 16;

/// What a write asks of the device driver, besides what the shadow and the hardware took.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// The command register: memory decoding or the INTx mask may have changed.
    Command,
    /// A power state, 0 to 3 for D0 to D3hot.
    PowerState(u8),
    /// A function level reset.
    Reset,
}

/// The configuration space of one open device.
pub(crate) struct VirtualConfig {
    layout: Layout,
    shadow: Vec<u8>,
    bars: [Option<Bar>; 6],
    /// BARs 0 to 5 and the ROM as firmware set them, for after a reset behind our back.
    hardware_bars: [u32; 7],
}

impl VirtualConfig {
    /// The view of `function` as it stands: bus mastering off, memory decoding on.
    pub(crate) fn new(function: &dyn PciFunction) -> Self {
        let (layout, shadow) = Layout::of(function);
        let mut hardware_bars = [0; 7];
        for (bar, at) in hardware_bars.iter_mut().zip(bar_offsets()) {
            *bar = read32(function, at);
        }
        let mut config = Self { layout, shadow, bars: function.bars(), hardware_bars };
        config.fix_bars();
        config
    }

    /// Size in bytes: 4096 with extended space, else 256.
    pub(crate) fn size(&self) -> u64 {
        self.shadow.len() as u64
    }

    /// The command register as the user last wrote it: memory and I/O enable, and INTx disable.
    pub(crate) fn command(&self) -> u16 {
        self.shadow16(PCI_COMMAND)
    }

    /// The interrupt pin that the user sees, 0 for none.
    pub(crate) fn interrupt_pin(&self) -> u8 {
        self.shadow.get(usize::from(PCI_INTERRUPT_PIN)).copied().unwrap_or(0)
    }

    /// A standard capability that the user sees.
    pub(crate) fn capability(&self, id: u8) -> Option<Capability> {
        self.find(CapabilityKind::Standard(id))
    }

    /// A capability that the user sees.
    pub(crate) fn find(&self, kind: CapabilityKind) -> Option<Capability> {
        self.layout.find(kind)
    }

    /// Reads what the user sees. The range lies inside the space.
    pub(crate) fn read(&self, function: &dyn PciFunction, at: u16, to: &mut [u8]) {
        let (mut at, mut rest) = (at, to);
        while let Some((piece, after)) = rest.split_at_mut_checked(self.piece(at, rest.len())) {
            if piece.is_empty() {
                break;
            }
            self.read_piece(function, at, piece);
            at = at.saturating_add(len16(piece));
            rest = after;
        }
    }

    /// Writes the first piece of `from`: gives its length in bytes and what else it asks for. `msi` is
    /// the log2 of the MSI vectors that are enabled, if any are. The range lies inside the space.
    pub(crate) fn write_piece(
        &mut self,
        function: &dyn PciFunction,
        at: u16,
        from: &[u8],
        msi: Option<u8>,
    ) -> (usize, Effect) {
        let len = self.piece(at, from.len());
        let Some(piece) = from.get(..len) else {
            return (from.len(), Effect::None);
        };
        let owner = self.layout.owner(at);
        if owner == Owner::Header && at == PCI_COMMAND {
            self.recover_bars(function, piece);
        }
        self.store(function, at, piece);
        let effect = match owner {
            Owner::Header => self.header_written(at, piece),
            Owner::Capability(capability) => {
                self.capability_written(function, capability, at, piece, msi)
            }
            Owner::Nobody => Effect::None,
        };
        (len, effect)
    }

    /// The length of the first piece of an access of `count` bytes.
    fn piece(&self, at: u16, count: usize) -> usize {
        let owner = self.layout.owner(at);
        let mut same = 1;
        while (at.wrapping_add(same)) % 4 != 0 && self.layout.owner(at.wrapping_add(same)) == owner
        {
            same += 1;
        }
        let count = count.min(usize::from(same));
        match count {
            4.. if at.is_multiple_of(4) => 4,
            2.. if at.is_multiple_of(2) => 2,
            _ => count.min(1),
        }
    }

    fn read_piece(&self, function: &dyn PciFunction, at: u16, to: &mut [u8]) {
        function.config_read(at, to);
        for (position, byte) in (at..).zip(to) {
            let mask = self.layout.mask(position);
            let shadow = self.shadow.get(usize::from(position)).copied().unwrap_or(0);
            *byte = (*byte & !mask.virt) | (shadow & mask.virt);
        }
    }

    /// Stores the writable bits: the virtual ones in the shadow, the others in the hardware.
    fn store(&mut self, function: &dyn PciFunction, at: u16, from: &[u8]) {
        let mut hardware = [0; 4];
        let Some(hardware) = hardware.get_mut(..from.len()) else { return };
        let (mut any, mut all) = (false, true);
        for (position, _) in (at..).zip(from) {
            let mask = self.layout.mask(position);
            any |= mask.write & !mask.virt != 0;
            all &= mask.write & !mask.virt == 0xff;
        }
        if any && !all {
            function.config_read(at, hardware);
        }
        for ((position, byte), hardware) in (at..).zip(from).zip(hardware.iter_mut()) {
            let mask = self.layout.mask(position);
            let (to_shadow, to_hardware) = (mask.write & mask.virt, mask.write & !mask.virt);
            if let Some(shadow) = self.shadow.get_mut(usize::from(position)) {
                *shadow = (*shadow & !to_shadow) | (byte & to_shadow);
            }
            *hardware = (*hardware & !to_hardware) | (byte & to_hardware);
        }
        if any {
            function.config_write(at, hardware);
        }
    }

    /// The user turns decoding on, and so had it, but the hardware has it off: the function was reset
    /// by a way of its own and has lost its BARs.
    fn recover_bars(&self, function: &dyn PciFunction, from: &[u8]) {
        let new = u16::from(from.first().copied().unwrap_or(0));
        let (had, has) = (self.command(), read16(function, PCI_COMMAND));
        let decode = PCI_COMMAND_MEMORY | PCI_COMMAND_IO;
        if new & had & !has & decode != 0 {
            self.restore_bars(function);
        }
    }

    /// Writes the BARs as firmware had set them.
    pub(crate) fn restore_bars(&self, function: &dyn PciFunction) {
        for (bar, at) in self.hardware_bars.iter().zip(bar_offsets()) {
            function.config_write(at, &bar.to_le_bytes());
        }
    }

    fn header_written(&mut self, at: u16, from: &[u8]) -> Effect {
        if at == PCI_COMMAND {
            // The enable bits are the hardware's, but what was asked for is remembered.
            let decode = (PCI_COMMAND_MEMORY | PCI_COMMAND_IO).to_le_bytes()[0];
            let new = from.first().copied().unwrap_or(0);
            if let Some(shadow) = self.shadow.get_mut(usize::from(PCI_COMMAND)) {
                *shadow = (*shadow & !decode) | (new & decode);
            }
        }
        self.fix_bars();
        if at == PCI_COMMAND || at == PCI_COMMAND + 1 { Effect::Command } else { Effect::None }
    }

    fn capability_written(
        &mut self,
        function: &dyn PciFunction,
        capability: Capability,
        at: u16,
        from: &[u8],
        msi: Option<u8>,
    ) -> Effect {
        let start = capability.start;
        let touches = |register: u16| {
            let register = start + register;
            at <= register && at.saturating_add(len16(from)) > register
        };
        match capability.kind {
            CapabilityKind::Standard(PCI_CAP_ID_MSI) if touches(PCI_MSI_FLAGS) => {
                self.msi_control_written(function, start, msi);
                Effect::None
            }
            CapabilityKind::Standard(PCI_CAP_ID_PM) if touches(PCI_PM_CTRL) => {
                Effect::PowerState(from.first().copied().unwrap_or(0) & 3)
            }
            CapabilityKind::Standard(PCI_CAP_ID_EXP)
                if touches(PCI_EXP_DEVCTL) || touches(PCI_EXP_DEVCTL + 1) =>
            {
                self.device_control_written(function, start)
            }
            CapabilityKind::Standard(PCI_CAP_ID_AF) if touches(PCI_AF_CTRL) => {
                let control = start + PCI_AF_CTRL;
                let asked = self.shadow16(control) & 1 != 0;
                self.clear_shadow16(control, 1);
                let able =
                    read16(function, start + PCI_AF_CAP) & PCI_AF_CAP_TP_FLR == PCI_AF_CAP_TP_FLR;
                if asked && able { Effect::Reset } else { Effect::None }
            }
            CapabilityKind::Standard(PCI_CAP_ID_VPD) if touches(PCI_VPD_ADDR + 1) => {
                self.vpd_address_written(function, start);
                Effect::None
            }
            _ => Effect::None,
        }
    }

    /// MSI is enabled through `VFIO_DEVICE_SET_IRQS`: here the user can only turn it off and on again,
    /// with no more vectors than are there.
    fn msi_control_written(&mut self, function: &dyn PciFunction, start: u16, msi: Option<u8>) {
        let control = start + PCI_MSI_FLAGS;
        let mut flags = self.shadow16(control);
        if msi.is_none() {
            flags &= !PCI_MSI_FLAGS_ENABLE;
        }
        let most = u16::from(msi.unwrap_or(0));
        if (flags & PCI_MSI_FLAGS_QSIZE) >> 4 > most {
            flags = (flags & !PCI_MSI_FLAGS_QSIZE) | most << 4;
        }
        self.set_shadow16(control, flags);
        if msi.is_some() {
            function.config_write(control, &flags.to_le_bytes());
        }
    }

    /// The reset bit reads 0 and starts a reset; the read request size is let through, but not below
    /// the payload size of the hardware.
    fn device_control_written(&mut self, function: &dyn PciFunction, start: u16) -> Effect {
        let control = start + PCI_EXP_DEVCTL;
        let asked = self.shadow16(control);
        self.clear_shadow16(control, PCI_EXP_DEVCTL_FLR);
        let hardware = read16(function, control);
        let payload = (hardware & PCI_EXP_DEVCTL_PAYLOAD) >> 5;
        let request = ((asked & PCI_EXP_DEVCTL_READRQ) >> 12).max(payload);
        let wanted = (hardware & !PCI_EXP_DEVCTL_READRQ) | request << 12;
        if wanted != hardware {
            function.config_write(control, &wanted.to_le_bytes());
        }
        let able = read32(function, start + PCI_EXP_DEVCAP) & PCI_EXP_DEVCAP_FLR != 0;
        if asked & PCI_EXP_DEVCTL_FLR != 0 && able { Effect::Reset } else { Effect::None }
    }

    /// Vital product data go through a window: flag 1 writes the data, flag 0 reads them, and the flag
    /// turns over when that is done (PCI Local Bus 3.0 appendix I).
    fn vpd_address_written(&mut self, function: &dyn PciFunction, start: u16) {
        let (address_at, data_at) = (start + PCI_VPD_ADDR, start + PCI_VPD_DATA);
        let address = self.shadow16(address_at);
        let write = address & PCI_VPD_ADDR_F != 0;
        if write {
            let data = [0, 1, 2, 3]
                .map(|byte| self.shadow.get(usize::from(data_at + byte)).copied().unwrap_or(0));
            function.config_write(data_at, &data);
        }
        function.config_write(address_at, &address.to_le_bytes());
        let turned =
            (0..VPD_POLLS).any(|_| (read16(function, address_at) ^ address) & PCI_VPD_ADDR_F != 0);
        if !turned {
            return;
        }
        if !write {
            let data = read32(function, data_at).to_le_bytes();
            for (position, byte) in (data_at..).zip(data) {
                if let Some(shadow) = self.shadow.get_mut(usize::from(position)) {
                    *shadow = byte;
                }
            }
        }
        self.set_shadow16(address_at, address ^ PCI_VPD_ADDR_F);
    }

    /// Gives the virtual BARs the bits that hardware would hold: size mask and type.
    fn fix_bars(&mut self) {
        let mut index = 0;
        while index < 6 {
            let at = PCI_BASE_ADDRESS_0 + 4 * index;
            match self.bars.get(usize::from(index)).copied().flatten() {
                None => self.set_shadow32(at, 0),
                Some(bar) => {
                    let mask = !bar.size.wrapping_sub(1);
                    let wide = bar.kind == BarKind::Memory64;
                    let kind = u32::from(wide) << 2 | u32::from(bar.prefetchable) << 3;
                    let value =
                        u64::from(self.shadow32(at)) | u64::from(self.shadow32(at + 4)) << 32;
                    let (low, high) = halves(value & mask);
                    self.set_shadow32(at, (low & !0xf) | kind);
                    if wide && index < 5 {
                        self.set_shadow32(at + 4, high);
                        index += 1;
                    }
                }
            }
            index += 1;
        }
        // No function here has an expansion ROM.
        self.set_shadow32(PCI_ROM_ADDRESS, 0);
    }

    fn shadow16(&self, at: u16) -> u16 {
        let at = usize::from(at);
        let mut bytes = [0; 2];
        if let Some(shadow) = self.shadow.get(at..at + 2) {
            bytes.copy_from_slice(shadow);
        }
        u16::from_le_bytes(bytes)
    }

    fn set_shadow16(&mut self, at: u16, value: u16) {
        let at = usize::from(at);
        if let Some(shadow) = self.shadow.get_mut(at..at + 2) {
            shadow.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn clear_shadow16(&mut self, at: u16, bits: u16) {
        self.set_shadow16(at, self.shadow16(at) & !bits);
    }

    fn shadow32(&self, at: u16) -> u32 {
        u32::from(self.shadow16(at)) | u32::from(self.shadow16(at + 2)) << 16
    }

    fn set_shadow32(&mut self, at: u16, value: u32) {
        let at = usize::from(at);
        if let Some(shadow) = self.shadow.get_mut(at..at + 4) {
            shadow.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// Reads 16 bits of the hardware's configuration space.
pub(crate) fn read16(function: &dyn PciFunction, at: u16) -> u16 {
    let mut bytes = [0; 2];
    function.config_read(at, &mut bytes);
    u16::from_le_bytes(bytes)
}

/// Reads 32 bits of the hardware's configuration space.
pub(crate) fn read32(function: &dyn PciFunction, at: u16) -> u32 {
    let mut bytes = [0; 4];
    function.config_read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Sets and clears bits of the command register.
pub(crate) fn change_command(function: &dyn PciFunction, clear: u16, set: u16) {
    let old = read16(function, PCI_COMMAND);
    let new = (old & !clear) | set;
    if new != old {
        function.config_write(PCI_COMMAND, &new.to_le_bytes());
    }
}

/// Where BARs 0 to 5 and the expansion ROM are.
fn bar_offsets() -> impl Iterator<Item = u16> {
    (0..6).map(|index| PCI_BASE_ADDRESS_0 + 4 * index).chain([PCI_ROM_ADDRESS])
}

fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))
}

fn len16(bytes: &[u8]) -> u16 {
    u16::try_from(bytes.len()).unwrap_or(u16::MAX)
}
