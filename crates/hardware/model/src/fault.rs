//! What an IOMMU model says when it stops a request: the same record whatever the architecture,
//! beside the entry that lands in the architecture's own log.

use std::fmt;

use lychgate_types::{Iova, Pasid, PhysAddr, RequesterId};

use crate::iommu::Access;

/// Why a request did not pass.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FaultCause {
    /// A device-level entry is missing, not valid, or has a reserved bit or value.
    DeviceEntry,
    /// The device-level entry says that the device may not do DMA.
    Blocked,
    /// The address lies beyond what the tables of the device reach.
    OutOfReach,
    /// An entry of the tables is not present.
    NotPresent,
    /// The entries do not allow the access.
    Permission,
    /// An entry of the tables has a reserved bit set.
    ReservedBits,
    /// An entry of the tables names an impossible level or size.
    BadEntry,
    /// The address space that the PASID names does not exist.
    Pasid,
    /// The address is one that the architecture keeps for another purpose.
    SpecialRange,
    /// An interrupt has no valid mapping.
    Interrupt,
    /// Memory that holds a table did not answer here.
    TableMemory(PhysAddr),
}

/// What a stopped request wanted.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum FaultAccess {
    /// To reach memory.
    Memory(Access),
    /// To interrupt, with this message data.
    Interrupt(u32),
}

/// One stopped request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct FaultRecord {
    /// Who asked.
    pub requester: RequesterId,
    /// With which PASID prefix.
    pub pasid: Option<Pasid>,
    /// First bus address that did not pass.
    pub at: Iova,
    /// What for.
    pub access: FaultAccess,
    /// Why.
    pub cause: FaultCause,
    /// The tables asked that this fault not be logged.
    pub suppressed: bool,
}

/// Who wants to know of every stopped request, logged by the architecture's rules or not. Called
/// without any lock of the model, on the thread of the request.
pub trait FaultObserver: Send + Sync {
    /// A request was stopped.
    fn fault(&self, record: &FaultRecord);
}

impl fmt::Display for FaultCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DeviceEntry => "the device's entry is not valid",
            Self::Blocked => "the device may not do DMA",
            Self::OutOfReach => "the address is beyond the reach of the tables",
            Self::NotPresent => "not mapped",
            Self::Permission => "not permitted",
            Self::ReservedBits => "a table entry has a reserved bit set",
            Self::BadEntry => "a table entry has an impossible level or size",
            Self::Pasid => "the PASID has no address space",
            Self::SpecialRange => "the address is reserved for another purpose",
            Self::Interrupt => "the interrupt is not mapped",
            Self::TableMemory(at) => return write!(f, "no memory answers at {at} for a table"),
        })
    }
}

impl fmt::Display for FaultRecord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.requester)?;
        if let Some(pasid) = self.pasid {
            write!(f, " pasid {:#x}", pasid.get())?;
        }
        match self.access {
            FaultAccess::Memory(Access::Read) => write!(f, " read {}", self.at)?,
            FaultAccess::Memory(Access::Write) => write!(f, " write {}", self.at)?,
            FaultAccess::Interrupt(data) => write!(f, " interrupt {} data {data:#x}", self.at)?,
        }
        write!(f, ": {}", self.cause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_as_a_sentence() {
        let record = FaultRecord {
            requester: RequesterId::new(0x0108),
            pasid: Pasid::new(5),
            at: Iova::new(0x1000),
            access: FaultAccess::Memory(Access::Write),
            cause: FaultCause::NotPresent,
            suppressed: false,
        };
        assert_eq!(record.to_string(), "01:01.0 pasid 0x5 write 0x1000: not mapped");
    }
}
