//! Configuration space against what `vfio_pci_config.c` makes of it.

use lychgate_types::Errno;

use super::client::{MEMORY, TestClient};
use super::function::*;
use crate::abi::{VFIO_PCI_CONFIG_REGION_INDEX, region_offset};

const COMMAND: u16 = 4;
const MEMORY_ENABLE: u16 = 2;
const MASTER: u16 = 4;
const INTX_DISABLE: u16 = 0x400;

fn low(value: u16) -> u8 {
    value.to_le_bytes()[0]
}

#[test]
fn bus_mastering_is_off_at_open_and_follows_the_user() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(COMMAND, &[0x06, 0x04], &[]);
    });
    assert_eq!(bench.config16(COMMAND), MEMORY_ENABLE);
    for wanted in [MASTER | MEMORY_ENABLE, MEMORY_ENABLE, MASTER | MEMORY_ENABLE] {
        bench.set_config(COMMAND, &wanted.to_le_bytes());
        assert_eq!(bench.config16(COMMAND), wanted);
        assert_eq!(bench.function.hardware16(COMMAND), wanted);
    }
    bench.device.disable();
    assert_eq!(bench.function.hardware16(COMMAND) & MASTER, 0);
}

#[test]
fn intx_disable_is_virtual() {
    let bench = Bench::open();
    bench.set_config(COMMAND, &(MEMORY_ENABLE | INTX_DISABLE).to_le_bytes());
    assert_eq!(bench.config16(COMMAND), MEMORY_ENABLE | INTX_DISABLE);
    assert_eq!(bench.function.hardware16(COMMAND), MEMORY_ENABLE);
}

#[test]
fn identity_class_and_pin_cannot_be_written() {
    let bench = Bench::open();
    let before: [u8; 16] = bench.config(0);
    bench.set_config(0, &[0xff; 4]);
    bench.set_config(8, &[0xff; 4]);
    bench.set_config(0x3d, &[0xff]);
    let after: [u8; 16] = bench.config(0);
    assert_eq!(before, after);
    assert_eq!(bench.config::<1>(0x3d), [1]);
}

#[test]
fn the_interrupt_line_is_the_users_own() {
    let bench = Bench::open();
    bench.set_config(0x3c, &[11]);
    assert_eq!(bench.config::<1>(0x3c), [11]);
    assert_eq!(bench.function.hardware16(0x3c) & 0xff, 0);
}

#[test]
fn bars_size_themselves_and_leave_the_hardware_alone() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(0x10, &[0x04, 0xc0, 0, 0xfe], &[]);
    });
    assert_eq!(bench.config32(0x10), 0xfe00_c004);
    for bar in (0x10..0x28).step_by(4) {
        bench.set_config(bar, &[0xff; 4]);
    }
    assert_eq!(bench.config32(0x10), 0xffff_c004, "16 KiB, 64-bit");
    assert_eq!(bench.config32(0x14), 0xffff_ffff);
    assert_eq!(bench.config32(0x18), 0xffff_f000, "4 KiB, 32-bit");
    assert_eq!([0x1c, 0x20, 0x24, 0x30].map(|bar| bench.config32(bar)), [0; 4]);
    assert_eq!(bench.function.hardware16(0x12), 0xfe00);
    bench.set_config(0x10, &[0x34, 0x12, 0x34, 0x12]);
    bench.set_config(0x14, &[0x01, 0, 0, 0]);
    assert_eq!((bench.config32(0x14), bench.config32(0x10)), (1, 0x1234_0004));
}

#[test]
fn bars_that_the_function_lost_are_restored_when_decoding_is_enabled() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(0x18, &[0, 0x10, 0, 0xfd], &[]);
    });
    bench.function.lose_configuration();
    bench.function.config_write_zero(0x18);
    bench.set_config(COMMAND, &MEMORY_ENABLE.to_le_bytes());
    assert_eq!(bench.function.hardware16(0x1a), 0xfd00);
    assert_eq!(bench.function.hardware16(COMMAND), MEMORY_ENABLE);
}

