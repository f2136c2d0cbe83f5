//! The controller as a PCI function: its header, its BAR, where MSI-X lies.
//!
//! BAR 0: page 0 registers, page 1 doorbells, page 2 the MSI-X table, page 3 the Pending Bit Array.
//! The first two may be mapped; the others have effects that a mapping would hide.

use lychgate_model::{Bar, BarKind, Capabilities, Header, MsixLayout};

/// Queue pairs whose doorbells fit their page, the admin queue's included.
pub(crate) const MAX_QUEUE_PAIRS: u16 = 512;
/// Vectors whose entries fit their page.
pub(crate) const MAX_VECTORS: u16 = 256;

/// Bytes of BAR 0 that may be mapped: registers and doorbells.
pub(crate) const MAPPABLE: u64 = 0x2000;
/// The MSI-X table.
pub(crate) const TABLE: u64 = 0x2000;
/// The Pending Bit Array.
pub(crate) const PBA: u64 = 0x3000;
const BAR_SIZE: u64 = 0x4000;

/// QEMU's identity for its NVMe controller, which every driver takes: most bind by class, and
/// those that know the id apply one quirk, to ignore the namespace identifiers (Linux).
pub(crate) const HEADER: Header = Header {
    vendor: 0x1b36,
    device: 0x0010,
    revision: 2,
    // Mass storage, non-volatile memory, NVM Express I/O controller: SeaBIOS wants all three.
    class: 0x01_0802,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    // Interrupts are MSI-X alone, so INTMS and INTMC have nothing to mask.
    interrupt_pin: 0,
};

pub(crate) const BARS: [Option<Bar>; 6] = [
    Some(Bar { size: BAR_SIZE, kind: BarKind::Memory64, prefetchable: false, mappable: MAPPABLE }),
    None,
    None,
    None,
    None,
    None,
];

pub(crate) fn capabilities(vectors: u16) -> Capabilities {
    let msix = MsixLayout {
        vectors,
        table_bar: 0,
        table_offset: (TABLE & 0xffff_ffff) as u32,
        pba_bar: 0,
        pba_offset: (PBA & 0xffff_ffff) as u32,
    };
    Capabilities { express: true, msi: None, msix: Some(msix) }
}
