//! A driver whose domains are maps of leaves.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::{Arc, Mutex, Weak};

use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, DirtyBits, DirtyTracking, Domain, Driver,
    Geometry, HwInfo, MapError, NestedDomain, NewViommu, PageFault, PageResponse, PagingDomain,
    ProbeError, ReservedRegion, UserData, ViommuHost, ViommuRequest,
};
use lychgate_types::{Errno, Iova, Pasid, PhysAddr, PhysRun, Prot, RequesterId};

use super::nested::{self, FakeNested, FakeViommu, Nesting};

/// What the driver's next domains are and what shall go wrong.
pub(crate) struct Plan {
    pub(crate) geometry: Geometry,
    pub(crate) capabilities: HashSet<Capability>,
    pub(crate) reserved: BTreeMap<u16, Vec<ReservedRegion>>,
    pub(crate) alloc_error: Option<AllocError>,
    pub(crate) attach_error: BTreeMap<u16, AttachError>,
    /// Calls of `map` that succeed before all fail.
    pub(crate) maps_left: Option<u32>,
    pub(crate) hw_info: Option<HwInfo>,
    pub(crate) domains: Vec<Weak<FakeDomain>>,
    /// Devices that only go with domains that were allocated for one of them.
    pub(crate) picky: BTreeSet<u16>,
    pub(crate) last_data: Option<(u32, Vec<u8>)>,
    /// Besides what has to do with one stage of translation.
    pub(crate) nesting: Nesting,
}

pub(crate) struct FakeDriver {
    pub(crate) plan: Arc<Mutex<Plan>>,
}

impl FakeDriver {
    pub(crate) fn new() -> Arc<Self> {
        let geometry = Geometry {
            first: Iova::new(0),
            last: Iova::new((1 << 48) - 1),
            page_sizes: !0xfff & ((1 << 31) - 1),
        };
        let plan = Plan {
            geometry,
            capabilities: HashSet::from([
                Capability::CacheCoherency,
                Capability::IsolatedMsi,
                Capability::EnforceCacheCoherency,
            ]),
            reserved: BTreeMap::new(),
            alloc_error: None,
            attach_error: BTreeMap::new(),
            maps_left: None,
            hw_info: None,
            domains: Vec::new(),
            picky: BTreeSet::new(),
            last_data: None,
            nesting: Nesting::default(),
        };
        Arc::new(Self { plan: Arc::new(Mutex::new(plan)) })
    }

    pub(crate) fn plan(&self, change: impl FnOnce(&mut Plan)) {
        change(&mut self.plan.lock().unwrap());
    }

    /// The domains that are still there, oldest first.
    pub(crate) fn domains(&self) -> Vec<Arc<FakeDomain>> {
        self.plan.lock().unwrap().domains.iter().filter_map(Weak::upgrade).collect()
    }
}

impl Driver for FakeDriver {
    fn probe(&self, _: RequesterId, _: &[RequesterId]) -> Result<(), ProbeError> {
        Ok(())
    }

    fn release(&self, _: RequesterId) {}

    fn capable(&self, _: RequesterId, capability: Capability) -> bool {
        self.plan.lock().unwrap().capabilities.contains(&capability)
    }

    fn hw_info(&self, _: RequesterId, kind: u32) -> Option<HwInfo> {
        let info = self.plan.lock().unwrap().hw_info.clone()?;
        (kind == 0 || kind == info.kind).then_some(info)
    }

    fn reserved_regions(&self, device: RequesterId) -> Vec<ReservedRegion> {
        self.plan.lock().unwrap().reserved.get(&device.get()).cloned().unwrap_or_default()
    }

    fn alloc_paging(
        &self,
        device: RequesterId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        let mut plan = self.plan.lock().unwrap();
        if let Some(error) = plan.alloc_error {
            return Err(error);
        }
        if flags.nest_parent && !plan.nesting.supported {
            return Err(AllocError::Unsupported);
        }
        plan.last_data = data.map(|data| (data.kind, data.bytes.to_vec()));
        let domain = Arc::new(FakeDomain {
            device: device.get(),
            pasid: flags.pasid,
            geometry: plan.geometry,
            leaves: Mutex::default(),
            tracked: flags.dirty.then(Mutex::default),
            plan: Arc::downgrade(&self.plan),
        });
        plan.domains.push(Arc::downgrade(&domain));
        Ok(domain)
    }