#[test]
fn the_list_leaves_out_what_is_not_for_users() {
    let bench = Bench::open();
    let mut at = u16::from(bench.config::<1>(0x34)[0]);
    let mut seen = Vec::new();
    while at != 0 {
        let [id, next] = bench.config(at);
        seen.push((id, at));
        at = u16::from(next);
    }
    let expected = [
        (0x01, PM),
        (0x05, MSI),
        (0x10, EXPRESS),
        (0x11, MSIX),
        (0x09, VENDOR_SPECIFIC),
        (0x13, AF),
    ];
    assert_eq!(seen, expected);
    // What was left out is a hole now: raw.
    bench.set_config(HIDDEN + 2, &[0x77, 0x66]);
    assert_eq!(bench.function.hardware16(HIDDEN + 2), 0x6677);
}

#[test]
fn extended_capabilities_are_filtered_behind_an_anchor() {
    let bench = Bench::open();
    assert_eq!(bench.config32(PASID), u32::from(AER) << 20, "PASID became an anchor");
    let header = bench.config32(AER);
    assert_eq!(header & 0xf_ffff, 0x2_0001);
    assert_eq!(header >> 20, u32::from(VSEC), "the hidden one behind is skipped");
    assert_eq!(bench.config32(VSEC) >> 20, 0);
    bench.set_config(AER + 8, &[0xff; 4]);
    assert_eq!(bench.config32(AER + 8), 0x03ff_f031);
    bench.set_config(VSEC + 8, &[9, 8, 7, 6]);
    assert_eq!(bench.config::<4>(VSEC + 8), [9, 8, 7, 6]);
    bench.set_config(AER, &[0; 4]);
    assert_eq!(bench.config32(AER), header);
}

#[test]
fn a_function_without_visible_capabilities_has_no_list() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(0x34, &[low(HIDDEN)], &[]);
        function.lay(HIDDEN, &[0x0c, 0], &[]);
    });
    assert_eq!(bench.config::<1>(0x34), [0]);
    assert_eq!(bench.config16(6) & 0x10, 0);
    // Not PCI Express any more: 256 bytes.
    let client = TestClient::new();
    let config = region_offset(VFIO_PCI_CONFIG_REGION_INDEX);
    let refusal = bench.device.read_region(&client, MEMORY, 1, config + 256).unwrap_err();
    assert_eq!(refusal.errno, Errno::EFAULT);
}

#[test]
fn a_list_with_a_loop_ends() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(AF, &[0x13, low(PM)], &[]);
        function.lay(VSEC, &[0x0b, 0, 0x01, 0x11], &[]);
    });
    assert_eq!(bench.config::<1>(AF), [0x13]);
}

#[test]
fn msi_can_be_enabled_only_while_it_is_set_up() {
    let bench = Bench::open();
    bench.set_config(MSI + 2, &[0x21, 0]);
    assert_eq!(bench.config16(MSI + 2), 0x0184, "no enable bit, no messages");
    assert_eq!(bench.function.hardware16(MSI + 2), 0x0184);
    bench.set_config(MSI + 4, &[0xcd; 10]);
    assert_eq!(bench.config::<10>(MSI + 4), [0xcd; 10]);
    assert_eq!(bench.function.hardware16(MSI + 4), 0, "the message is virtual");
    bench.set_config(MSI + 0x10, &[5, 0, 0, 0]);
    assert_eq!(bench.function.hardware16(MSI + 0x10), 5, "the mask is not");
}

#[test]
fn msix_control_is_not_for_users() {
    let bench = Bench::open();
    bench.set_config(MSIX + 2, &[0xff, 0xff]);
    assert_eq!(bench.config16(MSIX + 2), 3);
    assert_eq!(bench.function.hardware16(MSIX + 2), 3);
}

#[test]
fn the_reset_bits_reset_and_read_as_zero() {
    let bench = Bench::open();
    bench.set_config(COMMAND, &(MEMORY_ENABLE | MASTER).to_le_bytes());
    let before = bench.function.resets();
    bench.set_config(EXPRESS + 8, &[0x20, 0xa0]);
    assert_eq!(bench.function.resets(), before + 1);
    assert_eq!(bench.config16(EXPRESS + 8), 0x2020);
    bench.set_config(AF + 4, &[1]);
    assert_eq!(bench.function.resets(), before + 2);
    assert_eq!(bench.config::<1>(AF + 4), [0]);
    assert_eq!(bench.config16(COMMAND), MEMORY_ENABLE | MASTER, "as before the reset");
}

