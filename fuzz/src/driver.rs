//! An IOMMU driver whose domains are maps of leaves, which fails when it is told to and checks what
//! it is asked for.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, Domain, Driver, Geometry, HwInfo, Iommu,
    MapError, PagingDomain, PciFunctionInfo, PciKind, ProbeError, ReservedKind, ReservedRegion,
    UserData,
};
use lychgate_types::{Bdf, Iova, PhysAddr, PhysRun, Prot, RequesterId};

use crate::client::PAGE;

/// Last IOVA that domains reach.
pub const LAST_IOVA: u64 = (1 << 48) - 1;
/// The window of interrupts that every device reserves.
pub const RESERVED: std::ops::RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;

/// The driver.
#[derive(Debug)]
pub struct FuzzDriver {
    attached: Mutex<BTreeMap<RequesterId, Domain>>,
    budget: Arc<Budget>,
}

/// Calls of each kind that succeed before all fail, or, for `attach`, before one fails: a way back
/// is always open. `u32::MAX` for no end.
#[derive(Debug)]
pub struct Budget {
    maps: AtomicU32,
    allocs: AtomicU32,
    attaches: AtomicU32,
}

impl Budget {
    /// Lets so many calls of `map`, `alloc_paging` and `attach` succeed.
    pub fn set(&self, maps: Option<u32>, allocs: Option<u32>, attaches: Option<u32>) {
        for (left, value) in
            [(&self.maps, maps), (&self.allocs, allocs), (&self.attaches, attaches)]
        {
            left.store(value.unwrap_or(u32::MAX), Ordering::Relaxed);
        }
    }

    fn spend(left: &AtomicU32) -> bool {
        match left.load(Ordering::Relaxed) {
            u32::MAX => true,
            0 => false,
            more => {
                left.store(more - 1, Ordering::Relaxed);
                true
            }
        }
    }
}

impl FuzzDriver {
    /// A driver without devices.
    pub fn new() -> Arc<Self> {
        let free = || AtomicU32::new(u32::MAX);
        let budget = Arc::new(Budget { maps: free(), allocs: free(), attaches: free() });
        Arc::new(Self { attached: Mutex::default(), budget })
    }

    /// What may fail.
    pub fn budget(&self) -> &Budget {
        &self.budget
    }

    /// What is mapped for a device: frame by IOVA of each page. `None` when it is not attached to a
    /// paging domain.
    pub fn reach(&self, device: RequesterId) -> Option<BTreeMap<u64, (u64, Prot)>> {
        match lock(&self.attached).get(&device)? {
            Domain::Paging(domain) => pages(&**domain),
            _ => None,
        }
    }

    /// Adds an endpoint; those of one slot share a group.
    pub fn add(self: &Arc<Self>, iommu: &mut Iommu, bdf: Bdf) -> lychgate_iommu::DeviceId {
        let info = PciFunctionInfo {
            bdf,
            kind: PciKind::Endpoint,
            multifunction: true,
            acs: None,
            parent: None,
            secondary_bus: None,
            quirk_aliases: Vec::new(),
        };
        iommu.add_pci(info, Arc::clone(self) as _).expect("a new address")
    }
}

impl Driver for FuzzDriver {
    fn probe(&self, device: RequesterId, _: &[RequesterId]) -> Result<(), ProbeError> {
        lock(&self.attached).insert(device, Domain::Blocked);
        Ok(())
    }

    fn release(&self, device: RequesterId) {
        lock(&self.attached).remove(&device);
    }

    fn capable(&self, _: RequesterId, capability: Capability) -> bool {
        matches!(
            capability,
            Capability::CacheCoherency
                | Capability::IsolatedMsi
                | Capability::EnforceCacheCoherency
        )
    }

    fn hw_info(&self, _: RequesterId, kind: u32) -> Option<HwInfo> {
        let info = HwInfo { kind: 4, bytes: vec![7; 16], max_pasid_log2: 0 };
        (kind == 0 || kind == 4).then_some(info)
    }

    fn reserved_regions(&self, _: RequesterId) -> Vec<ReservedRegion> {
        let (first, last) = (Iova::new(*RESERVED.start()), Iova::new(*RESERVED.end()));
        vec![ReservedRegion { first, last, prot: Prot::NONE, kind: ReservedKind::Msi }]
    }

