//! Which capability each byte of configuration space belongs to, and which of its bits are virtual and
//! which writable.

use lychgate_model::PciFunction;

use super::{
    PCI_CAP_ID_AF, PCI_CAP_ID_EXP, PCI_CAP_ID_MSI, PCI_CAP_ID_MSIX, PCI_CAP_ID_PM, PCI_CAP_ID_VPD,
    PCI_EXP_DEVCTL, PCI_EXP_DEVCTL2, PCI_MSI_FLAGS, read16, read32,
};

/// Length of the header, which every function has.
const HEADER: u16 = 0x40;
/// First byte of extended configuration space.
const EXTENDED: u16 = 0x100;

const PCI_STATUS: u16 = 0x06;
const PCI_STATUS_CAP_LIST: u8 = 1 << 4;
const PCI_CAPABILITY_LIST: u16 = 0x34;

const PCI_CAP_ID_AGP: u8 = 0x02;
const PCI_CAP_ID_VNDR: u8 = 0x09;
const PCI_CAP_ID_SATA: u8 = 0x12;

const PCI_EXT_CAP_ID_ERR: u16 = 0x01;
const PCI_EXT_CAP_ID_VC: u16 = 0x02;
const PCI_EXT_CAP_ID_DSN: u16 = 0x03;
const PCI_EXT_CAP_ID_PWR: u16 = 0x04;
const PCI_EXT_CAP_ID_MFVC: u16 = 0x08;
const PCI_EXT_CAP_ID_VC9: u16 = 0x09;
const PCI_EXT_CAP_ID_VNDR: u16 = 0x0b;
const PCI_EXT_CAP_ID_ACS: u16 = 0x0d;
const PCI_EXT_CAP_ID_ARI: u16 = 0x0e;
const PCI_EXT_CAP_ID_ATS: u16 = 0x0f;
const PCI_EXT_CAP_ID_SRIOV: u16 = 0x10;
const PCI_EXT_CAP_ID_MCAST: u16 = 0x12;
const PCI_EXT_CAP_ID_PRI: u16 = 0x13;
const PCI_EXT_CAP_ID_REBAR: u16 = 0x15;
const PCI_EXT_CAP_ID_DPA: u16 = 0x16;
const PCI_EXT_CAP_ID_TPH: u16 = 0x17;
const PCI_EXT_CAP_ID_LTR: u16 = 0x18;
const PCI_EXT_CAP_ID_DVSEC: u16 = 0x23;

/// The uncorrectable errors of PCIe Base 5.0 7.8.4.2.
const AER_UNCORRECTABLE: u32 = 0x03ff_f031;
/// The correctable errors of PCIe Base 5.0 7.8.4.5.
const AER_CORRECTABLE: u32 = 0x0000_f1c1;
/// ECRC generation and check enable.
const AER_CONTROL: u32 = 0x0000_0140;

/// Which list a capability is in, and its id there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CapabilityKind {
    /// The list from the header.
    Standard(u8),
    /// The list from 0x100.
    Extended(u16),
}

/// A capability that the user sees.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Capability {
    /// What it is.
    pub(crate) kind: CapabilityKind,
    /// Offset of its first byte.
    pub(crate) start: u16,
}

/// Whom a byte belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Owner {
    /// The header.
    Header,
    /// A capability.
    Capability(Capability),
    /// Nobody that is known: device-specific registers.
    Nobody,
}

/// The bits of one byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mask {
    /// Bits that live in the shadow.
    pub(super) virt: u8,
    /// Bits that may be written.
    pub(super) write: u8,
}

const RAW: Mask = Mask { virt: 0, write: 0xff };
const READ_ONLY: Mask = Mask { virt: 0, write: 0 };

/// All of configuration space.
pub(super) struct Layout {
    bytes: Vec<(Owner, Mask)>,
    capabilities: Vec<Capability>,
}

impl Layout {
    /// Looks at a function: gives the layout, and the shadow with what the user shall see first.
    pub(super) fn of(function: &dyn PciFunction) -> (Self, Vec<u8>) {
        let size = config_size(function);
        let mut shadow = vec![0; usize::from(size)];
        function.config_read(0, &mut shadow);
        let mut layout =
            Self { bytes: vec![(Owner::Nobody, RAW); usize::from(size)], capabilities: Vec::new() };
        layout.header();
        layout.standard(function, &mut shadow);
        if size > EXTENDED {
            layout.extended(function, &mut shadow);
        }
        (layout, shadow)
    }

    pub(super) fn owner(&self, at: u16) -> Owner {
        self.bytes.get(usize::from(at)).map_or(Owner::Nobody, |byte| byte.0)
    }

    pub(super) fn mask(&self, at: u16) -> Mask {
        self.bytes.get(usize::from(at)).map_or(READ_ONLY, |byte| byte.1)
    }

