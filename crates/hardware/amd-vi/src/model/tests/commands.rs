use super::*;
use crate::spec::event::{COMMAND_HARDWARE_ERROR, HARDWARE_MASTER_ABORT, ILLEGAL_COMMAND_ERROR};
use crate::spec::size::Block;
use crate::spec::{Efr, command};

/// Stops at the command just queued, with the log saying why and where.
fn assert_halted(rig: &Rig, code: u64, at: PhysAddr, head: u64) {
    let event = rig.take_event();
    assert_eq!((event.code(), event.address()), (code, at.get()), "{}", event.name());
    assert!(!rig.status().cmd_buf_run());
    assert_eq!(rig.read(regs::COMMAND_HEAD), head);
}

#[test]
fn a_completion_wait_stores_interrupts_or_neither() {
    let rig = Rig::new();
    enable_msi(&rig);
    rig.command(Command::completion_wait(rig.wait, 0x1122_3344_5566_7788, false));
    assert_eq!(rig.load(rig.wait), 0x1122_3344_5566_7788);
    assert!(!rig.status().com_wait_int());
    rig.command(Command::completion_wait(rig.wait, 9, true).with_wait_s(false));
    assert_eq!(rig.load(rig.wait), 0x1122_3344_5566_7788);
    assert!(rig.status().com_wait_int());
    assert_eq!(rig.take_msis(), 1);
    rig.command(Command::completion_wait(rig.wait, 9, true).with_wait_f(true));
    assert_eq!(rig.load(rig.wait), 9);
    assert_eq!(rig.take_msis(), 0, "ComWaitInt was still set");
}

#[test]
fn com_wait_int_is_recorded_even_where_it_does_not_interrupt() {
    let rig = Rig::new();
    enable_msi(&rig);
    rig.write(regs::CONTROL, enabled().with_com_wait_int_en(false).0[0]);
    rig.command(Command::completion_wait(rig.wait, 1, true));
    assert!(rig.status().com_wait_int());
    assert_eq!(rig.take_msis(), 0);
}

#[test]
fn unknown_opcodes_and_reserved_bits_halt_the_buffer() {
    let absent = [0, command::INSERT_GUEST_EVENT, command::RESET_VMMIO, 0xb, 0xc, 0xd, 0xe, 0xf]
        .map(|opcode| Command::default().with_opcode(opcode));
    let unsupported = [command::PREFETCH_IOMMU_PAGES, command::COMPLETE_PPR_REQUEST]
        .map(|opcode| Command::default().with_opcode(opcode));
    let reserved = [
        Command([0x1000_0000_0000_0000 | 1 << 52, 0]),
        Command([0x2000_0000_0001_0000, 0]),
        Command([0x2000_0000_0000_0000, 1]),
        Command([0x3000_0000_0010_0000, 0]),
        Command([0x3000_0000_0000_0000, 8]),
        Command([0x5000_0001_0000_0000, 0]),
        Command([0x8000_0000_0000_0001, 0]),
    ];
    for command in absent.into_iter().chain(unsupported).chain(reserved) {
        let rig = Rig::new();
        rig.run(&[]);
        rig.command(command);
        assert_halted(&rig, ILLEGAL_COMMAND_ERROR, rig.commands.wrapping_add(16), 16);
        rig.command(Command::completion_wait(rig.wait, 77, false));
        assert_ne!(rig.load(rig.wait), 77, "halted");
    }
}

#[test]
fn a_halted_buffer_restarts_where_software_says() {
    let rig = Rig::new();
    rig.command(Command::default());
    rig.command(Command::completion_wait(rig.wait, 1, false));
    assert_halted(&rig, ILLEGAL_COMMAND_ERROR, rig.commands, 0);
    rig.write(regs::CONTROL, enabled().0[0]);
    assert!(!rig.status().cmd_buf_run(), "only CmdBufEn 0 to 1 restarts");
    rig.write(regs::CONTROL, enabled().with_cmd_buf_en(false).0[0]);
    rig.store(rig.commands, Command::completion_wait(rig.wait, 0, false).0[0]);
    rig.write(regs::CONTROL, enabled().0[0]);
    assert!(rig.status().cmd_buf_run());
    assert_eq!(rig.load(rig.wait), 1);
    assert_eq!(rig.read(regs::COMMAND_HEAD), 32);
}

#[test]
fn memory_that_does_not_answer_halts_the_buffer() {
    let rig = Rig::new();
    rig.command(Command::completion_wait(NOWHERE, 1, false));
    assert_halted(&rig, COMMAND_HARDWARE_ERROR, NOWHERE, 0);

    let rig = Rig::stopped(Config::default());
    let base = RingBase::default().with_ring_len(8).with_base(NOWHERE);
    rig.write(regs::COMMAND_BUFFER_BASE, base.0[0]);
    rig.write(regs::CONTROL, enabled().0[0]);
    rig.write(regs::COMMAND_TAIL, 16);
    let event = rig.take_event();
    assert_eq!((event.code(), event.address()), (COMMAND_HARDWARE_ERROR, NOWHERE.get()));
    assert_eq!(event.hardware_type(), HARDWARE_MASTER_ABORT);
}

#[test]
fn commands_wrap_around_the_ring() {
    let rig = Rig::new();
    for _ in 0..600 {
        rig.run(&[Command::invalidate_iommu_all()]);
    }
    assert!(rig.status().cmd_buf_run());
}

#[test]
fn an_iotlb_invalidation_wants_a_device_that_may_have_an_iotlb() {
    let rig = Rig::new();
    let flush = Command::invalidate_iotlb_pages(DEVICE, DEVICE.get(), 32, Block::ALL);
    rig.set_entry(DEVICE, translated(rig.table(), 3).with_i(true));
    rig.run(&[flush]);
    rig.set_entry(DEVICE, translated(rig.table(), 3));
    rig.run(&[Command::invalidate_devtab_entry(DEVICE)]);
    rig.command(flush);
    assert_eq!(rig.take_event().code(), ILLEGAL_COMMAND_ERROR);

    let rig = Rig::with(Config { iotlb_sup: false, ..Config::default() });
    rig.set_entry(DEVICE, translated(rig.table(), 3).with_i(true));
    rig.command(flush);
    assert_eq!(rig.take_event().code(), ILLEGAL_COMMAND_ERROR);
}

#[test]
fn optional_commands_follow_their_feature_bits() {
    let efr = Efr::default().with_pre_f_sup(true).with_ppr_sup(true);
    let rig = Rig::with(Config { efr, ..Config::default() });
    let answer = Command::default().with_opcode(command::COMPLETE_PPR_REQUEST).with_device_id(8);
    rig.run(&[
        Command::default().with_opcode(command::PREFETCH_IOMMU_PAGES).with_count(3),
        answer.with_prg_code(command::PRG_SUCCESS),
        answer.with_prg_code(command::PRG_INVALID),
        answer.with_prg_code(command::PRG_FAILURE),
    ]);
    rig.command(answer.with_prg_code(2));
    assert_eq!(rig.take_event().code(), ILLEGAL_COMMAND_ERROR);
    let rig = Rig::with(Config { efr, ..Config::default() });
    rig.command(Command::invalidate_iommu_all());
    assert_eq!(rig.take_event().code(), ILLEGAL_COMMAND_ERROR);
}

fn enable_msi(rig: &Rig) {
    function::enable_msi(rig, 0xfee0_1000, 0x41);
}