    fn alloc_paging(
        &self,
        _: RequesterId,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<Arc<dyn PagingDomain>, AllocError> {
        if flags.nest_parent || data.is_some() {
            return Err(AllocError::Unsupported);
        }
        if !Budget::spend(&self.budget.allocs) {
            return Err(AllocError::OutOfMemory);
        }
        let budget = Arc::clone(&self.budget);
        Ok(Arc::new(FuzzDomain { leaves: Mutex::default(), budget }))
    }

    fn attach(
        &self,
        device: RequesterId,
        domain: &Domain,
        old: &Domain,
    ) -> Result<(), AttachError> {
        let mut attached = lock(&self.attached);
        let now = attached.get_mut(&device).expect("only probed devices are attached");
        assert!(now.same(old), "{device} is attached to something else than is said");
        if !matches!(domain, Domain::Blocked) && !Budget::spend(&self.budget.attaches) {
            self.budget.attaches.store(u32::MAX, Ordering::Relaxed);
            return Err(AttachError::OutOfMemory);
        }
        *now = domain.clone();
        Ok(())
    }
}

/// The pages of a domain of this driver.
pub fn pages(domain: &dyn PagingDomain) -> Option<BTreeMap<u64, (u64, Prot)>> {
    let domain = domain.as_any().downcast_ref::<FuzzDomain>()?;
    let leaves = lock(&domain.leaves);
    let pages = leaves.iter().flat_map(|(&iova, leaf)| {
        (0..leaf.len / PAGE).map(move |n| (iova + n * PAGE, (leaf.phys + n * PAGE, leaf.prot)))
    });
    Some(pages.collect())
}

#[derive(Clone, Copy, Debug)]
struct Leaf {
    len: u64,
    phys: u64,
    prot: Prot,
}

/// A domain that keeps leaves as hardware would: powers of two, aligned on both sides.
#[derive(Debug)]
struct FuzzDomain {
    leaves: Mutex<BTreeMap<u64, Leaf>>,
    budget: Arc<Budget>,
}

impl Drop for FuzzDomain {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(lock(&self.leaves).is_empty(), "a domain was freed with mappings");
        }
    }
}

impl PagingDomain for FuzzDomain {
    fn geometry(&self) -> Geometry {
        let (first, last) = (Iova::new(0), Iova::new(LAST_IOVA));
        Geometry { first, last, page_sizes: 0x7fff_f000 }
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError> {
        if !Budget::spend(&self.budget.maps) {
            return Err(MapError::OutOfMemory);
        }
        let mut leaves = lock(&self.leaves);
        let mut at = iova.get();
        assert!(!runs.is_empty());
        for run in runs {
            let (mut phys, mut rest) = (run.start.get(), run.len);
            assert!((at | phys | rest).is_multiple_of(PAGE) && rest > 0, "{at:#x} {run:?}");
            while rest > 0 {
                let bits = at | phys | 1 << 30;
                let len = (bits & bits.wrapping_neg()).min(1 << rest.ilog2());
                let before = leaves.range(..at + len).next_back();
                assert!(before.is_none_or(|(first, leaf)| first + leaf.len <= at), "{at:#x} taken");
                leaves.insert(at, Leaf { len, phys, prot });
                (at, phys, rest) = (at + len, phys + len, rest - len);
            }
        }
        assert!(at - 1 <= LAST_IOVA);
        Ok(())
    }

    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let mut leaves = lock(&self.leaves);
        let mut at = iova.get();
        let end = at + len;
        while at < end {
            let leaf = leaves.remove(&at).expect("unmapped from inside of a leaf, or a hole");
            at += leaf.len;
        }
        assert_eq!(at, end, "a leaf passes the end of what is unmapped");
        len
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        let leaves = lock(&self.leaves);
        let (first, leaf) = leaves.range(..=iova.get()).next_back()?;
        let offset = iova.get() - first;
        (offset < leaf.len).then(|| PhysAddr::new(leaf.phys + offset))
    }

    fn enforce_cache_coherency(&self) -> bool {
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