    pub(super) fn find(&self, kind: CapabilityKind) -> Option<Capability> {
        self.capabilities.iter().copied().find(|capability| capability.kind == kind)
    }

    fn claim(&mut self, start: u16, len: u16, owner: Owner, mask: Mask) {
        let start = usize::from(start);
        let end = (start + usize::from(len)).min(self.bytes.len());
        if let Some(bytes) = self.bytes.get_mut(start..end) {
            bytes.fill((owner, mask));
        }
    }

    /// Sets `bytes` bytes from `at`: little-endian masks.
    fn set(&mut self, at: u16, bytes: usize, virt: u32, write: u32) {
        let masks = virt.to_le_bytes().into_iter().zip(write.to_le_bytes());
        let at = usize::from(at);
        for (byte, (virt, write)) in self.bytes.iter_mut().skip(at).take(bytes).zip(masks) {
            byte.1 = Mask { virt, write };
        }
    }

    fn header(&mut self) {
        self.claim(0, HEADER, Owner::Header, READ_ONLY);
        self.set(0x00, 4, u32::MAX, 0); // vendor and device
        self.set(0x04, 2, u32::from(super::PCI_COMMAND_INTX_DISABLE), u32::MAX);
        self.set(PCI_STATUS, 2, u32::from(PCI_STATUS_CAP_LIST), 0);
        self.set(0x0c, 2, 0, u32::MAX); // cache line size, latency timer
        self.set(0x0f, 1, 0, u32::MAX); // BIST
        for bar in super::bar_offsets() {
            self.set(bar, 4, u32::MAX, u32::MAX);
        }
        self.set(PCI_CAPABILITY_LIST, 1, u32::MAX, 0);
        self.set(0x3c, 1, u32::MAX, u32::MAX); // interrupt line
        self.set(super::PCI_INTERRUPT_PIN, 1, u32::MAX, 0);
    }

    /// Follows the list of the header, and takes out of it what the user shall not see.
    fn standard(&mut self, function: &dyn PciFunction, shadow: &mut [u8]) {
        let status = usize::from(PCI_STATUS);
        if shadow.get(status).is_none_or(|status| status & PCI_STATUS_CAP_LIST == 0) {
            return;
        }
        let mut previous = PCI_CAPABILITY_LIST;
        let mut at = byte(shadow, previous) & !3;
        // A list has no more entries than there are dwords for it; a loop in it ends here.
        for _ in 0..(EXTENDED - HEADER) / 4 {
            let start = u16::from(at);
            if start < HEADER {
                break;
            }
            let (id, next) = (byte(shadow, start), byte(shadow, start + 1) & !3);
            match standard_len(function, id, start) {
                0 => put(shadow, previous, next),
                len => {
                    self.add(CapabilityKind::Standard(id), start, len.min(EXTENDED - start));
                    self.standard_masks(function, id, start, shadow);
                    previous = start + 1;
                }
            }
            at = next;
        }
        if self.capabilities.is_empty() {
            put(shadow, PCI_STATUS, byte(shadow, PCI_STATUS) & !PCI_STATUS_CAP_LIST);
        }
    }

    fn standard_masks(
        &mut self,
        function: &dyn PciFunction,
        id: u8,
        start: u16,
        shadow: &mut [u8],
    ) {
        if id == PCI_CAP_ID_VNDR {
            self.claim_masks(start, RAW);
        }
        self.set(start + 1, 1, u32::MAX, 0);
        match id {
            PCI_CAP_ID_PM => {
                // Nobody listens to PME: it reads as if it were not there.
                const PMC_PME: u16 = 0xf800;
                const PMCSR_PME: u16 = 0x8100;
                self.set(start + 2, 2, u32::from(PMC_PME), 0);
                self.set(start + 4, 4, u32::from(PMCSR_PME), !(u32::from(PMCSR_PME) | 3));
                for (at, bits) in [(start + 2, PMC_PME), (start + 4, PMCSR_PME)] {
                    for (position, clear) in (at..).zip(bits.to_le_bytes()) {
                        put(shadow, position, byte(shadow, position) & !clear);
                    }
                }
            }
            PCI_CAP_ID_VPD => {
                self.set(start + 2, 2, u32::MAX, u32::MAX);
                self.set(start + 4, 4, u32::MAX, u32::MAX);
            }
            PCI_CAP_ID_MSI => self.msi_masks(start, read16(function, start + PCI_MSI_FLAGS)),
            PCI_CAP_ID_EXP => {
                const FLR_PAYLOAD_READRQ: u32 = 0xf0e0;
                const PHANTOM: u32 = 0x0200;
                const ARI: u32 = 0x0020;
                self.set(start + PCI_EXP_DEVCTL, 2, FLR_PAYLOAD_READRQ, !PHANTOM);
                if standard_len(function, id, start) > PCI_EXP_DEVCTL2 {
                    self.set(start + PCI_EXP_DEVCTL2, 2, 0, !ARI);
                }
            }
            PCI_CAP_ID_AF => self.set(start + 4, 1, 1, 1),
            _ => {}
        }
    }

