//! vIOMMUs of the mock IOMMU, and what is on them.

use std::os::unix::fs::FileExt;

use lychgate_iommufd::OpenFile;
use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, op};
use lychgate_types::Errno;
use zerocopy::IntoBytes;

use crate::common::{BASE, Mock, PAGE, World};

const VIRTUAL: u64 = 0x99;
const DEFAULT: u32 = abi::DEVICE_CACHE_DEFAULT;

struct Guest {
    world: World,
    ioas: u32,
    mock: Mock,
    parent: u32,
    viommu: u32,
}

impl Guest {
    fn new() -> Self {
        let world = World::new();
        let ioas = world.ioas();
        let mock = world.mock(ioas, 0).unwrap();
        let parent = world.hwpt(mock.idev, ioas, linux::HWPT_ALLOC_NEST_PARENT).unwrap();
        let viommu = viommu(&world, mock.idev, parent, 0, 0).unwrap();
        Self { world, ioas, mock, parent, viommu }
    }

    fn vdevice(&self) -> u32 {
        let alloc = linux::VdeviceAlloc {
            viommu_id: self.viommu,
            dev_id: self.mock.idev,
            virt_id: VIRTUAL,
            ..Default::default()
        };
        self.world.call(alloc).unwrap().0.out_vdevice_id
    }

    fn nested(&self) -> u32 {
        self.world.nested(self.mock.idev, self.viommu, 0, 1).unwrap()
    }

    fn invalidate(&self, requests: &[u32]) -> (u32, Result<(), Errno>) {
        self.world.invalidate(self.viommu, requests, 12, abi::VIOMMU_INVALIDATE_DATA)
    }

    fn check_cache(&self, expected: [u32; 4]) {
        for (id, cache) in (0..).zip(expected) {
            let member = abi::CheckDevCache { id, cache };
            self.world.test(op::DEV_CHECK_CACHE, self.mock.idev, member).unwrap();
        }
    }

    fn trigger(&self) -> Result<(), Errno> {
        let member = abi::TriggerVevent { dev_id: self.mock.idev };
        self.world.test(op::TRIGGER_VEVENT, 0, member).map(drop)
    }

    fn queue(&self, index: u32, iova: u64) -> Result<u32, Errno> {
        let alloc = linux::HwQueueAlloc {
            viommu_id: self.viommu,
            kind: abi::HW_QUEUE_TYPE,
            index,
            nesting_parent_iova: iova,
            length: PAGE,
            ..Default::default()
        };
        self.world.call(alloc).map(|(alloc, _)| alloc.out_hw_queue_id)
    }
}

fn viommu(
    world: &World,
    dev_id: u32,
    hwpt_id: u32,
    data_uptr: u64,
    data_len: u32,
) -> Result<u32, Errno> {
    let kind = abi::VIOMMU_TYPE;
    let alloc =
        linux::ViommuAlloc { kind, dev_id, hwpt_id, data_uptr, data_len, ..Default::default() };
    world.call(alloc).map(|(alloc, _)| alloc.out_viommu_id)
}

#[test]
fn a_guest_finds_its_value_in_the_structure_and_in_the_memory_that_it_can_map() {
    let guest = Guest::new();
    let (world, idev) = (&guest.world, guest.mock.idev);
    let at = world.put(&abi::ViommuData { in_data: 0xbeef, ..Default::default() });
    viommu(world, idev, guest.parent, at, 24).unwrap();
    let data = world.get::<abi::ViommuData>();
    assert_eq!((data.out_data, data.out_mmap_length), (0xbeef, 2 * PAGE));
    let file = std::fs::File::from(world.context.backing().unwrap().try_clone_to_owned().unwrap());
    let mut word = [0; 4];
    file.read_exact_at(&mut word, data.out_mmap_offset).unwrap();
    assert_eq!(u32::from_le_bytes(word), 0xbeef);
    for len in [1, 8, 23] {
        assert_eq!(viommu(world, idev, guest.parent, at, len), Err(Errno::EINVAL));
    }
}

