//! Core, driver and model together: groups, ownership and what devices reach meanwhile.

use std::sync::Arc;

use lychgate_amd_vi::{driver, model};
use lychgate_iommu::{
    AllocFlags, AttachError, DefaultDomain, DeviceId, Domain, GroupId, Iommu, Owner, PagingDomain,
    PciFunctionInfo, PciKind, ReservedKind,
};
use lychgate_model::{Access, Policy};
use lychgate_types::{Bdf, HeapPages, Iova, RequesterId, StdLocks};

use crate::bench::{RW, Sink, dma, frames};

const BRIDGE: RequesterId = RequesterId::new(0x0100);
/// What the bridge makes of requests from below.
const ALIAS: RequesterId = RequesterId::new(0x0200);
const FIRST: RequesterId = RequesterId::new(0x0208);
const SECOND: RequesterId = RequesterId::new(0x0210);
const ALONE: RequesterId = RequesterId::new(0x0018);
const OWNER: Owner = Owner(1);

/// Two conventional functions below a PCI Express to PCI bridge, and an endpoint of its own.
struct System {
    port: Arc<model::AmdVi>,
    iommu: Iommu,
    first: DeviceId,
    shared: GroupId,
    alone: DeviceId,
}

impl System {
    fn new(policy: DefaultDomain) -> Self {
        let memory = Arc::new(HeapPages::new());
        let config = model::Config { policy: Policy::Adversarial, ..model::Config::default() };
        let port = Arc::new(model::AmdVi::new(config, memory.clone(), Arc::new(|_| ())));
        let sink = Arc::new(Sink::default());
        let driver: driver::AmdVi<HeapPages, StdLocks> =
            driver::AmdVi::new(port.clone(), memory, sink, driver::Config::default()).unwrap();
        let driver = Arc::new(driver);
        let mut iommu = Iommu::with_default_domain(policy);
        let bridge = PciFunctionInfo {
            kind: PciKind::PcieToPciBridge,
            secondary_bus: Some(2),
            ..function(BRIDGE, None)
        };
        iommu.add_bridge(bridge);
        let below = Some(BRIDGE);
        let first = iommu.add_pci(function(FIRST, below), driver.clone()).unwrap();
        let second = iommu.add_pci(function(SECOND, below), driver.clone()).unwrap();
        let alone = iommu.add_pci(function(ALONE, None), driver).unwrap();
        let shared = iommu.group(first).unwrap();
        assert_eq!(iommu.group_devices(shared), [first, second]);
        Self { port, iommu, first, shared, alone }
    }

    fn paging(&mut self) -> Arc<dyn PagingDomain> {
        self.iommu.alloc_paging(self.first, AllocFlags::default(), None).unwrap()
    }

    fn read(&self, requester: RequesterId, iova: u64) -> Option<u64> {
        let runs = dma(&self.port, requester, iova, 8, Access::Read).ok()?;
        Some(runs[0].start.get())
    }

    /// Where the shared group's requests to an address lead, the same under every id.
    fn read_shared(&self, iova: u64) -> Option<u64> {
        let [alias, first, second] = [ALIAS, FIRST, SECOND].map(|id| self.read(id, iova));
        assert_eq!((alias, first), (first, second));
        alias
    }
}

fn function(requester: RequesterId, parent: Option<RequesterId>) -> PciFunctionInfo {
    let at = |requester| Bdf { segment: 0, requester };
    PciFunctionInfo {
        bdf: at(requester),
        kind: PciKind::Endpoint,
        multifunction: false,
        acs: None,
        parent: parent.map(at),
        secondary_bus: None,
        quirk_aliases: Vec::new(),
    }
}

#[test]
fn a_group_moves_as_one_with_its_shared_alias() {
    let mut system = System::new(DefaultDomain::Identity);
    assert_eq!(system.read_shared(0x1000), Some(0x1000));
    system.iommu.claim_dma_owner(system.first, OWNER).unwrap();
    assert_eq!(system.read_shared(0x1000), None);
    assert_eq!(system.read(ALONE, 0x1000), Some(0x1000), "another group");

    let domains = [system.paging(), system.paging()];
    for (domain, phys) in domains.iter().zip([0x9000, 0xa000]) {
        domain.map(Iova::new(0x1000), &frames(phys, 0x1000), RW).unwrap();
        let domain = Domain::Paging(domain.clone());
        system.iommu.attach_group(system.shared, OWNER, domain).unwrap();
        assert_eq!(system.read_shared(0x1000), Some(phys));
    }
    system.iommu.detach_group(system.shared);
    assert_eq!(system.read_shared(0x1000), None);
    system.iommu.release_dma_owner(system.first);
    assert_eq!(system.read_shared(0x1000), Some(0x1000));
}

#[test]
fn a_device_that_goes_leaves_the_shared_alias_to_the_other() {
    let mut system = System::new(DefaultDomain::Identity);
    system.iommu.claim_group(system.shared, OWNER).unwrap();
    let domain = system.paging();
    domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
    let attached = Domain::Paging(domain.clone());
    system.iommu.attach_group(system.shared, OWNER, attached).unwrap();
    system.iommu.remove(system.first);
    assert_eq!(system.read(FIRST, 0x1000), None);
    for requester in [ALIAS, SECOND] {
        assert_eq!(system.read(requester, 0x1000), Some(0x9000));
    }
    assert_eq!(domain.unmap(Iova::new(0x1000), 0x1000), 0x1000);
    assert_eq!(system.read(ALIAS, 0x1000), None);
}

#[test]
fn a_group_whose_attachment_fails_keeps_what_it_reached() {
    let mut system = System::new(DefaultDomain::Identity);
    let mut foreign = System::new(DefaultDomain::Identity);
    system.iommu.claim_dma_owner(system.first, OWNER).unwrap();
    let domain = system.paging();
    domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
    system.iommu.attach_group(system.shared, OWNER, Domain::Paging(domain)).unwrap();
    let stranger = Domain::Paging(foreign.paging());
    let refused = system.iommu.attach_group(system.shared, OWNER, stranger);
    assert_eq!(refused, Err(AttachError::Incompatible));
    assert_eq!(system.read_shared(0x1000), Some(0x9000));
}

#[test]
fn default_domains_are_what_the_policy_says() {
    let system = System::new(DefaultDomain::Blocked);
    assert_eq!(system.read(ALONE, 0x1000), None);
    let system = System::new(DefaultDomain::Dma);
    assert_eq!(system.read(ALONE, 0x1000), None);
    let group = system.iommu.group(system.alone).unwrap();
    let Some(Domain::Paging(domain)) = system.iommu.group_domain(group) else {
        panic!("not a paging domain");
    };
    domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
    assert_eq!(system.read(ALONE, 0x1000), Some(0x9000));
    assert_eq!(system.read_shared(0x1000), None);
}

#[test]
fn reserved_regions_are_what_page_tables_do_not_translate() {
    let system = System::new(DefaultDomain::Identity);
    let regions: Vec<_> = system
        .iommu
        .reserved_regions(system.shared)
        .iter()
        .map(|region| (region.first.get(), region.last.get(), region.kind))
        .collect();
    assert_eq!(
        regions,
        [
            (0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi),
            (0xfd_0000_0000, 0xff_ffff_ffff, ReservedKind::Reserved),
        ]
    );
}
