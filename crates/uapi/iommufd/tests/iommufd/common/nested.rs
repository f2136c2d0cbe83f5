//! Nested domains and vIOMMUs whose guests say nothing but words.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, Weak};

use lychgate_iommu::{
    AllocError, AttachError, DomainKind, Handled, HwQueue, HwQueueRequest, NestedDomain,
    NewHwQueue, PageResponse, PagingDomain, SharedMemory, UserArray, UserData, ViommuHost,
    ViommuRequest, VirtualDevice, VirtualIommu,
};
use lychgate_types::{Errno, RequesterId};

/// The type of every vIOMMU, of nested data and of invalidation requests.
pub(crate) const KIND: u32 = 0x77;
/// The type of the events of a vIOMMU.
pub(crate) const EVENTS: u32 = 0x78;
/// The type of the queues of a vIOMMU, of which there are 2.
pub(crate) const QUEUES: u32 = 0x79;
/// A request that is `EIO`.
pub(crate) const BAD_REQUEST: u32 = 0xbad;
/// Bytes that can be mapped of a vIOMMU that was made with data.
pub(crate) const MMAP_BYTES: u64 = 0x2000;

/// What the driver has and does of all this.
#[derive(Default)]
pub(crate) struct Nesting {
    pub(crate) supported: bool,
    pub(crate) max_pasids: u32,
    pub(crate) pasid_error: Option<AttachError>,
    /// What PASIDs of devices are attached to.
    pub(crate) pasids: BTreeMap<(u16, u32), DomainKind>,
    pub(crate) page_requests: bool,
    /// Page request groups that were answered, and how.
    pub(crate) responses: Vec<(u32, PageResponse)>,
    pub(crate) domains: Vec<Weak<FakeNested>>,
    pub(crate) viommus: Vec<Weak<FakeViommu>>,
}

pub(crate) struct FakeNested {
    parent: Arc<dyn PagingDomain>,
    viommu: Option<Arc<FakeViommu>>,
    pasid: bool,
    pub(crate) invalidated: Mutex<Vec<u32>>,
}

impl FakeNested {
    pub(crate) fn new(
        parent: &Arc<dyn PagingDomain>,
        pasid: bool,
        viommu: Option<Arc<FakeViommu>>,
        data: UserData<'_>,
    ) -> Result<Arc<Self>, AllocError> {
        match (data.kind, data.bytes.len()) {
            (KIND, 4) => Ok(Arc::new(Self {
                parent: Arc::clone(parent),
                viommu,
                pasid,
                invalidated: Mutex::default(),
            })),
            (KIND, _) => Err(AllocError::InvalidData),
            _ => Err(AllocError::Unsupported),
        }
    }
}

impl NestedDomain for FakeNested {
    fn parent(&self) -> Arc<dyn PagingDomain> {
        Arc::clone(&self.parent)
    }

    fn supports_pasid(&self) -> bool {
        self.pasid
    }

