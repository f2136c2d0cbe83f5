use super::*;

const HEADER: Header = Header {
    vendor: 0x1b36,
    device: 0x0010,
    revision: 2,
    class: 0x01_0802,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    interrupt_pin: 1,
};

fn bar(size: u64, kind: BarKind) -> Option<Bar> {
    Some(Bar { size, kind, prefetchable: false, mappable: 0 })
}

fn space(msi: Option<MsiLayout>) -> ConfigSpace {
    let bars =
        [bar(0x4000, BarKind::Memory64), None, bar(0x10_0000, BarKind::Memory32), None, None, None];
    let msix = MsixLayout {
        vectors: 65,
        table_bar: 0,
        table_offset: 0x2000,
        pba_bar: 0,
        pba_offset: 0x3000,
    };
    ConfigSpace::new(&HEADER, &bars, &Capabilities { express: true, msi, msix: Some(msix) })
}

fn dword(space: &ConfigSpace, at: u16) -> u32 {
    let mut bytes = [0; 4];
    space.read(at, &mut bytes);
    u32::from_le_bytes(bytes)
}

fn write(space: &mut ConfigSpace, at: u16, value: u32) {
    assert!(!space.write(at, &value.to_le_bytes()).function_level_reset);
}

/// Offset of capability `id` in the list.
fn find(space: &ConfigSpace, id: u8) -> Option<u16> {
    let mut at = u16::try_from(dword(space, 0x34) & 0xff).unwrap();
    let mut steps = 0;
    while at != 0 {
        let [this, next, ..] = dword(space, at).to_le_bytes();
        if this == id {
            return Some(at);
        }
        at = u16::from(next);
        steps += 1;
        assert!(steps < 48, "the capability list does not end");
    }
    None
}

#[test]
fn bars_size_themselves_and_keep_their_flags() {
    let mut space = space(None);
    for at in (0x10..0x28).step_by(4) {
        write(&mut space, at, !0);
    }
    assert_eq!(dword(&space, 0x10), 0xffff_c004);
    assert_eq!(dword(&space, 0x14), 0xffff_ffff);
    assert_eq!(dword(&space, 0x18), 0xfff0_0000);
    assert_eq!(dword(&space, 0x1c), 0);
    write(&mut space, 0x10, 0x1234_5678);
    assert_eq!(dword(&space, 0x10), 0x1234_4004);
}

#[test]
fn identity_is_read_only() {
    let mut space = space(None);
    let before: Vec<u32> = [0x00, 0x08, 0x2c, 0x34].map(|at| dword(&space, at)).into();
    for at in [0x00, 0x08, 0x2c, 0x34] {
        write(&mut space, at, !0);
    }
    assert_eq!(before, [0x00, 0x08, 0x2c, 0x34].map(|at| dword(&space, at)));
    assert_eq!(before[0], 0x0010_1b36);
    assert_eq!(before[1], 0x0108_0202);
}

#[test]
fn only_implemented_command_bits_stick() {
    let mut space = space(None);
    write(&mut space, 4, 0xffff);
    assert_eq!(dword(&space, 4) & 0xffff, 0x0406);
    assert!(space.memory_enabled() && space.bus_master() && space.intx_disabled());
    space.reset();
    assert!(!space.memory_enabled() && !space.bus_master() && !space.intx_disabled());
}

#[test]
fn received_master_abort_is_cleared_by_writing_one() {
    let mut space = space(None);
    space.set_received_master_abort();
    write(&mut space, 4, 0);
    assert_eq!(dword(&space, 4) >> 16, 0x2010);
    write(&mut space, 4, 0x2000_0000);
    assert_eq!(dword(&space, 4) >> 16, 0x0010);
}

#[test]
fn the_flr_bit_triggers_and_reads_zero() {
    let mut space = space(None);
    let express = find(&space, 0x10).unwrap();
    assert_ne!(dword(&space, express + 4) & 1 << 28, 0);
    assert!(!space.write(express + 8, &[0x10, 0x28]).function_level_reset);
    assert!(space.write(express + 8, &[0x10, 0xa8]).function_level_reset);
    assert_eq!(dword(&space, express + 8) & 0xffff, 0x2810);
    assert!(space.write(express + 9, &[0x80]).function_level_reset);
}

#[test]
fn the_msix_gate_follows_control_and_bus_master() {
    let mut space = space(None);
    let msix = find(&space, 0x11).unwrap();
    assert_eq!(dword(&space, msix), 0x0040_0011);
    assert_eq!(dword(&space, msix + 4), 0x2000);
    assert_eq!(dword(&space, msix + 8), 0x3000);
    write(&mut space, msix, 0xffff_0000);
    assert_eq!(dword(&space, msix), 0xc040_0011);
    let gate = space.msix_gate();
    assert!(gate.enabled && gate.masked && !gate.bus_master);
}

#[test]
fn msi_vectors_fold_onto_the_enabled_count() {
    let mut space = space(Some(MsiLayout { vectors_log2: 3, wide: true, maskable: false }));
    let msi = find(&space, 5).unwrap();
    assert_eq!(dword(&space, msi) >> 16, 0x0086);
    assert_eq!(space.raise_msi(0), None, "disabled");
    write(&mut space, msi + 4, 0xfee0_1003);
    write(&mut space, msi + 8, 1);
    write(&mut space, msi + 12, 0xffff_4567);
    write(&mut space, msi, 0x0011_0000);
    assert_eq!(space.raise_msi(0), None, "no bus mastering, no message");
    write(&mut space, 4, 4);
    let sent = space.raise_msi(5).unwrap();
    assert_eq!((sent.address, sent.data), (0x1_fee0_1000, 0x4567));
    assert_eq!(space.raise_msi(4).unwrap().data, 0x4566);
}

#[test]
fn a_masked_msi_vector_is_sent_once_when_unmasked() {
    let mut space = space(Some(MsiLayout { vectors_log2: 2, wide: false, maskable: true }));
    let msi = find(&space, 5).unwrap();
    write(&mut space, 4, 4);
    write(&mut space, msi + 4, 0xfee0_0000);
    write(&mut space, msi + 8, 0x40);
    write(&mut space, msi, 0x0021_0000);
    write(&mut space, msi + 12, !0);
    assert_eq!(dword(&space, msi + 12), 0xf);
    assert_eq!((space.raise_msi(2), space.raise_msi(2)), (None, None));
    assert_eq!(dword(&space, msi + 16), 0b100);
    assert_eq!(space.release_msi(), None);
    write(&mut space, msi + 12, 0);
    assert_eq!(space.release_msi().unwrap().data, 0x42);
    assert_eq!(space.release_msi(), None);
}

#[test]
fn accesses_at_the_end_of_the_space_stay_inside() {
    let mut space = space(None);
    let mut bytes = [0; 8];
    space.read(4092, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    space.read(u16::MAX, &mut bytes);
    assert_eq!(bytes, [0xff; 8]);
    let _ = space.write(4094, &[0xff; 8]);
    let _ = space.write(u16::MAX, &[0xff; 8]);
    assert_eq!(dword(&space, 0x100), 0, "no extended capability");
}
