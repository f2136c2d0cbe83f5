//! Attachment, default domains and DMA ownership (Linux, `drivers/iommu/iommu.c`).

use std::sync::Arc;

use crate::fake::{FakeDomain, FakeDriver, endpoint, function};
use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, ClaimError, DefaultDomain, DeviceId, Domain,
    GroupId, Iommu, Owner, ProbeError, ReservedKind,
};
use lychgate_types::{Iova, PhysAddr, RequesterId};

const OWNER: Owner = Owner(1);
const OTHER: Owner = Owner(2);

/// Three functions of one group: 00:01.0, 00:01.1, 00:01.2.
struct Trio {
    iommu: Iommu,
    driver: Arc<FakeDriver>,
    devices: [DeviceId; 3],
    group: GroupId,
}

impl Trio {
    fn new() -> Self {
        let (mut iommu, driver) = (Iommu::new(), FakeDriver::new());
        let devices = [0x08, 0x09, 0x0a]
            .map(|requester| iommu.add_pci(function(requester), driver.clone()).unwrap());
        let group = iommu.group(devices[0]).unwrap();
        driver.take_calls();
        Self { iommu, driver, devices, group }
    }

    fn paging(&mut self) -> Domain {
        let flags = AllocFlags::default();
        let domain = self.iommu.alloc_paging(self.devices[0], flags, None);
        Domain::Paging(domain.unwrap())
    }

    fn all_are(&self, domain: &Domain) {
        for requester in [0x08, 0x09, 0x0a] {
            let attached = self.driver.attached(requester).unwrap();
            assert!(attached.same(domain), "{requester:#x}: {attached:?}");
        }
        assert!(self.iommu.group_domain(self.group).unwrap().same(domain));
    }
}

#[test]
fn a_device_starts_in_the_default_domain_and_is_blocked_while_it_is_owned() {
    let mut trio = Trio::new();
    trio.all_are(&Domain::Identity);
    assert!(!trio.iommu.group_owned(trio.group));
    trio.iommu.claim_dma_owner(trio.devices[1], OWNER).unwrap();
    trio.all_are(&Domain::Blocked);
    assert!(trio.iommu.group_owned(trio.group));
    trio.iommu.release_dma_owner(trio.devices[1]);
    trio.all_are(&Domain::Identity);
    assert!(!trio.iommu.group_owned(trio.group));
}

#[test]
fn the_last_of_several_claims_gives_the_group_back() {
    let mut trio = Trio::new();
    for device in trio.devices {
        trio.iommu.claim_dma_owner(device, OWNER).unwrap();
    }
    for device in trio.devices {
        trio.all_are(&Domain::Blocked);
        trio.iommu.release_dma_owner(device);
        // A claim is undone once.
        trio.iommu.release_dma_owner(device);
    }
    trio.all_are(&Domain::Identity);
}

#[test]
fn owners_exclude_each_other_and_kernel_drivers() {
    let mut trio = Trio::new();
    let [a, b, _] = trio.devices;
    trio.iommu.claim_dma_owner(a, OWNER).unwrap();
    assert_eq!(trio.iommu.claim_dma_owner(b, OTHER), Err(ClaimError::Owned));
    assert_eq!(trio.iommu.claim_group(trio.group, OWNER), Err(ClaimError::Owned));
    assert_eq!(trio.iommu.use_default_domain(b), Err(ClaimError::Busy));
    trio.iommu.release_group(trio.group);
    trio.all_are(&Domain::Blocked);
    trio.iommu.release_dma_owner(a);

    trio.iommu.use_default_domain(b).unwrap();
    trio.iommu.use_default_domain(b).unwrap();
    assert!(trio.iommu.group_owned(trio.group));
    for _ in 0..2 {
        assert_eq!(trio.iommu.claim_dma_owner(a, OWNER), Err(ClaimError::Owned));
        trio.iommu.unuse_default_domain(b);
    }
    trio.iommu.claim_group(trio.group, OWNER).unwrap();
    assert_eq!(trio.iommu.claim_dma_owner(a, OWNER), Err(ClaimError::Owned));
    assert_eq!(trio.iommu.claim_group(trio.group, OWNER), Err(ClaimError::Owned));
    trio.iommu.release_group(trio.group);
    trio.all_are(&Domain::Identity);
}

