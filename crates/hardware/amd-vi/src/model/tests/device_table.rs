use super::*;
use crate::spec::event::{
    DEV_TAB_HARDWARE_ERROR, ILLEGAL_DEV_TABLE_ENTRY, INVALID_DEVICE_REQUEST, IO_PAGE_FAULT,
    REQUEST_INTERRUPT_READ, REQUEST_PORT_IO, REQUEST_RESERVED_RANGE, REQUEST_SYSTEM_MANAGEMENT,
};
use crate::spec::registers::ExclusionBase;
use crate::spec::{Efr, Efr2, dte};
use lychgate_model::FaultCause;

#[test]
fn without_iommu_en_everything_passes() {
    let rig = Rig::stopped(Config::default());
    assert_eq!(rig.read_at(DEVICE, 0x1234), Ok(0x1234));
    assert_eq!(rig.iommu.remap_msi(DEVICE, 0x1234, 5), Some((0x1234, 5)));
}

#[test]
fn an_entry_that_is_not_valid_passes_requests_through() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, Dte([!1, u64::MAX, !1, u64::MAX]));
    assert_eq!(
        rig.request(DEVICE, None, 0x1234, 0x10_0000, Access::Write),
        Ok(vec![PhysRun { start: PhysAddr::new(0x1234), len: 0x10_0000 }])
    );
    assert!(rig.take_events().is_empty());
}

#[test]
fn an_entry_without_translation_blocks() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, Dte::default().with_v(true).with_domain_id(DOMAIN));
    assert_eq!(rig.read_at(DEVICE, 0x1000), Err(0x1000));
    let event = rig.take_event();
    assert_eq!(event.code(), IO_PAGE_FAULT);
    assert!(!event.pr() && !event.pe() && !event.rz() && !event.rw());
    assert_eq!(event.domain_or_pasid(), DOMAIN);
    assert_eq!(rig.faults.0.lock().unwrap()[0].cause, FaultCause::Blocked);
}

#[test]
fn mode_0_is_identity_under_the_permissions_of_the_entry() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, translated(PhysAddr::new(0), 0).with_iw(false));
    assert_eq!(rig.read_at(DEVICE, 0x4567_8000), Ok(0x4567_8000));
    assert_eq!(rig.write_at(DEVICE, 0x4567_8000), Err(0x4567_8000));
    let event = rig.take_event();
    assert!(event.pe() && event.pr() && event.rw());
}

/// The flags of the one event of a read of `dte`'s device.
fn event_of(config: Config, dte: Dte) -> Event {
    let rig = Rig::with(config);
    rig.set_entry(DEVICE, dte);
    assert_eq!(rig.read_at(DEVICE, 0x5008), Err(0x5008));
    rig.take_event()
}

#[test]
fn reserved_bits_and_absent_features_make_an_entry_illegal_with_rz() {
    let good = translated(PhysAddr::new(0), 0);
    let mut bad = vec![
        good.with_gv(true),
        good.with_giov(true),
        good.with_ppr(true),
        good.with_gprp(true),
        good.with_sats(true),
    ];
    for bit in [2, 3, 4, 5, 6, 63] {
        bad.push(Dte([good.0[0] | 1 << bit, good.0[1], 0, 0]));
    }
    for dte in bad {
        let event = event_of(Config::default(), dte);
        assert_eq!(event.code(), ILLEGAL_DEV_TABLE_ENTRY, "{dte:x?}");
        assert!(event.rz() && !event.rw() && !event.i(), "{dte:x?}");
        assert_eq!(event.address(), 0x5008);
        assert_eq!(event.device_id(), u64::from(DEVICE.get()));
    }
}

#[test]
fn reserved_values_make_an_entry_illegal_without_rz() {
    let good = translated(PhysAddr::new(0), 0);
    let four_levels = Config { efr: Efr::default(), ..Config::default() };
    for (config, dte) in [
        (Config::default(), good.with_mode(7)),
        (four_levels, good.with_mode(5)),
        (four_levels, good.with_had(dte::HAD_ACCESS)),
        (four_levels, good.with_had(dte::HAD_ACCESS_DIRTY)),
        (Config::default(), good.with_had(2)),
        (Config::default(), good.with_glx(3)),
        (Config::default(), good.with_io_ctl(3)),
    ] {
        let event = event_of(config, dte);
        assert_eq!(event.code(), ILLEGAL_DEV_TABLE_ENTRY, "{dte:x?}");
        assert!(!event.rz(), "{dte:x?}");
    }
}

