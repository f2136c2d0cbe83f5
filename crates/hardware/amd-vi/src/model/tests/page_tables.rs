use super::*;
use crate::spec::dte::{HAD_ACCESS, HAD_ACCESS_DIRTY};
use crate::spec::event::{IO_PAGE_FAULT, PAGE_TAB_HARDWARE_ERROR};
use crate::spec::host_page_table::reach;
use crate::spec::size::Block;

const FRAME: u64 = 0x12_3456_7000;

fn one_device(mode: u32) -> (Rig, PhysAddr) {
    let rig = Rig::new();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, mode));
    (rig, root)
}

fn flags(event: Event) -> (u64, bool, bool, bool) {
    (event.code(), event.pr(), event.pe(), event.rz())
}

#[test]
fn every_mode_translates_up_to_its_reach_and_not_beyond() {
    for mode in 1..=6 {
        let (rig, root) = one_device(mode);
        let top = u64::MAX >> (64 - reach(mode));
        for at in [0, 0x1000, top & !0xfff] {
            rig.map(root, mode, at, page(PhysAddr::new(FRAME)));
            assert_eq!(rig.read_at(DEVICE, at | 0x123), Ok(FRAME | 0x123), "mode {mode} {at:#x}");
        }
        if mode < 6 {
            let beyond = top + 1;
            assert_eq!(rig.write_at(DEVICE, beyond), Err(beyond));
            let event = rig.take_event();
            assert_eq!(flags(event), (IO_PAGE_FAULT, false, false, false));
            assert_eq!((event.address(), event.rw()), (beyond, true));
            assert_eq!(rig.read_at(DEVICE, u64::MAX), Err(u64::MAX));
        }
    }
}

#[test]
fn a_page_may_end_the_walk_at_levels_1_to_5() {
    for level in 1..=6 {
        let (rig, root) = one_device(6);
        let at = 0x0123_4567_89ab_c000;
        let slot = rig.entry_of(root, 6, level, at);
        let frame = 0x000f_0000_0000_0000 & !((1 << level_shift(level)) - 1);
        rig.store(slot, page(PhysAddr::new(frame)).0[0]);
        if level < 6 {
            let inside = at & ((1 << level_shift(level)) - 1);
            assert_eq!(rig.read_at(DEVICE, at), Ok(frame | inside), "level {level}");
        } else {
            assert_eq!(rig.read_at(DEVICE, at), Err(at));
            assert_eq!(flags(rig.take_event()), (IO_PAGE_FAULT, true, false, false));
        }
    }
}

#[test]
fn next_level_7_gives_every_power_of_two_between_the_levels_and_no_other() {
    for level in 1..=6u32 {
        for order in 13..=51u32 {
            let (rig, root) = one_device(6);
            let at = 0x00f3_5a71_2345_6000 & !((1u64 << order) - 1) | 0x5678;
            let frame = 0x000a_0000_0000_0000 & !((1u64 << order) - 1);
            let (address, _) = Block { start: frame, order }.encode();
            let entry = page(PhysAddr::new(address)).with_next_level(7);
            let slot = rig.entry_of(root, 6, level, at);
            rig.store(slot, entry.0[0]);
            let legal = level < 6 && level_shift(level) < order && order < level_shift(level + 1);
            let result = rig.read_at(DEVICE, at);
            if legal {
                let inside = at & ((1u64 << order) - 1);
                assert_eq!(result, Ok(frame | inside), "level {level} order {order}");
            } else {
                assert_eq!(result, Err(at), "level {level} order {order}");
                assert_eq!(flags(rig.take_event()), (IO_PAGE_FAULT, true, false, false));
            }
        }
    }
    let (rig, root) = one_device(6);
    let endless = Entry([0x000f_ffff_ffff_f000]).with_pr(true).with_ir(true).with_next_level(7);
    rig.store(rig.entry_of(root, 6, 5, 0), endless.0[0]);
    assert_eq!(rig.read_at(DEVICE, 0), Err(0));
}

