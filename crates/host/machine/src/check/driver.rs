//! A driver whose operations are counted, so that the checker looks only when none is under way.

use std::any::Any;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, DefaultDomain, DirtyTracking, Domain, Driver,
    Geometry, HwInfo, MapError, NestedDomain, NewViommu, PageFault, PageResponse, PagingDomain,
    ProbeError, ReservedRegion, UserData, ViommuHost, ViommuRequest,
};
use lychgate_model::{Audit, Scope};
use lychgate_types::{Errno, Iova, Pasid, PhysAddr, PhysRun, Prot, RequesterId};

use crate::faults::Faults;

/// A driver and what looks over its shoulder.
pub(crate) struct CheckedDriver {
    driver: Arc<dyn Driver>,
    checker: Arc<Checker>,
}

impl CheckedDriver {
    pub(crate) fn new(driver: Arc<dyn Driver>, model: Arc<dyn Audit>, faults: Arc<Faults>) -> Self {
        let checker = Checker { model, faults, state: Mutex::default(), idle: Condvar::new() };
        Self { driver, checker: Arc::new(checker) }
    }
}

/// Looks at the model's copies when no operation is under way.
struct Checker {
    model: Arc<dyn Audit>,
    faults: Arc<Faults>,
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Default)]
struct State {
    /// Operations under way.
    operations: usize,
    /// Where those that have returned since nobody was looking may have left something.
    scopes: Vec<Scope>,
    /// Somebody looks; operations wait.
    looking: bool,
}

impl Checker {
    /// Runs an operation of the driver that can leave copies in `scope` stale. The last of several at
    /// once looks at what they left behind.
    fn during<R>(&self, scope: Scope, operation: impl FnOnce() -> R) -> R {
        self.begin();
        let result = operation();
        self.end(Some(scope));
        result
    }

    /// Runs an operation that makes nothing stale, but must not be looked at in the middle.
    fn beside<R>(&self, operation: impl FnOnce() -> R) -> R {
        self.begin();
        let result = operation();
        self.end(None);
        result
    }