#[test]
fn the_interrupt_half_does_not_concern_memory_requests() {
    let rig = Rig::new();
    let mut dte = translated(PhysAddr::new(0), 0);
    dte.0[2] = u64::MAX;
    dte.0[3] = u64::MAX;
    rig.set_entry(DEVICE, dte);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(0x1000));
}

#[test]
fn a_device_beyond_the_table_faults_in_domain_0() {
    let rig = Rig::new();
    let table = DeviceTableBase::default().with_base(rig.device_table).with_size(0);
    rig.write(regs::DEVICE_TABLE_BASE, table.0[0]);
    assert_eq!(rig.read_at(RequesterId::new(127), 0x1000), Ok(0x1000));
    assert_eq!(rig.read_at(RequesterId::new(128), 0x1000), Err(0x1000));
    let event = rig.take_event();
    assert_eq!((event.code(), event.domain_or_pasid()), (IO_PAGE_FAULT, 0));
    assert_eq!(event.device_id(), 128);
}

#[test]
fn a_table_that_does_not_answer_is_a_hardware_error() {
    let rig = Rig::new();
    let table = DeviceTableBase::default().with_base(NOWHERE).with_size(0x1ff);
    rig.write(regs::DEVICE_TABLE_BASE, table.0[0]);
    assert_eq!(rig.write_at(DEVICE, 0x1000), Err(0x1000));
    let event = rig.take_event();
    assert_eq!(event.code(), DEV_TAB_HARDWARE_ERROR);
    assert_eq!(event.address(), NOWHERE.get() + 32 * u64::from(DEVICE.get()));
    assert_eq!(event.hardware_type(), 1);
    assert!(event.rw());
}

#[test]
fn a_pasid_without_guest_translation_faults() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, translated(PhysAddr::new(0), 0));
    let pasid = Pasid::new(0x1_2345);
    assert_eq!(rig.request(DEVICE, pasid, 0x1000, 4, Access::Read), Err(0x1000));
    let event = rig.take_event();
    assert!(event.gn());
    assert_eq!((event.pasid_high(), event.domain_or_pasid()), (1, 0x2345));
}

#[test]
fn the_exclusion_range_passes_untranslated_for_those_who_may() {
    let rig = Rig::new();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3).with_ex(true));
    rig.set_entry(OTHER, translated(root, 3));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(0x7000)));
    rig.write(regs::EXCLUSION_LIMIT, 0x3000);
    let base = ExclusionBase::default().with_base(PhysAddr::new(0x2000)).with_ex_en(true);
    rig.write(regs::EXCLUSION_BASE, base.0[0]);
    assert_eq!(
        rig.request(DEVICE, None, 0x1000, 0x3000, Access::Read),
        Ok(vec![
            PhysRun { start: PhysAddr::new(0x7000), len: 0x1000 },
            PhysRun { start: PhysAddr::new(0x2000), len: 0x2000 },
        ])
    );
    assert_eq!(rig.request(DEVICE, None, 0x3fff, 2, Access::Read), Err(0x4000));
    assert_eq!(rig.read_at(OTHER, 0x2000), Err(0x2000));
    rig.write(regs::EXCLUSION_BASE, base.with_allow(true).0[0]);
    assert_eq!(rig.read_at(OTHER, 0x2000), Ok(0x2000));
}

