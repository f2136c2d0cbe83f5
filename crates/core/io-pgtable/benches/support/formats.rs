//! The tables that are measured, one or more of each format.

use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, ArmOptions, ArmStage1, ArmStage2, Config, Format, RiscvFirstStage,
    RiscvOptions, RiscvSecondStage, VtdSecondStage, VtdSecondStageOptions, X86_64, X86_64Options,
};

/// What is done with each table.
pub(crate) trait Visitor {
    fn visit<F: Format>(&mut self, name: &'static str, config: Config<F>);
}

/// Every format with each number of levels or granule that people use. Tables begin without a record of
/// writes wherever the format lets software choose.
pub(crate) fn visit_all(visitor: &mut impl Visitor) {
    let first = X86_64Options { record_writes: true, ..Default::default() };
    let vtd = VtdSecondStageOptions { force_snoop: true };
    let riscv = RiscvOptions { record_writes: true, ..Default::default() };
    let arm = ArmOptions { record_writes: true, ..Default::default() };
    let amd = Config { levels: 4, ..Config::<AmdV1>::new(48, AmdV1Options::default()) };

    visitor.visit("x86_64, 4 levels", Config::<X86_64>::new(47, first));
    visitor.visit("x86_64, 5 levels", Config::<X86_64>::new(56, first));
    visitor.visit("amdv1, 4 levels", amd);
    visitor.visit("vtdss, 4 levels", Config::<VtdSecondStage>::new(48, vtd));
    visitor.visit("riscv Sv39", Config::<RiscvFirstStage>::new(38, riscv));
    visitor.visit("riscv Sv48", Config::<RiscvFirstStage>::new(47, riscv));
    visitor.visit("riscv Sv57", Config::<RiscvFirstStage>::new(56, riscv));
    visitor.visit("riscv Sv39x4", Config::<RiscvSecondStage>::new(41, riscv));
    visitor.visit("riscv Sv48x4", Config::<RiscvSecondStage>::new(50, riscv));
    visitor.visit("riscv Sv57x4", Config::<RiscvSecondStage>::new(59, riscv));
    visitor.visit("arm stage 1, 4K", Config::<ArmStage1<12>>::new(48, arm));
    visitor.visit("arm stage 1, 16K", Config::<ArmStage1<14>>::new(47, arm));
    visitor.visit("arm stage 1, 64K", Config::<ArmStage1<16>>::new(48, arm));
    visitor.visit("arm stage 2, 4K", Config::<ArmStage2<12>>::new(40, arm).concatenated());
    visitor.visit("arm stage 2, 16K", Config::<ArmStage2<14>>::new(40, arm).concatenated());
    visitor.visit("arm stage 2, 64K", Config::<ArmStage2<16>>::new(40, arm).concatenated());
}
