//! The port of an IOMMU, as the bus in front of it uses it.

use lychgate_types::{BusError, Iova, Mmio, Pasid, PhysRun, RequesterId};

/// What a request wants of memory.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Access {
    /// A memory read.
    Read,
    /// A memory write.
    Write,
}

/// A run of bus addresses that one requester wants translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// Who asks.
    pub requester: RequesterId,
    /// With which PASID prefix.
    pub pasid: Option<Pasid>,
    /// First bus address.
    pub start: Iova,
    /// Length in bytes, not 0.
    pub len: u64,
    /// What for.
    pub access: Access,
}

/// The IOMMU did not let a request pass, or memory did not answer. The IOMMU has logged it if its
/// rules say so.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("no translation at {at}")]
pub struct Aborted {
    /// First bus address that did not pass.
    pub at: Iova,
}

/// An IOMMU model: registers below, requests from devices in front.
pub trait IommuPort: Mmio {
    /// Translates every run of `requests` in order and hands the physical memory, in the same
    /// order, to `access`, once, if all of it translates; else nothing is accessed.
    ///
    /// The translations stay valid until `access` returns: an invalidation completes only after
    /// every access that could use what it removed. `access` must not call back into the IOMMU.
    fn with_translation(
        &self,
        requests: &[Translation],
        access: &mut dyn FnMut(&[PhysRun]) -> Result<(), BusError>,
    ) -> Result<(), Aborted>;

    /// A message-signalled interrupt on its way to the processor. Gives the address and data that
    /// come out on the other side, or `None` when the IOMMU stops it.
    fn remap_msi(&self, requester: RequesterId, address: u64, data: u32) -> Option<(u64, u32)>;
}
