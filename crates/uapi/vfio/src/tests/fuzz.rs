//! Whatever a client does, the device answers, and can be closed.

use lychgate_iommufd::NodeKind;
use lychgate_types::RequesterId;
use proptest::prelude::*;
use zerocopy::IntoBytes;

use super::bus::Bus;
use super::client::{MEMORY, TestClient};
use super::function::Bench;
use crate::abi::*;

#[derive(Clone, Debug)]
enum Operation {
    Read { region: u32, at: u64, count: u64 },
    Write { region: u32, at: u64, bytes: Vec<u8> },
    SetIrqs { header: [u32; 5], data: [i32; 4] },
    RegionInfo { argsz: u32, index: u32 },
    IoEventFd { flags: u32, offset: u64, fd: i32 },
    Reset,
    Intx(bool),
    RaiseMsix(u16),
    RaiseMsi(u16),
}

fn operation() -> impl Strategy<Value = Operation> {
    let at = prop_oneof![0..0x120u64, 0x1ff0..0x2050u64, 0..0x5000u64, any::<u64>()];
    let header = (0..40u32, 0..72u32, 0..6u32, 0..6u32, 0..6u32)
        .prop_map(|(argsz, flags, index, start, count)| [argsz, flags, index, start, count]);
    prop_oneof![
        4 => (0..10u32, at.clone(), 0..64u64)
            .prop_map(|(region, at, count)| Operation::Read { region, at, count }),
        4 => (0..10u32, at.clone(), prop::collection::vec(any::<u8>(), 0..16))
            .prop_map(|(region, at, bytes)| Operation::Write { region, at, bytes }),
        4 => (header, prop::array::uniform4(-2..14i32))
            .prop_map(|(header, data)| Operation::SetIrqs { header, data }),
        1 => (0..100u32, 0..12u32)
            .prop_map(|(argsz, index)| Operation::RegionInfo { argsz, index }),
        1 => (0..20u32, at, -2..14i32)
            .prop_map(|(flags, offset, fd)| Operation::IoEventFd { flags, offset, fd }),
        1 => Just(Operation::Reset),
        1 => any::<bool>().prop_map(Operation::Intx),
        1 => (0..4u16).prop_map(Operation::RaiseMsix),
        1 => (0..4u16).prop_map(Operation::RaiseMsi),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn any_sequence_of_calls_leaves_a_device_that_can_be_closed(
        operations in prop::collection::vec(operation(), 1..60)
    ) {
        let (bench, client) = (Bench::open(), TestClient::new());
        for fd in 10..13 {
            client.open_eventfd(fd);
        }
        let identity: [u8; 4] = bench.config(0);
        for operation in operations {
            // Every answer is fine; what matters is that there is one.
            let _ = match operation {
                Operation::Read { region, at, count } => {
                    let offset = region_offset(region).wrapping_add(at);
                    bench.device.read_region(&client, MEMORY, count, offset).map(drop)
                }
                Operation::Write { region, at, bytes } => {
                    client.put(0, &bytes);
                    let offset = region_offset(region).wrapping_add(at);
                    bench.device.write_region(&client, MEMORY, bytes.len() as u64, offset).map(drop)
                }
                Operation::SetIrqs { header, data } => {
                    let argument = client.argument(&header);
                    client.put(20, data.as_bytes());
                    bench.device.set_irqs(&client, argument).map(drop)
                }
                Operation::RegionInfo { argsz, index } => {
                    let info = RegionInfo { argsz, index, ..RegionInfo::default() };
                    bench.device.get_region_info(&client, client.argument(&info))
                }
                Operation::IoEventFd { flags, offset, fd } => {
                    let call = IoEventFd { argsz: 32, flags, offset, fd, ..IoEventFd::default() };
                    bench.device.ioeventfd(&client, client.argument(&call))
                }
                Operation::Reset => bench.device.reset(),
                Operation::Intx(asserted) => {
                    bench.device.intx(asserted);
                    Ok(())
                }
                Operation::RaiseMsix(vector) => {
                    bench.function.raise_msix(vector);
                    Ok(())
                }
                Operation::RaiseMsi(vector) => {
                    bench.function.raise_msi(vector);
                    Ok(())
                }
            };
            prop_assert_eq!(bench.config::<4>(0), identity);
        }
        bench.device.disable();
        prop_assert_eq!(bench.controller.taken(), 0);
        prop_assert_eq!(bench.function.hardware16(4) & 4, 0, "no bus mastering after close");
    }

    #[test]
    fn a_bar_is_memory_but_for_the_msix_table(
        accesses in prop::collection::vec(
            (any::<bool>(), 0..0x4000u64, prop::collection::vec(any::<u8>(), 1..80)), 1..40)
    ) {
        let (bench, client) = (Bench::open(), TestClient::new());
        let mut model = vec![0; 0x4000];
        let hidden = |at: usize| (0x2000..0x2040).contains(&at);
        for (write, at, bytes) in accesses {
            let (start, len) = {
                let start = usize::try_from(at).unwrap();
                (start, bytes.len().min(0x4000 - start))
            };
            let count = bytes.len() as u64;
            if write {
                client.put(0, &bytes);
                let written = bench.device.write_region(&client, MEMORY, count, at);
                prop_assert_eq!(written, Ok(len as u64));
                for (at, byte) in (start..0x4000).zip(bytes) {
                    if !hidden(at) {
                        model[at] = byte;
                    }
                }
            } else {
                prop_assert_eq!(bench.device.read_region(&client, MEMORY, count, at), Ok(len as u64));
                let expected: Vec<u8> = (start..start + len)
                    .map(|at| if hidden(at) { 0xff } else { model[at] })
                    .collect();
                prop_assert_eq!(client.bytes(MEMORY, len), expected);
            }
        }
    }

    #[test]
    fn any_ioctl_on_any_file_is_answered(
        calls in prop::collection::vec(
            (0..4usize, 95..125u32, prop_oneof![9 => 0..64u64, 1 => any::<u64>()],
             prop::collection::vec(prop_oneof![4 => 0..40u32, 1 => 100..110u32, 1 => any::<u32>()], 16)),
            1..60)
    ) {
        let bus = Bus::with(&["0000:01:00.0", "0000:01:00.1", "0000:02:00.0"]);
        let default = |requester| bus.driver.attached(RequesterId::new(requester));
        let before = [0x100, 0x101, 0x200].map(default);
        let context = bus.open_context(NodeKind::Iommu);
        let bind = BindIommufd { argsz: 24, iommufd: context, ..BindIommufd::default() };
        let first = bus.open_cdev(0);
        let files = [context, first, bus.open_cdev(1), bus.open_group(bus.vfio.groups()[1].number).unwrap()];
        prop_assert_eq!(bus.call(first, VFIO_DEVICE_BIND_IOMMUFD, &bind), Ok(0));
        bus.client.open_eventfd(10);
        let mut opened = Vec::new();
        for (file, nr, argument, words) in calls {
            bus.client.put(0, words.as_bytes());
            if argument == 7 {
                bus.client.put(0, b"0000:02:00.0\0");
            }
            let argument = if argument < 64 { MEMORY + argument / 16 * 4 } else { argument };
            let command = 0x3b00 + nr;
            let makes_a_file = command == VFIO_GROUP_GET_DEVICE_FD && file == 3;
            if let (Ok(fd), true) = (bus.ioctl(files[file], command, argument), makes_a_file) {
                opened.push(fd);
            }
        }
        for fd in opened.into_iter().chain(files) {
            bus.close(fd);
        }
        let after = [0x100, 0x101, 0x200].map(default);
        for (before, after) in before.iter().zip(&after) {
            prop_assert!(before.same(after), "{before:?} became {after:?}");
        }
    }

    #[test]
    fn any_configuration_space_can_be_opened(
        patches in prop::collection::vec((0..4096u16, any::<[u8; 8]>()), 0..40)
    ) {
        let bench = Bench::open_with(super::function::Controller::default(), |function| {
            for (at, bytes) in patches {
                let room = usize::from(4096 - at).min(bytes.len());
                function.lay(at, &bytes[..room], &[]);
            }
        });
        let whole: [u8; 256] = bench.config(0);
        bench.set_config(0, &whole);
        bench.device.disable();
    }
}
