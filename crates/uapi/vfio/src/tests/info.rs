//! What the device tells about itself.

use lychgate_types::Errno;

use super::client::{MEMORY, TestClient};
use super::function::*;
use crate::abi::*;

#[test]
fn the_device_is_pci_and_can_be_reset() {
    let (bench, client) = (Bench::open(), TestClient::new());
    for (argsz, cap_offset) in [(24, 0), (20, 0), (16, 0xdead)] {
        let asked = DeviceInfo { argsz, cap_offset: 0xdead, ..DeviceInfo::default() };
        let argument = client.argument(&asked);
        assert_eq!(bench.device.get_info(&client, argument), Ok(()));
        let info: DeviceInfo = client.get(argument);
        assert_eq!(info.flags, VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET);
        assert_eq!((info.num_regions, info.num_irqs), (9, 5));
        assert_eq!(info.cap_offset, cap_offset, "argsz {argsz}");
    }
    let argument = client.argument(&DeviceInfo { argsz: 15, ..DeviceInfo::default() });
    assert_eq!(bench.device.get_info(&client, argument).unwrap_err().errno, Errno::EINVAL);
    assert_eq!(bench.device.get_info(&client, 8).unwrap_err().errno, Errno::EFAULT);
}

fn region(bench: &Bench, client: &TestClient, argsz: u32, index: u32) -> Result<RegionInfo, Errno> {
    let argument = client.argument(&RegionInfo { argsz, index, ..RegionInfo::default() });
    let result = bench.device.get_region_info(client, argument);
    result.map(|()| client.get(argument)).map_err(|refusal| refusal.errno)
}

#[test]
fn regions_are_where_their_index_says() {
    let (bench, client) = (Bench::open(), TestClient::new());
    let config = region(&bench, &client, 32, VFIO_PCI_CONFIG_REGION_INDEX).unwrap();
    assert_eq!((config.size, config.flags, config.offset), (4096, 3, 7 << 40));
    let bar2 = region(&bench, &client, 32, 2).unwrap();
    assert_eq!((bar2.size, bar2.flags, bar2.offset), (BAR2, 3, 2 << 40));
    for absent in [1, 3, 4, 5, VFIO_PCI_ROM_REGION_INDEX] {
        let info = region(&bench, &client, 32, absent).unwrap();
        assert_eq!((info.size, info.flags, info.cap_offset), (0, 0, 0), "{absent}");
    }
    for refused in [VFIO_PCI_VGA_REGION_INDEX, VFIO_PCI_NUM_REGIONS, u32::MAX] {
        assert_eq!(region(&bench, &client, 32, refused), Err(Errno::EINVAL));
    }
    assert_eq!(region(&bench, &client, 31, 0), Err(Errno::EINVAL));
}

#[test]
fn what_can_be_mapped_is_told_when_there_is_room() {
    let (bench, client) = (Bench::open(), TestClient::new());
    let short = region(&bench, &client, 32, 0).unwrap();
    assert_eq!((short.size, short.flags), (BAR0, 0xf));
    assert_eq!((short.argsz, short.cap_offset), (64, 0));
    let info = region(&bench, &client, 64, 0).unwrap();
    assert_eq!((info.argsz, info.cap_offset), (64, 32));
    let header: CapHeader = client.get(MEMORY + 32);
    assert_eq!(header, CapHeader { id: VFIO_REGION_INFO_CAP_SPARSE_MMAP, version: 1, next: 0 });
    assert_eq!(client.get::<SparseMmap>(MEMORY + 40), SparseMmap { nr_areas: 1, reserved: 0 });
    let area: SparseMmapArea = client.get(MEMORY + 48);
    assert_eq!(area, SparseMmapArea { offset: 0, size: MAPPABLE });
}

#[test]
fn a_mappable_msix_table_is_said_to_be_so() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(MSIX + 4, &[0, 0x10, 0, 0], &[]);
    });
    let client = TestClient::new();
    let info = region(&bench, &client, 72, 0).unwrap();
    assert_eq!((info.argsz, info.cap_offset), (72, 32));
    assert_eq!(client.get::<CapHeader>(MEMORY + 32).next, 64);
    let header: CapHeader = client.get(MEMORY + 64);
    assert_eq!(header, CapHeader { id: VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, version: 1, next: 0 });
}

fn irq(bench: &Bench, client: &TestClient, argsz: u32, index: u32) -> Result<(u32, u32), Errno> {
    let argument = client.argument(&IrqInfo { argsz, index, ..IrqInfo::default() });
    bench.device.get_irq_info(client, argument).map_err(|refusal| refusal.errno)?;
    let info: IrqInfo = client.get(argument);
    Ok((info.flags, info.count))
}

#[test]
fn interrupts_are_counted() {
    let (bench, client) = (Bench::open(), TestClient::new());
    let expected = [(7, 1), (9, 4), (1, 4), (9, 1), (9, 1)];
    for (index, expected) in (0..).zip(expected) {
        assert_eq!(irq(&bench, &client, 16, index), Ok(expected), "{index}");
    }
    assert_eq!(irq(&bench, &client, 16, 5), Err(Errno::EINVAL));
    assert_eq!(irq(&bench, &client, 15, 0), Err(Errno::EINVAL));
}

#[test]
fn a_conventional_function_without_a_pin_has_neither_errors_nor_intx() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(0x3d, &[0], &[]);
        function.lay(PM + 1, &[0], &[]);
    });
    let client = TestClient::new();
    assert_eq!(irq(&bench, &client, 16, VFIO_PCI_INTX_IRQ_INDEX), Ok((7, 0)));
    assert_eq!(irq(&bench, &client, 16, VFIO_PCI_MSI_IRQ_INDEX), Ok((9, 0)));
    assert_eq!(irq(&bench, &client, 16, VFIO_PCI_ERR_IRQ_INDEX), Err(Errno::EINVAL));
}

#[test]
fn features_are_refused_in_order() {
    let (bench, client) = (Bench::open(), TestClient::new());
    let feature = |argsz, flags| {
        let argument = client.argument(&Feature { argsz, flags });
        bench.device.feature(&client, argument).unwrap_err().errno
    };
    const GET: u32 = VFIO_DEVICE_FEATURE_GET;
    const SET: u32 = VFIO_DEVICE_FEATURE_SET;
    const PROBE: u32 = VFIO_DEVICE_FEATURE_PROBE;
    assert_eq!(feature(7, GET), Errno::EINVAL);
    assert_eq!(feature(8, 1 << 19), Errno::EINVAL);
    assert_eq!(feature(8, GET | SET), Errno::EINVAL);
    for id in 0..16 {
        assert_eq!(feature(8, PROBE | GET | SET | id), Errno::ENOTTY);
        assert_eq!(feature(64, GET | id), Errno::ENOTTY);
    }
}