#[test]
fn special_ranges_are_no_memory() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, translated(PhysAddr::new(0), 0));
    for (at, write, request_type) in [
        (0xfee0_0000, false, REQUEST_INTERRUPT_READ),
        (0xfeef_fffc, true, REQUEST_RESERVED_RANGE),
        (0xfd_f800_0000, false, REQUEST_INTERRUPT_READ),
        (0xfd_0000_0000, true, REQUEST_RESERVED_RANGE),
        (0xfd_f910_0000, true, REQUEST_SYSTEM_MANAGEMENT),
        (0xfd_fc00_0000, true, REQUEST_PORT_IO),
        (0xff_ffff_fffc, false, REQUEST_RESERVED_RANGE),
    ] {
        let result = if write { rig.write_at(DEVICE, at) } else { rig.read_at(DEVICE, at) };
        assert_eq!(result, Err(at));
        let event = rig.take_event();
        assert_eq!((event.code(), event.request_type()), (INVALID_DEVICE_REQUEST, request_type));
        assert_eq!(event.address(), at);
    }
    assert_eq!(rig.request(DEVICE, None, 0xfedf_f000, 0x2000, Access::Read), Err(0xfee0_0000));
    assert_eq!(rig.read_at(DEVICE, 0x100_0000_0000), Ok(0x100_0000_0000));
}

#[test]
fn the_entry_decides_about_system_management_and_port_io() {
    let rig = Rig::new();
    let dte = translated(PhysAddr::new(0), 3)
        .with_sys_mgt(dte::SYS_MGT_FORWARD)
        .with_io_ctl(dte::IO_CTL_FORWARD);
    rig.set_entry(DEVICE, dte);
    assert_eq!(rig.write_at(DEVICE, 0xfd_f910_0000), Ok(0xfd_f910_0000));
    assert_eq!(rig.write_at(DEVICE, 0xfd_fc00_0000), Ok(0xfd_fc00_0000));
    let root = rig.table();
    let dte =
        translated(root, 4).with_sys_mgt(dte::SYS_MGT_TRANSLATE).with_io_ctl(dte::IO_CTL_TRANSLATE);
    rig.set_entry(OTHER, dte);
    rig.map(root, 4, 0xfd_f910_0000, page(PhysAddr::new(0x8000)));
    rig.map(root, 4, 0xfd_fc00_0000, page(PhysAddr::new(0x9000)));
    assert_eq!(rig.write_at(OTHER, 0xfd_f910_0000), Ok(0x8000));
    assert_eq!(rig.write_at(OTHER, 0xfd_fc00_0000), Ok(0x9000));
}

#[test]
fn ht_range_ignore_makes_the_hypertransport_ranges_ordinary() {
    let efr2 = Efr2::default().with_ht_range_ignore(true);
    let rig = Rig::with(Config { efr2, ..Config::default() });
    rig.set_entry(DEVICE, translated(PhysAddr::new(0), 0));
    assert_eq!(rig.read_at(DEVICE, 0xfd_0000_0000), Ok(0xfd_0000_0000));
    assert_eq!(rig.read_at(DEVICE, 0xfee0_0000), Err(0xfee0_0000));
}

#[test]
fn a_request_that_passes_the_end_of_the_address_space_is_aborted_without_event() {
    let rig = Rig::new();
    rig.set_entry(DEVICE, translated(PhysAddr::new(0), 0));
    assert_eq!(rig.request(DEVICE, None, u64::MAX, 1, Access::Read).unwrap()[0].len, 1);
    assert_eq!(rig.request(DEVICE, None, u64::MAX, 2, Access::Read), Err(u64::MAX));
    assert!(rig.take_events().is_empty());
}

#[test]
fn an_abort_of_memory_is_told_by_its_bus_address() {
    let rig = Rig::new();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    rig.map(root, 3, 0x1000, page(PhysAddr::new(0x9000)));
    rig.map(root, 3, 0x2000, page(PhysAddr::new(0x5000)));
    let at = |start| Translation {
        requester: DEVICE,
        pasid: None,
        start: Iova::new(start),
        len: 0x800,
        access: Access::Read,
    };
    for (physical, bus) in [(0x9004, 0x1004), (0x5810, 0x2810), (0x57ff, 0x1000)] {
        let failed = rig.iommu.with_translation(&[at(0x1000), at(0x2800)], &mut |runs| {
            assert_eq!(runs.len(), 2);
            Err(lychgate_types::BusError { at: PhysAddr::new(physical) })
        });
        assert_eq!(failed.unwrap_err().at, Iova::new(bus));
    }
    assert!(rig.take_events().is_empty());
}
