//! Attach handles: what somebody who attaches a domain leaves with it, to be found again by the
//! PASID of a fault (`struct iommu_attach_handle`).

use alloc::sync::Arc;
use core::any::Any;

use crate::domain::Domain;
use crate::page_fault::FaultGroup;

/// The kind of a domain, for look-ups that accept one kind alone.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum DomainKind {
    /// [`Domain::Blocked`].
    Blocked,
    /// [`Domain::Identity`].
    Identity,
    /// [`Domain::Paging`].
    Paging,
    /// [`Domain::Nested`].
    Nested,
}

impl Domain {
    /// Its kind.
    pub const fn kind(&self) -> DomainKind {
        match self {
            Self::Blocked => DomainKind::Blocked,
            Self::Identity => DomainKind::Identity,
            Self::Paging(_) => DomainKind::Paging,
            Self::Nested(_) => DomainKind::Nested,
        }
    }
}

/// What stays with an attachment.
pub trait AttachHandle: Send + Sync {
    /// Whether I/O page faults of the attachment are handled. Constant.
    fn handles_faults(&self) -> bool {
        false
    }

    /// Takes a group of faults over, to answer it later. Called with the core's lock held: it must
    /// not call the core. The group comes back when it cannot be taken.
    fn page_fault(&self, group: FaultGroup) -> Result<(), FaultGroup> {
        Err(group)
    }

    /// The handle's own type.
    fn as_any(&self) -> &dyn Any;
}

/// What a PASID, or the requester itself, is attached to.
#[derive(Clone)]
pub(crate) struct Attached {
    pub(crate) domain: Domain,
    pub(crate) handle: Option<Arc<dyn AttachHandle>>,
}

impl Attached {
    /// Whether both are the same domain with the same handle, or both without one.
    pub(crate) fn same(&self, other: &Self) -> bool {
        let handles = match (&self.handle, &other.handle) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            _ => false,
        };
        handles && self.domain.same(&other.domain)
    }

    pub(crate) fn handles_faults(&self) -> bool {
        self.handle.as_ref().is_some_and(|handle| handle.handles_faults())
    }
}
