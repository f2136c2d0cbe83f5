//! A PCI function as the bus sees it: configuration space, BARs, reset, and time to work.

use std::sync::atomic::AtomicU32;
use std::time::Instant;

/// What kind of space a base address register decodes (PCI Local Bus 3.0 6.2.5.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarKind {
    /// 32-bit memory space.
    Memory32,
    /// 64-bit memory space; takes this BAR and the next.
    Memory64,
}

/// One base address register of a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Bar {
    /// Size in bytes, a power of two of at least 4096.
    pub size: u64,
    /// Space and width.
    pub kind: BarKind,
    /// Whether reads have no side effect.
    pub prefetchable: bool,
    /// The bytes from the start of the BAR that software may map and reach without the function
    /// seeing each access: a multiple of 4096, 0 when every access must be seen.
    pub mappable: u64,
}

/// A message-signalled interrupt: what the function writes, and where.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Msi {
    /// Address of the write, a multiple of 4.
    pub address: u64,
    /// The 32 bits written.
    pub data: u32,
}

/// Registers that software may also map: 32-bit words that both sides reach at any time. The
/// function learns of a store only by looking, so what it keeps here are levels (a doorbell's
/// value), never events.
pub trait RegisterFile: Send + Sync {
    /// The words from the start of the mappable part of the BAR.
    fn words(&self) -> &[AtomicU32];
}

/// When a function wants to be served again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Service {
    /// It did something: look again at once.
    Busy,
    /// Nothing to do; a store to mapped registers may come at any time.
    Idle,
    /// Nothing to do before then, unless a register access comes first.
    At(Instant),
    /// Nothing to do before the next trapped register access: mapped registers need no look.
    Asleep,
}

/// A PCI function: what is behind one requester id. Every method may be called from any thread.
pub trait PciFunction: Send + Sync {
    /// What it is, in a word, for people: `nvme`, `edu`.
    fn name(&self) -> &str;

    /// The six base address registers; `None` for one that is absent or the upper half of a
    /// 64-bit one.
    fn bars(&self) -> [Option<Bar>; 6];

    /// Reads configuration space as hardware presents it, 4096 bytes; beyond, all ones.
    fn config_read(&self, offset: u16, to: &mut [u8]);

    /// Writes configuration space; read-only bits keep their value.
    fn config_write(&self, offset: u16, from: &[u8]);

    /// Reads 1, 2, 4 or 8 bytes, naturally aligned, of BAR `bar` as one access; all ones where
    /// nothing answers or memory decoding is off.
    fn bar_read(&self, bar: u8, offset: u64, to: &mut [u8]);

    /// Writes 1, 2, 4 or 8 bytes, naturally aligned, of BAR `bar` as one access; dropped where
    /// nothing answers or memory decoding is off.
    fn bar_write(&self, bar: u8, offset: u64, from: &[u8]);

    /// Function level reset (PCIe Base 5.0 6.6.2). When it returns, no DMA and no interrupt of the
    /// life before is on its way.
    fn reset(&self);

    /// Does the work that is due: looks at mapped registers, fetches commands, moves data. One
    /// thread serves a function; it calls again as the answer says.
    fn service(&self) -> Service;
}
