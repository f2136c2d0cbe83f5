//! PASIDs of mock devices.

use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;

use crate::common::{Mock, World};

struct Pasids {
    world: World,
    ioas: u32,
    mock: Mock,
    /// A page table for PASIDs, to which the requests without one are attached.
    paging: u32,
    nested: u32,
}

impl Pasids {
    fn new() -> Self {
        let world = World::new();
        let ioas = world.ioas();
        let mock = world.mock(ioas, abi::DEVICE_PASID).unwrap();
        let paging = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_PASID).unwrap();
        let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
        let nested = world.nested(mock.idev, parent, linux::HWPT_ALLOC_PASID, 0).unwrap();
        world.replace(mock.stdev, paging).unwrap();
        Self { world, ioas, mock, paging, nested }
    }

    fn change(&self, op: u32, pasid: u32, pt_id: u32) -> Result<u32, Errno> {
        let member = abi::PasidAttach { pasid, pt_id };
        self.world.test(op, self.mock.stdev, member).map(|member| member.pt_id)
    }

    fn attach(&self, pasid: u32, pt_id: u32) -> Result<u32, Errno> {
        self.change(op::PASID_ATTACH, pasid, pt_id)
    }

    fn replace(&self, pasid: u32, pt_id: u32) -> Result<u32, Errno> {
        self.change(op::PASID_REPLACE, pasid, pt_id)
    }

    fn detach(&self, pasid: u32) {
        self.world.test(op::PASID_DETACH, self.mock.stdev, abi::PasidDetach { pasid }).unwrap();
    }

    fn check(&self, pasid: u32, hwpt_id: u32) -> Result<(), Errno> {
        let member = abi::PasidCheck { pasid, hwpt_id };
        self.world.test(op::PASID_CHECK_HWPT, self.mock.stdev, member).map(drop)
    }
}

#[test]
fn a_pasid_is_attached_replaced_and_detached() {
    let pasids = Pasids::new();
    pasids.check(7, 0).unwrap();
    assert_eq!(pasids.attach(7, pasids.paging), Ok(pasids.paging));
    pasids.check(7, pasids.paging).unwrap();
    assert_eq!(pasids.check(7, pasids.nested), Err(Errno::EINVAL));
    assert_eq!(pasids.check(7, 0), Err(Errno::EINVAL));
    assert_eq!(pasids.check(7, 99), Err(Errno::ENOENT));
    assert_eq!(pasids.attach(7, pasids.nested), Err(Errno::EBUSY));
    pasids.replace(7, pasids.nested).unwrap();
    pasids.check(7, pasids.nested).unwrap();
    assert_eq!(pasids.world.destroy(pasids.nested), Err(Errno::EBUSY));
    pasids.detach(7);
    pasids.check(7, 0).unwrap();
    pasids.detach(7);
    assert_eq!(pasids.replace(7, pasids.paging), Err(Errno::EINVAL));
    pasids.world.destroy(pasids.nested).unwrap();
}

#[test]
fn pasid_0_is_the_requests_without_one() {
    let pasids = Pasids::new();
    pasids.check(0, pasids.paging).unwrap();
    pasids.replace(0, pasids.nested).unwrap();
    pasids.check(0, pasids.nested).unwrap();
    pasids.detach(0);
    pasids.check(0, 0).unwrap();
}

#[test]
fn a_pasid_needs_a_page_table_and_a_device_that_have_them() {
    let pasids = Pasids::new();
    let Pasids { world, ioas, mock, .. } = &pasids;
    let plain = world.hwpt(mock.idev, *ioas, 0).unwrap();
    assert_eq!(pasids.attach(7, plain), Err(Errno::EINVAL));
    assert_eq!(pasids.attach(7, *ioas), Err(Errno::EINVAL));
    assert_eq!(pasids.attach(1 << 20, pasids.paging), Err(Errno::EINVAL));
    assert_eq!(pasids.attach(7, 99), Err(Errno::ENOENT));
    pasids.detach(1 << 20);
    pasids.check(1 << 20, 0).unwrap();
    let without = world.mock(*ioas, 0).unwrap();
    let member = abi::PasidAttach { pasid: 7, pt_id: pasids.paging };
    let attach = |stdev| world.test(op::PASID_ATTACH, stdev, member).map(drop);
    assert_eq!(attach(without.stdev), Err(Errno::EINVAL));
    assert_eq!(attach(without.idev), Err(Errno::ENOENT));
    // With a PASID attached, the requests without one stay with a page table for PASIDs.
    pasids.attach(7, pasids.nested).unwrap();
    assert_eq!(world.replace(mock.stdev, plain), Err(Errno::EINVAL));
}

#[test]
fn the_second_attachment_of_a_certain_pasid_fails_and_the_first_stays() {
    let pasids = Pasids::new();
    pasids.attach(abi::PASID_RESERVED, pasids.paging).unwrap();
    assert_eq!(pasids.replace(abi::PASID_RESERVED, pasids.nested), Err(Errno::ENOMEM));
    pasids.check(abi::PASID_RESERVED, pasids.paging).unwrap();
    pasids.replace(abi::PASID_RESERVED, pasids.nested).unwrap();
    pasids.detach(abi::PASID_RESERVED);
    pasids.attach(abi::PASID_RESERVED, pasids.nested).unwrap();
}

#[test]
fn a_pasid_whose_page_table_cannot_be_told_is_not_attached() {
    let pasids = Pasids::new();
    pasids.world.set_read_only(true);
    assert_eq!(pasids.attach(7, pasids.paging), Err(Errno::EFAULT));
    pasids.world.set_read_only(false);
    pasids.check(7, 0).unwrap();
}

#[test]
fn a_mock_device_that_goes_takes_its_pasids_along() {
    let pasids = Pasids::new();
    pasids.attach(7, pasids.nested).unwrap();
    pasids.attach(8, pasids.paging).unwrap();
    pasids.world.destroy(pasids.mock.stdev).unwrap();
    pasids.world.destroy(pasids.nested).unwrap();
    pasids.world.destroy(pasids.paging).unwrap();
}
