//! Fault queues.

use lychgate_iommu::{PageFault, PageResponse};
use lychgate_iommufd::abi::iommufd as abi;
use lychgate_iommufd::{BoundDevice, OpenFile};
use lychgate_types::{Errno, Iova, Pasid};
use zerocopy::{FromBytes, IntoBytes};

use crate::common::{SCRATCH, World};
use crate::nested::{nested_call, nesting, paging};

const BUFFER: u64 = SCRATCH + 0x2000;
const RECORD: u64 = 40;

struct Fixture {
    world: World,
    bound: BoundDevice,
    queue: u32,
    fd: u32,
    /// The second stage, the page table with the queue, and another with it; all for PASIDs.
    parent: u32,
    hwpt: u32,
    other: u32,
}

impl Fixture {
    fn new() -> Self {
        let (world, bound, ioas) = nesting();
        let flags = abi::HWPT_ALLOC_NEST_PARENT | abi::HWPT_ALLOC_PASID;
        let parent = paging(&world, bound.id(), ioas, flags).unwrap();
        let (queue, fd) = queue(&world);
        let with_queue = || {
            let flags = abi::HWPT_FAULT_ID_VALID | abi::HWPT_ALLOC_PASID;
            let call = nested_call(bound.id(), parent);
            let call = abi::HwptAlloc { flags, fault_id: queue, ..call };
            world.call(call).unwrap().out_hwpt_id
        };
        let (hwpt, other) = (with_queue(), with_queue());
        Self { world, bound, queue, fd, parent, hwpt, other }
    }

    fn fault(&self, group: u32, pasid: u32, last: bool) -> Result<(), Errno> {
        let mut iommu = self.world.iommu.lock().unwrap();
        let device = iommu.find("0000:01:00.0".parse().unwrap()).unwrap();
        let fault = PageFault {
            pasid: Pasid::new(pasid).filter(|pasid| *pasid != Pasid::NONE),
            group,
            last,
            response_needs_pasid: false,
            perm: 3,
            iova: Iova::new(0x1_0000 + u64::from(group)),
            private_data: [0; 2],
        };
        iommu.report_page_fault(device, fault)
    }

    fn read(&self, count: u64) -> Result<Vec<abi::HwptPgfault>, Errno> {
        let file = self.world.files.get(self.fd);
        let read = file.read_at(&self.world.client, BUFFER, count, 0);
        let bytes = read.map_err(|refusal| refusal.errno)?;
        let bytes = self.world.client.get(BUFFER, usize::try_from(bytes).unwrap());
        Ok(bytes.chunks(40).map(|at| abi::HwptPgfault::read_from_bytes(at).unwrap()).collect())
    }

    fn answer(&self, answers: &[(u32, u32)]) -> Result<u64, Errno> {
        for (index, (cookie, code)) in answers.iter().enumerate() {
            let answer = abi::HwptPageResponse { cookie: *cookie, code: *code };
            self.world.client.put(BUFFER + 8 * index as u64, answer.as_bytes());
        }
        let file = self.world.files.get(self.fd);
        let written = file.write_at(&self.world.client, BUFFER, 8 * answers.len() as u64, 0);
        written.map_err(|refusal| refusal.errno)
    }

    fn responses(&self) -> Vec<(u32, PageResponse)> {
        std::mem::take(&mut self.world.driver.plan.lock().unwrap().nesting.responses)
    }

    fn is_readable(&self) -> bool {
        self.world.files.is_readable(self.fd)
    }
}

fn queue(world: &World) -> (u32, u32) {
    let alloc = world.call(abi::FaultQueueAlloc::default()).unwrap();
    (alloc.out_fault_id, alloc.out_fault_fd)
}

