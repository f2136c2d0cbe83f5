//! The MMIO registers and what writing them does (AMD 48882 3.4).

use super::ring::Ring;
use super::{Config, Exclusion, Raised, Settings};
use crate::spec::registers::{
    COMMAND_BUFFER_BASE, COMMAND_HEAD, COMMAND_TAIL, CONTROL, DEVICE_TABLE_BASE, DeviceTableBase,
    EFR, EFR2, EVENT_HEAD, EVENT_LOG_BASE, EVENT_TAIL, EXCLUSION_BASE, EXCLUSION_LIMIT,
    ExclusionBase, PPR_HEAD, PPR_LOG_BASE, PPR_TAIL, REGION_BYTES, STATUS, XT_GENERAL_INTERRUPT,
    XT_PPR_INTERRUPT, XtInterrupt,
};
use crate::spec::{Control, Efr, Efr2, Status};

const LIMIT_PAGE: u64 = 0x000f_ffff_ffff_f000;

/// Every register, and the interrupt that is due.
pub(super) struct Registers {
    efr: Efr,
    efr2: Efr2,
    pub(super) control: Control,
    /// The bits that software clears; the others follow from the rings.
    pub(super) recorded: Status,
    device_table: DeviceTableBase,
    exclusion_base: ExclusionBase,
    exclusion_limit: u64,
    pub(super) commands: Ring,
    pub(super) events: Ring,
    page_requests: Ring,
    xt_general: XtInterrupt,
    xt_page_requests: XtInterrupt,
    raised: bool,
}

impl Registers {
    /// As after reset.
    pub(super) fn new(config: &Config) -> Self {
        Self {
            efr: config.efr,
            efr2: config.efr2,
            control: Control::default(),
            recorded: Status::default(),
            device_table: DeviceTableBase::default(),
            exclusion_base: ExclusionBase::default(),
            exclusion_limit: 0,
            commands: Ring::new(),
            events: Ring::new(),
            page_requests: Ring::new(),
            xt_general: XtInterrupt::default(),
            xt_page_requests: XtInterrupt::default(),
            raised: false,
        }
    }

    /// A 64-bit read, `offset` a multiple of 8. What is not defined inside the region reads 0.
    pub(super) fn read(&self, offset: u64) -> u64 {
        match offset {
            DEVICE_TABLE_BASE => self.device_table.0[0],
            COMMAND_BUFFER_BASE => self.commands.base().0[0],
            EVENT_LOG_BASE => self.events.base().0[0],
            CONTROL => self.control.0[0],
            EXCLUSION_BASE => self.exclusion_base.0[0],
            EXCLUSION_LIMIT => self.exclusion_limit | 0xfff,
            EFR => self.efr.0[0],
            EFR2 => self.efr2.0[0],
            COMMAND_HEAD => self.commands.head,
            COMMAND_TAIL => self.commands.tail,
            EVENT_HEAD => self.events.head,
            EVENT_TAIL => self.events.tail,
            STATUS => self.status().0[0],
            PPR_LOG_BASE if self.efr.ppr_sup() => self.page_requests.base().0[0],
            PPR_HEAD if self.efr.ppr_sup() => self.page_requests.head,
            PPR_TAIL if self.efr.ppr_sup() => self.page_requests.tail,
            XT_GENERAL_INTERRUPT if self.efr.xt_sup() => self.xt_general.0[0],
            XT_PPR_INTERRUPT if self.efr.xt_sup() => self.xt_page_requests.0[0],
            REGION_BYTES.. => u64::MAX,
            _ => 0,
        }
    }

