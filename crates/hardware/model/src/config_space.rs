//! A function's configuration space: a type 0 header, BARs that size themselves, the capability
//! list, and which bits a write may change (PCIe Base 5.0 7.5.1, 7.5.3, 7.7).

use crate::msix::MsixGate;
use crate::pci::{Bar, BarKind, Msi};

/// Bytes of configuration space.
pub const CONFIG_SPACE_SIZE: usize = 4096;

/// The fields of a type 0 header that tell one function from another.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Header {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class 23:16, sub-class 15:8, programming interface 7:0.
    pub class: u32,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
    /// Interrupt Pin: 0 none, 1 to 4 INTA to INTD.
    pub interrupt_pin: u8,
}

/// Where a function keeps its MSI-X structures (PCIe Base 5.0 7.7.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsixLayout {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// BAR of the table.
    pub table_bar: u8,
    /// Offset of the table in that BAR, a multiple of 8.
    pub table_offset: u32,
    /// BAR of the Pending Bit Array.
    pub pba_bar: u8,
    /// Offset of the Pending Bit Array in that BAR, a multiple of 8.
    pub pba_offset: u32,
}

/// The shape of an MSI capability (PCIe Base 5.0 7.7.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MsiLayout {
    /// Log2 of the number of vectors, 0 to 5.
    pub vectors_log2: u8,
    /// 64-bit Address Capable.
    pub wide: bool,
    /// Per-Vector Masking Capable.
    pub maskable: bool,
}

/// The capabilities of a function, in the order of the list.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Capabilities {
    /// A PCI Express endpoint with function level reset; without it, a conventional PCI function.
    pub express: bool,
    /// MSI.
    pub msi: Option<MsiLayout>,
    /// MSI-X.
    pub msix: Option<MsixLayout>,
}

/// What a write to configuration space asks of the function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct Written {
    /// Initiate Function Level Reset was written as 1: the function resets itself now.
    pub function_level_reset: bool,
}

/// The configuration space of one function.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    at_reset: Vec<u8>,
    writable: Vec<u8>,
    write_one_clears: Vec<u8>,
    express: Option<usize>,
    msi: Option<(usize, MsiLayout)>,
    msix: Option<usize>,
}

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const COMMAND_INTX_DISABLE_HIGH: u8 = 1 << 2;
const STATUS: usize = 0x06;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITY_LIST: u8 = 1 << 4;
const STATUS_RECEIVED_MASTER_ABORT_HIGH: u8 = 1 << 5;
const FIRST_BAR: usize = 0x10;
const CAPABILITY_POINTER: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

const ID_MSI: u8 = 0x05;
const ID_EXPRESS: u8 = 0x10;
const ID_MSIX: u8 = 0x11;

const EXPRESS_LEN: usize = 0x3c;
const DEVICE_CONTROL_HIGH: usize = 0x09;
const INITIATE_FLR_HIGH: u8 = 1 << 7;

const MSI_CONTROL: usize = 2;
const MSI_ENABLE: u8 = 1;
const MSIX_CONTROL_HIGH: usize = 3;
const MSIX_ENABLE_HIGH: u8 = 1 << 7;
const MSIX_FUNCTION_MASK_HIGH: u8 = 1 << 6;

impl ConfigSpace {
    /// The space of a function with these BARs and capabilities, as after reset.
    pub fn new(header: &Header, bars: &[Option<Bar>; 6], capabilities: &Capabilities) -> Self {
        let mut space = Self {
            bytes: vec![0; CONFIG_SPACE_SIZE],
            at_reset: Vec::new(),
            writable: vec![0; CONFIG_SPACE_SIZE],
            write_one_clears: vec![0; CONFIG_SPACE_SIZE],
            express: None,
            msi: None,
            msix: None,
        };
        space.lay_header(header);
        space.lay_bars(bars);
        space.lay_capabilities(capabilities);
        space.at_reset = space.bytes.clone();
        space
    }