#[test]
fn a_large_page_serves_all_its_addresses_from_one_entry() {
    let (rig, root) = one_device(3);
    let entry = page(PhysAddr::new(0x4000_0000)).with_next_level(0);
    rig.store(rig.entry_of(root, 3, 2, 0x20_0000), entry.0[0]);
    let all = rig.request(DEVICE, None, 0x20_0000, 0x20_0000, Access::Write);
    assert_eq!(all, Ok(vec![PhysRun { start: PhysAddr::new(0x4000_0000), len: 0x20_0000 }]));
}

#[test]
fn pages_that_lie_side_by_side_come_as_one_run() {
    let (rig, root) = one_device(3);
    for page_index in 0..256u64 {
        let frame = FRAME + page_index * 4096 + if page_index >= 100 { 0x10_0000 } else { 0 };
        rig.map(root, 3, 0x40_0000 + page_index * 4096, page(PhysAddr::new(frame)));
    }
    assert_eq!(
        rig.request(DEVICE, None, 0x40_0010, 0xf_ffe0, Access::Read),
        Ok(vec![
            PhysRun { start: PhysAddr::new(FRAME + 0x10), len: 100 * 4096 - 0x10 },
            PhysRun { start: PhysAddr::new(FRAME + 0x16_4000), len: 156 * 4096 - 0x10 },
        ])
    );
}

#[test]
fn nothing_is_accessed_unless_everything_translates() {
    let (rig, root) = one_device(3);
    rig.map(root, 3, 0x1000, page(PhysAddr::new(FRAME)));
    assert_eq!(rig.request(DEVICE, None, 0x1800, 0x1000, Access::Read), Err(0x2000));
    assert_eq!(rig.take_event().address(), 0x2000);
}

#[test]
fn a_skipped_level_must_have_zero_address_bits() {
    let (rig, root) = one_device(4);
    let leaf_table = rig.table();
    rig.store(root.wrapping_add(8), directory(leaf_table, 1).0[0]);
    rig.store(leaf_table.wrapping_add(3 * 8), page(PhysAddr::new(FRAME)).0[0]);
    let base = 1 << 39;
    assert_eq!(rig.read_at(DEVICE, base + 0x3008), Ok(FRAME + 8));
    for skipped in [1u64 << 21, 1 << 29, 1 << 30, 1 << 38] {
        let at = base + 0x3008 + skipped;
        assert_eq!(rig.read_at(DEVICE, at), Err(at));
        assert_eq!(flags(rig.take_event()), (IO_PAGE_FAULT, true, false, false));
    }
}

#[test]
fn a_directory_must_lead_down() {
    for (level, next) in [(3, 3), (3, 4), (2, 2), (2, 6), (1, 1), (1, 6)] {
        let (rig, root) = one_device(3);
        rig.store(rig.entry_of(root, 3, level, 0x1000), directory(root, next).0[0]);
        assert_eq!(rig.read_at(DEVICE, 0x1000), Err(0x1000));
        assert_eq!(flags(rig.take_event()), (IO_PAGE_FAULT, true, false, false), "{level} {next}");
    }
}

#[test]
fn reserved_bits_fault_with_rz_only_where_the_entry_is_present() {
    for bit in 52..=60 {
        let (rig, root) = one_device(3);
        let slot = rig.entry_of(root, 3, 2, 0x1000);
        let leaf = rig.entry_of(root, 3, 1, 0x1000);
        rig.store(leaf, page(PhysAddr::new(FRAME)).0[0]);
        let good = rig.load(slot);
        rig.store(slot, good | 1 << bit);
        assert_eq!(rig.read_at(DEVICE, 0x1000), Err(0x1000));
        assert_eq!(flags(rig.take_event()), (IO_PAGE_FAULT, true, false, true), "PDE bit {bit}");
        rig.store(slot, good);
        rig.store(leaf, page(PhysAddr::new(FRAME)).0[0] | 1 << bit);
        if bit <= 58 {
            assert_eq!(rig.read_at(DEVICE, 0x1000), Err(0x1000));
            let event = rig.take_event();
            assert_eq!(flags(event), (IO_PAGE_FAULT, true, false, true), "PTE bit {bit}");
        } else {
            assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(FRAME), "U and FC");
        }
    }
    let (rig, root) = one_device(3);
    rig.store(rig.entry_of(root, 3, 1, 0x1000), !1);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Err(0x1000));
    assert_eq!(flags(rig.take_event()), (IO_PAGE_FAULT, false, false, false));
}

