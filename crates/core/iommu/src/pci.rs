//! What the core must know of a PCI function to form groups.

use alloc::vec::Vec;

use lychgate_types::{Bdf, RequesterId};

/// PCI Express device and port types, as far as grouping asks (PCIe Base 5.0 7.5.3.2).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum PciKind {
    /// Endpoint, legacy endpoint, or root complex integrated endpoint.
    Endpoint,
    /// Root port of a root complex, or downstream port of a switch.
    DownstreamPort,
    /// Upstream port of a switch.
    UpstreamPort,
    /// PCI Express to PCI bridge: requests below it carry its secondary bus number.
    PcieToPciBridge,
    /// Conventional PCI function or bridge, without any PCI Express capability.
    Conventional,
}

/// Access control services of a function (PCIe Base 5.0 6.12).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Acs {
    /// Source validation, request redirect, completion redirect and upstream forwarding are each
    /// either enabled or cannot happen.
    pub isolates: bool,
}

/// One function of the PCI topology.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PciFunctionInfo {
    /// Where it is.
    pub bdf: Bdf,
    /// What it is.
    pub kind: PciKind,
    /// Whether the header says that the device has several functions.
    pub multifunction: bool,
    /// Its ACS capability; `None` without one.
    pub acs: Option<Acs>,
    /// The bridge or port above it; `None` on the root bus.
    pub parent: Option<Bdf>,
    /// For a bridge: the bus below it.
    pub secondary_bus: Option<u8>,
    /// Requester ids besides its own under which its requests may arrive, known as quirks.
    pub quirk_aliases: Vec<RequesterId>,
}