#[test]
fn no_reset_where_the_function_has_none() {
    let bench = Bench::open_with(Controller::default(), |function| {
        function.lay(EXPRESS + 4, &[0; 4], &[]);
        function.lay(AF + 3, &[0], &[]);
    });
    let before = bench.function.resets();
    bench.set_config(EXPRESS + 8, &[0x20, 0xa0]);
    bench.set_config(AF + 4, &[1]);
    assert_eq!(bench.function.resets(), before);
    assert_eq!(bench.config16(EXPRESS + 8) & 0x8000, 0);
}

#[test]
fn read_requests_are_not_smaller_than_payloads() {
    let bench = Bench::open();
    bench.set_config(EXPRESS + 8, &[0xe0, 0x02]);
    assert_eq!(bench.config16(EXPRESS + 8), 0x00e0, "payload and request size are virtual");
    let hardware = bench.function.hardware16(EXPRESS + 8);
    assert_eq!(hardware & 0x70e0, 0x1020, "256-byte payloads stay, requests are raised to them");
    assert_eq!(hardware & 0x0200, 0, "no phantom functions");
    bench.set_config(EXPRESS + 0x28, &[0xff, 0xff]);
    assert_eq!(bench.function.hardware16(EXPRESS + 0x28), 0xffdf, "no ARI forwarding");
}

#[test]
fn power_management_events_are_hidden_and_d3hot_takes_memory_away() {
    let bench = Bench::open();
    assert_eq!(bench.config16(PM + 2), 0x0003);
    assert_eq!(bench.config16(PM + 4), 0x0008);
    bench.set_config(PM + 4, &[3, 0x81]);
    assert_eq!(bench.function.hardware16(PM + 4) & 3, 3);
    assert_eq!(bench.config16(PM + 4) & 0x8103, 3);
    let client = TestClient::new();
    let read =
        |at| bench.device.read_region(&client, MEMORY, 4, at).map_err(|refusal| refusal.errno);
    assert_eq!(read(0), Err(Errno::EIO));
    bench.set_config(PM + 4, &[0, 0]);
    assert_eq!(bench.function.hardware16(PM + 4) & 3, 0);
    assert_eq!(read(0), Ok(4));
}

#[test]
fn holes_and_vendor_specific_registers_are_raw() {
    let bench = Bench::open();
    bench.set_config(0xe0, &[1, 2]);
    assert_eq!(bench.function.hardware16(0xe0), 0x0201);
    assert_eq!(bench.config16(0xe0), 0x0201);
    bench.set_config(VENDOR_SPECIFIC + 4, &[9, 9, 9, 9]);
    assert_eq!(bench.config::<4>(VENDOR_SPECIFIC + 4), [9, 9, 3, 4]);
}

#[test]
fn one_read_gives_what_many_give() {
    let bench = Bench::open();
    let whole: [u8; 4096] = bench.config(0);
    for at in 0..4096 {
        assert_eq!(bench.config::<1>(at), [whole[usize::from(at)]], "{at:#x}");
    }
    for at in (0..4094).step_by(3) {
        assert_eq!(bench.config::<2>(at), whole[usize::from(at)..][..2], "{at:#x}");
    }
}

#[test]
fn vital_product_data_go_through_the_window() {
    let bench = Bench::open_with(Controller::default(), |function| {
        // Instead of the hidden capability; the flag is set already: data are there.
        function.lay(HIDDEN, &[0x03, low(EXPRESS), 0, 0x80, 0xde, 0xad, 0xbe, 0xef], &[0; 8]);
    });
    bench.set_config(HIDDEN + 2, &[0x10, 0x00]);
    assert_eq!(bench.config16(HIDDEN + 2), 0x8010, "read: the flag comes up");
    assert_eq!(bench.config::<4>(HIDDEN + 4), [0xde, 0xad, 0xbe, 0xef]);
    bench.set_config(HIDDEN + 2, &[0x10, 0x80]);
    assert_eq!(bench.config16(HIDDEN + 2), 0x8010, "a write that never completes");
}
