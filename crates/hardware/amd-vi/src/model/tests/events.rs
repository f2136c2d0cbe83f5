use super::*;
use crate::spec::event::IO_PAGE_FAULT;
use crate::spec::registers::XtInterrupt;

/// A device whose every request faults.
fn faulting() -> Rig {
    let rig = Rig::new();
    function::enable_msi(&rig, 0xfee0_1000, 0x41);
    rig.set_entry(DEVICE, translated(rig.table(), 3));
    rig
}

#[test]
fn an_event_interrupts_once_until_its_status_bit_is_cleared() {
    let rig = faulting();
    assert_eq!(rig.read_at(DEVICE, 0x1000), Err(0x1000));
    assert!(rig.status().event_log_int());
    assert_eq!(*rig.msis.lock().unwrap(), [Msi { address: 0xfee0_1000, data: 0x41 }]);
    rig.take_msis();
    assert_eq!(rig.read_at(DEVICE, 0x2000), Err(0x2000));
    assert_eq!(rig.take_msis(), 0);
    rig.write(regs::STATUS, Status::default().with_event_log_int(true).0[0]);
    assert_eq!(rig.read_at(DEVICE, 0x3000), Err(0x3000));
    assert_eq!(rig.take_msis(), 1);
    let addresses: Vec<_> = rig.take_events().iter().map(|event| event.address()).collect();
    assert_eq!(addresses, [0x1000, 0x2000, 0x3000]);
}

#[test]
fn without_event_int_en_nothing_interrupts() {
    let rig = faulting();
    rig.write(regs::CONTROL, enabled().with_event_int_en(false).0[0]);
    assert!(rig.read_at(DEVICE, 0x1000).is_err());
    assert!(rig.status().event_log_int());
    assert_eq!(rig.take_msis(), 0);
}

#[test]
fn a_full_log_overflows_stops_and_restarts_as_the_specification_says() {
    let rig = faulting();
    for page in 0..255u64 {
        assert!(rig.read_at(DEVICE, page << 12).is_err());
    }
    assert!(rig.status().event_log_run() && !rig.status().event_overflow());
    rig.write(regs::STATUS, Status::default().with_event_log_int(true).0[0]);
    rig.take_msis();

    assert!(rig.read_at(DEVICE, 255 << 12).is_err());
    let status = rig.status();
    assert!(status.event_overflow() && !status.event_log_run() && status.event_log_int());
    assert_eq!(rig.take_msis(), 1);
    assert_eq!(rig.take_events().len(), 255);

    // Room alone, or a cleared overflow alone, does not bring it back.
    assert!(rig.read_at(DEVICE, 0x1000).is_err());
    rig.write(regs::CONTROL, enabled().with_event_log_en(false).0[0]);
    rig.write(regs::CONTROL, enabled().0[0]);
    assert!(!rig.status().event_log_run(), "the overflow has not been acknowledged");
    rig.write(regs::STATUS, Status::default().with_event_overflow(true).0[0]);
    assert!(!rig.status().event_overflow() && !rig.status().event_log_run());
    assert!(rig.take_events().is_empty());

    rig.write(regs::CONTROL, enabled().with_event_log_en(false).0[0]);
    rig.write(regs::CONTROL, enabled().0[0]);
    assert!(rig.status().event_log_run());
    assert!(rig.read_at(DEVICE, 0x7000).is_err());
    assert_eq!(rig.take_event().address(), 0x7000);
}

#[test]
fn nothing_is_logged_while_the_log_is_off() {
    let rig = faulting();
    rig.write(regs::CONTROL, enabled().with_event_log_en(false).0[0]);
    assert!(rig.read_at(DEVICE, 0x1000).is_err());
    assert!(rig.take_events().is_empty() && !rig.status().event_log_int());
    assert_eq!(rig.faults.0.lock().unwrap().len(), 1, "observers see it all the same");
}

#[test]
fn sa_suppresses_every_page_fault_and_se_all_but_the_first() {
    let rig = Rig::adversarial();
    let dte = translated(rig.table(), 3);
    rig.set_entry(DEVICE, dte.with_sa(true));
    rig.set_entry(OTHER, dte.with_se(true));
    for _ in 0..3 {
        assert!(rig.read_at(DEVICE, 0x1000).is_err());
        assert!(rig.read_at(OTHER, 0x1000).is_err());
    }
    let event = rig.take_event();
    assert_eq!((event.code(), event.device_id()), (IO_PAGE_FAULT, u64::from(OTHER.get())));
    assert_eq!(rig.faults.0.lock().unwrap().iter().filter(|fault| fault.suppressed).count(), 5);
    rig.run(&[Command::invalidate_devtab_entry(OTHER)]);
    assert!(rig.read_at(OTHER, 0x1000).is_err());
    assert_eq!(rig.take_events().len(), 1, "fetching the entry again arms it");
}

#[test]
fn with_int_cap_xt_en_the_interrupt_comes_from_the_xt_register() {
    let rig = faulting();
    let xt = XtInterrupt::default()
        .with_vector(0x55)
        .with_destination_low(0x03_0201)
        .with_destination_high(0x04)
        .with_dest_mode(true);
    rig.write(regs::XT_GENERAL_INTERRUPT, xt.0[0]);
    rig.write(regs::CONTROL, enabled().with_int_cap_xt_en(true).0[0]);
    assert!(rig.read_at(DEVICE, 0x1000).is_err());
    let expected = Msi { address: 0x0403_0200_fee0_1004, data: 0x55 };
    assert_eq!(*rig.msis.lock().unwrap(), [expected]);
}
