//! Whatever software does, the controller neither panics nor writes where it was not told to.

use std::sync::Arc;

use lychgate_model::PciFunction;
use proptest::prelude::*;

use super::driver::*;
use crate::storage::{MemoryStorage, Storage};

/// Something software may do to the function.
#[derive(Clone, Debug)]
enum Poke {
    Trapped { bar: u8, offset: u64, bytes: Vec<u8> },
    Stored { offset: u64, value: u32 },
    Config { offset: u16, bytes: Vec<u8> },
    Read { offset: u64, len: usize },
    Memory { offset: u64, word: u64 },
    Reset,
    Serve,
}

/// Values that registers find interesting, and others.
fn value() -> impl Strategy<Value = u32> {
    prop_oneof![
        Just(CC_ENABLE),
        Just(0),
        0_u32..80,
        (0_u32..64).prop_map(|page| page * 4096),
        any::<u32>(),
    ]
}

fn register() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(CC),
        Just(AQA),
        (0_u64..0x10).prop_map(|n| n * 4),
        (0_u64..0x40).prop_map(|n| 0x1000 + n * 4),
        (0_u64..0x4000 / 4).prop_map(|n| n * 4),
        any::<u64>().prop_map(|n| n & !7),
    ]
}

fn poke() -> impl Strategy<Value = Poke> {
    let len = prop_oneof![Just(1_usize), Just(2), Just(4), Just(8)];
    prop_oneof![
        4 => (register(), value())
            .prop_map(|(offset, value)| Poke::Stored { offset: offset & 0x1ffc, value }),
        3 => (register(), value()).prop_map(|(offset, value)| Poke::Trapped {
            bar: 0,
            offset,
            bytes: value.to_le_bytes().into(),
        }),
        1 => (0_u8..7, register(), any::<u64>(), len.clone()).prop_map(|(bar, offset, value, len)| {
            Poke::Trapped { bar, offset, bytes: value.to_le_bytes()[..len].into() }
        }),
        1 => (0_u16..0x120, any::<u64>(), 0_usize..8).prop_map(|(offset, value, len)| {
            Poke::Config { offset, bytes: value.to_le_bytes()[..len].into() }
        }),
        1 => (register(), len).prop_map(|(offset, len)| Poke::Read { offset, len }),
        3 => (0_u64..0x1000, any::<u64>())
            .prop_map(|(offset, word)| Poke::Memory { offset: offset * 8, word }),
        1 => Just(Poke::Reset),
        6 => Just(Poke::Serve),
    ]
}

/// Commands with fields that are often right.
fn command(admin: bool) -> impl Strategy<Value = Command> {
    let opcode: BoxedStrategy<u8> = if admin {
        prop_oneof![0_u8..0x11, any::<u8>()].boxed()
    } else {
        prop_oneof![0_u8..0x0a, any::<u8>()].boxed()
    };
    let address = prop_oneof![
        (0_u64..8).prop_map(|page| WRITABLE.start + page * 4096),
        (0_u64..8192).prop_map(|dword| WRITABLE.start + dword * 4),
        any::<u64>(),
    ];
    let dword = prop_oneof![Just(0_u32), 0_u32..16, any::<u32>()];
    (opcode, 0_u32..4, address.clone(), address, prop::array::uniform6(dword), any::<u8>())
        .prop_map(|(opcode, nsid, prp1, prp2, dwords, flags)| {
            let mut command = Command::new(opcode).nsid(nsid).prps(prp1, prp2);
            command.0[0] |= if flags < 16 { u32::from(flags) << 8 & 0xff00 } else { 0 };
            command.0[10..].copy_from_slice(&dwords);
            command
        })
}

/// The memory that random commands may name and have written; the queues lie elsewhere.
const WRITABLE: std::ops::Range<u64> = 0x60_0000..0x60_8000;

fn storages() -> Vec<Arc<dyn Storage>> {
    vec![
        Arc::new(MemoryStorage::new(1 << 20).unwrap()),
        Arc::new(MemoryStorage::read_only(&[3; 4096]).unwrap()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_sequence_of_accesses_panics(pokes in prop::collection::vec(poke(), 1..200)) {
        let mut driver = Driver::new(storages());
        driver.enable();
        driver.create_pair(1, 16);
        for poke in pokes {
            match poke {
                Poke::Trapped { bar, offset, bytes } => driver.nvme.bar_write(bar, offset, &bytes),
                Poke::Stored { offset, value } => driver.store(offset, value),
                Poke::Config { offset, bytes } => driver.nvme.config_write(offset, &bytes),
                Poke::Read { offset, len } => {
                    driver.nvme.bar_read(0, offset, &mut [0; 8][..len]);
                }
                Poke::Memory { offset, word } => {
                    for base in [driver.sqs[0].base, driver.sqs[1].base] {
                        driver.poke_words(base + offset % 0x400, &[word]);
                    }
                }
                Poke::Reset => {
                    driver.nvme.reset();
                    driver.set_up_function();
                }
                Poke::Serve => {
                    driver.nvme.service();
                }
            }
        }
        driver.nvme.reset();
        driver.set_up_function();
        driver.enable();
        prop_assert_eq!(driver.identify(1, 0).0.status, 0, "a reset brings it back");
    }

    #[test]
    fn random_commands_complete_once_each_and_write_only_where_prps_point(
        commands in prop::collection::vec((any::<bool>(), command(true), command(false)), 1..40),
    ) {
        let mut driver = Driver::new(storages());
        driver.enable();
        driver.create_pair(1, 16);
        let (sq, cq) = (driver.sqs[1].base, driver.cqs[1].base);
        let host = Arc::clone(&driver.host);
        // All memory but the queues and the writable part aborts.
        host.unmap(0..0x10_0000);
        host.unmap(0x12_0000..cq);
        host.unmap(sq + 0x1000..WRITABLE.start);
        host.unmap(WRITABLE.end..HOST_SIZE as u64);
        host.protect(driver.sqs[0].base..driver.sqs[0].base + 0x1000);
        host.protect(sq..sq + 0x1000);
        let mut events = 0;
        for (is_admin, admin_command, io_command) in commands {
            let (queue, command) =
                if is_admin { (0, admin_command) } else { (1, io_command) };
            // Deletion and creation of queue 1 would take the test's own queue away; Create may
            // put a queue into the writable part, where it is harmless.
            if is_admin && matches!(command.0[0] & 0xff, 0 | 4) {
                continue;
            }
            let cid = driver.push(queue, command);
            driver.ring(queue);
            driver.run();
            prop_assert_eq!(driver.read32(CSTS) & 2, 0);
            match driver.reap(queue) {
                Some(done) => {
                    prop_assert_eq!((done.cid, done.sq_head), (cid, driver.sqs[usize::from(queue)].at));
                    driver.ring_head(queue);
                }
                None => {
                    prop_assert_eq!((queue, command.0[0] & 0xff), (0, 0x0c));
                    events += 1;
                }
            }
            prop_assert_eq!(driver.reap(queue), None);
            prop_assert!(events <= 4);
        }
    }
}
