//! Calls as people read them.

use zerocopy::IntoBytes;

use super::client::TestClient;
use crate::abi::*;
use crate::trace::describe;

#[test]
fn calls_are_spelled_out() {
    let client = TestClient::new();
    let argument = client.argument(&IrqSet {
        argsz: 28,
        flags: VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER,
        index: VFIO_PCI_MSIX_IRQ_INDEX,
        start: 0,
        count: 2,
    });
    client.put(20, [7i32, -1].as_bytes());
    assert_eq!(
        describe(VFIO_DEVICE_SET_IRQS, argument, &client).unwrap(),
        "VFIO_DEVICE_SET_IRQS, {argsz=28, flags=DATA_EVENTFD|ACTION_TRIGGER, index=MSIX, start=0, \
         count=2, data=[7, -1]}"
    );
    let argument = client.put(0, b"0000:01:00.0\0");
    assert_eq!(
        describe(VFIO_GROUP_GET_DEVICE_FD, argument, &client).unwrap(),
        "VFIO_GROUP_GET_DEVICE_FD, \"0000:01:00.0\""
    );
    let argument = client.argument(&RegionInfo { argsz: 32, index: 7, ..RegionInfo::default() });
    assert_eq!(
        describe(VFIO_DEVICE_GET_REGION_INFO, argument, &client).unwrap(),
        "VFIO_DEVICE_GET_REGION_INFO, {argsz=32, flags=0, index=CONFIG, cap_offset=0, size=0x0, \
         offset=0x0}"
    );
}

#[test]
fn what_cannot_be_read_is_shown_as_an_address() {
    let client = TestClient::new();
    assert_eq!(describe(VFIO_DEVICE_GET_INFO, 8, &client).unwrap(), "VFIO_DEVICE_GET_INFO, 0x8");
    assert_eq!(describe(VFIO_DEVICE_RESET, 0, &client).unwrap(), "VFIO_DEVICE_RESET");
    assert_eq!(describe(0x1234, 0, &client), None);
}
