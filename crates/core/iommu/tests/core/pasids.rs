//! What PASIDs are attached to, and the handles left there (Linux, `iommu_attach_device_pasid`,
//! `iommu_attach_handle_get`).

use std::any::Any;
use std::sync::Arc;

use crate::fake::{FakeDriver, FakeNested, function};
use lychgate_iommu::{
    AllocFlags, AttachError, AttachHandle, ClaimError, DeviceId, Domain, DomainKind, GroupId,
    Iommu, Owner, PagingDomain,
};
use lychgate_types::{Errno, Pasid};

const OWNER: Owner = Owner(1);

struct Tag;

impl AttachHandle for Tag {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn tag() -> Arc<dyn AttachHandle> {
    Arc::new(Tag)
}

fn pasid(number: u32) -> Pasid {
    Pasid::new(number).unwrap()
}

/// A group of three functions that OWNER has; the second one has no PASIDs.
struct Trio {
    iommu: Iommu,
    driver: Arc<FakeDriver>,
    device: DeviceId,
    group: GroupId,
}

impl Trio {
    fn new() -> Self {
        let (mut iommu, driver) = (Iommu::new(), FakeDriver::new());
        driver.give_pasids(0x08, 64);
        driver.give_pasids(0x0a, 32);
        let [device, ..] = [0x08, 0x09, 0x0a]
            .map(|requester| iommu.add_pci(function(requester), driver.clone()).unwrap());
        let group = iommu.group(device).unwrap();
        iommu.claim_dma_owner(device, OWNER).unwrap();
        driver.take_calls();
        Self { iommu, driver, device, group }
    }

    fn paging(&mut self) -> Arc<dyn PagingDomain> {
        let flags = AllocFlags { pasid: true, ..AllocFlags::default() };
        self.iommu.alloc_paging(self.device, flags, None).unwrap()
    }

    fn attach(&mut self, number: u32, domain: &Domain) -> Result<(), AttachError> {
        let handle = Some(tag());
        self.iommu.attach_pasid(self.group, OWNER, pasid(number), domain.clone(), handle)
    }

