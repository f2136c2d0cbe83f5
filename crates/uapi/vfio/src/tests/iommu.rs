//! An IOMMU driver whose page tables are a map.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, DeviceId, Domain, Driver, Geometry, HwInfo,
    Iommu, MapError, PagingDomain, PciFunctionInfo, PciKind, ProbeError, ReservedRegion, UserData,
};
use lychgate_types::{Bdf, Iova, Pasid, PhysAddr, PhysRun, Prot, RequesterId};

/// What the driver can, and what it has attached.
#[derive(Default)]
pub(crate) struct TestDriver {
    incoherent: bool,
    unisolated: bool,
    attached: Mutex<BTreeMap<RequesterId, Domain>>,
    pasids: Mutex<BTreeMap<(RequesterId, Pasid), Domain>>,
}

impl TestDriver {
    /// One that does not isolate interrupts.
    pub(crate) fn unisolated() -> Self {
        Self { unisolated: true, ..Self::default() }
    }

    /// One without coherent DMA.
    pub(crate) fn incoherent() -> Self {
        Self { incoherent: true, ..Self::default() }
    }

    pub(crate) fn attached(&self, device: RequesterId) -> Domain {
        self.attached.lock().unwrap().get(&device).cloned().unwrap()
    }

    pub(crate) fn pasid_attached(&self, device: RequesterId, pasid: u32) -> Option<Domain> {
        let pasid = Pasid::new(pasid).unwrap();
        self.pasids.lock().unwrap().get(&(device, pasid)).cloned()
    }
}

impl Driver for TestDriver {
    fn probe(&self, device: RequesterId, _: &[RequesterId]) -> Result<(), ProbeError> {
        self.attached.lock().unwrap().insert(device, Domain::Blocked);
        Ok(())
    }

    fn release(&self, device: RequesterId) {
        self.attached.lock().unwrap().remove(&device);
    }

    fn capable(&self, _: RequesterId, capability: Capability) -> bool {
        match capability {
            Capability::CacheCoherency => !self.incoherent,
            Capability::IsolatedMsi => !self.unisolated,
            _ => false,
        }
    }

    fn hw_info(&self, _: RequesterId, kind: u32) -> Option<HwInfo> {
        (kind == 0).then(HwInfo::default)
    }

    fn reserved_regions(&self, _: RequesterId) -> Vec<ReservedRegion> {
        Vec::new()
    }

    fn alloc_paging(
        &self,
        _: RequesterId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        match data {
            None => Ok(Arc::new(TestDomain { pasid: flags.pasid, ..TestDomain::default() })),
            Some(_) => Err(AllocError::Unsupported),
        }
    }

    fn attach(&self, device: RequesterId, domain: &Domain, _: &Domain) -> Result<(), AttachError> {
        self.attached.lock().unwrap().insert(device, domain.clone());
        Ok(())
    }

    fn max_pasids(&self, _: RequesterId) -> u32 {
        1 << 8
    }

    fn attach_pasid(
        &self,
        device: RequesterId,
        pasid: Pasid,
        domain: &Domain,
        _: &Domain,
    ) -> Result<(), AttachError> {
        self.pasids.lock().unwrap().insert((device, pasid), domain.clone());
        Ok(())
    }
}

#[derive(Default)]
struct TestDomain {
    pages: Mutex<BTreeMap<u64, u64>>,
    pasid: bool,
}

impl PagingDomain for TestDomain {
    fn geometry(&self) -> Geometry {
        Geometry { first: Iova::new(0), last: Iova::new((1 << 48) - 1), page_sizes: 0x1000 }
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], _: Prot) -> Result<(), MapError> {
        let mut pages = self.pages.lock().unwrap();
        let mut at = iova.get();
        for run in runs {
            for offset in (0..run.len).step_by(0x1000) {
                assert_eq!(pages.insert(at, run.start.get() + offset), None);
                at += 0x1000;
            }
        }
        Ok(())
    }

    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let mut pages = self.pages.lock().unwrap();
        let pages = (0..len)
            .step_by(0x1000)
            .take_while(|offset| pages.remove(&(iova.get() + offset)).is_some());
        pages.count() as u64 * 0x1000
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        let page = *self.pages.lock().unwrap().get(&iova.align_down(0x1000).get())?;
        Some(PhysAddr::new(page + iova.get() % 0x1000))
    }

    fn enforce_cache_coherency(&self) -> bool {
        true
    }

    fn supports_pasid(&self) -> bool {
        self.pasid
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// Adds an endpoint. Functions of one device share a group.
pub(crate) fn add(iommu: &mut Iommu, driver: &Arc<TestDriver>, bdf: Bdf) -> DeviceId {
    let info = PciFunctionInfo {
        bdf,
        kind: PciKind::Endpoint,
        multifunction: true,
        acs: None,
        parent: None,
        secondary_bus: None,
        quirk_aliases: Vec::new(),
    };
    iommu.add_pci(info, Arc::clone(driver) as Arc<dyn Driver>).unwrap()
}