#[test]
fn only_the_owner_attaches() {
    let mut trio = Trio::new();
    let domain = trio.paging();
    let group = trio.group;
    let attach = |trio: &mut Trio, owner| trio.iommu.attach_group(group, owner, domain.clone());
    assert_eq!(attach(&mut trio, OWNER), Err(AttachError::Busy));
    trio.iommu.use_default_domain(trio.devices[0]).unwrap();
    assert_eq!(attach(&mut trio, OWNER), Err(AttachError::Busy));
    trio.iommu.unuse_default_domain(trio.devices[0]);
    trio.iommu.claim_dma_owner(trio.devices[0], OWNER).unwrap();
    assert_eq!(attach(&mut trio, OTHER), Err(AttachError::Busy));
    trio.all_are(&Domain::Blocked);
    assert_eq!(attach(&mut trio, OWNER), Ok(()));
    trio.all_are(&domain);
}

#[test]
fn detaching_blocks_and_releasing_restores_whatever_was_attached() {
    let mut trio = Trio::new();
    let (one, two) = (trio.paging(), trio.paging());
    trio.iommu.claim_dma_owner(trio.devices[0], OWNER).unwrap();
    trio.iommu.attach_group(trio.group, OWNER, one.clone()).unwrap();
    trio.iommu.attach_group(trio.group, OWNER, two.clone()).unwrap();
    trio.all_are(&two);
    trio.iommu.detach_group(trio.group);
    trio.all_are(&Domain::Blocked);
    trio.iommu.attach_group(trio.group, OWNER, one).unwrap();
    trio.iommu.release_dma_owner(trio.devices[0]);
    trio.all_are(&Domain::Identity);
}

#[test]
fn attaching_what_is_attached_does_not_bother_the_driver() {
    let mut trio = Trio::new();
    let domain = trio.paging();
    trio.iommu.claim_dma_owner(trio.devices[0], OWNER).unwrap();
    trio.iommu.attach_group(trio.group, OWNER, domain.clone()).unwrap();
    trio.driver.take_calls();
    trio.iommu.attach_group(trio.group, OWNER, domain).unwrap();
    assert_eq!(trio.driver.take_calls(), Vec::<String>::new());
}

#[test]
fn devices_that_had_moved_are_put_back_in_reverse_when_one_fails() {
    let mut trio = Trio::new();
    trio.iommu.claim_dma_owner(trio.devices[0], OWNER).unwrap();
    let (old, new) = (trio.paging(), trio.paging());
    trio.iommu.attach_group(trio.group, OWNER, old.clone()).unwrap();
    trio.driver.take_calls();
    trio.driver.break_device(0x0a, Some(AttachError::Incompatible));
    assert_eq!(trio.iommu.attach_group(trio.group, OWNER, new), Err(AttachError::Incompatible));
    trio.all_are(&old);
    let moves = trio.driver.take_calls();
    let who: Vec<&str> = moves.iter().map(|call| &call[..7]).collect();
    assert_eq!(who, ["00:01.0", "00:01.1", "00:01.2", "00:01.1", "00:01.0"]);
}

#[test]
fn a_device_that_cannot_go_back_is_blocked_and_comes_along_next_time() {
    let mut trio = Trio::new();
    trio.iommu.claim_dma_owner(trio.devices[0], OWNER).unwrap();
    trio.driver.break_device(0x09, Some(AttachError::Hardware));
    trio.iommu.release_dma_owner(trio.devices[0]);
    assert!(matches!(trio.iommu.group_domain(trio.group), Some(Domain::Identity)));
    assert!(matches!(trio.driver.attached(0x09), Some(Domain::Blocked)));
    assert!(matches!(trio.driver.attached(0x0a), Some(Domain::Identity)));
    trio.driver.break_device(0x09, None);
    trio.iommu.claim_dma_owner(trio.devices[0], OWNER).unwrap();
    trio.iommu.release_dma_owner(trio.devices[0]);
    trio.all_are(&Domain::Identity);
}