#[test]
fn a_nested_page_table_on_a_viommu_takes_devices_with_a_virtual_id() {
    let guest = Guest::new();
    let nested = guest.nested();
    assert_eq!(guest.world.replace(guest.mock.stdev, nested), Err(Errno::ENOENT));
    guest.vdevice();
    guest.world.replace(guest.mock.stdev, nested).unwrap();
    guest.world.replace(guest.mock.stdev, guest.ioas).unwrap();
    assert_eq!(guest.world.destroy(guest.viommu), Err(Errno::EBUSY));
    guest.world.destroy(nested).unwrap();
}

#[test]
fn an_invalidation_reaches_the_devices_that_its_requests_name() {
    let guest = Guest::new();
    assert_eq!(guest.invalidate(&[0, 0x99, 0]), (0, Err(Errno::EINVAL)));
    guest.vdevice();
    guest.check_cache([DEFAULT; 4]);
    assert_eq!(guest.invalidate(&[0, 0x99, 1, 0, 0x98, 2]), (1, Err(Errno::EINVAL)));
    assert_eq!(guest.invalidate(&[0, 0x99, 2, 2, 0x99, 0]), (1, Err(Errno::EOPNOTSUPP)));
    assert_eq!(guest.invalidate(&[0, 0x99, 4]), (0, Err(Errno::EINVAL)));
    guest.check_cache([DEFAULT, 0, 0, DEFAULT]);
    assert_eq!(guest.invalidate(&[abi::INVALIDATE_ALL, 0x99, 0]), (1, Ok(())));
    guest.check_cache([0; 4]);
    assert_eq!(guest.invalidate(&[]), (0, Ok(())));
    let other = guest.world.invalidate(guest.viommu, &[0; 3], 12, 1);
    assert_eq!(other, (0, Err(Errno::EINVAL)));
}

#[test]
fn events_of_a_device_carry_its_virtual_id() {
    let guest = Guest::new();
    let nested = guest.nested();
    guest.vdevice();
    assert_eq!(guest.trigger(), Err(Errno::ENOENT));
    guest.world.replace(guest.mock.stdev, nested).unwrap();
    assert_eq!(guest.trigger(), Err(Errno::EOPNOTSUPP));
    let alloc = linux::VeventqAlloc {
        viommu_id: guest.viommu,
        kind: abi::VEVENTQ_TYPE,
        veventq_depth: 2,
        ..Default::default()
    };
    let (queue, _) = guest.world.call(alloc).unwrap();
    guest.trigger().unwrap();
    let event = guest.world.read(queue.out_veventq_fd, 12).unwrap();
    assert_eq!(event, [0_u32, 0, 0x99].as_bytes());
    guest.world.replace(guest.mock.stdev, guest.ioas).unwrap();
    assert_eq!(guest.trigger(), Err(Errno::ENOENT));
    guest.world.close(queue.out_veventq_fd);
}

#[test]
fn hardware_queues_come_in_order_and_go_in_reverse() {
    let guest = Guest::new();
    let iova = abi::APERTURE_START;
    guest.world.map(guest.ioas, BASE, 4 * PAGE, iova).unwrap();
    assert_eq!(guest.queue(1, iova), Err(Errno::EIO));
    assert_eq!(guest.queue(2, iova), Err(Errno::EINVAL));
    let first = guest.queue(0, iova).unwrap();
    assert_eq!(guest.queue(0, iova), Err(Errno::EEXIST));
    let second = guest.queue(1, iova + PAGE).unwrap();
    assert_eq!(guest.world.destroy(first), Err(Errno::EBUSY));
    assert_eq!(guest.world.unmap(guest.ioas, iova, 4 * PAGE), Err(Errno::EBUSY));
    guest.world.destroy(second).unwrap();
    guest.world.destroy(first).unwrap();
    assert_eq!(guest.queue(1, iova), Err(Errno::EIO));
    guest.world.unmap(guest.ioas, iova, 4 * PAGE).unwrap();
}
