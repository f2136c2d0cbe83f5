//! vIOMMUs of the mock IOMMU.

use core::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lychgate_iommu::{
    AllocError, Handled, HwQueue, HwQueueRequest, NestedDomain, NewHwQueue, NewViommu,
    PagingDomain, SharedMemory, UserArray, UserData, ViommuHost, ViommuRequest, VirtualIommu,
};
use lychgate_types::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::abi;
use super::driver::MockDevices;
use super::nested::{MockNested, Stage2};
use crate::error::Refusal;
use crate::fault_injection;
use crate::mm::PAGE_SIZE;

/// Bytes that a guest can map.
const LOOPBACK: u64 = 2 * PAGE_SIZE;

/// What everything on one vIOMMU shares: it lives as long as the last of it.
pub(super) struct Slice {
    host: Weak<dyn ViommuHost>,
    parent: Arc<dyn PagingDomain>,
    devices: Arc<MockDevices>,
    /// Which hardware queues there are.
    queues: Mutex<[bool; abi::HW_QUEUES]>,
    /// What the guest may map.
    _loopback: Option<Arc<dyn SharedMemory>>,
}

impl Slice {
    pub(super) fn host(&self) -> &Weak<dyn ViommuHost> {
        &self.host
    }

    pub(super) fn parent(&self) -> &Arc<dyn PagingDomain> {
        &self.parent
    }

    fn queues(&self) -> MutexGuard<'_, [bool; abi::HW_QUEUES]> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A vIOMMU.
pub(super) struct MockViommu {
    slice: Arc<Slice>,
}

impl MockViommu {
    /// A vIOMMU as `request` describes it. With data, the guest finds `in_data` in its structure
    /// and in the memory that it can map.
    pub(super) fn init(
        request: &ViommuRequest<'_>,
        host: Weak<dyn ViommuHost>,
        devices: &Arc<MockDevices>,
    ) -> Result<NewViommu, Errno> {
        fault_injection::allocation().map_err(errno)?;
        let (mut loopback, mut out) = (None, Vec::new());
        if !request.data.bytes.is_empty() {
            let mut data =
                abi::ViommuData::read_from_bytes(request.data.bytes).map_err(|_| Errno::EINVAL)?;
            let memory = host.upgrade().ok_or(Errno::ENODEV)?.alloc_mmap(LOOPBACK)?;
            memory.write(0, data.in_data.as_bytes())?;
            data.out_data = data.in_data;
            data.out_mmap_offset = memory.offset();
            data.out_mmap_length = LOOPBACK;
            loopback = Some(memory);
            out = data.as_bytes().to_vec();
        }
        let slice = Slice {
            host,
            parent: Arc::clone(request.parent),
            devices: Arc::clone(devices),
            queues: Mutex::default(),
            _loopback: loopback,
        };
        Ok(NewViommu { viommu: Arc::new(Self { slice: Arc::new(slice) }), out })
    }

    fn invalidate_one(&self, requests: &mut dyn UserArray, index: u32) -> Result<(), Errno> {
        let mut request = abi::ViommuInvalidateData::default();
        requests.read(index, 0, request.as_mut_bytes())?;
        if request.flags & !abi::INVALIDATE_ALL != 0 {
            return Err(Errno::EOPNOTSUPP);
        }
        let entry = usize::try_from(request.cache_id).map_err(|_| Errno::EINVAL)?;
        if entry >= abi::DEVICE_CACHE_ENTRIES {
            return Err(Errno::EINVAL);
        }
        let host = self.slice.host.upgrade().ok_or(Errno::EINVAL)?;
        let device = host.devices().find(request.vdev_id.into()).ok_or(Errno::EINVAL)?;
        let all = request.flags & abi::INVALIDATE_ALL != 0;
        self.slice.devices.invalidate(device, if all { None } else { Some(entry) });
        Ok(())
    }
}

impl VirtualIommu for MockViommu {
    fn alloc_nested(
        &self,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        let stage2 = Stage2::Viommu(Arc::clone(&self.slice));
        Ok(Arc::new(MockNested::new(stage2, pasid, data)?))
    }

    fn invalidate(&self, requests: &mut dyn UserArray) -> Option<Handled> {
        if requests.kind() != abi::VIOMMU_INVALIDATE_DATA {
            return Some(Handled { count: 0, result: Err(Errno::EINVAL) });
        }
        for index in 0..requests.len() {
            if let Err(errno) = self.invalidate_one(requests, index) {
                return Some(Handled { count: index, result: Err(errno) });
            }
        }
        Some(Handled { count: requests.len(), result: Ok(()) })
    }

    fn supports_veventq(&self, kind: u32) -> bool {
        kind == abi::VEVENTQ_TYPE
    }

    fn supports_hw_queue(&self, kind: u32) -> bool {
        kind == abi::HW_QUEUE_TYPE
    }

    fn hw_queue_init(&self, request: &HwQueueRequest) -> Result<NewHwQueue, Errno> {
        let index = usize::try_from(request.index).map_err(|_| Errno::EINVAL)?;
        let mut queues = self.slice.queues();
        let before = index.checked_sub(1).map(|before| queues.get(before).copied());
        let taken = queues.get_mut(index).ok_or(Errno::EINVAL)?;
        if *taken {
            return Err(Errno::EEXIST);
        }
        // Queues come in order and go in reverse.
        if before.is_some_and(|before| before != Some(true)) {
            return Err(Errno::EIO);
        }
        if self.slice.parent.iova_to_phys(request.iova) != Some(request.base) {
            return Err(Errno::EFAULT);
        }
        *taken = true;
        let queue = MockHwQueue { slice: Arc::clone(&self.slice), index };
        Ok(NewHwQueue { queue: Box::new(queue), after: request.index.checked_sub(1) })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A hardware queue of a vIOMMU.
struct MockHwQueue {
    slice: Arc<Slice>,
    index: usize,
}

impl HwQueue for MockHwQueue {}

impl Drop for MockHwQueue {
    fn drop(&mut self) {
        if let Some(taken) = self.slice.queues().get_mut(self.index) {
            *taken = false;
        }
    }
}

fn errno(refusal: Refusal) -> Errno {
    refusal.errno
}