#[test]
fn permissions_are_the_and_of_the_device_entry_and_every_entry() {
    for mask in 0..16u32 {
        let rig = Rig::new();
        let root = rig.table();
        let leaf = rig.entry_of(root, 3, 1, 0x1000);
        let slots = [root, rig.entry_of(root, 3, 2, 0x1000), leaf];
        rig.store(leaf, page(PhysAddr::new(FRAME)).0[0]);
        for (index, slot) in slots.into_iter().enumerate() {
            let entry = Entry([rig.load(slot)]);
            rig.store(slot, entry.with_iw(mask & 1 << index != 0).0[0]);
        }
        rig.set_entry(DEVICE, translated(root, 3).with_iw(mask & 8 != 0));
        assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(FRAME));
        if mask == 15 {
            assert_eq!(rig.write_at(DEVICE, 0x1000), Ok(FRAME));
            continue;
        }
        assert_eq!(rig.write_at(DEVICE, 0x1000), Err(0x1000), "{mask:#b}");
        let event = rig.take_event();
        assert_eq!(flags(event), (IO_PAGE_FAULT, true, true, false));
        assert!(event.rw());
    }
}

#[test]
fn a_table_that_does_not_answer_is_a_hardware_error() {
    let (rig, root) = one_device(3);
    rig.store(rig.entry_of(root, 3, 2, 0x3000), directory(NOWHERE, 1).0[0]);
    assert_eq!(rig.read_at(DEVICE, 0x3000), Err(0x3000));
    let event = rig.take_event();
    assert_eq!((event.code(), event.address()), (PAGE_TAB_HARDWARE_ERROR, NOWHERE.get() + 24));
    assert_eq!(event.domain_or_pasid(), DOMAIN);
}

#[test]
fn access_and_dirty_bits_follow_had() {
    for (had, writes, accessed, dirty) in [
        (0, true, false, false),
        (HAD_ACCESS, true, true, false),
        (HAD_ACCESS_DIRTY, false, true, false),
        (HAD_ACCESS_DIRTY, true, true, true),
    ] {
        let (rig, root) = one_device(3);
        rig.set_entry(DEVICE, translated(root, 3).with_had(had));
        rig.map(root, 3, 0x1000, page(PhysAddr::new(FRAME)));
        rig.read_at(DEVICE, 0x1000).unwrap();
        let leaf = rig.entry_of(root, 3, 1, 0x1000);
        assert!(!Entry([rig.load(leaf)]).d());
        if writes {
            rig.write_at(DEVICE, 0x1000).unwrap();
        }
        let entry = Entry([rig.load(leaf)]);
        assert_eq!((entry.a(), entry.d()), (accessed, dirty), "HAD {had}");
        assert_eq!(Entry([rig.load(root)]).a(), accessed);
    }
}

#[test]
fn a_refused_write_leaves_no_mark() {
    let (rig, root) = one_device(3);
    rig.set_entry(DEVICE, translated(root, 3).with_had(HAD_ACCESS_DIRTY));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(FRAME)).with_iw(false));
    rig.write_at(DEVICE, 0x1000).unwrap_err();
    let entry = Entry([rig.load(rig.entry_of(root, 3, 1, 0x1000))]);
    assert!(!entry.a() && !entry.d());
}
