//! The calls that programs make, in the order in which they were recorded.

use lychgate_iommu::{Domain, PagingDomain};
use lychgate_iommufd::{MmapRequest, NodeKind};
use lychgate_types::{Errno, Iova, PhysAddr, RequesterId};
use std::sync::Arc;
use zerocopy::IntoBytes;

use super::bus::Bus;
use super::client::MEMORY;
use super::function::{MAPPABLE, MSIX};
use crate::abi::*;

const DEVICE: RequesterId = RequesterId::new(0x100);
const CONFIG: u64 = region_offset(VFIO_PCI_CONFIG_REGION_INDEX);

fn paging(bus: &Bus) -> Arc<dyn PagingDomain> {
    match bus.driver.attached(DEVICE) {
        Domain::Paging(domain) => domain,
        other => panic!("attached to {other:?}"),
    }
}

fn region_info(bus: &Bus, device: i32, index: u32) -> RegionInfo {
    let info = RegionInfo { argsz: 32, index, ..RegionInfo::default() };
    assert_eq!(bus.call(device, VFIO_DEVICE_GET_REGION_INFO, &info), Ok(0));
    bus.client.get(MEMORY)
}

fn irq_info(bus: &Bus, device: i32, index: u32) -> IrqInfo {
    let info = IrqInfo { argsz: 16, index, ..IrqInfo::default() };
    assert_eq!(bus.call(device, VFIO_DEVICE_GET_IRQ_INFO, &info), Ok(0));
    bus.client.get(MEMORY)
}

fn set_eventfd(bus: &Bus, device: i32, index: u32, fd: i32) -> Result<i32, Errno> {
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    bus.client.put(20, fd.as_bytes());
    let set = IrqSet { argsz: 24, flags, index, start: 0, count: 1 };
    bus.call(device, VFIO_DEVICE_SET_IRQS, &set)
}

fn map(bus: &Bus, device: i32, offset: u64, len: u64, read: bool) {
    let request = MmapRequest { offset, len, read, write: true, exec: false, shared: true };
    assert_eq!(bus.file(device).mmap(&request), Ok(()));
}