    /// Copies the bytes from `offset`; all ones beyond the end.
    pub fn read(&self, offset: u16, to: &mut [u8]) {
        let from = self.bytes.get(usize::from(offset)..).unwrap_or(&[]);
        let there = from.len().min(to.len());
        let (inside, beyond) = to.split_at_mut(there);
        inside.copy_from_slice(&from[..there]);
        beyond.fill(0xff);
    }

    /// Stores into the bits that software may change. After it, offer pending interrupts again:
    /// [`crate::Msix::release`], [`ConfigSpace::release_msi`].
    pub fn write(&mut self, offset: u16, from: &[u8]) -> Written {
        let mut function_level_reset = false;
        for (at, &value) in (usize::from(offset)..CONFIG_SPACE_SIZE).zip(from) {
            let writable = self.writable[at];
            let cleared = self.write_one_clears[at] & value;
            self.bytes[at] = self.bytes[at] & !writable & !cleared | value & writable;
            function_level_reset |= self.express.map(|cap| cap + DEVICE_CONTROL_HIGH) == Some(at)
                && value & INITIATE_FLR_HIGH != 0;
        }
        Written { function_level_reset }
    }

    /// Every register as after reset: decoding, bus mastering and interrupts off, BARs 0.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.at_reset);
    }

    /// Memory Space Enable: the BARs answer.
    pub fn memory_enabled(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY != 0
    }

    /// Bus Master Enable: the function may issue memory requests.
    pub fn bus_master(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_BUS_MASTER != 0
    }

    /// Interrupt Disable: the function must not assert INTx.
    pub fn intx_disabled(&self) -> bool {
        self.bytes[COMMAND + 1] & COMMAND_INTX_DISABLE_HIGH != 0
    }

    /// Interrupt Status: an INTx is pending inside the function, whether or not it is disabled.
    pub fn set_intx_status(&mut self, pending: bool) {
        self.bytes[STATUS] &= !STATUS_INTERRUPT;
        self.bytes[STATUS] |= if pending { STATUS_INTERRUPT } else { 0 };
    }

    /// Received Master Abort: a request of the function ended as an Unsupported Request. Software
    /// clears it by writing 1.
    pub fn set_received_master_abort(&mut self) {
        self.bytes[STATUS + 1] |= STATUS_RECEIVED_MASTER_ABORT_HIGH;
    }

    /// What MSI-X messages must pass, besides the mask bit of their entry.
    pub fn msix_gate(&self) -> MsixGate {
        let control = self.msix.map_or(0, |cap| self.bytes[cap + MSIX_CONTROL_HIGH]);
        MsixGate {
            enabled: control & MSIX_ENABLE_HIGH != 0,
            masked: control & MSIX_FUNCTION_MASK_HIGH != 0,
            bus_master: self.bus_master(),
        }
    }

    /// MSI Enable.
    pub fn msi_enabled(&self) -> bool {
        self.msi.is_some_and(|(cap, _)| self.bytes[cap + MSI_CONTROL] & MSI_ENABLE != 0)
    }

    /// An event on MSI vector `vector`: the message to send now, if it may leave. Vectors above
    /// the enabled count fold onto it. What a mask bit holds back becomes pending.
    pub fn raise_msi(&mut self, vector: u8) -> Option<Msi> {
        let (cap, layout) = self.msi?;
        if !self.msi_enabled() {
            return None;
        }
        let vector = vector & (self.msi_count(cap, layout) - 1);
        if layout.maskable {
            let bit = 1 << vector;
            if self.dword(cap + msi_mask(layout)) & bit != 0 || !self.bus_master() {
                let pending = self.dword(cap + msi_pending(layout)) | bit;
                self.set_dword(cap + msi_pending(layout), pending);
                return None;
            }
        }
        self.bus_master().then(|| self.msi_message(cap, layout, vector))
    }

    /// One pending MSI message that may leave now, no longer pending. Call until `None` after a
    /// write.
    pub fn release_msi(&mut self) -> Option<Msi> {
        let (cap, layout) = self.msi.filter(|(_, layout)| layout.maskable)?;
        let pending = self.dword(cap + msi_pending(layout));
        if pending == 0 || !self.msi_enabled() || !self.bus_master() {
            return None;
        }
        let vector = (pending & !self.dword(cap + msi_mask(layout))).trailing_zeros();
        let vector = u8::try_from(vector).ok().filter(|&vector| vector < 32)?;
        self.set_dword(cap + msi_pending(layout), pending & !(1 << vector));
        Some(self.msi_message(cap, layout, vector))
    }

    fn msi_count(&self, cap: usize, layout: MsiLayout) -> u8 {
        let enabled_log2 = self.bytes[cap + MSI_CONTROL] >> 4 & 7;
        1 << enabled_log2.min(layout.vectors_log2.min(5))
    }

    fn msi_message(&self, cap: usize, layout: MsiLayout, vector: u8) -> Msi {
        let (high, data_at) =
            if layout.wide { (self.dword(cap + 8), cap + 12) } else { (0, cap + 8) };
        let data = self.dword(data_at) & 0xffff;
        let low_bits = u32::from(self.msi_count(cap, layout)) - 1;
        Msi {
            address: u64::from(high) << 32 | u64::from(self.dword(cap + 4)),
            data: data & !low_bits | u32::from(vector),
        }
    }

    fn lay_header(&mut self, header: &Header) {
        let class = header.class.to_le_bytes();
        self.lay(0x00, &header.vendor.to_le_bytes(), &[]);
        self.lay(0x02, &header.device.to_le_bytes(), &[]);
        let intx_disable = if header.interrupt_pin == 0 { 0 } else { COMMAND_INTX_DISABLE_HIGH };
        self.lay(COMMAND, &[], &[COMMAND_MEMORY | COMMAND_BUS_MASTER, intx_disable]);
        self.lay(STATUS, &[STATUS_CAPABILITY_LIST], &[]);
        self.write_one_clears[STATUS + 1] = STATUS_RECEIVED_MASTER_ABORT_HIGH;
        self.lay(0x08, &[header.revision, class[0], class[1], class[2]], &[]);
        // Cache Line Size: no effect in PCI Express, but writable (7.5.1.1.7).
        self.lay(0x0c, &[], &[0xff]);
        self.lay(0x2c, &header.subsystem_vendor.to_le_bytes(), &[]);
        self.lay(0x2e, &header.subsystem.to_le_bytes(), &[]);
        self.lay(0x3c, &[0, header.interrupt_pin], &[0xff]);
    }

    fn lay_bars(&mut self, bars: &[Option<Bar>; 6]) {
        for (at, bar) in (FIRST_BAR..).step_by(4).zip(bars) {
            let Some(bar) = bar else { continue };
            let wide = bar.kind == BarKind::Memory64;
            let flags = u8::from(wide) << 2 | u8::from(bar.prefetchable) << 3;
            let size = bar.size.max(16).checked_next_power_of_two();
            let mask = size.unwrap_or(1 << 63).wrapping_neg().to_le_bytes();
            // The upper half of a 64-bit BAR cannot lie outside the six.
            let len = if wide && at < FIRST_BAR + 5 * 4 { 8 } else { 4 };
            self.lay(at, &[flags], &mask[..len]);
        }
    }

    fn lay_capabilities(&mut self, capabilities: &Capabilities) {
        let mut link = CAPABILITY_POINTER;
        let mut free = FIRST_CAPABILITY;
        if capabilities.express {
            self.express = Some(free);
            self.lay_express(free);
            self.link(&mut link, &mut free, EXPRESS_LEN);
        }
        if let Some(layout) = capabilities.msi {
            self.msi = Some((free, layout));
            let len = self.lay_msi(free, layout);
            self.link(&mut link, &mut free, len);
        }
        if let Some(layout) = capabilities.msix {
            self.msix = Some(free);
            self.lay_msix(free, layout);
            self.link(&mut link, &mut free, 12);
        }
        if link == CAPABILITY_POINTER {
            self.bytes[STATUS] &= !STATUS_CAPABILITY_LIST;
        }
    }

    /// Makes the list reach the capability at `free`, and reserves its `len` bytes.
    fn link(&mut self, link: &mut usize, free: &mut usize, len: usize) {
        self.bytes[*link] = u8::try_from(*free).unwrap_or(0);
        *link = *free + 1;
        *free = (*free + len).next_multiple_of(4);
    }

    fn lay_express(&mut self, cap: usize) {
        const VERSION_2: u8 = 2;
        const ROLE_BASED_ERROR_REPORTING: u32 = 1 << 15;
        const FLR_CAPABLE: u32 = 1 << 28;
        const EXTENDED_TAG: u32 = 1 << 5;
        const ONE_LANE_2_5_GT: u16 = 0x0011;
        self.lay(cap, &[ID_EXPRESS, 0, VERSION_2, 0], &[]);
        let device = FLR_CAPABLE | ROLE_BASED_ERROR_REPORTING | EXTENDED_TAG;
        self.lay(cap + 0x04, &device.to_le_bytes(), &[]);
        // Error reporting, relaxed ordering, payload size, extended tag, no snoop, read request
        // size. Their defaults are relaxed ordering, no snoop, 512-byte reads (7.5.3.4).
        self.lay(cap + 0x08, &0x2810_u16.to_le_bytes(), &[0xff, 0x79]);
        self.lay(cap + 0x0c, &u32::from(ONE_LANE_2_5_GT).to_le_bytes(), &[]);
        // Active State PM, read completion boundary, common clock, extended synch.
        self.lay(cap + 0x10, &[], &[0xcb, 0x00]);
        self.lay(cap + 0x12, &ONE_LANE_2_5_GT.to_le_bytes(), &[]);
    }

    /// Returns the length of the capability.
    fn lay_msi(&mut self, cap: usize, layout: MsiLayout) -> usize {
        let control = layout.vectors_log2.min(5) << 1 | u8::from(layout.wide) << 7;
        self.lay(cap, &[ID_MSI, 0, control, u8::from(layout.maskable)], &[]);
        self.writable[cap + MSI_CONTROL] = MSI_ENABLE | 0x70;
        self.lay(cap + 4, &[], &[0xfc, 0xff, 0xff, 0xff]);
        let data = if layout.wide {
            self.lay(cap + 8, &[], &[0xff; 4]);
            cap + 12
        } else {
            cap + 8
        };
        self.lay(data, &[], &[0xff; 2]);
        if !layout.maskable {
            return data + 2 - cap;
        }
        let vectors = u32::MAX >> (32 - (1_u32 << layout.vectors_log2.min(5)));
        self.lay(cap + msi_mask(layout), &[], &vectors.to_le_bytes());
        msi_pending(layout) + 4
    }

    fn lay_msix(&mut self, cap: usize, layout: MsixLayout) {
        let size = layout.vectors.clamp(1, 2048) - 1;
        let table = layout.table_offset & !7 | u32::from(layout.table_bar & 7);
        let pba = layout.pba_offset & !7 | u32::from(layout.pba_bar & 7);
        self.lay(cap, &[ID_MSIX, 0], &[]);
        self.lay(cap + 2, &size.to_le_bytes(), &[]);
        self.writable[cap + MSIX_CONTROL_HIGH] = MSIX_ENABLE_HIGH | MSIX_FUNCTION_MASK_HIGH;
        self.lay(cap + 4, &table.to_le_bytes(), &[]);
        self.lay(cap + 8, &pba.to_le_bytes(), &[]);
    }

    /// Puts reset values and write masks at `at`, which lies inside the space.
    fn lay(&mut self, at: usize, values: &[u8], writable: &[u8]) {
        for (byte, value) in self.bytes[at..].iter_mut().zip(values) {
            *byte = *value;
        }
        for (mask, bits) in self.writable[at..].iter_mut().zip(writable) {
            *mask = *bits;
        }
    }

    fn dword(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.bytes[at..at + 4]);
        u32::from_le_bytes(bytes)
    }

    fn set_dword(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    }
}

fn msi_mask(layout: MsiLayout) -> usize {
    if layout.wide { 0x10 } else { 0x0c }
}

fn msi_pending(layout: MsiLayout) -> usize {
    msi_mask(layout) + 4
}

#[cfg(test)]
mod tests;