#[test]
fn a_device_that_needs_a_direct_mapping_cannot_be_owned() {
    let (mut iommu, driver) = (Iommu::new(), FakeDriver::new());
    driver.reserve(0x08, 0x1000, 0x1fff, ReservedKind::Direct);
    let device = iommu.add_pci(endpoint(0x08), driver.clone()).unwrap();
    assert_eq!(iommu.claim_dma_owner(device, OWNER), Err(ClaimError::DirectMapped));
    let group = iommu.group(device).unwrap();
    assert!(!iommu.group_owned(group));
    assert!(matches!(driver.attached(0x08), Some(Domain::Identity)));
}

#[test]
fn a_blocking_default_spares_what_needs_a_direct_mapping() {
    let mut iommu = Iommu::with_default_domain(DefaultDomain::Blocked);
    let driver = FakeDriver::new();
    driver.reserve(0x08, 0x1000, 0x1fff, ReservedKind::Direct);
    driver.reserve(0x10, 0x1000, 0x1fff, ReservedKind::DirectRelaxable);
    iommu.add_pci(endpoint(0x08), driver.clone()).unwrap();
    iommu.add_pci(endpoint(0x10), driver.clone()).unwrap();
    assert!(matches!(driver.attached(0x08), Some(Domain::Identity)));
    assert!(matches!(driver.attached(0x10), Some(Domain::Blocked)));
}

#[test]
fn a_driver_can_demand_a_default_domain_whatever_the_policy() {
    let driver = FakeDriver::new();
    let demand = |device, domain| {
        driver.0.lock().unwrap().default_domains.insert(RequesterId::new(device), domain);
    };
    demand(0x08, DefaultDomain::Blocked);
    demand(0x10, DefaultDomain::Dma);
    let mut iommu = Iommu::new();
    let device = iommu.add_pci(endpoint(0x08), driver.clone()).unwrap();
    iommu.add_pci(endpoint(0x10), driver.clone()).unwrap();
    iommu.add_pci(endpoint(0x18), driver.clone()).unwrap();
    assert!(matches!(driver.attached(0x08), Some(Domain::Blocked)));
    assert!(matches!(driver.attached(0x10), Some(Domain::Paging(_))));
    assert!(matches!(driver.attached(0x18), Some(Domain::Identity)));
    // It is what the group goes back to.
    iommu.claim_dma_owner(device, OWNER).unwrap();
    iommu.release_dma_owner(device);
    assert!(matches!(driver.attached(0x08), Some(Domain::Blocked)));
}

#[test]
fn a_paging_default_holds_the_direct_regions_of_every_device_of_the_group() {
    let mut iommu = Iommu::with_default_domain(DefaultDomain::Dma);
    let driver = FakeDriver::new();
    driver.reserve(0x08, 0x1800, 0x37ff, ReservedKind::Direct);
    driver.reserve(0x08, 0x9000, 0x9fff, ReservedKind::Msi);
    driver.reserve(0x09, 0x2000, 0x4fff, ReservedKind::DirectRelaxable);
    let device = iommu.add_pci(function(0x08), driver.clone()).unwrap();
    iommu.add_pci(function(0x09), driver.clone()).unwrap();
    let group = iommu.group(device).unwrap();
    let Some(Domain::Paging(domain)) = iommu.group_domain(group) else {
        panic!("not a paging domain");
    };
    for page in [0x1000, 0x2000, 0x3000, 0x4000] {
        let phys = domain.iova_to_phys(Iova::new(page));
        assert_eq!(phys, Some(PhysAddr::new(page)));
    }
    for page in [0, 0x5000, 0x9000] {
        assert_eq!(domain.iova_to_phys(Iova::new(page)), None);
    }
    let fake = domain.as_any().downcast_ref::<FakeDomain>().unwrap();
    assert_eq!(fake.pages.lock().unwrap().len(), 4);
}