    /// The message is virtual, mask and pending bits are the hardware's. Of the control register the
    /// user may write the enable bit and the number of messages.
    fn msi_masks(&mut self, start: u16, flags: u16) {
        let wide = flags & 1 << 7 != 0;
        let data = if wide { start + 0xc } else { start + 8 };
        self.set(start + PCI_MSI_FLAGS, 1, u32::MAX, 0x71);
        self.set(start + 4, 4, u32::MAX, u32::MAX);
        if wide {
            self.set(start + 8, 4, u32::MAX, u32::MAX);
        }
        self.set(data, 2, u32::MAX, u32::MAX);
        if flags & 1 << 8 != 0 {
            self.set(data + 4, 4, 0, u32::MAX);
            self.set(data + 8, 4, 0, u32::MAX);
        }
    }

    /// Follows the list from 0x100. One that is hidden is skipped, but for the first, which stays as an
    /// anchor without an id.
    fn extended(&mut self, function: &dyn PciFunction, shadow: &mut [u8]) {
        const NEXT: u32 = 0xffc0_0000;
        let mut previous = None;
        let mut start = EXTENDED;
        if read32(function, EXTENDED) == 0 {
            return;
        }
        let mut seen = false;
        for _ in 0..(4096 - EXTENDED) / 4 {
            if start < EXTENDED {
                break;
            }
            let header = read32(function, start);
            let [low, high, ..] = header.to_le_bytes();
            let id = u16::from_le_bytes([low, high]);
            let next = u16::try_from(header >> 20).unwrap_or(0) & 0xffc;
            let len = extended_len(function, id, start);
            match previous {
                Some(previous) if len == 0 => {
                    let kept = dword(shadow, previous) & !NEXT;
                    put32(shadow, previous, kept | u32::from(next) << 20);
                }
                _ if len == 0 => {
                    self.claim(start, 4, Owner::Capability(anchor(start)), READ_ONLY);
                    self.set(start, 4, u32::MAX, 0);
                    put32(shadow, start, header & NEXT);
                    previous = Some(start);
                }
                _ => {
                    self.add(CapabilityKind::Extended(id), start, len.min(4096 - start));
                    self.extended_masks(id, start);
                    previous = Some(start);
                    seen = true;
                }
            }
            start = next;
        }
        if !seen {
            put32(shadow, EXTENDED, 0);
        }
    }

    fn extended_masks(&mut self, id: u16, start: u16) {
        match id {
            PCI_EXT_CAP_ID_VNDR | PCI_EXT_CAP_ID_DVSEC => self.claim_masks(start, RAW),
            PCI_EXT_CAP_ID_ERR => {
                for register in [0x4, 0x8, 0xc] {
                    self.set(start + register, 4, 0, AER_UNCORRECTABLE);
                }
                for register in [0x10, 0x14] {
                    self.set(start + register, 4, 0, AER_CORRECTABLE);
                }
                self.set(start + 0x18, 4, 0, AER_CONTROL);
            }
            PCI_EXT_CAP_ID_PWR => self.set(start + 4, 1, 0, u32::MAX),
            _ => {}
        }
        self.set(start, 4, u32::MAX, 0);
    }

    fn add(&mut self, kind: CapabilityKind, start: u16, len: u16) {
        let capability = Capability { kind, start };
        self.claim(start, len, Owner::Capability(capability), READ_ONLY);
        self.capabilities.push(capability);
    }

    /// Gives every byte of the capability at `start` the same mask.
    fn claim_masks(&mut self, start: u16, mask: Mask) {
        let owner = self.owner(start);
        for byte in self.bytes.iter_mut().skip(usize::from(start)) {
            if byte.0 != owner {
                break;
            }
            byte.1 = mask;
        }
    }
}

/// What stands for a hidden capability at the head of the extended list.
fn anchor(start: u16) -> Capability {
    Capability { kind: CapabilityKind::Extended(0), start }
}

/// 4096 for a PCI Express function whose extended space answers, else 256 (`pci_cfg_space_size`).
fn config_size(function: &dyn PciFunction) -> u16 {
    let mut at = {
        let mut byte = [0];
        function.config_read(PCI_CAPABILITY_LIST, &mut byte);
        u16::from(byte[0] & !3)
    };
    for _ in 0..(EXTENDED - HEADER) / 4 {
        if at < HEADER {
            break;
        }
        let [id, next] = read16(function, at).to_le_bytes();
        if id == PCI_CAP_ID_EXP {
            return if read32(function, EXTENDED) == u32::MAX { EXTENDED } else { 4096 };
        }
        at = u16::from(next & !3);
    }
    EXTENDED
}

