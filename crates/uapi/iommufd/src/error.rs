//! Refusals: the errno a caller gets, and which check gave it.

use std::borrow::Cow;
use std::fmt;

use lychgate_iommu::{AllocError, AttachError, ClaimError, MapError};
use lychgate_types::Errno;

/// A call was refused. The errno goes to the caller, the reason to whoever traces it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// What the caller gets.
    pub errno: Errno,
    /// Which check failed, as a sentence without a full stop: `the IOVA is not a multiple of 4096`.
    pub why: Cow<'static, str>,
}

/// The result of a call.
pub type Result<T, E = Refusal> = std::result::Result<T, E>;

impl Refusal {
    /// A refusal with its reason.
    pub fn new(errno: Errno, why: impl Into<Cow<'static, str>>) -> Self {
        Self { errno, why: why.into() }
    }
}

/// `Err` with an errno and the check that gave it.
pub fn refuse<T>(errno: Errno, why: impl Into<Cow<'static, str>>) -> Result<T> {
    Err(Refusal::new(errno, why))
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.errno, self.why)
    }
}

impl std::error::Error for Refusal {}

macro_rules! from_core {
    ($($error:ty),*) => {
        $(impl From<$error> for Refusal {
            fn from(error: $error) -> Self {
                Self::new(error.errno(), error.to_string())
            }
        })*
    };
}

from_core!(AllocError, AttachError, ClaimError, MapError);