#[test]
fn a_device_that_joins_an_owned_group_joins_its_domain() {
    let mut trio = Trio::new();
    let domain = trio.paging();
    trio.iommu.claim_dma_owner(trio.devices[0], OWNER).unwrap();
    trio.iommu.attach_group(trio.group, OWNER, domain.clone()).unwrap();
    let late = trio.iommu.add_pci(function(0x0b), trio.driver.clone());
    assert_eq!(trio.iommu.group(late.unwrap()), Some(trio.group));
    assert!(trio.driver.attached(0x0b).unwrap().same(&domain));

    trio.driver.break_device(0x0c, Some(AttachError::Incompatible));
    let refused = trio.iommu.add_pci(function(0x0c), trio.driver.clone());
    assert_eq!(refused, Err(ProbeError::Incompatible));
    assert!(trio.driver.attached(0x0c).is_none());
    assert_eq!(trio.iommu.group_devices(trio.group).len(), 4);
}

#[test]
fn a_device_that_goes_takes_its_claims_along() {
    let mut trio = Trio::new();
    let [a, b, c] = trio.devices;
    trio.iommu.claim_dma_owner(a, OWNER).unwrap();
    trio.iommu.claim_dma_owner(a, OWNER).unwrap();
    trio.iommu.claim_dma_owner(b, OWNER).unwrap();
    trio.iommu.remove(a);
    assert!(trio.iommu.group_owned(trio.group));
    trio.iommu.remove(b);
    assert!(!trio.iommu.group_owned(trio.group));
    assert!(matches!(trio.driver.attached(0x0a), Some(Domain::Identity)));
    trio.iommu.use_default_domain(c).unwrap();
    trio.iommu.remove(c);
    assert_eq!(trio.iommu.groups(), []);
    assert_eq!(trio.iommu.claim_dma_owner(c, OWNER), Err(ClaimError::NoDevice));
    assert_eq!(trio.iommu.use_default_domain(c), Err(ClaimError::NoDevice));
}

#[test]
fn questions_about_a_device_go_to_its_driver() {
    let mut trio = Trio::new();
    let device = trio.devices[0];
    assert!(trio.iommu.capable(device, Capability::CacheCoherency));
    assert!(!trio.iommu.capable(device, Capability::PciAts));
    assert_eq!(trio.iommu.hw_info(device, 0).unwrap().kind, 99);
    assert_eq!(trio.iommu.hw_info(device, 1), None);
    let nest = AllocFlags { nest_parent: true, ..AllocFlags::default() };
    let refused = trio.iommu.alloc_paging(device, nest, None).err();
    assert_eq!(refused, Some(AllocError::Unsupported));
    trio.iommu.remove(device);
    assert!(!trio.iommu.capable(device, Capability::CacheCoherency));
    assert_eq!(trio.iommu.hw_info(device, 0), None);
    let refused = trio.iommu.alloc_paging(device, nest, None).err();
    assert_eq!(refused, Some(AllocError::NoDevice));
}

#[test]
fn the_reserved_regions_of_a_group_are_those_of_its_devices_merged() {
    let trio = Trio::new();
    trio.driver.reserve(0x0a, 0x1000, 0x1fff, ReservedKind::Msi);
    trio.driver.reserve(0x08, 0x2000, 0x2fff, ReservedKind::Msi);
    trio.driver.reserve(0x09, 0x2000, 0x2fff, ReservedKind::Reserved);
    let regions = trio.iommu.reserved_regions(trio.group);
    let spans: Vec<_> =
        regions.iter().map(|region| (region.first.get(), region.last.get(), region.kind)).collect();
    assert_eq!(
        spans,
        [(0x1000, 0x2fff, ReservedKind::Msi), (0x2000, 0x2fff, ReservedKind::Reserved),]
    );
}