    fn is(&self, number: u32, domain: Option<&Domain>) -> bool {
        [0x08, 0x0a].iter().all(|device| match (self.driver.pasid(*device, number), domain) {
            (Some(attached), Some(domain)) => attached.same(domain),
            (None, None) => true,
            _ => false,
        })
    }
}

#[test]
fn a_pasid_is_attached_for_every_member_that_has_pasids() {
    let mut trio = Trio::new();
    let domain = Domain::Paging(trio.paging());
    trio.attach(7, &domain).unwrap();
    assert!(trio.is(7, Some(&domain)));
    assert!(trio.driver.pasid(0x09, 7).is_none());
    assert_eq!(trio.attach(7, &domain), Err(AttachError::Busy));
    trio.iommu.detach_pasid(trio.group, pasid(7));
    assert!(trio.is(7, None));
    assert!(trio.iommu.attached_pasids(trio.group).is_empty());
    trio.iommu.detach_pasid(trio.group, pasid(7));
}

#[test]
fn what_cannot_have_a_pasid_is_refused() {
    let mut trio = Trio::new();
    let domain = Domain::Paging(trio.paging());
    // The third member has 32 only.
    for number in [0, 32, 63] {
        assert_eq!(trio.attach(number, &domain), Err(AttachError::Incompatible), "{number}");
    }
    for domain in [Domain::Identity, Domain::Blocked] {
        assert_eq!(trio.attach(1, &domain), Err(AttachError::Unsupported));
    }
    let plain = trio.iommu.alloc_paging(trio.device, AllocFlags::default(), None).unwrap();
    assert_eq!(trio.attach(1, &Domain::Paging(plain)), Err(AttachError::Unsupported));
    let group = trio.group;
    let other = trio.iommu.attach_pasid(group, Owner(2), pasid(1), domain, None);
    assert_eq!(other, Err(AttachError::Busy));
    assert!(trio.driver.take_calls().is_empty());
}

#[test]
fn a_member_that_fails_leaves_every_pasid_as_it_was() {
    let mut trio = Trio::new();
    let (one, two) = (Domain::Paging(trio.paging()), Domain::Paging(trio.paging()));
    trio.driver.break_device(0x0a, Some(AttachError::OutOfMemory));
    assert_eq!(trio.attach(3, &one), Err(AttachError::OutOfMemory));
    assert!(trio.is(3, None));
    trio.driver.break_device(0x0a, None);
    trio.attach(3, &one).unwrap();
    trio.driver.break_device(0x0a, Some(AttachError::OutOfMemory));
    let replaced = trio.iommu.replace_pasid(trio.group, OWNER, pasid(3), two, tag());
    assert_eq!(replaced, Err(AttachError::OutOfMemory));
    assert!(trio.is(3, Some(&one)));
    assert!(trio.iommu.pasid_domain(trio.group, pasid(3)).unwrap().same(&one));
}

#[test]
fn the_same_domain_with_a_new_handle_does_not_reach_the_driver() {
    let mut trio = Trio::new();
    let (domain, group) = (Domain::Paging(trio.paging()), trio.group);
    let nothing = trio.iommu.replace_pasid(group, OWNER, pasid(3), domain.clone(), tag());
    assert_eq!(nothing, Err(AttachError::Incompatible));
    trio.attach(3, &domain).unwrap();
    trio.driver.take_calls();
    let handle = tag();
    let mut replace =
        || trio.iommu.replace_pasid(group, OWNER, pasid(3), domain.clone(), handle.clone());
    assert_eq!(replace(), Ok(()));
    assert_eq!(replace(), Err(AttachError::Incompatible), "the same entry");
    assert!(trio.driver.take_calls().is_empty());
    let found = trio.iommu.attach_handle(group, pasid(3), None).unwrap();
    assert!(Arc::ptr_eq(&found, &handle));
}

#[test]
fn a_handle_is_found_by_its_pasid_and_kind_alone() {
    let mut trio = Trio::new();
    let (parent, group) = (trio.paging(), trio.group);
    let get =
        |trio: &Trio, number, kind| trio.iommu.attach_handle(group, pasid(number), kind).err();
    assert_eq!(get(&trio, 0, None), Some(Errno::ENOENT));
    assert_eq!(get(&trio, 5, None), Some(Errno::ENOENT));
    let domain = Domain::Paging(parent.clone());
    trio.iommu.attach_pasid(group, OWNER, pasid(5), domain.clone(), None).unwrap();
    assert_eq!(get(&trio, 5, None), Some(Errno::EBUSY), "attached without a handle");
    trio.attach(6, &domain).unwrap();
    assert_eq!(get(&trio, 6, None), None);
    assert_eq!(get(&trio, 6, Some(DomainKind::Paging)), None);
    assert_eq!(get(&trio, 6, Some(DomainKind::Nested)), Some(Errno::EBUSY));
    trio.iommu.attach_group(group, OWNER, domain.clone()).unwrap();
    assert_eq!(get(&trio, 0, None), Some(Errno::EBUSY));
    let nested = Domain::Nested(Arc::new(FakeNested(parent)));
    trio.iommu.replace_group_handle(group, OWNER, nested.clone(), tag()).unwrap();
    assert_eq!(get(&trio, 0, Some(DomainKind::Nested)), None);
    let again = trio.iommu.attach_group_handle(group, OWNER, nested, tag());
    assert_eq!(again, Err(AttachError::Busy), "a handle is there");
}

#[test]
fn an_owner_that_goes_leaves_no_pasid_behind() {
    let mut trio = Trio::new();
    let domain = Domain::Paging(trio.paging());
    trio.attach(1, &domain).unwrap();
    trio.attach(2, &domain).unwrap();
    trio.iommu.release_dma_owner(trio.device);
    assert!(trio.is(1, None) && trio.is(2, None));
    assert_eq!(trio.iommu.claim_dma_owner(trio.device, Owner(2)), Ok::<_, ClaimError>(()));
    assert_eq!(
        Arc::strong_count(match &domain {
            Domain::Paging(domain) => domain,
            _ => unreachable!(),
        }),
        1
    );
}

#[test]
fn a_device_does_not_join_a_group_whose_pasids_are_attached() {
    let mut trio = Trio::new();
    let domain = Domain::Paging(trio.paging());
    trio.attach(1, &domain).unwrap();
    let late = trio.iommu.add_pci(function(0x0b), trio.driver.clone());
    assert_eq!(late.unwrap_err().errno(), Errno::EINVAL);
    trio.iommu.detach_pasid(trio.group, pasid(1));
    trio.iommu.add_pci(function(0x0b), trio.driver.clone()).unwrap();
}