    /// A write of the bytes in `mask`, `offset` a multiple of 8.
    pub(super) fn write(&mut self, offset: u64, value: u64, mask: u64) {
        let merged = self.read(offset) & !mask | value & mask;
        match offset {
            DEVICE_TABLE_BASE => {
                self.device_table = DeviceTableBase([merged & DeviceTableBase::MASK]);
            }
            COMMAND_BUFFER_BASE => self.commands.write_base(merged),
            EVENT_LOG_BASE => self.events.write_base(merged),
            CONTROL => self.write_control(merged),
            EXCLUSION_BASE => {
                self.exclusion_base = ExclusionBase([merged & ExclusionBase::MASK]);
            }
            EXCLUSION_LIMIT => self.exclusion_limit = merged & LIMIT_PAGE,
            COMMAND_HEAD if !self.commands.running => self.commands.write_head(merged),
            COMMAND_TAIL => self.commands.write_tail(merged),
            EVENT_HEAD => self.events.write_head(merged),
            EVENT_TAIL if !self.events.running => self.events.write_tail(merged),
            STATUS => self.recorded.0[0] &= !(value & mask & Status::W1C),
            PPR_LOG_BASE if self.efr.ppr_sup() => self.page_requests.write_base(merged),
            PPR_HEAD if self.efr.ppr_sup() => self.page_requests.write_head(merged),
            PPR_TAIL if self.efr.ppr_sup() && !self.page_requests.running => {
                self.page_requests.write_tail(merged);
            }
            XT_GENERAL_INTERRUPT if self.efr.xt_sup() => {
                self.xt_general = XtInterrupt([merged & XtInterrupt::MASK]);
            }
            XT_PPR_INTERRUPT if self.efr.xt_sup() => {
                self.xt_page_requests = XtInterrupt([merged & XtInterrupt::MASK]);
            }
            _ => {}
        }
    }

    /// What requests depend on.
    pub(super) fn settings(&self) -> Settings {
        let base = self.exclusion_base;
        Settings {
            control: self.control,
            device_table: self.device_table,
            exclusion: base.ex_en().then(|| Exclusion {
                first: base.base().get(),
                last: self.exclusion_limit | 0xfff,
                every_device: base.allow(),
            }),
        }
    }

    /// Sets EventLogInt; an interrupt is due when it was clear and EventIntEn is set.
    pub(super) fn record_event(&mut self) {
        self.raised |= !self.recorded.event_log_int() && self.control.event_int_en();
        self.recorded = self.recorded.with_event_log_int(true);
    }

    /// Sets ComWaitInt; an interrupt is due when it was clear and ComWaitIntEn is set.
    pub(super) fn record_completion(&mut self) {
        self.raised |= !self.recorded.com_wait_int() && self.control.com_wait_int_en();
        self.recorded = self.recorded.with_com_wait_int(true);
    }

    /// The interrupt that became due since the last call.
    pub(super) fn take_raised(&mut self) -> Option<Raised> {
        std::mem::take(&mut self.raised)
            .then(|| Raised { xt: self.control.int_cap_xt_en().then_some(self.xt_general) })
    }

    fn status(&self) -> Status {
        self.recorded
            .with_event_log_run(self.events.running)
            .with_cmd_buf_run(self.commands.running)
            .with_ppr_log_run(self.page_requests.running)
    }

    fn write_control(&mut self, value: u64) {
        let control = Control([value & self.control_bits()]);
        self.control = control;
        let on = control.iommu_en();
        let overflow = self.recorded.event_overflow();
        self.commands.follow(on && control.cmd_buf_en(), true);
        self.events.follow(on && control.event_log_en(), !overflow);
        self.page_requests.follow(on && control.ppr_log_en(), true);
    }

    /// The Control bits that exist with these features; the others read 0 after any write, which
    /// is how software finds out.
    fn control_bits(&self) -> u64 {
        let always = Control::default()
            .with_iommu_en(true)
            .with_ht_tun_en(true)
            .with_event_log_en(true)
            .with_event_int_en(true)
            .with_com_wait_int_en(true)
            .with_inv_time_out(7)
            .with_pass_pw(true)
            .with_res_pass_pw(true)
            .with_coherent(true)
            .with_isoc(true)
            .with_cmd_buf_en(true);
        let ppr = self.efr.ppr_sup();
        let xt = self.efr.xt_sup();
        let hosted = if self.efr.ha_sup() { 3 } else { 0 };
        always
            .with_ppr_log_en(ppr)
            .with_ppr_int_en(ppr)
            .with_ppr_en(ppr)
            .with_ga_en(self.efr.ga_sup())
            .with_xt_en(xt && self.efr.ga_sup())
            .with_int_cap_xt_en(xt)
            .with_had_update(hosted)
            .with_num_int_remap_mode(self.efr2.num_int_remap_sup())
            .0[0]
    }
}
