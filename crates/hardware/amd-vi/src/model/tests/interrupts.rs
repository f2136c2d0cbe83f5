use super::*;
use crate::spec::dte::{INT_CTL_ABORT, INT_CTL_FORWARD, INT_CTL_REMAP};
use crate::spec::event::{
    ILLEGAL_DEV_TABLE_ENTRY, INVALID_DEVICE_REQUEST, IO_PAGE_FAULT, PAGE_TAB_HARDWARE_ERROR,
    REQUEST_INTERRUPT,
};
use crate::spec::{Irte32, Irte128};

const MSI: u64 = 0xfee0_0000;

fn remapping(table: PhysAddr) -> Dte {
    Dte::default()
        .with_iv(true)
        .with_int_ctl(INT_CTL_REMAP)
        .with_int_tab_len(9)
        .with_int_table_root(table)
}

fn rig_with_table() -> (Rig, PhysAddr) {
    let rig = Rig::adversarial();
    let table = rig.pages.alloc(8192).unwrap();
    rig.set_entry(DEVICE, remapping(table));
    (rig, table)
}

fn valid() -> Irte128 {
    Irte128::default().with_remap_en(true).with_vector(0x61).with_destination_low(0x02_0304)
}

impl Rig {
    fn set_irte(&self, table: PhysAddr, index: u64, irte: Irte128) {
        self.store(table.wrapping_add(index * 16), irte.0[0]);
        self.store(table.wrapping_add(index * 16 + 8), irte.0[1]);
    }

    fn msi(&self, data: u32) -> Option<(u64, u32)> {
        self.iommu.remap_msi(DEVICE, MSI, data)
    }
}

#[test]
fn without_iv_interrupts_pass_unmapped() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, translated(rig.table(), 3));
    assert_eq!(rig.iommu.remap_msi(DEVICE, 0xfee0_3000, 0x4031), Some((0xfee0_3000, 0x4031)));
}

#[test]
fn int_ctl_aborts_forwards_or_remaps() {
    let rig = Rig::new();
    let dte = remapping(rig.table());
    rig.set_entry(DEVICE, dte.with_int_ctl(INT_CTL_FORWARD));
    assert_eq!(rig.msi(0x31), Some((MSI, 0x31)));
    rig.set_entry(DEVICE, dte.with_int_ctl(INT_CTL_ABORT));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    assert_eq!(rig.msi(0x31), None);
    let event = rig.take_event();
    assert_eq!((event.code(), event.request_type()), (INVALID_DEVICE_REQUEST, REQUEST_INTERRUPT));
    assert_eq!(event.address(), MSI);
}

#[test]
fn long_entries_give_destination_and_vector() {
    let (rig, table) = rig_with_table();
    rig.set_irte(table, 5, valid().with_dm(true).with_int_type(1).with_destination_high(0x01));
    assert_eq!(rig.msi(5), Some((0xfee0_4004, 0x161)), "8 bits of destination without XTEn");
    rig.write(regs::CONTROL, enabled().with_xt_en(true).0[0]);
    assert_eq!(rig.msi(5), Some((0x0102_0300_fee0_4004, 0x161)));
}

#[test]
fn short_entries_are_used_without_ga_en() {
    let (rig, table) = rig_with_table();
    rig.write(regs::CONTROL, enabled().with_ga_en(false).0[0]);
    let irte = |vector| Irte32::default().with_remap_en(true).with_vector(vector);
    let pair = irte(0x40).0[0] | irte(0x41).with_destination(9).0[0] << 32;
    rig.store(table.wrapping_add(8), pair);
    assert_eq!(rig.msi(2), Some((MSI, 0x40)));
    assert_eq!(rig.msi(3), Some((MSI | 9 << 12, 0x41)));
    rig.store(table.wrapping_add(8), 0);
    assert_eq!(rig.msi(3), Some((MSI | 9 << 12, 0x41)), "cached");
    rig.run(&[Command::invalidate_interrupt_table(DEVICE)]);
    assert_eq!(rig.msi(3), None);
}

#[test]
fn unmapped_interrupts_fault_unless_told_to_be_quiet() {
    let (rig, table) = rig_with_table();
    rig.set_irte(table, 1, Irte128::default().with_sup_iopf(true));
    assert_eq!(rig.msi(1), None);
    assert!(rig.take_events().is_empty());
    assert_eq!(rig.msi(2), None);
    let event = rig.take_event();
    assert_eq!(event.code(), IO_PAGE_FAULT);
    assert!(event.i() && !event.pr() && !event.rz());
    assert_eq!(event.address(), MSI);
    rig.set_entry(DEVICE, remapping(table).with_int_tab_len(2));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    assert_eq!(rig.msi(4), None);
    assert_eq!(rig.take_event().code(), IO_PAGE_FAULT, "beyond the table");
    rig.set_entry(DEVICE, remapping(table).with_int_tab_len(2).with_ig(true));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    assert_eq!((rig.msi(4), rig.msi(2)), (None, None));
    assert!(rig.take_events().is_empty());
}

