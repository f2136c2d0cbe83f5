//! The driver of the mock IOMMU, and the devices behind it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, DefaultDomain, Domain, Driver, HwInfo,
    NestedDomain, NewViommu, PagingDomain, ProbeError, ReservedRegion, UserData, ViommuHost,
    ViommuRequest,
};
use lychgate_types::{Bdf, Errno, Pages, Pasid, RequesterId};
use zerocopy::IntoBytes;

use super::abi;
use super::domain::{MockDomain, Shape};
use super::nested::{MockNested, Stage2, read_hwpt_data};
use super::pages::MockPages;
use super::viommu::MockViommu;
use crate::fault_injection;

/// The segment of the mock devices' addresses: no PCI function of a machine is there.
const SEGMENT: u16 = 0xffff;

/// The mock IOMMU.
pub(super) struct MockDriver {
    pages: MockPages,
    devices: Arc<MockDevices>,
}

impl MockDriver {
    /// A mock IOMMU without devices, whose tables lie in `pages`.
    pub(super) fn new(pages: Arc<dyn Pages>) -> Arc<Self> {
        Arc::new(Self { pages: MockPages::new(pages), devices: Arc::default() })
    }

    /// Where its tables lie.
    pub(super) fn pages(&self) -> &MockPages {
        &self.pages
    }

    /// The devices behind it.
    pub(super) fn devices(&self) -> &MockDevices {
        &self.devices
    }

    fn flags(&self, device: RequesterId) -> u32 {
        self.devices.read().get(&device).map_or(0, |device| device.flags)
    }

    /// A domain of this driver, unless it tracks dirty pages of a device that does not.
    fn check(&self, device: RequesterId, domain: &Domain) -> Result<(), AttachError> {
        let flags = self.flags(device);
        let fits = match domain {
            Domain::Blocked => true,
            Domain::Paging(domain) => {
                let mock = domain.as_any().downcast_ref::<MockDomain>();
                let no_dirty = flags & abi::DEVICE_NO_DIRTY != 0;
                mock.is_some_and(|mock| !(mock.flags().dirty && no_dirty))
            }
            Domain::Nested(domain) => domain.as_any().is::<MockNested>(),
            _ => false,
        };
        if fits { Ok(()) } else { Err(AttachError::Incompatible) }
    }
}

/// Mock devices by requester id. Attaching takes the lock for writing, an event on its way to a
/// guest for reading: a device's place on a vIOMMU does not change under it.
#[derive(Default)]
pub(super) struct MockDevices(RwLock<BTreeMap<RequesterId, MockDevice>>);

/// A device behind the mock IOMMU.
struct MockDevice {
    /// `MOCK_FLAGS_DEVICE_*`.
    flags: u32,
    cache: [u32; abi::DEVICE_CACHE_ENTRIES],
    /// The vIOMMU that its nested domain is on, and its id there.
    virtual_id: Option<(Weak<dyn ViommuHost>, u64)>,
    /// The next attachment of [`abi::PASID_RESERVED`] fails.
    fail_reserved_pasid: bool,
}

impl MockDevices {
    /// Makes a device; gives the address under which the core can take it. `EINVAL` for an unknown
    /// flag.
    pub(super) fn create(&self, flags: u32) -> Result<Bdf, Errno> {
        if flags & !(abi::DEVICE_NO_DIRTY | abi::DEVICE_PASID) != 0 {
            return Err(Errno::EINVAL);
        }
        let mut devices = self.write();
        let free = |number: &u16| !devices.contains_key(&RequesterId::new(*number));
        let number = (0..=u16::MAX).find(free).ok_or(Errno::ENOMEM)?;
        let requester = RequesterId::new(number);
        let device = MockDevice {
            flags,
            cache: [abi::DEVICE_CACHE_DEFAULT; abi::DEVICE_CACHE_ENTRIES],
            virtual_id: None,
            fail_reserved_pasid: false,
        };
        devices.insert(requester, device);
        Ok(Bdf { segment: SEGMENT, requester })
    }

    /// Takes a device away that the core does not have, or has no longer.
    pub(super) fn destroy(&self, device: Bdf) {
        self.write().remove(&device.requester);
    }

    /// Whether there is a mock device at an address.
    pub(super) fn contains(&self, device: Bdf) -> bool {
        device.segment == SEGMENT && self.read().contains_key(&device.requester)
    }

    /// What a device has cached in entry `id`; `None` when there is no such device or entry.
    pub(super) fn cached(&self, device: Bdf, id: u32) -> Option<u32> {
        let devices = self.read();
        devices.get(&device.requester)?.cache.get(usize::try_from(id).ok()?).copied()
    }

    /// A device forgets one entry, or all.
    pub(super) fn invalidate(&self, device: RequesterId, entry: Option<usize>) {
        if let Some(device) = self.write().get_mut(&device) {
            match entry {
                Some(entry) => {
                    if let Some(entry) = device.cache.get_mut(entry) {
                        *entry = 0;
                    }
                }
                None => device.cache.fill(0),
            }
        }
    }

    /// A device has an event for its guest. `ENOENT` unless it is attached to a nested domain of a
    /// vIOMMU, and when its virtual id is 0; else as `report_event`.
    pub(super) fn report_event(&self, device: Bdf) -> Result<(), Errno> {
        let devices = self.read();
        let on_viommu = devices.get(&device.requester).and_then(|d| d.virtual_id.as_ref());
        let (host, id) = on_viommu.filter(|(_, id)| *id != 0).ok_or(Errno::ENOENT)?;
        let host = host.upgrade().ok_or(Errno::ENOENT)?;
        #[expect(clippy::cast_possible_truncation, reason = "the structure has 32 bits of it")]
        let event = abi::EventData { virt_id: *id as u32 };
        host.report_event(abi::VEVENTQ_TYPE, event.as_bytes())
    }