/// `qemu-img info nvme://0000:01:00.0/1`: a group in a type1 container.
#[test]
fn qemu_img() {
    const GET_API_VERSION: u32 = 0x3b64;
    const CHECK_EXTENSION: u32 = 0x3b65;
    const SET_IOMMU: u32 = 0x3b66;
    const GET_INFO: u32 = 0x3b70;
    const MAP_DMA: u32 = 0x3b71;
    const UNMAP_DMA: u32 = 0x3b72;
    const TYPE1: u64 = 1;

    let bus = Bus::with(&["0000:01:00.0"]);
    let container = bus.open_context(NodeKind::VfioContainer);
    assert_eq!(bus.ioctl(container, GET_API_VERSION, 0), Ok(0));
    assert_eq!(bus.ioctl(container, CHECK_EXTENSION, TYPE1), Ok(1));
    let group = bus.open_group(bus.group_number()).unwrap();
    assert_eq!(bus.call(group, VFIO_GROUP_GET_STATUS, &[8u32, 0]), Ok(0));
    assert_eq!(bus.client.get::<GroupStatus>(MEMORY).flags & VFIO_GROUP_FLAGS_VIABLE, 1);
    assert_eq!(bus.call(group, VFIO_GROUP_SET_CONTAINER, &container), Ok(0));
    assert_eq!(bus.ioctl(container, SET_IOMMU, TYPE1), Ok(0));
    assert_eq!(bus.call(container, GET_INFO, &[24u32, 0, 0, 0, 0, 0]), Ok(0));
    let needed: u32 = bus.client.get(MEMORY);
    assert!(needed > 24, "capabilities do not fit");
    assert_eq!(bus.ioctl(container, GET_INFO, MEMORY), Ok(0));

    let name = bus.client.put(0, b"0000:01:00.0\0");
    let device = bus.ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name).unwrap();
    assert_eq!(bus.call(device, VFIO_DEVICE_GET_INFO, &[20u32, 0, 0, 0, 0]), Ok(0));
    let info: DeviceInfo = bus.client.get(MEMORY);
    assert_eq!((info.flags & 3, info.num_regions, info.num_irqs), (3, 9, 5));
    let config = region_info(&bus, device, VFIO_PCI_CONFIG_REGION_INDEX);
    assert_eq!(config.offset, CONFIG);
    for bar in 0..6 {
        region_info(&bus, device, bar);
    }
    let file = bus.file(device);
    assert_eq!(file.read_at(&bus.client, MEMORY, 2, CONFIG + 4), Ok(2));
    let command = bus.client.get::<u16>(MEMORY);
    bus.client.put(0, (command | 4).as_bytes());
    assert_eq!(file.write_at(&bus.client, MEMORY, 2, CONFIG + 4), Ok(2));
    map(&bus, device, 0, 4096, true);
    map(&bus, device, 0, MAPPABLE, false);

    let dma = |address: u64, iova: u64, len: u64| {
        let mut argument = [0u64; 4];
        argument[0] = 32 | 3 << 32;
        argument[1..].copy_from_slice(&[address, iova, len]);
        bus.call(container, MAP_DMA, &argument)
    };
    assert_eq!(dma(0x7f00_0000, 0x1_0000, 0x7f000), Ok(0));
    assert_eq!(dma(0x7e00_0000, 0x9_0000, 0x2000), Ok(0));
    assert_eq!(dma(0x7d00_0000, (1 << 39) - 0x1000, 0x1000), Ok(0));
    assert_eq!(dma(0x7d00_0000, 0x9_1000, 0x1000), Err(Errno::EEXIST));
    let domain = paging(&bus);
    let phys = |iova| domain.iova_to_phys(Iova::new(iova));
    assert_eq!(phys(0x1_1234), Some(PhysAddr::new(0x7f00_1234)));
    assert_eq!(phys((1 << 39) - 1), Some(PhysAddr::new(0x7d00_0fff)));

    assert_eq!(irq_info(&bus, device, VFIO_PCI_MSIX_IRQ_INDEX).count, 4);
    let eventfd = bus.client.open_eventfd(10);
    assert_eq!(set_eventfd(&bus, device, VFIO_PCI_MSIX_IRQ_INDEX, 10), Ok(0));
    bus.functions[0].raise_msix(0);
    assert_eq!(eventfd.take(), 1);

    let unmap = [24u64, (1 << 39) - 0x1000, 0x1000];
    assert_eq!(bus.call(container, UNMAP_DMA, &unmap), Ok(0));
    assert_eq!(phys((1 << 39) - 1), None);
    assert_eq!(bus.ioctl(device, VFIO_DEVICE_RESET, 0), Ok(0));
    drop(file);
    bus.close(device);
    bus.close(group);
    bus.close(container);
    assert!(!matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
    assert_eq!(phys(0x1_1234), None, "nothing stays mapped");
    assert_eq!(bus.functions[0].hardware16(MSIX + 2) & 0x8000, 0);
}