#[test]
fn a_queue_lasts_as_long_as_its_descriptor_and_its_page_tables() {
    let world = World::new();
    let flag = abi::FaultQueueAlloc { flags: 1, ..Default::default() };
    assert_eq!(world.call(flag), Err(Errno::EOPNOTSUPP));
    let (id, fd) = queue(&world);
    assert_eq!(world.files.get(fd).name(), "[iommufd-pgfault]");
    assert_eq!(world.destroy(id), Err(Errno::EBUSY));
    world.files.close(fd);
    assert_eq!(world.destroy(id), Ok(()));
    let fixture = Fixture::new();
    fixture.world.files.close(fixture.fd);
    assert_eq!(fixture.world.destroy(fixture.queue), Err(Errno::EBUSY));
    fixture.world.destroy(fixture.hwpt).unwrap();
    fixture.world.destroy(fixture.other).unwrap();
    assert_eq!(fixture.world.destroy(fixture.queue), Ok(()));
}

#[test]
fn a_queue_that_could_not_be_told_is_gone() {
    let world = World::new();
    *world.client.read_only_from.lock().unwrap() = 0;
    assert_eq!(world.call(abi::FaultQueueAlloc::default()), Err(Errno::EFAULT));
    *world.client.read_only_from.lock().unwrap() = u64::MAX;
    world.files.let_none_be_opened();
    assert_eq!(world.call(abi::FaultQueueAlloc::default()), Err(Errno::EMFILE));
    assert_eq!(world.ioas(), 1, "its number is free");
}

#[test]
fn an_open_queue_keeps_the_context() {
    let (world, bound, ioas) = nesting();
    paging(&world, bound.id(), ioas, 0).unwrap();
    let (_, fd) = queue(&world);
    drop(bound);
    world.context.release();
    assert_eq!(world.driver.domains().len(), 1);
    world.files.close(fd);
    assert_eq!(world.driver.domains().len(), 0);
}

#[test]
fn faults_are_read_and_answered() {
    let fixture = Fixture::new();
    assert_eq!(fixture.fault(1, 0, true), Err(Errno::ENODEV), "nothing handles faults");
    fixture.bound.attach(fixture.hwpt).unwrap();
    assert!(!fixture.is_readable());
    fixture.fault(1, 0, true).unwrap();
    fixture.fault(2, 9, true).unwrap();
    assert!(fixture.is_readable());
    let [a, b] = fixture.read(5 * RECORD).unwrap()[..] else { panic!("two faults") };
    let expected = abi::HwptPgfault {
        flags: abi::PGFAULT_FLAGS_LAST_PAGE,
        dev_id: fixture.bound.id(),
        grpid: 1,
        perm: 3,
        addr: 0x1_0001,
        cookie: 1,
        ..Default::default()
    };
    assert_eq!(a, expected);
    assert_eq!((b.flags, b.pasid, b.grpid, b.cookie), (3, 9, 2, 2), "the guest has the PASIDs");
    assert!(!fixture.is_readable());
    assert_eq!(fixture.read(RECORD), Ok(vec![]));
    assert_eq!(fixture.answer(&[(2, abi::PAGE_RESP_SUCCESS), (2, 0)]), Ok(8), "once");
    assert_eq!(fixture.answer(&[(2, 0)]), Err(Errno::EINVAL));
    assert_eq!(fixture.answer(&[(1, 2)]), Err(Errno::EINVAL), "no such response");
    assert_eq!(fixture.responses(), [(2, PageResponse::Success)]);
    assert_eq!(fixture.answer(&[(1, abi::PAGE_RESP_INVALID)]), Ok(8));
    assert_eq!(fixture.responses(), [(1, PageResponse::Invalid)]);
    fixture.fault(3, 0, true).unwrap();
    assert_eq!(fixture.read(RECORD).unwrap()[0].cookie, 1, "cookies are used again");
}