    fn attach(&self, device: RequesterId, domain: &Domain, _: &Domain) -> Result<(), AttachError> {
        let domain = match domain {
            Domain::Paging(domain) => domain,
            Domain::Nested(domain) => return nested::check_attach(domain, device),
            _ => return Ok(()),
        };
        let plan = self.plan.lock().unwrap();
        let domain = domain.as_any().downcast_ref::<FakeDomain>().unwrap();
        if plan.picky.contains(&device.get()) != plan.picky.contains(&domain.device) {
            return Err(AttachError::Incompatible);
        }
        plan.attach_error.get(&device.get()).map_or(Ok(()), |error| Err(*error))
    }

    fn max_pasids(&self, _: RequesterId) -> u32 {
        self.plan.lock().unwrap().nesting.max_pasids
    }

    fn attach_pasid(
        &self,
        device: RequesterId,
        pasid: Pasid,
        domain: &Domain,
        _: &Domain,
    ) -> Result<(), AttachError> {
        let mut plan = self.plan.lock().unwrap();
        if let (Some(error), false) = (plan.nesting.pasid_error, matches!(domain, Domain::Blocked))
        {
            return Err(error);
        }
        plan.nesting.pasids.insert((device.get(), pasid.get()), domain.kind());
        Ok(())
    }

    fn user_pasid_table(&self, _: RequesterId) -> bool {
        true
    }

    fn enable_page_requests(&self, _: RequesterId) -> Result<(), AttachError> {
        match self.plan.lock().unwrap().nesting.page_requests {
            true => Ok(()),
            false => Err(AttachError::NoDevice),
        }
    }

    fn page_response(&self, _: RequesterId, last: &PageFault, response: PageResponse) {
        self.plan.lock().unwrap().nesting.responses.push((last.group, response));
    }

    fn alloc_nested(
        &self,
        _: RequesterId,
        parent: &Arc<dyn PagingDomain>,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        let domain = FakeNested::new(parent, pasid, None, data)?;
        self.plan.lock().unwrap().nesting.domains.push(Arc::downgrade(&domain));
        Ok(domain)
    }

    fn supports_viommu(&self, _: RequesterId, kind: u32) -> bool {
        kind == nested::KIND && self.plan.lock().unwrap().nesting.supported
    }

    fn viommu_init(
        &self,
        _: RequesterId,
        request: &ViommuRequest<'_>,
        host: Weak<dyn ViommuHost>,
    ) -> Result<NewViommu, Errno> {
        let (viommu, out) = FakeViommu::new(request, host)?;
        self.plan.lock().unwrap().nesting.viommus.push(Arc::downgrade(&viommu));
        Ok(NewViommu { viommu, out })
    }
}

/// A domain that keeps leaves as hardware would: powers of two, aligned on both sides.
pub(crate) struct FakeDomain {
    device: u16,
    pasid: bool,
    geometry: Geometry,
    /// First IOVA to length, physical address and permissions.
    pub(crate) leaves: Mutex<BTreeMap<u64, (u64, u64, Prot)>>,
    /// For a domain that tracks dirty pages.
    tracked: Option<Mutex<Tracked>>,
    plan: Weak<Mutex<Plan>>,
}

#[derive(Default)]
struct Tracked {
    enabled: bool,
    /// First IOVAs of leaves.
    dirty: BTreeSet<u64>,
}

impl FakeDomain {
    /// Every mapped granule and where it leads.
    pub(crate) fn pages(&self) -> BTreeMap<u64, u64> {
        let granule = self.geometry.granule();
        let leaves = self.leaves.lock().unwrap();
        let pages = leaves.iter().flat_map(|(iova, (len, phys, _))| {
            (0..len / granule).map(move |n| (iova + n * granule, phys + n * granule))
        });
        pages.collect()
    }