    fn read(&self) -> RwLockReadGuard<'_, BTreeMap<RequesterId, MockDevice>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<RequesterId, MockDevice>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for MockDriver {
    fn probe(&self, device: RequesterId, _aliases: &[RequesterId]) -> Result<(), ProbeError> {
        fault_injection::allocation().map_err(|_| ProbeError::OutOfMemory)?;
        if self.devices.read().contains_key(&device) { Ok(()) } else { Err(ProbeError::NoIommu) }
    }

    fn release(&self, device: RequesterId) {
        if let Some(device) = self.devices.write().get_mut(&device) {
            device.virtual_id = None;
        }
    }

    fn capable(&self, device: RequesterId, capability: Capability) -> bool {
        match capability {
            // Mock devices have no interrupts that could reach anything.
            Capability::CacheCoherency | Capability::IsolatedMsi => true,
            Capability::DirtyTracking => self.flags(device) & abi::DEVICE_NO_DIRTY == 0,
            _ => false,
        }
    }

    fn hw_info(&self, device: RequesterId, kind: u32) -> Option<HwInfo> {
        if kind != 0 && kind != abi::HW_INFO_TYPE {
            return None;
        }
        let data = abi::HwInfoData { flags: 0, test_reg: abi::HW_INFO_REGISTER };
        Some(HwInfo {
            kind: abi::HW_INFO_TYPE,
            bytes: data.as_bytes().to_vec(),
            max_pasid_log2: match self.max_pasids(device) {
                0 => 0,
                _ => abi::PASID_WIDTH,
            },
        })
    }

    fn default_domain(&self, _device: RequesterId) -> Option<DefaultDomain> {
        Some(DefaultDomain::Blocked)
    }

    fn reserved_regions(&self, _device: RequesterId) -> Vec<ReservedRegion> {
        Vec::new()
    }

    fn alloc_paging(
        &self,
        device: RequesterId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        let data = data.map(read_hwpt_data).transpose()?.unwrap_or_default();
        if flags.dirty && self.flags(device) & abi::DEVICE_NO_DIRTY != 0 {
            return Err(AllocError::Unsupported);
        }
        let shape = match data.pagetable_type {
            abi::PAGE_TABLE_DEFAULT => Shape::Default,
            abi::PAGE_TABLE_HUGE => Shape::Huge,
            _ => return Err(AllocError::Unsupported),
        };
        fault_injection::allocation().map_err(|_| AllocError::OutOfMemory)?;
        Ok(Arc::new(MockDomain::new(self.pages.clone(), shape, flags)?))
    }

    fn attach(
        &self,
        device: RequesterId,
        domain: &Domain,
        _old: &Domain,
    ) -> Result<(), AttachError> {
        self.check(device, domain)?;
        let host = match domain {
            Domain::Nested(nested) => {
                nested.as_any().downcast_ref::<MockNested>().and_then(MockNested::host)
            }
            _ => None,
        };
        let mut devices = self.devices.write();
        let virtual_id = match host {
            Some(host) => {
                let id = host.upgrade().and_then(|host| host.devices().virtual_id(device));
                Some((Weak::clone(host), id.ok_or(AttachError::NoVirtualDevice)?))
            }
            None => None,
        };
        if let Some(device) = devices.get_mut(&device) {
            device.virtual_id = virtual_id;
        }
        Ok(())
    }

    fn max_pasids(&self, device: RequesterId) -> u32 {
        if self.flags(device) & abi::DEVICE_PASID != 0 { 1 << abi::PASID_WIDTH } else { 0 }
    }

    fn attach_pasid(
        &self,
        device: RequesterId,
        pasid: Pasid,
        domain: &Domain,
        _old: &Domain,
    ) -> Result<(), AttachError> {
        self.check(device, domain)?;
        if pasid.get() == abi::PASID_RESERVED
            && let Some(device) = self.devices.write().get_mut(&device)
        {
            // One attachment in two fails, so that tests see how the core goes back.
            let fails = device.fail_reserved_pasid;
            device.fail_reserved_pasid = !fails && !matches!(domain, Domain::Blocked);
            if fails && !matches!(domain, Domain::Blocked) {
                return Err(AttachError::OutOfMemory);
            }
        }
        Ok(())
    }

    fn user_pasid_table(&self, _device: RequesterId) -> bool {
        true
    }

    fn enable_page_requests(&self, _device: RequesterId) -> Result<(), AttachError> {
        fault_injection::allocation().map_err(|_| AttachError::OutOfMemory)
    }

    fn disable_page_requests(&self, _device: RequesterId) {}

    fn alloc_nested(
        &self,
        _device: RequesterId,
        parent: &Arc<dyn PagingDomain>,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        if !parent.as_any().is::<MockDomain>() {
            return Err(AllocError::InvalidData);
        }
        let stage2 = Stage2::Parent(Arc::clone(parent));
        Ok(Arc::new(MockNested::new(stage2, pasid, data)?))
    }

    fn supports_viommu(&self, _device: RequesterId, kind: u32) -> bool {
        kind == abi::VIOMMU_TYPE
    }

    fn viommu_init(
        &self,
        _device: RequesterId,
        request: &ViommuRequest<'_>,
        host: Weak<dyn ViommuHost>,
    ) -> Result<NewViommu, Errno> {
        MockViommu::init(request, host, &self.devices)
    }
}