    fn invalidate(&self, requests: &mut dyn UserArray) -> Option<Handled> {
        self.viommu.is_none().then(|| take_all(requests, &self.invalidated))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A device without a virtual id is nothing for a domain of a vIOMMU.
pub(crate) fn check_attach(
    domain: &Arc<dyn NestedDomain>,
    device: RequesterId,
) -> Result<(), AttachError> {
    let domain = domain.as_any().downcast_ref::<FakeNested>().unwrap();
    let Some(viommu) = &domain.viommu else {
        return Ok(());
    };
    let host = viommu.host.upgrade().unwrap();
    match host.devices().virtual_id(device) {
        Some(_) => Ok(()),
        None => Err(AttachError::NoVirtualDevice),
    }
}

fn take_all(requests: &mut dyn UserArray, to: &Mutex<Vec<u32>>) -> Handled {
    if requests.kind() != KIND {
        return Handled { count: 0, result: Err(Errno::EINVAL) };
    }
    for count in 0..requests.len() {
        let mut word = [0; 4];
        let taken =
            requests.read(count, 2, &mut word).and_then(|()| match u32::from_le_bytes(word) {
                BAD_REQUEST => Err(Errno::EIO),
                word => Ok(word),
            });
        match taken {
            Ok(word) => to.lock().unwrap().push(word),
            Err(errno) => return Handled { count, result: Err(errno) },
        }
    }
    Handled { count: requests.len(), result: Ok(()) }
}

pub(crate) struct FakeViommu {
    pub(crate) host: Weak<dyn ViommuHost>,
    parent: Arc<dyn PagingDomain>,
    pub(crate) memory: Option<Arc<dyn SharedMemory>>,
    pub(crate) invalidated: Mutex<Vec<u32>>,
    /// Virtual ids that are taken.
    pub(crate) devices: Arc<Mutex<BTreeSet<u64>>>,
    /// Indexes that are taken, and what is there.
    pub(crate) queues: Arc<Mutex<BTreeMap<u32, HwQueueRequest>>>,
    me: Weak<Self>,
}

impl FakeViommu {
    /// One made with data gives the offset of its memory back in the first 8 bytes.
    pub(crate) fn new(
        request: &ViommuRequest<'_>,
        host: Weak<dyn ViommuHost>,
    ) -> Result<(Arc<Self>, Vec<u8>), Errno> {
        let memory = match request.data.bytes.len() {
            0 => None,
            8.. => Some(host.upgrade().unwrap().alloc_mmap(MMAP_BYTES)?),
            _ => return Err(Errno::EINVAL),
        };
        let offset = memory.as_ref().map(|memory| memory.offset().to_le_bytes().to_vec());
        let viommu = Arc::new_cyclic(|me| Self {
            host,
            parent: Arc::clone(request.parent),
            memory,
            invalidated: Mutex::default(),
            devices: Arc::default(),
            queues: Arc::default(),
            me: me.clone(),
        });
        Ok((viommu, offset.unwrap_or_default()))
    }
}

struct FakeVdevice(Arc<Mutex<BTreeSet<u64>>>, u64);

impl VirtualDevice for FakeVdevice {}

impl Drop for FakeVdevice {
    fn drop(&mut self) {
        assert!(self.0.lock().unwrap().remove(&self.1));
    }
}

struct FakeHwQueue(Arc<Mutex<BTreeMap<u32, HwQueueRequest>>>, u32);

impl HwQueue for FakeHwQueue {}

impl Drop for FakeHwQueue {
    fn drop(&mut self) {
        let mut queues = self.0.lock().unwrap();
        assert!(queues.remove(&self.1).is_some() && !queues.contains_key(&(self.1 + 1)));
    }
}

impl VirtualIommu for FakeViommu {
    fn alloc_nested(
        &self,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        let domain = FakeNested::new(&self.parent, pasid, self.me.upgrade(), data)?;
        Ok(domain)
    }

    fn invalidate(&self, requests: &mut dyn UserArray) -> Option<Handled> {
        Some(take_all(requests, &self.invalidated))
    }

    fn vdevice_init(
        &self,
        device: RequesterId,
        virtual_id: u64,
    ) -> Result<Option<Box<dyn VirtualDevice>>, Errno> {
        if virtual_id == u64::from(BAD_REQUEST) {
            return Err(Errno::EIO);
        }
        let host = self.host.upgrade().unwrap();
        assert_eq!(host.devices().find(virtual_id), Some(device));
        assert!(self.devices.lock().unwrap().insert(virtual_id));
        Ok(Some(Box::new(FakeVdevice(Arc::clone(&self.devices), virtual_id))))
    }

    fn supports_veventq(&self, kind: u32) -> bool {
        kind == EVENTS
    }

    fn supports_hw_queue(&self, kind: u32) -> bool {
        kind == QUEUES
    }

    fn hw_queue_init(&self, request: &HwQueueRequest) -> Result<NewHwQueue, Errno> {
        let mut queues = self.queues.lock().unwrap();
        let index = request.index;
        if index >= 2 {
            return Err(Errno::EINVAL);
        }
        if queues.contains_key(&index) {
            return Err(Errno::EEXIST);
        }
        let after = index.checked_sub(1);
        if after.is_some_and(|before| !queues.contains_key(&before)) {
            return Err(Errno::EIO);
        }
        queues.insert(index, *request);
        Ok(NewHwQueue { queue: Box::new(FakeHwQueue(Arc::clone(&self.queues), index)), after })
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for FakeViommu {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(
                self.devices.lock().unwrap().is_empty() && self.queues.lock().unwrap().is_empty()
            );
        }
    }
}
