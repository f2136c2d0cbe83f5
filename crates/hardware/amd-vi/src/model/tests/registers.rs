use super::*;
use crate::spec::{Efr, Efr2};

#[test]
fn feature_registers_are_read_only_and_report_what_is_modelled() {
    let everything = Config { efr: Efr([u64::MAX]), efr2: Efr2([u64::MAX]), ..Config::default() };
    let rig = Rig::stopped(everything);
    let efr = Efr([rig.read(regs::EFR)]);
    assert!(efr.ia_sup() && efr.ga_sup() && efr.hd_sup() && !efr.gt_sup() && !efr.snp_sup());
    rig.write(regs::EFR, 0);
    rig.write(regs::EFR2, 0);
    assert_eq!(rig.read(regs::EFR), efr.0[0]);
    assert_ne!(rig.read(regs::EFR2), 0);
}

#[test]
fn control_bits_of_absent_features_read_zero_after_writing_ones() {
    let rig =
        Rig::stopped(Config { efr: Efr::default(), efr2: Efr2::default(), ..Config::default() });
    rig.write(regs::CONTROL, !1);
    let control = Control([rig.read(regs::CONTROL)]);
    assert!(control.cmd_buf_en() && control.event_log_en());
    assert!(!control.irt_cache_dis() && !control.gt_en() && !control.ga_en() && !control.xt_en());
    assert!(!control.gcr3_trp_mode() && !control.ppr_log_en());
    assert_eq!(control.0[0] & Control::RESERVED, 0);
}

#[test]
fn writing_a_ring_base_zeroes_its_pointers_unless_the_ring_runs() {
    let rig = Rig::stopped(Config::default());
    let base = rig.read(regs::COMMAND_BUFFER_BASE);
    rig.write(regs::COMMAND_HEAD, 0x40);
    rig.write(regs::COMMAND_TAIL, 0x40);
    rig.write(regs::EVENT_HEAD, 0x20);
    rig.write(regs::EVENT_TAIL, 0x20);
    rig.write(regs::COMMAND_BUFFER_BASE, base);
    rig.write(regs::EVENT_LOG_BASE, rig.read(regs::EVENT_LOG_BASE));
    for pointer in [regs::COMMAND_HEAD, regs::COMMAND_TAIL, regs::EVENT_HEAD, regs::EVENT_TAIL] {
        assert_eq!(rig.read(pointer), 0);
    }
    rig.write(regs::CONTROL, enabled().0[0]);
    rig.run(&[]);
    rig.write(regs::COMMAND_BUFFER_BASE, 0);
    assert_eq!(rig.read(regs::COMMAND_BUFFER_BASE), base);
    assert_eq!(rig.read(regs::COMMAND_HEAD), 16);
}

#[test]
fn pointers_that_hardware_moves_are_locked_while_it_runs() {
    let rig = Rig::new();
    rig.run(&[]);
    rig.write(regs::COMMAND_HEAD, 0x80);
    assert_eq!(rig.read(regs::COMMAND_HEAD), 0x10);
    rig.write(regs::EVENT_TAIL, 0x80);
    assert_eq!(rig.read(regs::EVENT_TAIL), 0);
    rig.write(regs::CONTROL, 0);
    rig.write(regs::COMMAND_HEAD, 0xffff_ffff_ffff_ff8f);
    assert_eq!(rig.read(regs::COMMAND_HEAD), 0x7_ff80);
    rig.write(regs::EVENT_TAIL, 0x80);
    assert_eq!(rig.read(regs::EVENT_TAIL), 0x80);
}

#[test]
fn rings_run_only_with_iommu_en_and_a_legal_length() {
    let rig = Rig::stopped(Config::default());
    let waiting = enabled().with_iommu_en(false);
    rig.write(regs::CONTROL, waiting.0[0]);
    assert!(!rig.status().cmd_buf_run() && !rig.status().event_log_run());
    rig.write(regs::CONTROL, enabled().0[0]);
    assert!(rig.status().cmd_buf_run() && rig.status().event_log_run());
    rig.write(regs::CONTROL, waiting.0[0]);
    assert!(!rig.status().cmd_buf_run() && !rig.status().event_log_run());
    let reserved = RingBase::default().with_base(rig.commands).with_ring_len(7);
    rig.write(regs::COMMAND_BUFFER_BASE, reserved.0[0]);
    rig.write(regs::CONTROL, enabled().0[0]);
    assert!(!rig.status().cmd_buf_run() && rig.status().event_log_run());
}

#[test]
fn commands_queued_before_the_start_run_at_the_start() {
    let rig = Rig::stopped(Config::default());
    rig.command(Command::completion_wait(rig.wait, 5, false));
    assert_eq!(rig.load(rig.wait), 0);
    rig.write(regs::CONTROL, enabled().0[0]);
    assert_eq!(rig.load(rig.wait), 5);
}

#[test]
fn halves_of_registers_are_accessible() {
    let rig = Rig::stopped(Config::default());
    rig.iommu.write32(regs::EXCLUSION_BASE, 0x1234_5003);
    rig.iommu.write32(regs::EXCLUSION_BASE + 4, 0xffff_0007);
    assert_eq!(rig.read(regs::EXCLUSION_BASE), 0x000f_0007_1234_5003);
    assert_eq!(rig.iommu.read32(regs::EXCLUSION_BASE), 0x1234_5003);
    assert_eq!(rig.iommu.read32(regs::EXCLUSION_BASE + 4), 0x000f_0007);
    rig.write(regs::EXCLUSION_LIMIT, 0x5000);
    assert_eq!(rig.read(regs::EXCLUSION_LIMIT), 0x5fff);
}

#[test]
fn what_is_not_there_reads_zero_and_beyond_the_region_all_ones() {
    let rig = Rig::stopped(Config::default());
    rig.write(0x0500, u64::MAX);
    assert_eq!(rig.read(0x0500), 0);
    assert_eq!(rig.read(regs::REGION_BYTES), u64::MAX);
    assert_eq!(rig.iommu.read32(regs::REGION_BYTES + 4), u32::MAX);
}

#[test]
fn only_a_one_clears_a_recorded_status_bit() {
    let rig = Rig::new();
    rig.command(Command::completion_wait(rig.wait, 1, true));
    assert!(rig.status().com_wait_int());
    rig.write(regs::STATUS, !Status::default().with_com_wait_int(true).0[0]);
    assert!(rig.status().com_wait_int() && rig.status().cmd_buf_run());
    rig.iommu.write32(regs::STATUS, 4);
    assert!(!rig.status().com_wait_int() && rig.status().cmd_buf_run());
}
