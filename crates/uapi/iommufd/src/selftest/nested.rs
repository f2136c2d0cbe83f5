//! Nested domains of the mock IOMMU: no first stage to walk, but something cached of it.

use core::any::Any;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};

use lychgate_iommu::{
    AllocError, Handled, NestedDomain, PagingDomain, UserArray, UserData, ViommuHost,
};
use lychgate_types::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi;
use super::viommu::Slice;
use crate::fault_injection;

/// A nested domain, on a nest parent or on a vIOMMU.
pub(super) struct MockNested {
    stage2: Stage2,
    pasid: bool,
    iotlb: [AtomicU32; abi::IOTLB_ENTRIES],
}

/// What is below a nested domain.
pub(super) enum Stage2 {
    /// A page table.
    Parent(Arc<dyn PagingDomain>),
    /// A vIOMMU with its page table.
    Viommu(Arc<Slice>),
}

impl MockNested {
    /// A nested domain as `data` describes it.
    pub(super) fn new(stage2: Stage2, pasid: bool, data: UserData<'_>) -> Result<Self, AllocError> {
        let data = read_hwpt_data(data)?;
        fault_injection::allocation().map_err(|_| AllocError::OutOfMemory)?;
        let iotlb = core::array::from_fn(|_| AtomicU32::new(data.iotlb));
        Ok(Self { stage2, pasid, iotlb })
    }

    /// What is cached in entry `id`; `None` when there is no such entry.
    pub(super) fn cached(&self, id: u32) -> Option<u32> {
        Some(self.entry(id)?.load(Ordering::Relaxed))
    }

    /// Who knows the virtual ids of devices, for a nested domain on a vIOMMU.
    pub(super) fn host(&self) -> Option<&Weak<dyn ViommuHost>> {
        match &self.stage2 {
            Stage2::Parent(_) => None,
            Stage2::Viommu(slice) => Some(slice.host()),
        }
    }

    fn entry(&self, id: u32) -> Option<&AtomicU32> {
        self.iotlb.get(usize::try_from(id).ok()?)
    }

    fn invalidate_one(&self, requests: &mut dyn UserArray, index: u32) -> Result<(), Errno> {
        let mut request = abi::HwptInvalidateData::default();
        let size = request.as_bytes().len();
        if usize::try_from(requests.entry_len()).is_ok_and(|len| len > size) {
            return Err(Errno::EINVAL);
        }
        requests.read(index, size, request.as_mut_bytes())?;
        if request.flags & !abi::INVALIDATE_ALL != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        let entry = self.entry(request.iotlb_id).ok_or(Errno::EINVAL)?;
        if request.flags & abi::INVALIDATE_ALL != 0 {
            self.iotlb.iter().for_each(|entry| entry.store(0, Ordering::Relaxed));
        } else {
            entry.store(0, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl NestedDomain for MockNested {
    fn parent(&self) -> Arc<dyn PagingDomain> {
        match &self.stage2 {
            Stage2::Parent(parent) => Arc::clone(parent),
            Stage2::Viommu(slice) => Arc::clone(slice.parent()),
        }
    }

    fn supports_pasid(&self) -> bool {
        self.pasid
    }

    fn invalidate(&self, requests: &mut dyn UserArray) -> Option<Handled> {
        if requests.kind() != abi::HWPT_INVALIDATE_DATA {
            return Some(Handled { count: 0, result: Err(Errno::EINVAL) });
        }
        for index in 0..requests.len() {
            if let Err(errno) = self.invalidate_one(requests, index) {
                return Some(Handled { count: index, result: Err(errno) });
            }
        }
        Some(Handled { count: requests.len(), result: Ok(()) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The structure of `IOMMU_HWPT_DATA_SELFTEST`, of which `pagetable_type` may be missing.
pub(super) fn read_hwpt_data(data: UserData<'_>) -> Result<abi::HwptData, AllocError> {
    if data.kind != abi::HWPT_DATA {
        return Err(AllocError::Unsupported);
    }
    let mut whole = [0_u8; size_of::<abi::HwptData>()];
    let known = whole.get_mut(..data.bytes.len()).ok_or(AllocError::InvalidData)?;
    if known.len() < size_of::<u32>() {
        return Err(AllocError::InvalidData);
    }
    known.copy_from_slice(data.bytes);
    abi::HwptData::read_from_bytes(&whole).map_err(|_| AllocError::InvalidData)
}