#[test]
fn bad_entries_fault_by_their_kind() {
    let reserved = Irte128([valid().0[0], valid().0[1] | 1 << 20]);
    for (irte, rz) in [
        (valid().with_guest_mode(true), true),
        (reserved, true),
        (valid().with_int_type(2), false),
        (valid().with_int_type(7), false),
    ] {
        let (rig, table) = rig_with_table();
        rig.set_irte(table, 3, irte);
        rig.set_irte(table, 4, irte.with_sup_iopf(true));
        assert_eq!((rig.msi(3), rig.msi(4)), (None, None));
        let event = rig.take_event();
        assert_eq!((event.code(), event.rz()), (IO_PAGE_FAULT, rz), "{irte:x?}");
        assert!(event.i() && event.pr());
    }
}

#[test]
fn an_illegal_interrupt_half_is_an_illegal_entry() {
    let rig = Rig::new();
    let good = remapping(rig.table());
    let bit = Dte([0, 0, good.0[2] | 1 << 52, 0]);
    for (device, (dte, rz)) in
        [(bit, true), (good.with_int_ctl(3), false), (good.with_int_tab_len(12), false)]
            .into_iter()
            .enumerate()
    {
        let device = RequesterId::new(u16::try_from(device).unwrap());
        rig.set_entry(device, dte);
        assert_eq!(rig.iommu.remap_msi(device, MSI, 0), None);
        let event = rig.take_event();
        assert_eq!((event.code(), event.rz()), (ILLEGAL_DEV_TABLE_ENTRY, rz));
        assert!(event.i());
    }
}

#[test]
fn a_table_that_does_not_answer_is_a_hardware_error() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, remapping(NOWHERE));
    assert_eq!(rig.msi(2), None);
    let event = rig.take_event();
    assert_eq!((event.code(), event.address()), (PAGE_TAB_HARDWARE_ERROR, NOWHERE.get() + 32));
    assert!(event.i());
}

#[test]
fn an_entry_is_cached_by_device_except_for_its_destination() {
    let (rig, table) = rig_with_table();
    rig.set_entry(OTHER, remapping(table));
    rig.set_irte(table, 5, valid());
    assert_eq!(rig.msi(5), Some((MSI | 4 << 12, 0x61)));
    rig.set_irte(table, 5, valid().with_vector(0x62).with_destination_low(7));
    assert_eq!(rig.msi(5), Some((MSI | 7 << 12, 0x61)));
    assert_eq!(rig.iommu.remap_msi(OTHER, MSI, 5), Some((MSI | 7 << 12, 0x62)));
    rig.run(&[
        Command::invalidate_interrupt_table(OTHER),
        Command::invalidate_devtab_entry(DEVICE),
    ]);
    assert_eq!(rig.msi(5), Some((MSI | 7 << 12, 0x61)));
    rig.run(&[Command::invalidate_interrupt_table(DEVICE)]);
    assert_eq!(rig.msi(5), Some((MSI | 7 << 12, 0x62)));
}

#[test]
fn other_delivery_modes_follow_their_pass_bits() {
    let (rig, table) = rig_with_table();
    for (mode, pass) in [
        (4, remapping(table).with_nmi_pass(true)),
        (5, remapping(table).with_init_pass(true)),
        (7, remapping(table).with_eint_pass(true)),
    ] {
        let data = mode << 8;
        rig.set_entry(DEVICE, remapping(table));
        rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
        assert_eq!(rig.msi(data), None);
        assert_eq!(rig.take_event().code(), INVALID_DEVICE_REQUEST);
        rig.set_entry(DEVICE, pass);
        rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
        assert_eq!(rig.msi(data), Some((MSI, data)));
    }
}

#[test]
fn with_2048_interrupts_all_eleven_bits_are_index() {
    let rig = Rig::new();
    let table = rig.pages.alloc(32768).unwrap();
    rig.write(regs::CONTROL, enabled().with_num_int_remap_mode(1).0[0]);
    rig.set_entry(DEVICE, remapping(table).with_int_tab_len(11));
    rig.set_irte(table, 0x7ff, valid());
    assert_eq!(rig.msi(0x7ff), Some((MSI | 4 << 12, 0x61)));
}

#[test]
fn what_is_no_interrupt_is_stopped() {
    let rig = Rig::new();
    assert_eq!(rig.iommu.remap_msi(DEVICE, 0x1000, 1), None);
    assert!(rig.take_events().is_empty());
}