#[test]
fn groups_are_never_split() {
    let fixture = Fixture::new();
    fixture.bound.attach(fixture.hwpt).unwrap();
    fixture.fault(1, 0, true).unwrap();
    fixture.fault(2, 0, false).unwrap();
    fixture.fault(2, 0, false).unwrap();
    assert_eq!(fixture.read(RECORD).unwrap().len(), 1, "2 is not closed");
    fixture.fault(3, 0, true).unwrap();
    fixture.fault(2, 0, true).unwrap();
    assert_eq!(fixture.read(3 * RECORD).unwrap().len(), 1, "3, and 2 does not fit");
    assert_eq!(fixture.read(2 * RECORD), Err(Errno::EINVAL));
    assert_eq!(fixture.read(0), Err(Errno::EINVAL));
    assert!(fixture.is_readable());
    let faults = fixture.read(3 * RECORD).unwrap();
    let flags: Vec<u32> = faults.iter().map(|fault| fault.flags).collect();
    assert_eq!(flags, [0, 0, abi::PGFAULT_FLAGS_LAST_PAGE]);
    assert!(faults.iter().all(|fault| fault.cookie == faults[0].cookie));
    fixture.answer(&[(faults[0].cookie, 0)]).unwrap();
    assert_eq!(fixture.responses(), [(2, PageResponse::Success)]);
}

#[test]
fn sizes_and_positions_are_those_of_records() {
    let fixture = Fixture::new();
    fixture.bound.attach(fixture.hwpt).unwrap();
    fixture.fault(1, 0, true).unwrap();
    let file = fixture.world.files.get(fixture.fd);
    let client = &fixture.world.client;
    let errno = |result: lychgate_iommufd::Result<u64>| result.unwrap_err().errno;
    assert_eq!(errno(file.read_at(client, BUFFER, RECORD + 1, 0)), Errno::ESPIPE);
    assert_eq!(errno(file.read_at(client, BUFFER, RECORD, 8)), Errno::ESPIPE);
    assert_eq!(errno(file.write_at(client, BUFFER, 7, 0)), Errno::ESPIPE);
    assert_eq!(errno(file.write_at(client, BUFFER, 8, 8)), Errno::ESPIPE);
    assert_eq!(errno(file.read_at(client, 8, RECORD, 0)), Errno::EFAULT);
    assert_eq!(errno(file.write_at(client, 8, 8, 0)), Errno::EFAULT);
    assert_eq!(file.write_at(client, BUFFER, 0, 0).unwrap(), 0);
    assert_eq!(fixture.read(RECORD).unwrap().len(), 1, "it is still there");
    assert_eq!(errno(file.ioctl(client, 0x3b80, 0).map(|_| 0)), Errno::ENOTTY);
}

#[test]
fn the_end_of_an_attachment_answers_what_came_through_it() {
    let fixture = Fixture::new();
    fixture.bound.attach(fixture.hwpt).unwrap();
    let pasid = Pasid::new(5).unwrap();
    fixture.bound.attach_pasid(pasid, fixture.other).unwrap();
    fixture.fault(1, 0, true).unwrap();
    fixture.fault(2, 5, true).unwrap();
    fixture.read(RECORD).unwrap();
    fixture.fault(3, 0, true).unwrap();
    fixture.bound.replace(fixture.parent).unwrap();
    let mut responses = fixture.responses();
    responses.sort_by_key(|response| response.0);
    assert_eq!(responses, [(1, PageResponse::Invalid), (3, PageResponse::Invalid)]);
    assert_eq!(fixture.answer(&[(1, 0)]), Err(Errno::EINVAL), "too late");
    assert_eq!(fixture.read(2 * RECORD).unwrap()[0].grpid, 2, "of the other attachment");
    assert_eq!(fixture.fault(4, 0, true), Err(Errno::EINVAL), "nobody handles it");
    assert_eq!(fixture.responses(), [(4, PageResponse::Invalid)]);
    fixture.bound.detach_pasid(pasid);
    assert_eq!(fixture.responses(), [(2, PageResponse::Invalid)]);
    assert!(!fixture.is_readable());
}

#[test]
fn a_device_without_page_requests_takes_no_page_table_with_a_queue() {
    let fixture = Fixture::new();
    fixture.world.driver.plan(|plan| plan.nesting.page_requests = false);
    let refused = fixture.bound.attach(fixture.hwpt).unwrap_err();
    assert_eq!(refused.errno, Errno::ENODEV);
    fixture.bound.attach(fixture.parent).unwrap();
    assert_eq!(fixture.bound.replace(fixture.hwpt).unwrap_err().errno, Errno::ENODEV);
    assert!(fixture.bound.is_attached());
}
