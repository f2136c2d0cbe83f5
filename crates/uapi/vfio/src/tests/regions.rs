//! Regions: how accesses are cut, what of them is hidden, what can be mapped.

use lychgate_iommufd::MmapRequest;
use lychgate_types::Errno;

use super::client::{LEN, MEMORY, TestClient};
use super::function::*;
use crate::abi::*;

const BAR_2: u64 = 2 << REGION_SHIFT;

fn reads(bench: &Bench) -> Vec<(u64, usize)> {
    let read = |seen| match seen {
        Seen::Read { at, width, .. } => (at, width),
        Seen::Write { .. } => panic!("only reads were made"),
    };
    bench.function.seen().into_iter().map(read).collect()
}

#[test]
fn accesses_are_as_wide_as_they_are_aligned() {
    let (bench, client) = (Bench::open(), TestClient::new());
    assert_eq!(bench.device.read_region(&client, MEMORY, 4, 0x14), Ok(4));
    assert_eq!(reads(&bench), [(0x14, 4)]);
    assert_eq!(bench.device.read_region(&client, MEMORY, 8, 0x18), Ok(8));
    assert_eq!(reads(&bench), [(0x18, 8)]);
    assert_eq!(bench.device.read_region(&client, MEMORY, 18, 0x11), Ok(18));
    assert_eq!(reads(&bench), [(0x11, 1), (0x12, 2), (0x14, 4), (0x18, 8), (0x20, 2), (0x22, 1)]);
}

#[test]
fn what_is_written_is_read_back() {
    let (bench, client) = (Bench::open(), TestClient::new());
    let bytes: Vec<u8> = (0..200).collect();
    let address = client.put(0x100, &bytes);
    assert_eq!(bench.device.write_region(&client, address, 200, BAR_2 + 0x33), Ok(200));
    assert_eq!(bench.device.read_region(&client, MEMORY + 0x400, 200, BAR_2 + 0x33), Ok(200));
    assert_eq!(client.bytes(MEMORY + 0x400, 200), bytes);
}

#[test]
fn the_msix_table_is_hidden() {
    let (bench, client) = (Bench::open(), TestClient::new());
    client.put(0, &[0; 0x80]);
    let start = TABLE - 4;
    assert_eq!(bench.device.write_region(&client, MEMORY, 0x48, start), Ok(0x48));
    assert_eq!(
        bench.function.seen(),
        [
            Seen::Write { bar: 0, at: TABLE - 4, width: 4 },
            Seen::Write { bar: 0, at: TABLE + 0x40, width: 4 }
        ]
    );
    assert_eq!(bench.device.read_region(&client, MEMORY, 0x48, start), Ok(0x48));
    assert_eq!(client.bytes(MEMORY + 4, 0x40), [0xff; 0x40]);
    assert_eq!(reads(&bench), [(TABLE - 4, 4), (TABLE + 0x40, 4)]);
}

#[test]
fn a_region_ends_where_it_ends() {
    let (bench, client) = (Bench::open(), TestClient::new());
    let read = |count, at| {
        bench.device.read_region(&client, MEMORY, count, at).map_err(|refusal| refusal.errno)
    };
    let config = region_offset(VFIO_PCI_CONFIG_REGION_INDEX);
    assert_eq!(read(16, BAR_2 + BAR2 - 8), Ok(8), "cut at the end of a BAR");
    assert_eq!(read(1, BAR_2 + BAR2), Err(Errno::EINVAL));
    assert_eq!(read(1, 1 << REGION_SHIFT), Err(Errno::EINVAL), "the upper half of BAR 0");
    assert_eq!(read(16, config + 4088), Err(Errno::EFAULT), "but not of configuration space");
    assert_eq!(read(1, config + 4096), Err(Errno::EFAULT));
    assert_eq!(read(u64::MAX, config + 1), Err(Errno::EFAULT));
    for index in
        [VFIO_PCI_ROM_REGION_INDEX, VFIO_PCI_VGA_REGION_INDEX, VFIO_PCI_NUM_REGIONS, 1 << 23]
    {
        assert_eq!(read(4, region_offset(index)), Err(Errno::EINVAL), "{index}");
    }
    assert_eq!(read(0, region_offset(VFIO_PCI_NUM_REGIONS)), Ok(0), "nothing asks nothing");
    let write =
        bench.device.write_region(&client, MEMORY, 4, region_offset(VFIO_PCI_ROM_REGION_INDEX));
    assert_eq!(write.unwrap_err().errno, Errno::EINVAL);
}

#[test]
fn memory_that_is_not_there_is_a_fault() {
    let (bench, client) = (Bench::open(), TestClient::new());
    let config = region_offset(VFIO_PCI_CONFIG_REGION_INDEX);
    for offset in [0, config] {
        let end = MEMORY + LEN - 2;
        assert_eq!(
            bench.device.read_region(&client, end, 4, offset).unwrap_err().errno,
            Errno::EFAULT
        );
        assert_eq!(
            bench.device.write_region(&client, end, 4, offset).unwrap_err().errno,
            Errno::EFAULT
        );
        assert_eq!(
            bench.device.read_region(&client, u64::MAX, 4, offset).unwrap_err().errno,
            Errno::EFAULT
        );
    }
}

#[test]
fn bars_do_not_answer_while_decoding_is_off() {
    let (bench, client) = (Bench::open(), TestClient::new());
    bench.set_config(4, &[0, 0]);
    let read =
        |at| bench.device.read_region(&client, MEMORY, 4, at).map_err(|refusal| refusal.errno);
    assert_eq!(read(0), Err(Errno::EIO));
    assert_eq!(bench.device.write_region(&client, MEMORY, 4, 0).unwrap_err().errno, Errno::EIO);
    assert_eq!(bench.function.seen(), []);
    assert_eq!(read(region_offset(VFIO_PCI_CONFIG_REGION_INDEX)), Ok(4));
    bench.set_config(4, &[2, 0]);
    assert_eq!(read(0), Ok(4));
}

#[test]
fn only_the_mappable_part_can_be_mapped() {
    let bench = Bench::open();
    let request =
        MmapRequest { offset: 0, len: 4096, read: true, write: true, exec: false, shared: true };
    let map = |request| bench.device.check_mmap(&request).map_err(|refusal| refusal.errno);
    assert_eq!(map(request), Ok(()));
    assert_eq!(map(MmapRequest { len: MAPPABLE, read: false, ..request }), Ok(()));
    assert_eq!(map(MmapRequest { offset: 4096, len: 1, ..request }), Ok(()));
    for refused in [
        MmapRequest { shared: false, ..request },
        MmapRequest { len: MAPPABLE + 1, ..request },
        MmapRequest { len: u64::MAX, ..request },
        MmapRequest { offset: MAPPABLE, ..request },
        MmapRequest { offset: 1 << REGION_SHIFT, ..request },
        MmapRequest { offset: BAR_2, ..request },
        MmapRequest { offset: region_offset(VFIO_PCI_CONFIG_REGION_INDEX), ..request },
        MmapRequest { offset: region_offset(VFIO_PCI_NUM_REGIONS), ..request },
        MmapRequest { offset: u64::MAX << 12, ..request },
    ] {
        assert_eq!(map(refused), Err(Errno::EINVAL), "{refused:?}");
    }
}
