//! Faults as drivers report them.

use core::fmt;

use lychgate_types::{Iova, Pasid, RequesterId};

/// Why the hardware let a request not pass.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum FaultReason {
    /// Nothing is mapped at the address.
    NotPresent,
    /// The mapping does not allow the access.
    Permission,
    /// The device is blocked, or has no translation at all.
    Blocked,
    /// A table entry is malformed.
    Malformed,
    /// Memory did not answer while tables were read.
    Hardware,
    /// The request itself is not allowed (a range for interrupts, a translated address).
    InvalidRequest,
}

impl fmt::Display for FaultReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotPresent => "not mapped",
            Self::Permission => "not permitted",
            Self::Blocked => "device is blocked",
            Self::Malformed => "malformed table entry",
            Self::Hardware => "table memory does not answer",
            Self::InvalidRequest => "invalid request",
        })
    }
}

/// One fault that the hardware recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FaultReport {
    /// Who asked.
    pub requester: RequesterId,
    /// With which PASID.
    pub pasid: Option<Pasid>,
    /// Where.
    pub iova: Iova,
    /// Whether the request was a write.
    pub write: bool,
    /// Why it did not pass.
    pub reason: FaultReason,
    /// The hardware's own record, for `--trace` and for decoding: two 64-bit words for AMD.
    pub raw: [u64; 4],
}

/// Who hears of faults.
pub trait FaultSink: Send + Sync {
    /// A fault was recorded. Called without any lock of the driver held.
    fn fault(&self, report: &FaultReport);

    /// The hardware's log overflowed: faults were lost.
    fn faults_lost(&self);
}
