use proptest::prelude::*;

use super::*;
use crate::spec::size::Block;

#[derive(Clone, Debug)]
enum Step {
    Write64(u64, u64),
    Write32(u64, u32),
    Command(u64, u64),
    Store(u64, u64),
    Entry(u16, [u64; 4]),
    Request(u16, Option<u32>, u64, u64, bool),
    Msi(u16, u64, u32),
    Config(u16, Vec<u8>),
}

/// Addresses where something is: rings, tables, and just beyond.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0..0x48_0000u64).prop_map(|offset| 0x1_0000_0000 + offset),
        1 => any::<u64>(),
        1 => Just(0xfee0_0000u64),
    ]
}

/// Words that are nearly table entries, commands or bases.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => any::<u64>(),
        4 => (address(), any::<u16>(), 0..4u64)
            .prop_map(|(at, low, rw)| at & 0x000f_ffff_ffff_f000 | u64::from(low & 0xfff) | rw << 61),
        1 => (address(), 0..8u64).prop_map(|(at, next)| at & !0xfff | next << 9 | 3 << 61 | 1),
        1 => 0..16u64,
    ]
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0..0x40u64).prop_map(|index| index * 8),
        4 => (0..16u64).prop_map(|index| 0x2000 + index * 8),
        1 => (0..0x1000u64).prop_map(|index| index * 8),
    ]
}

fn device() -> impl Strategy<Value = u16> {
    prop_oneof![3 => 0..4u16, 1 => any::<u16>()]
}

fn command() -> impl Strategy<Value = (u64, u64)> {
    let wild = (any::<u64>(), any::<u64>());
    let tame =
        (0..11u64, device(), address(), any::<bool>()).prop_map(|(op, device, at, s)| match op {
            1 => Command::completion_wait(PhysAddr::new(at), at, s).0.into(),
            3 => {
                Command::invalidate_iommu_pages(device, Block::covering(at, at | 0xfff), s).0.into()
            }
            op => Command([op << 60 | u64::from(device), 0]).0.into(),
        });
    prop_oneof![1 => wild, 6 => tame]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (offset(), word()).prop_map(|(at, value)| Step::Write64(at, value)),
        1 => (offset(), any::<u32>()).prop_map(|(at, value)| Step::Write32(at | 4, value)),
        4 => command().prop_map(|(low, high)| Step::Command(low, high)),
        4 => (address(), word()).prop_map(|(at, value)| Step::Store(at & !7, value)),
        2 => (device(), [word(), word(), word(), word()]).prop_map(|(d, dte)| Step::Entry(d, dte)),
        6 => (device(), any::<Option<u16>>(), address(), 0..0x40_0000u64, any::<bool>())
            .prop_map(|(d, p, at, len, w)| Step::Request(d, p.map(u32::from), at, len, w)),
        2 => (device(), address(), any::<u32>()).prop_map(|(d, at, data)| Step::Msi(d, at, data)),
        1 => (any::<u16>(), prop::collection::vec(any::<u8>(), 0..8))
            .prop_map(|(at, bytes)| Step::Config(at, bytes)),
    ]
}

fn apply(rig: &Rig, step: &Step) {
    use lychgate_model::PciFunction;
    match step {
        Step::Write64(at, value) => rig.write(*at, *value),
        Step::Write32(at, value) => rig.iommu.write32(*at, *value),
        Step::Command(low, high) => {
            let tail = rig.read(regs::COMMAND_TAIL) % RING_BYTES;
            rig.store(rig.commands.wrapping_add(tail), *low);
            rig.store(rig.commands.wrapping_add(tail + 8), *high);
            rig.write(regs::COMMAND_TAIL, (tail + 16) % RING_BYTES);
        }
        Step::Store(at, value) => {
            let _ = rig.pages.store_u64(PhysAddr::new(*at), *value);
        }
        Step::Entry(device, words) => rig.set_entry(RequesterId::new(*device), Dte(*words)),
        Step::Request(device, pasid, at, len, write) => {
            let access = if *write { Access::Write } else { Access::Read };
            let pasid = pasid.and_then(Pasid::new);
            let request = rig.request(RequesterId::new(*device), pasid, *at, *len, access);
            if let Ok(runs) = request {
                assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), *len);
            }
        }
        Step::Msi(device, at, data) => {
            rig.iommu.remap_msi(RequesterId::new(*device), *at, *data);
        }
        Step::Config(at, bytes) => rig.iommu.config_write(*at, bytes),
    }
}

fn policy() -> impl Strategy<Value = Policy> {
    prop_oneof![
        Just(Policy::Plain),
        Just(Policy::Adversarial),
        any::<u64>().prop_map(Policy::EvictRandom)
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Nothing that software, tables or devices hold makes the model panic or hang, and a request
    /// that passes is as long as it was asked.
    #[test]
    fn garbage_is_survived(policy in policy(), steps in prop::collection::vec(step(), 1..200)) {
        let rig = Rig::with(Config { policy, ..Config::default() });
        for step in &steps {
            apply(&rig, step);
        }
        for offset in (0..regs::REGION_BYTES).step_by(8) {
            rig.read(offset);
        }
    }

    /// A table that leads back to itself in every entry ends: levels only go down.
    #[test]
    fn tables_that_contain_themselves_end(
        mode in 1..=6u32,
        next in 0..8u64,
        at in any::<u64>(),
        write in any::<bool>(),
    ) {
        let rig = Rig::new();
        let root = rig.table();
        for index in 0..512 {
            rig.store(root.wrapping_add(index * 8), directory(root, next).0[0]);
        }
        rig.set_entry(DEVICE, translated(root, mode));
        let _ = if write { rig.write_at(DEVICE, at) } else { rig.read_at(DEVICE, at) };
        prop_assert!(rig.take_events().len() <= 1);
    }

    /// With `EvictRandom` and `Plain`, while tables only gain entries, requests agree with a plain
    /// reading of what was mapped.
    #[test]
    fn translations_agree_with_what_was_mapped(
        policy in policy(),
        pages in prop::collection::vec((0..64u64, 0..1024u64, any::<bool>()), 1..64),
        probes in prop::collection::vec((0..64u64, any::<bool>()), 1..64),
    ) {
        let rig = Rig::with(Config { policy, ..Config::default() });
        let root = rig.table();
        rig.set_entry(DEVICE, translated(root, 3));
        let mut mapped = std::collections::HashMap::new();
        let mut probes = probes.into_iter().cycle();
        for (at, frame, writable) in pages {
            // 61 pages apart, so that several tables are involved.
            let iova = (at * 61) << 12;
            if mapped.contains_key(&iova) {
                continue;
            }
            let frame = frame << 12;
            rig.map(root, 3, iova, page(PhysAddr::new(frame)).with_iw(writable));
            mapped.insert(iova, (frame, writable));
            for (probe, write) in probes.by_ref().take(4) {
                let probe = (probe * 61) << 12;
                let expected = match mapped.get(&probe) {
                    Some(&(frame, writable)) if writable || !write => Ok(frame),
                    _ => Err(probe),
                };
                let seen =
                    if write { rig.write_at(DEVICE, probe) } else { rig.read_at(DEVICE, probe) };
                prop_assert_eq!(seen, expected);
            }
        }
    }
}
