//! Page requests of mock devices.

use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_iommufd::{Client, OpenFile};
use lychgate_types::Errno;
use std::sync::Arc;
use zerocopy::FromBytes;

use crate::common::{Mock, World};

struct Faulting {
    world: World,
    mock: Mock,
    /// A nested page table whose faults are read at `fd`.
    nested: u32,
    queue: u32,
    fd: u32,
}

const RECORD: u64 = size_of::<linux::HwptPgfault>() as u64;

impl Faulting {
    fn new() -> Self {
        let world = World::new();
        let ioas = world.ioas();
        let mock = world.mock(ioas, abi::DEVICE_PASID).unwrap();
        let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
        let (queue, _) = world.call(linux::FaultQueueAlloc::default()).unwrap();
        let data_uptr = world.put(&abi::HwptData::default());
        let alloc = linux::HwptAlloc {
            flags: linux::HWPT_FAULT_ID_VALID | linux::HWPT_ALLOC_PASID,
            dev_id: mock.idev,
            pt_id: parent,
            data_type: abi::HWPT_DATA,
            data_len: 8,
            data_uptr,
            fault_id: queue.out_fault_id,
            ..Default::default()
        };
        let nested = world.call(alloc).unwrap().0.out_hwpt_id;
        Self { world, mock, nested, queue: queue.out_fault_id, fd: queue.out_fault_fd }
    }

    fn trigger(&self, pasid: u32) {
        let member = abi::TriggerIopf {
            dev_id: self.mock.idev,
            pasid,
            grpid: 2,
            perm: 3,
            addr: 0xdead_beaf,
        };
        self.world.test(op::TRIGGER_IOPF, 0, member).unwrap();
    }

    fn fault(&self) -> Option<linux::HwptPgfault> {
        let bytes = self.world.read(self.fd, RECORD).unwrap();
        linux::HwptPgfault::read_from_bytes(&bytes).ok()
    }

    fn respond(&self, cookie: u32, code: u32) -> Result<u64, Errno> {
        let at = self.world.put(&linux::HwptPageResponse { cookie, code });
        let fd = i32::try_from(self.fd).unwrap();
        let file: Arc<dyn OpenFile> = self.world.process.file(fd).unwrap();
        file.write_at(&self.world.process, at, 8, 0).map_err(|refusal| refusal.errno)
    }

    fn close(self) {
        self.world.close(self.fd);
        self.world.destroy(self.mock.stdev).unwrap();
        self.world.destroy(self.nested).unwrap();
        self.world.destroy(self.queue).unwrap();
    }
}

#[test]
fn a_fault_reaches_the_queue_of_what_the_device_is_attached_to_and_is_answered() {
    let faulting = Faulting::new();
    faulting.trigger(0);
    assert_eq!(faulting.fault(), None);
    faulting.world.replace(faulting.mock.stdev, faulting.nested).unwrap();
    faulting.trigger(0);
    let fault = faulting.fault().unwrap();
    assert_eq!((fault.flags, fault.dev_id), (linux::PGFAULT_FLAGS_LAST_PAGE, faulting.mock.idev));
    assert_eq!((fault.grpid, fault.perm, fault.addr), (2, 3, 0xdead_beaf));
    assert_eq!(faulting.respond(fault.cookie + 1, linux::PAGE_RESP_SUCCESS), Err(Errno::EINVAL));
    assert_eq!(faulting.respond(fault.cookie, linux::PAGE_RESP_SUCCESS), Ok(8));
    assert_eq!(faulting.respond(fault.cookie, linux::PAGE_RESP_SUCCESS), Err(Errno::EINVAL));
    faulting.close();
}

#[test]
fn where_the_guest_owns_the_pasids_its_faults_go_to_its_page_table() {
    let faulting = Faulting::new();
    faulting.world.replace(faulting.mock.stdev, faulting.nested).unwrap();
    faulting.trigger(5);
    let fault = faulting.fault().unwrap();
    assert_eq!(fault.pasid, 5);
    assert_eq!(fault.flags, linux::PGFAULT_FLAGS_LAST_PAGE | linux::PGFAULT_FLAGS_PASID_VALID);
    // No device has this one.
    faulting.trigger(1 << 20);
    assert_eq!(faulting.fault(), None);
    faulting.close();
}

#[test]
fn faults_of_a_pasid_go_where_it_is_attached() {
    let faulting = Faulting::new();
    let Faulting { world, mock, nested, .. } = &faulting;
    let ioas = world.ioas();
    let paging = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_PASID).unwrap();
    world.replace(mock.stdev, paging).unwrap();
    let attach = abi::PasidAttach { pasid: 9, pt_id: *nested };
    world.test(op::PASID_ATTACH, mock.stdev, attach).unwrap();
    faulting.trigger(0);
    faulting.trigger(8);
    assert_eq!(faulting.fault(), None);
    faulting.trigger(9);
    assert_eq!(faulting.fault().unwrap().pasid, 9);
    faulting.close();
}

#[test]
fn only_a_mock_device_can_be_made_to_ask() {
    let faulting = Faulting::new();
    for dev_id in [0, 99, faulting.mock.stdev, faulting.nested] {
        let member = abi::TriggerIopf { dev_id, ..Default::default() };
        let result = faulting.world.test(op::TRIGGER_IOPF, 0, member).map(drop);
        assert_eq!(result, Err(Errno::ENOENT));
    }
    faulting.close();
}