/// `qemu-system-x86_64 -device vfio-pci,host=01:00.0,iommufd=...`: the device's own node.
#[test]
fn qemu_system() {
    const CHANGE_PROCESS: u32 = 0x3b92;
    const IOAS_ALLOC: u32 = 0x3b81;
    const IOVA_RANGES: u32 = 0x3b84;
    const IOAS_MAP: u32 = 0x3b85;
    const HWPT_ALLOC: u32 = 0x3b89;
    const GET_HW_INFO: u32 = 0x3b8a;

    let bus = Bus::with(&["0000:01:00.0"]);
    let device = bus.open_cdev(0);
    assert_eq!(bus.file(device).device_number(), Some((511, 0)));
    let iommufd = bus.open_context(NodeKind::Iommu);
    let probe = bus.call(iommufd, CHANGE_PROCESS, &[8u32, 0]);
    assert!(matches!(probe, Ok(0) | Err(Errno::ENOTTY)), "{probe:?}");
    let bind = BindIommufd { argsz: 24, iommufd, ..BindIommufd::default() };
    assert_eq!(bus.call(device, VFIO_DEVICE_BIND_IOMMUFD, &bind), Ok(0));
    let devid = bus.client.get::<BindIommufd>(MEMORY).out_devid;
    assert_eq!(bus.call(iommufd, IOAS_ALLOC, &[12u32, 0, 0]), Ok(0));
    let ioas: u32 = bus.client.get(MEMORY + 8);
    assert_eq!(bus.call(iommufd, GET_HW_INFO, &[40u32, 0, devid, 0, 0, 0, 0, 0, 0, 0]), Ok(0));
    let mut alloc = [0u32; 12];
    alloc[..4].copy_from_slice(&[48, 0, devid, ioas]);
    assert_eq!(bus.call(iommufd, HWPT_ALLOC, &alloc), Ok(0));
    let hwpt: u32 = bus.client.get(MEMORY + 16);
    let attach = AttachIommufdPt { argsz: 12, pt_id: hwpt, ..AttachIommufdPt::default() };
    assert_eq!(bus.call(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach), Ok(0));
    assert_eq!(bus.client.get::<AttachIommufdPt>(MEMORY).pt_id, hwpt);
    let ranges = bus.call(iommufd, IOVA_RANGES, &[32u32, ioas, 0, 0, 0, 0, 0, 0]);
    assert_eq!(ranges, Err(Errno::EMSGSIZE));
    for (flags, address, iova, len) in
        [(7u32, 0x5000_0000u64, 0u64, 0xc_0000u64), (5, 0x6000_0000, 0xc_0000, 0x4_0000)]
    {
        let mut argument = Vec::new();
        argument.extend_from_slice([40, flags, ioas, 0].as_bytes());
        argument.extend_from_slice([address, len, iova].as_bytes());
        let argument = bus.client.put(0, &argument);
        assert_eq!(bus.ioctl(iommufd, IOAS_MAP, argument), Ok(0));
    }
    let domain = paging(&bus);
    assert_eq!(domain.iova_to_phys(Iova::new(0xc_0123)), Some(PhysAddr::new(0x6000_0123)));

    assert_eq!(bus.call(device, VFIO_DEVICE_GET_INFO, &[24u32, 0, 0, 0, 0, 0]), Ok(0));
    for index in [0, 1, 2, 3, 4, 5, 7] {
        region_info(&bus, device, index);
    }
    assert_eq!(irq_info(&bus, device, VFIO_PCI_ERR_IRQ_INDEX).count, 1);
    let file = bus.file(device);
    assert_eq!(file.read_at(&bus.client, MEMORY + 0x2000, 4096, CONFIG), Ok(4096));
    assert_eq!(bus.client.get::<[u8; 4]>(MEMORY + 0x2000), [0x36, 0x1b, 0x10, 0]);
    assert_eq!(region_info(&bus, device, VFIO_PCI_ROM_REGION_INDEX).size, 0);
    assert_eq!(irq_info(&bus, device, VFIO_PCI_MSIX_IRQ_INDEX).count, 4);
    map(&bus, device, 0, MAPPABLE, true);
    for feature in [11, 1] {
        let flags = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_PROBE | feature;
        let probe = bus.call(device, VFIO_DEVICE_FEATURE, &Feature { argsz: 8, flags });
        assert_eq!(probe, Err(Errno::ENOTTY));
    }
    bus.client.open_eventfd(10);
    assert_eq!(set_eventfd(&bus, device, VFIO_PCI_INTX_IRQ_INDEX, 10), Ok(0));
    let request = bus.client.open_eventfd(11);
    assert_eq!(set_eventfd(&bus, device, VFIO_PCI_REQ_IRQ_INDEX, 11), Ok(0));
    // It takes its interrupts down before it resets.
    let off = IrqSet {
        argsz: 20,
        flags: VFIO_IRQ_SET_DATA_NONE | VFIO_IRQ_SET_ACTION_TRIGGER,
        ..IrqSet::default()
    };
    assert_eq!(bus.call(device, VFIO_DEVICE_SET_IRQS, &off), Ok(0));
    assert_eq!(bus.ioctl(device, VFIO_DEVICE_RESET, 0), Ok(0));

    // The guest enables MSI-X: first with no vector in use, then each as it is unmasked.
    let eventfd = bus.client.open_eventfd(12);
    bus.client.put(0, &[6, 4]);
    assert_eq!(file.write_at(&bus.client, MEMORY, 2, CONFIG + 4), Ok(2));
    assert_eq!(set_eventfd(&bus, device, VFIO_PCI_MSIX_IRQ_INDEX, -1), Ok(0));
    assert_eq!(set_eventfd(&bus, device, VFIO_PCI_MSIX_IRQ_INDEX, 12), Ok(0));
    bus.functions[0].raise_msix(0);
    assert_eq!((eventfd.take(), request.take()), (1, 0));
    drop(file);
    bus.close(device);
    bus.close(iommufd);
    assert!(!matches!(bus.driver.attached(DEVICE), Domain::Paging(_)));
    assert_eq!(domain.iova_to_phys(Iova::new(0xc_0123)), None);
}
