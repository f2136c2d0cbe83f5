//! Nested domains: the first stage is the guest's own table, the second a paging domain.

use alloc::sync::Arc;
use core::any::Any;

use lychgate_types::Errno;

use crate::domain::PagingDomain;

/// A domain whose first stage a guest wrote (`IOMMU_DOMAIN_NESTED`).
///
/// It pins what it is made of, its second stage or its vIOMMU, for as long as it lives.
pub trait NestedDomain: Send + Sync {
    /// The second stage: its reserved regions and interrupt doorbells are those of the nested
    /// domain.
    fn parent(&self) -> Arc<dyn PagingDomain>;

    /// Whether the domain can be attached to a PASID (`set_dev_pasid`).
    fn supports_pasid(&self) -> bool {
        false
    }

    /// Forgets what hardware caches of the first stage, as the requests say
    /// (`cache_invalidate_user`). `None` when the domain has no such call of its own, as where a
    /// guest sends what its vIOMMU takes.
    fn invalidate(&self, requests: &mut dyn UserArray) -> Option<Handled> {
        let _ = requests;
        None
    }

    /// The driver's own type, for the driver to find it again.
    fn as_any(&self) -> &dyn Any;
}

/// How far an array of requests got: those before `count` were handled, and the next one, if
/// `result` is an error, was not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Handled {
    /// Requests that were handled, from the first on.
    pub count: u32,
    /// Why the next one was not.
    pub result: Result<(), Errno>,
}

/// An array of structures in user space's memory (`struct iommu_user_data_array`).
pub trait UserArray {
    /// The type of its structures, `IOMMU_HWPT_INVALIDATE_DATA_*`.
    fn kind(&self) -> u32;

    /// Size of one structure as user space has it, in bytes.
    fn entry_len(&self) -> u32;

    /// How many there are.
    fn len(&self) -> u32;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads structure `index` (`iommu_copy_struct_from_user_array`). A longer one than `to` must
    /// be zero at its end, a shorter one is filled with zeros.
    ///
    /// `EINVAL` past the end and for a structure shorter than `least` bytes, `E2BIG` for a tail
    /// that is not zero, `EFAULT` where nothing is.
    fn read(&mut self, index: u32, least: usize, to: &mut [u8]) -> Result<(), Errno>;
}
