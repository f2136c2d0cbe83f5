//! vIOMMUs: a slice of an IOMMU that is handed to a guest (`include/linux/iommufd.h`,
//! `struct iommufd_viommu_ops`).
//!
//! The driver offers [`VirtualIommu`]; who allocates it (iommufd) owns [`VirtualDevices`], the one
//! table that leads from virtual ids to devices for commands and back for events.

use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::any::Any;

use lychgate_types::{Errno, Iova, PhysAddr, RequesterId};

use crate::domain::PagingDomain;
use crate::driver::UserData;
use crate::error::AllocError;
use crate::nested::{Handled, NestedDomain, UserArray};

/// What a vIOMMU is asked to be.
#[derive(Clone, Copy)]
pub struct ViommuRequest<'a> {
    /// `IOMMU_VIOMMU_TYPE_*`, never 0.
    pub kind: u32,
    /// The second stage of everything behind it, a nest parent.
    pub parent: &'a Arc<dyn PagingDomain>,
    /// The driver's own structure, as user space gave it; `bytes` is empty when there is none.
    pub data: UserData<'a>,
}

/// A vIOMMU that a driver made.
pub struct NewViommu {
    /// It.
    pub viommu: Arc<dyn VirtualIommu>,
    /// What goes back into the caller's structure, from its first byte on, and no further than it
    /// is long; empty when nothing does.
    pub out: Vec<u8>,
}

/// What a driver asks of whoever allocates a vIOMMU, during `viommu_init` and later.
pub trait ViommuHost: Send + Sync {
    /// Makes `len` bytes, a multiple of 4096 and not 0, that user space can map
    /// (`iommufd_viommu_alloc_mmap`). They are zero, and can be mapped for as long as the vIOMMU lives.
    ///
    /// Linux lets a driver name registers; here the memory is made for it, and a driver that has
    /// registers in it looks at what user space wrote.
    fn alloc_mmap(&self, len: u64) -> Result<Arc<dyn SharedMemory>, Errno>;

    /// Virtual ids and devices.
    fn devices(&self) -> &dyn VirtualDevices;

    /// An event of type `kind` (`IOMMU_VEVENTQ_TYPE_*`) for the guest (`iommufd_viommu_report_event`).
    /// Never blocks. `EOPNOTSUPP` when user space has no queue of the type.
    fn report_event(&self, kind: u32, data: &[u8]) -> Result<(), Errno>;
}

/// Memory that a driver and user space see both.
pub trait SharedMemory: Send + Sync {
    /// What user space gives to `mmap`, in bytes.
    fn offset(&self) -> u64;

    /// Its length in bytes.
    fn size(&self) -> u64;

    /// Reads from byte `at` on. `EFAULT` past the end.
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno>;

    /// Writes from byte `at` on. `EFAULT` past the end.
    fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno>;
}

/// Which device has which virtual id on a vIOMMU, both ways.
pub trait VirtualDevices: Send + Sync {
    /// The device with a virtual id (`iommufd_viommu_find_dev`).
    fn find(&self, virtual_id: u64) -> Option<RequesterId>;

    /// The virtual id of a device (`iommufd_viommu_get_vdev_id`).
    fn virtual_id(&self, device: RequesterId) -> Option<u64>;
}

/// A vIOMMU as its driver has it. Dropping it ends it.
pub trait VirtualIommu: Send + Sync {
    /// Allocates a nested domain on the second stage of the vIOMMU (`alloc_domain_nested`). `pasid`
    /// is `IOMMU_HWPT_ALLOC_PASID`.
    fn alloc_nested(
        &self,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        let _ = (pasid, data);
        Err(AllocError::Unsupported)
    }

    /// Handles invalidation requests of the guest (`cache_invalidate`); `None` when there is no such
    /// call.
    fn invalidate(&self, requests: &mut dyn UserArray) -> Option<Handled> {
        let _ = requests;
        None
    }

    /// A device got a virtual id (`vdevice_init`); what comes back ends with the vDEVICE.
    fn vdevice_init(
        &self,
        device: RequesterId,
        virtual_id: u64,
    ) -> Result<Option<Box<dyn VirtualDevice>>, Errno> {
        let _ = (device, virtual_id);
        Ok(None)
    }

    /// Whether events of a type can be reported (`supports_veventq`).
    fn supports_veventq(&self, kind: u32) -> bool {
        let _ = kind;
        false
    }

    /// Whether there are hardware queues of a type (`get_hw_queue_size`).
    fn supports_hw_queue(&self, kind: u32) -> bool {
        let _ = kind;
        false
    }

    /// Hands a queue of the guest to the hardware (`hw_queue_init_phys`).
    fn hw_queue_init(&self, request: &HwQueueRequest) -> Result<NewHwQueue, Errno> {
        let _ = request;
        Err(Errno::EOPNOTSUPP)
    }

    /// The driver's own type, for the driver to find it again.
    fn as_any(&self) -> &dyn Any;
}

/// A device on a vIOMMU, as its driver has it. Dropping it takes the device off.
pub trait VirtualDevice: Send + Sync {}

/// A queue of the guest that hardware reads (`IOMMU_HW_QUEUE_ALLOC`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HwQueueRequest {
    /// `IOMMU_HW_QUEUE_TYPE_*`.
    pub kind: u32,
    /// Which of the queues of that type.
    pub index: u32,
    /// Where it lies in the second stage.
    pub iova: Iova,
    /// Where it lies in memory; contiguous.
    pub base: PhysAddr,
    /// Its length in bytes.
    pub len: u64,
}

/// A hardware queue that a driver made.
pub struct NewHwQueue {
    /// It. Dropping it takes the queue from the hardware.
    pub queue: Box<dyn HwQueue>,
    /// The index of a queue that cannot go before this one (`iommufd_hw_queue_depend`).
    pub after: Option<u32>,
}

/// A hardware queue, as its driver has it.
pub trait HwQueue: Send + Sync {}
