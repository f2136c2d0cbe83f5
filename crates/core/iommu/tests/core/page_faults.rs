//! I/O page faults: groups, their one answer, and who gets them.

use std::any::Any;
use std::sync::{Arc, Mutex};

use crate::fake::{FakeDriver, FakeNested, endpoint};
use lychgate_iommu::{
    AllocFlags, AttachError, AttachHandle, DeviceId, Domain, FaultGroup, GroupId, Iommu, Owner,
    PageFault, PageResponse, PagingDomain,
};
use lychgate_types::{Errno, Iova, Pasid};

const OWNER: Owner = Owner(1);

/// A handle that keeps what it gets.
#[derive(Default)]
struct Keeper {
    groups: Mutex<Vec<FaultGroup>>,
    full: bool,
}

impl Keeper {
    fn take(&self) -> Vec<FaultGroup> {
        std::mem::take(&mut self.groups.lock().unwrap())
    }
}

impl AttachHandle for Keeper {
    fn handles_faults(&self) -> bool {
        true
    }

    fn page_fault(&self, group: FaultGroup) -> Result<(), FaultGroup> {
        if self.full {
            return Err(group);
        }
        self.groups.lock().unwrap().push(group);
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct One {
    iommu: Iommu,
    driver: Arc<FakeDriver>,
    device: DeviceId,
    group: GroupId,
}

impl One {
    fn new() -> Self {
        let (mut iommu, driver) = (Iommu::new(), FakeDriver::new());
        driver.give_pasids(0x08, 64);
        let device = iommu.add_pci(endpoint(0x08), driver.clone()).unwrap();
        let group = iommu.group(device).unwrap();
        iommu.claim_dma_owner(device, OWNER).unwrap();
        Self { iommu, driver, device, group }
    }

    fn paging(&mut self) -> Arc<dyn PagingDomain> {
        let flags = AllocFlags { pasid: true, ..AllocFlags::default() };
        self.iommu.alloc_paging(self.device, flags, None).unwrap()
    }

    fn attach(&mut self, domain: Domain, handle: &Arc<Keeper>) {
        self.iommu.replace_group_handle(self.group, OWNER, domain, handle.clone()).unwrap();
    }

    fn report(&mut self, pasid: Option<u32>, group: u32, last: bool) -> Result<(), Errno> {
        let fault = PageFault {
            pasid: pasid.map(|pasid| Pasid::new(pasid).unwrap()),
            group,
            last,
            response_needs_pasid: false,
            perm: 1,
            iova: Iova::new(u64::from(group) << 12),
            private_data: [0; 2],
        };
        self.iommu.report_page_fault(self.device, fault)
    }
}

#[test]
fn a_group_comes_whole_and_is_answered_once() {
    let mut one = One::new();
    let (domain, keeper) = (Domain::Paging(one.paging()), Arc::new(Keeper::default()));
    one.attach(domain, &keeper);
    one.report(None, 1, false).unwrap();
    one.report(None, 2, true).unwrap();
    one.report(None, 1, false).unwrap();
    one.report(None, 1, true).unwrap();
    let groups = keeper.take();
    let sizes: Vec<usize> = groups.iter().map(|group| group.faults().len()).collect();
    assert_eq!(sizes, [1, 3]);
    let [two, one_] = <[FaultGroup; 2]>::try_from(groups).unwrap();
    one_.respond(PageResponse::Success);
    drop(two);
    let answers = one.driver.take_answers();
    assert_eq!(answers, [(1, PageResponse::Success), (2, PageResponse::Invalid)]);
}

#[test]
fn a_fault_that_nobody_handles_is_answered_invalid() {
    let mut one = One::new();
    let (domain, keeper) = (Domain::Paging(one.paging()), Arc::new(Keeper::default()));
    assert_eq!(one.report(None, 1, true), Err(Errno::ENODEV), "it may not ask");
    one.attach(domain.clone(), &keeper);
    // Its PASID is attached to nothing, and a paging domain does not answer for PASIDs.
    assert_eq!(one.report(Some(9), 2, true), Err(Errno::EINVAL));
    assert_eq!(one.driver.take_answers(), [(2, PageResponse::Invalid)]);
    let pasid = Pasid::new(9).unwrap();
    one.iommu.attach_pasid(one.group, OWNER, pasid, domain, None).unwrap();
    assert_eq!(one.report(Some(9), 3, true), Err(Errno::EINVAL), "attached without a handle");
    assert_eq!(one.driver.take_answers(), [(3, PageResponse::Invalid)]);
}

#[test]
fn a_nested_domain_answers_for_the_pasids_of_its_guest() {
    let mut one = One::new();
    let parent = one.paging();
    let (outer, inner) = (Arc::new(Keeper::default()), Arc::new(Keeper::default()));
    one.attach(Domain::Nested(Arc::new(FakeNested(parent.clone()))), &outer);
    one.report(Some(9), 1, true).unwrap();
    assert_eq!(outer.take().len(), 1);
    let pasid = Pasid::new(9).unwrap();
    let (domain, handle) = (Domain::Paging(parent), inner.clone());
    one.iommu.attach_pasid(one.group, OWNER, pasid, domain, Some(handle)).unwrap();
    one.report(Some(9), 2, true).unwrap();
    assert_eq!((outer.take().len(), inner.take().len()), (0, 1));
}

#[test]
fn a_handle_without_room_gives_failure() {
    let mut one = One::new();
    let keeper = Arc::new(Keeper { full: true, ..Keeper::default() });
    let domain = Domain::Paging(one.paging());
    one.attach(domain, &keeper);
    one.report(None, 4, true).unwrap();
    assert_eq!(one.driver.take_answers(), [(4, PageResponse::Failure)]);
}

#[test]
fn a_device_may_ask_for_as_long_as_an_attachment_handles_faults() {
    let mut one = One::new();
    let (domain, keeper) = (Domain::Paging(one.paging()), Arc::new(Keeper::default()));
    one.attach(domain.clone(), &keeper);
    assert!(one.driver.may_ask(0x08));
    let pasid = Pasid::new(1).unwrap();
    let handle = Some(keeper.clone() as Arc<dyn AttachHandle>);
    one.iommu.attach_pasid(one.group, OWNER, pasid, domain.clone(), handle).unwrap();
    one.report(None, 1, false).unwrap();
    one.iommu.attach_group(one.group, OWNER, domain.clone()).unwrap();
    assert!(one.driver.may_ask(0x08), "the PASID still handles faults");
    one.iommu.detach_pasid(one.group, pasid);
    assert!(!one.driver.may_ask(0x08));
    // The fault whose group was open has gone with the attachments.
    one.attach(domain, &keeper);
    one.report(None, 1, true).unwrap();
    assert_eq!(keeper.take()[0].faults().len(), 1);
}

#[test]
fn a_failed_attachment_leaves_page_requests_as_they_were() {
    let mut one = One::new();
    let (domain, keeper) = (Domain::Paging(one.paging()), Arc::new(Keeper::default()));
    one.driver.break_device(0x08, Some(AttachError::Hardware));
    let handle = keeper.clone();
    let attached = one.iommu.replace_group_handle(one.group, OWNER, domain.clone(), handle);
    assert_eq!(attached, Err(AttachError::Hardware));
    assert!(!one.driver.may_ask(0x08));
    one.driver.break_device(0x08, None);
    one.driver.give_pasids(0x08, 0);
    let attached = one.iommu.replace_group_handle(one.group, OWNER, domain, keeper);
    assert_eq!(attached, Err(AttachError::NoDevice), "it cannot ask at all");
    assert!(one.iommu.group_domain(one.group).unwrap().same(&Domain::Blocked));
}

#[test]
fn a_device_that_never_closes_a_group_is_stopped() {
    let mut one = One::new();
    let (domain, keeper) = (Domain::Paging(one.paging()), Arc::new(Keeper::default()));
    one.attach(domain, &keeper);
    let kept = (0..).take_while(|group| one.report(None, *group, false).is_ok()).count();
    assert_eq!(kept, 512);
    one.iommu.discard_partial_faults(one.device);
    one.report(None, 1, false).unwrap();
}
