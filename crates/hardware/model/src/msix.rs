//! MSI-X: the table, the pending bits, and the rule that decides when a message leaves
//! (PCIe Base 5.0 6.1.4 and 7.7.2).

use crate::pci::Msi;

/// Bytes of one table entry.
pub const MSIX_ENTRY_SIZE: u64 = 16;

/// Most vectors that a function may have (PCIe Base 5.0 7.7.2.2: an 11-bit field, size - 1).
pub const MSIX_MAX_VECTORS: u16 = 2048;

/// What stands above the table in deciding whether a message may leave.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MsixGate {
    /// MSI-X Enable.
    pub enabled: bool,
    /// Function Mask.
    pub masked: bool,
    /// Bus Master Enable: a message is a memory write (PCIe Base 5.0 7.5.1.1.3).
    pub bus_master: bool,
}

impl MsixGate {
    fn is_open(self) -> bool {
        self.enabled && !self.masked && self.bus_master
    }
}

/// The MSI-X table and Pending Bit Array of one function.
#[derive(Clone, Debug)]
pub struct Msix {
    /// Message address low and high, message data, vector control.
    entries: Vec<[u32; 4]>,
    pending: Vec<bool>,
    pending_count: usize,
}

const ADDRESS_LOW: usize = 0;
const ADDRESS_HIGH: usize = 1;
const DATA: usize = 2;
const CONTROL: usize = 3;
const CONTROL_MASK: u32 = 1;

