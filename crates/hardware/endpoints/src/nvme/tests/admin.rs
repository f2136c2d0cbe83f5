use super::driver::*;

#[test]
fn identify_tells_what_every_driver_asks_first() {
    let mut driver = Driver::ready(1 << 20);
    let (done, data) = driver.identify(1, 0);
    assert_eq!(done.status, 0);
    assert_eq!(data[..4], [0x36, 0x1b, 0xf4, 0x1a]);
    assert_eq!(&data[4..24], b"lychgate-0          ");
    assert_eq!(data[77], 9);
    assert_eq!(data[80..84], 0x0001_0400_u32.to_le_bytes());
    assert_eq!(data[512..514], [0x66, 0x44]);
    assert_eq!(data[516..520], [1, 0, 0, 0]);
    let (done, data) = driver.identify(0, 1);
    assert_eq!(done.status, 0);
    for at in [0, 8, 16] {
        assert_eq!(data[at..at + 8], 2048_u64.to_le_bytes());
    }
    assert_eq!(data[128..132], [0, 0, 9, 0]);
}