    /// Waits until nobody looks, and counts an operation.
    fn begin(&self) {
        let mut state = self.lock();
        while state.looking {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.operations += 1;
    }

    /// An operation has returned.
    fn end(&self, scope: Option<Scope>) {
        let mut state = self.lock();
        state.operations = state.operations.saturating_sub(1);
        state.scopes.extend(scope);
        if state.operations > 0 || state.scopes.is_empty() {
            return;
        }
        state.looking = true;
        let mut scopes = std::mem::take(&mut state.scopes);
        drop(state);
        if scopes.contains(&Scope::Everything) {
            scopes = vec![Scope::Everything];
        }
        for finding in scopes.into_iter().flat_map(|scope| self.model.audit(scope)) {
            self.faults.tell_stale(finding);
        }
        self.lock().looking = false;
        self.idle.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Driver for CheckedDriver {
    fn probe(&self, device: RequesterId, aliases: &[RequesterId]) -> Result<(), ProbeError> {
        self.checker.during(Scope::Everything, || self.driver.probe(device, aliases))
    }

    fn release(&self, device: RequesterId) {
        self.checker.during(Scope::Everything, || self.driver.release(device));
    }

    fn capable(&self, device: RequesterId, capability: Capability) -> bool {
        self.driver.capable(device, capability)
    }

    fn hw_info(&self, device: RequesterId, kind: u32) -> Option<HwInfo> {
        self.driver.hw_info(device, kind)
    }

    fn reserved_regions(&self, device: RequesterId) -> Vec<ReservedRegion> {
        self.driver.reserved_regions(device)
    }

    fn alloc_paging(
        &self,
        device: RequesterId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        let domain = self.driver.alloc_paging(device, flags, data)?;
        let checker = Arc::clone(&self.checker);
        Ok(Arc::new(CheckedDomain { domain: Some(domain), checker }))
    }

    fn attach(
        &self,
        device: RequesterId,
        domain: &Domain,
        old: &Domain,
    ) -> Result<(), AttachError> {
        self.checker.during(Scope::Everything, || self.driver.attach(device, domain, old))
    }

    fn default_domain(&self, device: RequesterId) -> Option<DefaultDomain> {
        self.driver.default_domain(device)
    }

    fn max_pasids(&self, device: RequesterId) -> u32 {
        self.driver.max_pasids(device)
    }

    fn attach_pasid(
        &self,
        device: RequesterId,
        pasid: Pasid,
        domain: &Domain,
        old: &Domain,
    ) -> Result<(), AttachError> {
        self.checker
            .during(Scope::Everything, || self.driver.attach_pasid(device, pasid, domain, old))
    }

    fn user_pasid_table(&self, device: RequesterId) -> bool {
        self.driver.user_pasid_table(device)
    }

    fn enable_page_requests(&self, device: RequesterId) -> Result<(), AttachError> {
        self.checker.during(Scope::Everything, || self.driver.enable_page_requests(device))
    }

    fn disable_page_requests(&self, device: RequesterId) {
        self.checker.during(Scope::Everything, || self.driver.disable_page_requests(device));
    }

    fn page_response(&self, device: RequesterId, last: &PageFault, response: PageResponse) {
        self.driver.page_response(device, last, response);
    }

    fn alloc_nested(
        &self,
        device: RequesterId,
        parent: &Arc<dyn PagingDomain>,
        pasid: bool,
        data: UserData<'_>,
    ) -> Result<Arc<dyn NestedDomain>, AllocError> {
        self.driver.alloc_nested(device, parent, pasid, data)
    }

    fn supports_viommu(&self, device: RequesterId, kind: u32) -> bool {
        self.driver.supports_viommu(device, kind)
    }

    fn viommu_init(
        &self,
        device: RequesterId,
        request: &ViommuRequest<'_>,
        host: Weak<dyn ViommuHost>,
    ) -> Result<NewViommu, Errno> {
        self.driver.viommu_init(device, request, host)
    }
}

/// A paging domain of the driver.
struct CheckedDomain {
    /// Always there, until it is dropped.
    domain: Option<Arc<dyn PagingDomain>>,
    checker: Arc<Checker>,
}

impl CheckedDomain {
    fn domain(&self) -> Option<&dyn PagingDomain> {
        self.domain.as_deref()
    }
}

impl PagingDomain for CheckedDomain {
    fn geometry(&self) -> Geometry {
        const NONE: Geometry =
            Geometry { first: Iova::new(0), last: Iova::new(0), page_sizes: 0x1000 };
        self.domain().map_or(NONE, PagingDomain::geometry)
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError> {
        let domain = self.domain().ok_or(MapError::Hardware)?;
        self.checker.beside(|| domain.map(iova, runs, prot))
    }

    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let last = iova.get().saturating_add(len.saturating_sub(1));
        let scope = Scope::Addresses(iova.get(), last);
        self.checker.during(scope, || self.domain().map_or(0, |domain| domain.unmap(iova, len)))
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        self.domain()?.iova_to_phys(iova)
    }

    fn enforce_cache_coherency(&self) -> bool {
        self.domain().is_some_and(PagingDomain::enforce_cache_coherency)
    }

    fn supports_pasid(&self) -> bool {
        self.domain().is_some_and(PagingDomain::supports_pasid)
    }

    fn dirty(&self) -> Option<&dyn DirtyTracking> {
        self.domain()?.dirty()
    }

    /// The driver's own type, as if nothing stood between.
    fn as_any(&self) -> &dyn Any {
        self.domain().map_or(self, PagingDomain::as_any)
    }
}

impl Drop for CheckedDomain {
    fn drop(&mut self) {
        let domain = self.domain.take();
        self.checker.during(Scope::Everything, || drop(domain));
    }
}