impl Msix {
    /// A table of `vectors` entries (1 to [`MSIX_MAX_VECTORS`], clamped), all masked as after reset.
    pub fn new(vectors: u16) -> Self {
        let vectors = usize::from(vectors.clamp(1, MSIX_MAX_VECTORS));
        Self {
            entries: vec![[0, 0, 0, CONTROL_MASK]; vectors],
            pending: vec![false; vectors],
            pending_count: 0,
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> usize {
        self.entries.len()
    }

    /// Bytes of the table.
    pub fn table_len(&self) -> u64 {
        self.entries.len() as u64 * MSIX_ENTRY_SIZE
    }

    /// Every entry masked, nothing pending.
    pub fn reset(&mut self) {
        self.entries.fill([0, 0, 0, CONTROL_MASK]);
        self.pending.fill(false);
        self.pending_count = 0;
    }

    /// Reads bytes of the table from `offset`; 0 beyond its end.
    pub fn read_table(&self, offset: u64, to: &mut [u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(to) {
            *byte =
                index(at / MSIX_ENTRY_SIZE).and_then(|i| self.entries.get(i)).map_or(0, |entry| {
                    let word = entry.get((at % MSIX_ENTRY_SIZE / 4) as usize).copied();
                    word.unwrap_or(0).to_le_bytes()[(at % 4) as usize]
                });
        }
    }

    /// Writes one or two dwords of the table; anything but an aligned 4- or 8-byte access is
    /// dropped, as its result is undefined (PCIe Base 5.0 7.7.2). Call [`Msix::release`] after it.
    pub fn write_table(&mut self, offset: u64, from: &[u8]) {
        let (dwords, rest) = from.as_chunks::<4>();
        if !rest.is_empty() || dwords.len() > 2 || !offset.is_multiple_of(4) {
            return;
        }
        for (at, bytes) in (offset / 4..).zip(dwords) {
            let Some(entry) = index(at / 4).and_then(|i| self.entries.get_mut(i)) else {
                return;
            };
            let word = (at % 4) as usize;
            let writable = match word {
                ADDRESS_LOW => !3,
                CONTROL => CONTROL_MASK,
                _ => !0,
            };
            entry[word] = u32::from_le_bytes(*bytes) & writable;
        }
    }

    /// Reads bytes of the Pending Bit Array from `offset`; 0 beyond its end.
    pub fn read_pba(&self, offset: u64, to: &mut [u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(to) {
            let first = at.saturating_mul(8);
            *byte = (0..8).fold(0, |bits, i| {
                let set = index(first.saturating_add(i)).and_then(|v| self.pending.get(v));
                bits | u8::from(set == Some(&true)) << i
            });
        }
    }

    /// An event on `vector`: the message to send now, if it may leave. If it may not, it is
    /// remembered as pending while MSI-X is enabled.
    pub fn raise(&mut self, vector: u16, gate: MsixGate) -> Option<Msi> {
        if !gate.enabled {
            return None;
        }
        let vector = usize::from(vector);
        let entry = self.entries.get(vector)?;
        if gate.is_open() && entry[CONTROL] & CONTROL_MASK == 0 {
            return Some(message(entry));
        }
        if let Some(pending) = self.pending.get_mut(vector)
            && !*pending
        {
            *pending = true;
            self.pending_count += 1;
        }
        None
    }

    /// One pending message that may leave now, no longer pending. Call until `None` after
    /// anything that unmasks: an entry, the function, MSI-X Enable, Bus Master Enable.
    pub fn release(&mut self, gate: MsixGate) -> Option<Msi> {
        if self.pending_count == 0 || !gate.is_open() {
            return None;
        }
        for (pending, entry) in self.pending.iter_mut().zip(&self.entries) {
            if *pending && entry[CONTROL] & CONTROL_MASK == 0 {
                *pending = false;
                self.pending_count -= 1;
                return Some(message(entry));
            }
        }
        None
    }
}

fn message(entry: &[u32; 4]) -> Msi {
    Msi {
        address: u64::from(entry[ADDRESS_HIGH]) << 32 | u64::from(entry[ADDRESS_LOW]),
        data: entry[DATA],
    }
}

fn index(value: u64) -> Option<usize> {
    usize::try_from(value).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: MsixGate = MsixGate { enabled: true, masked: false, bus_master: true };

    fn program(msix: &mut Msix, vector: u64, address: u64, data: u32, masked: bool) {
        let at = vector * MSIX_ENTRY_SIZE;
        msix.write_table(at, &address.to_le_bytes());
        msix.write_table(at + 8, &data.to_le_bytes());
        msix.write_table(at + 12, &u32::from(masked).to_le_bytes());
    }

    fn pba(msix: &Msix) -> u64 {
        let mut bytes = [0; 8];
        msix.read_pba(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn entries_are_masked_after_reset() {
        let mut msix = Msix::new(3);
        let mut control = [0; 4];
        msix.read_table(2 * 16 + 12, &mut control);
        assert_eq!(control, [1, 0, 0, 0]);
        assert_eq!(msix.raise(2, OPEN), None);
        assert_eq!(pba(&msix), 0b100);
        msix.reset();
        assert_eq!(pba(&msix), 0);
    }

    #[test]
    fn a_masked_event_is_sent_once_when_unmasked() {
        let mut msix = Msix::new(4);
        program(&mut msix, 1, 0xfee0_0000, 0x41, true);
        assert_eq!(msix.raise(1, OPEN), None);
        assert_eq!(msix.raise(1, OPEN), None);
        assert_eq!(msix.release(OPEN), None);
        program(&mut msix, 1, 0x1_fee0_1000, 0x42, false);
        let sent = msix.release(OPEN).unwrap();
        assert_eq!((sent.address, sent.data), (0x1_fee0_1000, 0x42));
        assert_eq!(msix.release(OPEN), None);
        assert_eq!(pba(&msix), 0);
    }

    #[test]
    fn the_function_mask_and_bus_master_hold_messages_back_and_disable_drops_them() {
        let mut msix = Msix::new(70);
        program(&mut msix, 69, 0xfee0_0000, 7, false);
        for closed in [MsixGate { masked: true, ..OPEN }, MsixGate { bus_master: false, ..OPEN }] {
            assert_eq!(msix.raise(69, closed), None);
            assert_eq!(msix.release(closed), None);
            assert!(msix.release(OPEN).is_some());
        }
        let off = MsixGate { enabled: false, ..OPEN };
        assert_eq!(msix.raise(69, off), None);
        assert_eq!(msix.release(OPEN), None, "an event while disabled is not remembered");
    }

    #[test]
    fn accesses_beyond_the_table_or_misaligned_have_no_effect() {
        let mut msix = Msix::new(1);
        msix.write_table(16, &[0xff; 8]);
        msix.write_table(2, &[0xff; 4]);
        msix.write_table(0, &[0xff; 3]);
        msix.write_table(u64::MAX - 3, &[0xff; 8]);
        let mut table = [0xaa; 24];
        msix.read_table(0, &mut table);
        assert_eq!(table[..12], [0; 12]);
        assert_eq!(table[12..], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(msix.raise(1, OPEN), None);
        msix.read_pba(u64::MAX - 2, &mut [0; 2]);
    }

    #[test]
    fn an_eight_byte_write_reaches_both_dwords_and_reserved_bits_stay_zero() {
        let mut msix = Msix::new(1);
        msix.write_table(0, &[0xff; 8]);
        msix.write_table(8, &[0xff; 8]);
        let mut table = [0; 16];
        msix.read_table(0, &mut table);
        assert_eq!(table[..4], [0xfc, 0xff, 0xff, 0xff]);
        assert_eq!(table[4..12], [0xff; 8]);
        assert_eq!(table[12..], [1, 0, 0, 0]);
    }
}
