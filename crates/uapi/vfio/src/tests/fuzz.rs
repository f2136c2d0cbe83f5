//! Whatever a client does, the device answers, and can be closed.

use proptest::prelude::*;

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
                    client.put(20, zerocopy::IntoBytes::as_bytes(&data));
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