/// Length of a standard capability in bytes; 0 for one that the user does not see.
fn standard_len(function: &dyn PciFunction, id: u8, start: u16) -> u16 {
    match id {
        PCI_CAP_ID_PM | PCI_CAP_ID_VPD => 8,
        PCI_CAP_ID_AGP | PCI_CAP_ID_MSIX => 12,
        PCI_CAP_ID_AF => 6,
        PCI_CAP_ID_MSI => {
            let flags = read16(function, start + PCI_MSI_FLAGS);
            10 + if flags & 1 << 7 != 0 { 4 } else { 0 } + if flags & 1 << 8 != 0 { 10 } else { 0 }
        }
        PCI_CAP_ID_VNDR => u16::from(read16(function, start + 2).to_le_bytes()[0]),
        PCI_CAP_ID_EXP => {
            const RC_END: u16 = 9;
            let flags = read16(function, start + 2);
            match (flags & 0xf, flags >> 4 & 0xf) {
                (1, RC_END) => 0x0c,
                (1, _) => 0x14,
                (_, RC_END) => 0x2c,
                _ => 0x3c,
            }
        }
        PCI_CAP_ID_SATA => {
            const INLINE: u16 = 0xf;
            if read16(function, start + 4) & 0xf == INLINE { 16 } else { 8 }
        }
        _ => 0,
    }
}

/// Length of an extended capability in bytes; 0 for one that the user does not see.
fn extended_len(function: &dyn PciFunction, id: u16, start: u16) -> u16 {
    let register = |at: u16| read32(function, start.saturating_add(at));
    let field = |at: u16, shift: u32, mask: u16| {
        u16::try_from(register(at) >> shift & u32::from(mask)).unwrap_or(0)
    };
    match id {
        PCI_EXT_CAP_ID_ERR => 0x2c,
        PCI_EXT_CAP_ID_DSN => 12,
        PCI_EXT_CAP_ID_PWR | PCI_EXT_CAP_ID_PRI => 16,
        PCI_EXT_CAP_ID_ARI | PCI_EXT_CAP_ID_ATS | PCI_EXT_CAP_ID_LTR => 8,
        PCI_EXT_CAP_ID_SRIOV => 0x40,
        PCI_EXT_CAP_ID_MCAST => 40,
        PCI_EXT_CAP_ID_VC | PCI_EXT_CAP_ID_VC9 | PCI_EXT_CAP_ID_MFVC => {
            let more = field(4, 0, 7);
            let len = 0x10 + (1 + more) * 12;
            match field(8, 0, 0xff) {
                table if table & 8 != 0 => len.next_multiple_of(16) + 64,
                table if table & 4 != 0 => len.next_multiple_of(16) + 32,
                table if table & 2 != 0 => len.next_multiple_of(16) + 16,
                _ => len,
            }
        }
        PCI_EXT_CAP_ID_VNDR | PCI_EXT_CAP_ID_DVSEC => field(4, 20, 0xfff),
        PCI_EXT_CAP_ID_ACS => {
            const EGRESS_CONTROL: u16 = 1 << 5;
            if field(4, 0, EGRESS_CONTROL) == 0 {
                8
            } else {
                match field(4, 8, 0xff) {
                    0 => 8 + 256 / 8,
                    bits => 8 + bits.next_multiple_of(32) / 8,
                }
            }
        }
        PCI_EXT_CAP_ID_REBAR => 4 + field(8, 5, 7) * 8,
        PCI_EXT_CAP_ID_DPA => 16 + field(4, 0, 0x1f) + 1,
        PCI_EXT_CAP_ID_TPH => {
            const TABLE_HERE: u16 = 1;
            match field(4, 9, 3) {
                TABLE_HERE => 12 + field(4, 16, 0x7ff) * 2 + 2,
                _ => 12,
            }
        }
        _ => 0,
    }
}

fn byte(bytes: &[u8], at: u16) -> u8 {
    bytes.get(usize::from(at)).copied().unwrap_or(0)
}

fn put(bytes: &mut [u8], at: u16, value: u8) {
    if let Some(byte) = bytes.get_mut(usize::from(at)) {
        *byte = value;
    }
}

fn dword(bytes: &[u8], at: u16) -> u32 {
    u32::from_le_bytes([0, 1, 2, 3].map(|offset| byte(bytes, at.saturating_add(offset))))
}

fn put32(bytes: &mut [u8], at: u16, value: u32) {
    for (position, value) in (at..).zip(value.to_le_bytes()) {
        put(bytes, position, value);
    }
}