    /// A device writes at an IOVA.
    pub(crate) fn write(&self, iova: u64) {
        let leaves = self.leaves.lock().unwrap();
        let (first, leaf) = leaves.range(..=iova).next_back().unwrap();
        assert!(iova - first < leaf.0);
        self.tracked.as_ref().unwrap().lock().unwrap().dirty.insert(*first);
    }

    /// Lengths of the leaves, in order.
    pub(crate) fn leaf_sizes(&self) -> Vec<u64> {
        self.leaves.lock().unwrap().values().map(|leaf| leaf.0).collect()
    }
}

impl Drop for FakeDomain {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.leaves.lock().unwrap().is_empty(), "a domain was freed with mappings");
        }
    }
}

impl PagingDomain for FakeDomain {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError> {
        let plan = self.plan.upgrade().unwrap();
        if let Some(left) = &mut plan.lock().unwrap().maps_left {
            *left = left.checked_sub(1).ok_or(MapError::OutOfMemory)?;
        }
        let granule = self.geometry.granule();
        let mut leaves = self.leaves.lock().unwrap();
        let mut at = iova.get();
        assert!(at >= self.geometry.first.get() && !runs.is_empty());
        for run in runs {
            let (mut phys, mut rest) = (run.start.get(), run.len);
            assert!((at | phys | rest).is_multiple_of(granule) && rest > 0, "{at:#x} {run:?}");
            while rest > 0 {
                let fits = (at | phys | 1 << 30) & (at | phys | 1 << 30).wrapping_neg();
                let len = fits.min(1 << rest.ilog2());
                let before = leaves.range(..at + len).next_back();
                assert!(before.is_none_or(|(first, leaf)| first + leaf.0 <= at), "{at:#x} taken");
                leaves.insert(at, (len, phys, prot));
                (at, phys, rest) = (at + len, phys + len, rest - len);
            }
        }
        assert!(at - 1 <= self.geometry.last.get());
        Ok(())
    }

    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let mut leaves = self.leaves.lock().unwrap();
        let mut at = iova.get();
        let end = at + len;
        while at < end {
            let Some((size, ..)) = leaves.remove(&at) else {
                panic!("{at:#x} is not the start of a leaf");
            };
            at += size;
        }
        assert_eq!(at, end, "a leaf passes the end of what is unmapped");
        len
    }

    fn supports_pasid(&self) -> bool {
        self.pasid
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        let leaves = self.leaves.lock().unwrap();
        let (first, (len, phys, _)) = leaves.range(..=iova.get()).next_back()?;
        let offset = iova.get() - first;
        (offset < *len).then(|| PhysAddr::new(phys + offset))
    }

    fn enforce_cache_coherency(&self) -> bool {
        true
    }

    fn dirty(&self) -> Option<&dyn DirtyTracking> {
        self.tracked.is_some().then_some(self as &dyn DirtyTracking)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl DirtyTracking for FakeDomain {
    fn set_dirty_tracking(&self, enable: bool) -> Result<(), Errno> {
        self.tracked.as_ref().unwrap().lock().unwrap().enabled = enable;
        Ok(())
    }

    fn read_and_clear_dirty(
        &self,
        iova: Iova,
        len: u64,
        bits: DirtyBits,
        dirty: &mut dyn FnMut(Iova, u64),
    ) -> Result<(), Errno> {
        let leaves = self.leaves.lock().unwrap();
        let mut tracked = self.tracked.as_ref().unwrap().lock().unwrap();
        if !tracked.enabled {
            return Err(Errno::EINVAL);
        }
        let (first, last) = (iova.get(), iova.get() + (len - 1));
        for (at, (len, ..)) in
            leaves.range(..=last).filter(|(at, leaf)| **at + (leaf.0 - 1) >= first)
        {
            let was = match bits {
                DirtyBits::Clear => tracked.dirty.remove(at),
                DirtyBits::Keep => tracked.dirty.contains(at),
            };
            if was {
                dirty(Iova::new(*at), *len);
            }
        }
        Ok(())
    }
}
