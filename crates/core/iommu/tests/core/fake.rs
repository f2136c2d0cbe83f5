//! A driver that remembers what it was told and fails when asked to, and a topology to put it in.

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use lychgate_iommu::{
    Acs, AllocError, AllocFlags, AttachError, Capability, DefaultDomain, Domain, Driver, Geometry,
    HwInfo, MapError, NestedDomain, PageFault, PageResponse, PagingDomain, PciFunctionInfo,
    PciKind, ProbeError, ReservedKind, ReservedRegion, UserData,
};
use lychgate_types::{Bdf, Iova, Pasid, PhysAddr, PhysRun, Prot, RequesterId};

/// A paging domain that keeps its mappings in a map of pages.
#[derive(Default)]
pub(crate) struct FakeDomain {
    pub(crate) pages: Mutex<BTreeMap<u64, (u64, Prot)>>,
    /// Whether it was allocated for PASIDs.
    pub(crate) pasid: bool,
}

/// A nested domain without a first stage.
pub(crate) struct FakeNested(pub(crate) Arc<dyn PagingDomain>);

impl NestedDomain for FakeNested {
    fn parent(&self) -> Arc<dyn PagingDomain> {
        Arc::clone(&self.0)
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl PagingDomain for FakeDomain {
    fn geometry(&self) -> Geometry {
        Geometry { first: Iova::new(0), last: Iova::new((1 << 48) - 1), page_sizes: 0x1000 }
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError> {
        let mut pages = self.pages.lock().unwrap();
        let mut at = iova.get();
        for run in runs {
            for offset in (0..run.len).step_by(0x1000) {
                let taken = pages.insert(at, (run.start.get() + offset, prot));
                assert_eq!(taken, None, "{at:#x} was mapped");
                at += 0x1000;
            }
        }
        Ok(())
    }

    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let mut pages = self.pages.lock().unwrap();
        (0..len)
            .step_by(0x1000)
            .take_while(|offset| pages.remove(&(iova.get() + offset)).is_some())
            .count() as u64
            * 0x1000
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        let pages = self.pages.lock().unwrap();
        let (start, _) = pages.get(&iova.align_down(0x1000).get())?;
        Some(PhysAddr::new(start + iova.get() % 0x1000))
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

/// What the driver has attached and which calls shall fail.
#[derive(Default)]
pub(crate) struct FakeState {
    pub(crate) attached: BTreeMap<RequesterId, Domain>,
    pub(crate) aliases: BTreeMap<RequesterId, Vec<RequesterId>>,
    pub(crate) reserved: BTreeMap<RequesterId, Vec<ReservedRegion>>,
    /// Devices that must have a certain default domain.
    pub(crate) default_domains: BTreeMap<RequesterId, DefaultDomain>,
    /// Devices for which an attachment to anything but `Blocked` fails.
    pub(crate) broken: BTreeMap<RequesterId, AttachError>,
    pub(crate) probe_error: Option<ProbeError>,
    pub(crate) calls: Vec<String>,
    /// What PASIDs are attached to; those that are not blocked.
    pub(crate) pasids: BTreeMap<(RequesterId, Pasid), Domain>,
    /// Devices with PASIDs, and how many.
    pub(crate) max_pasids: BTreeMap<RequesterId, u32>,
    /// Devices that may ask for pages now.
    pub(crate) asking: BTreeSet<RequesterId>,
    /// Answers that devices got: the device, its page request group, the answer.
    pub(crate) answers: Vec<(RequesterId, u32, PageResponse)>,
}

#[derive(Default)]
pub(crate) struct FakeDriver(pub(crate) Mutex<FakeState>);

impl FakeDriver {
    pub(crate) fn new() -> Arc<Self> {
        Arc::default()
    }

    pub(crate) fn attached(&self, device: u16) -> Option<Domain> {
        let state = self.0.lock().unwrap();
        state.attached.get(&RequesterId::new(device)).cloned()
    }

    pub(crate) fn break_device(&self, device: u16, error: Option<AttachError>) {
        let mut state = self.0.lock().unwrap();
        let device = RequesterId::new(device);
        match error {
            Some(error) => state.broken.insert(device, error),
            None => state.broken.remove(&device),
        };
    }

    pub(crate) fn reserve(&self, device: u16, first: u64, last: u64, kind: ReservedKind) {
        let region = ReservedRegion {
            first: Iova::new(first),
            last: Iova::new(last),
            prot: Prot::READ | Prot::WRITE,
            kind,
        };
        let mut state = self.0.lock().unwrap();
        let regions = state.reserved.entry(RequesterId::new(device)).or_default();
        regions.push(region);
    }

    pub(crate) fn give_pasids(&self, device: u16, max: u32) {
        self.0.lock().unwrap().max_pasids.insert(RequesterId::new(device), max);
    }

    pub(crate) fn pasid(&self, device: u16, pasid: u32) -> Option<Domain> {
        let key = (RequesterId::new(device), Pasid::new(pasid).unwrap());
        self.0.lock().unwrap().pasids.get(&key).cloned()
    }

    pub(crate) fn may_ask(&self, device: u16) -> bool {
        self.0.lock().unwrap().asking.contains(&RequesterId::new(device))
    }

    pub(crate) fn take_answers(&self) -> Vec<(u32, PageResponse)> {
        let answers = std::mem::take(&mut self.0.lock().unwrap().answers);
        answers.into_iter().map(|(_, group, answer)| (group, answer)).collect()
    }

    pub(crate) fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().calls)
    }
}

impl Driver for FakeDriver {
    fn probe(&self, device: RequesterId, aliases: &[RequesterId]) -> Result<(), ProbeError> {
        let mut state = self.0.lock().unwrap();
        if let Some(error) = state.probe_error {
            return Err(error);
        }
        let before = state.attached.insert(device, Domain::Blocked);
        assert!(before.is_none(), "{device} was probed twice");
        state.aliases.insert(device, aliases.to_vec());
        Ok(())
    }

    fn release(&self, device: RequesterId) {
        let mut state = self.0.lock().unwrap();
        let before = state.attached.remove(&device);
        assert!(before.is_some(), "{device} was released without a probe");
    }

    fn capable(&self, _: RequesterId, capability: Capability) -> bool {
        capability == Capability::CacheCoherency
    }

    fn hw_info(&self, _: RequesterId, kind: u32) -> Option<HwInfo> {
        (kind == 0 || kind == 99).then(|| HwInfo { kind: 99, ..HwInfo::default() })
    }

    fn default_domain(&self, device: RequesterId) -> Option<DefaultDomain> {
        self.0.lock().unwrap().default_domains.get(&device).copied()
    }

    fn reserved_regions(&self, device: RequesterId) -> Vec<ReservedRegion> {
        let state = self.0.lock().unwrap();
        state.reserved.get(&device).cloned().unwrap_or_default()
    }

    fn alloc_paging(
        &self,
        _: RequesterId,
        flags: AllocFlags,
        _: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        if flags.nest_parent {
            return Err(AllocError::Unsupported);
        }
        Ok(Arc::new(FakeDomain { pasid: flags.pasid, ..FakeDomain::default() }))
    }

    fn max_pasids(&self, device: RequesterId) -> u32 {
        self.0.lock().unwrap().max_pasids.get(&device).copied().unwrap_or(0)
    }

    fn attach_pasid(
        &self,
        device: RequesterId,
        pasid: Pasid,
        domain: &Domain,
        old: &Domain,
    ) -> Result<(), AttachError> {
        let mut state = self.0.lock().unwrap();
        state.calls.push(format!("{device}/{} {old:?} -> {domain:?}", pasid.get()));
        let before = state.pasids.get(&(device, pasid)).unwrap_or(&Domain::Blocked);
        assert!(before.same(old), "{device}/{pasid:?} is not attached to {old:?}");
        if matches!(domain, Domain::Blocked) {
            state.pasids.remove(&(device, pasid));
            return Ok(());
        }
        if let Some(error) = state.broken.get(&device) {
            return Err(*error);
        }
        state.pasids.insert((device, pasid), domain.clone());
        Ok(())
    }

    fn user_pasid_table(&self, _: RequesterId) -> bool {
        true
    }

    fn enable_page_requests(&self, device: RequesterId) -> Result<(), AttachError> {
        let mut state = self.0.lock().unwrap();
        if state.max_pasids.get(&device).is_none_or(|max| *max == 0) {
            return Err(AttachError::NoDevice);
        }
        assert!(state.asking.insert(device), "{device} may ask already");
        Ok(())
    }

    fn disable_page_requests(&self, device: RequesterId) {
        assert!(self.0.lock().unwrap().asking.remove(&device), "{device} may not ask");
    }

    fn page_response(&self, device: RequesterId, last: &PageFault, response: PageResponse) {
        assert!(last.last, "an answer to a group that is not closed");
        self.0.lock().unwrap().answers.push((device, last.group, response));
    }

    fn attach(
        &self,
        device: RequesterId,
        domain: &Domain,
        old: &Domain,
    ) -> Result<(), AttachError> {
        let mut state = self.0.lock().unwrap();
        state.calls.push(format!("{device} {old:?} -> {domain:?}"));
        let before = state.attached.get(&device).expect("attached before probe");
        assert!(before.same(old), "{device} is not attached to {old:?}");
        if !matches!(domain, Domain::Blocked)
            && let Some(error) = state.broken.get(&device)
        {
            return Err(*error);
        }
        state.attached.insert(device, domain.clone());
        Ok(())
    }
}

pub(crate) fn bdf(requester: u16) -> Bdf {
    Bdf { segment: 0, requester: RequesterId::new(requester) }
}

/// A single-function endpoint on the root bus.
pub(crate) fn endpoint(requester: u16) -> PciFunctionInfo {
    PciFunctionInfo {
        bdf: bdf(requester),
        kind: PciKind::Endpoint,
        multifunction: false,
        acs: None,
        parent: None,
        secondary_bus: None,
        quirk_aliases: Vec::new(),
    }
}

/// One function of several that are not isolated from each other.
pub(crate) fn function(requester: u16) -> PciFunctionInfo {
    PciFunctionInfo { multifunction: true, ..endpoint(requester) }
}

/// A bridge of `kind` with the bus `secondary` below it.
pub(crate) fn bridge(
    requester: u16,
    kind: PciKind,
    secondary: u8,
    isolates: bool,
) -> PciFunctionInfo {
    PciFunctionInfo {
        kind,
        acs: isolates.then_some(Acs { isolates }),
        secondary_bus: Some(secondary),
        ..endpoint(requester)
    }
}

/// `info`, below `parent`.
pub(crate) fn below(parent: u16, info: PciFunctionInfo) -> PciFunctionInfo {
    PciFunctionInfo { parent: Some(bdf(parent)), ..info }
}

/// `info` with ACS that isolates it.
pub(crate) fn with_acs(info: PciFunctionInfo) -> PciFunctionInfo {
    PciFunctionInfo { acs: Some(Acs { isolates: true }), ..info }
}
