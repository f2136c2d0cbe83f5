//! MMIO registers (AMD 48882 3.4, 3.3 before revision 3.10): offsets from the base in the
//! capability block, 64 bits wide unless said otherwise.

use super::fields::{fields, mask};
use lychgate_types::PhysAddr;

/// Bytes of the region without performance counters.
pub const REGION_BYTES: u64 = 0x4000;

/// Device Table Base: [`DeviceTableBase`].
pub const DEVICE_TABLE_BASE: u64 = 0x0000;
/// Command Buffer Base: [`RingBase`]. Writing zeroes head and tail.
pub const COMMAND_BUFFER_BASE: u64 = 0x0008;
/// Event Log Base: [`RingBase`]. Writing zeroes head and tail.
pub const EVENT_LOG_BASE: u64 = 0x0010;
/// [`Control`].
pub const CONTROL: u64 = 0x0018;
/// Exclusion Base: [`ExclusionBase`].
pub const EXCLUSION_BASE: u64 = 0x0020;
/// Exclusion Limit: last page, bits 51:12; bits 11:0 count as ones.
pub const EXCLUSION_LIMIT: u64 = 0x0028;
/// [`Efr`], read only.
pub const EFR: u64 = 0x0030;
/// PPR Log Base: [`RingBase`].
pub const PPR_LOG_BASE: u64 = 0x0038;
/// GA Log Base.
pub const GA_LOG_BASE: u64 = 0x00e0;
/// GA Log Tail Address.
pub const GA_LOG_TAIL_ADDRESS: u64 = 0x00e8;
/// Device Table Segment 1 Base; 2 to 7 follow, 8 bytes apart.
pub const DEVICE_TABLE_SEGMENT_1_BASE: u64 = 0x0100;
/// MSI Vector 0: a copy of capability miscellaneous 0, 32 bits (MsiCapMmioSup).
pub const MSI_VECTOR_0: u64 = 0x0150;
/// XT IOMMU General Interrupt Control: [`XtInterrupt`] for event log and completion wait.
pub const XT_GENERAL_INTERRUPT: u64 = 0x0170;
/// XT IOMMU PPR Interrupt Control: [`XtInterrupt`].
pub const XT_PPR_INTERRUPT: u64 = 0x0178;
/// XT IOMMU GA Log Interrupt Control: [`XtInterrupt`].
pub const XT_GA_INTERRUPT: u64 = 0x0180;
/// [`Efr2`], read only.
pub const EFR2: u64 = 0x01a0;
/// Command buffer head: byte offset, bits 18:4.
pub const COMMAND_HEAD: u64 = 0x2000;
/// Command buffer tail: byte offset, bits 18:4. Writing is the doorbell.
pub const COMMAND_TAIL: u64 = 0x2008;
/// Event log head: byte offset, bits 18:4.
pub const EVENT_HEAD: u64 = 0x2010;
/// Event log tail: byte offset, bits 18:4.
pub const EVENT_TAIL: u64 = 0x2018;
/// [`Status`].
pub const STATUS: u64 = 0x2020;
/// PPR log head: byte offset, bits 18:4.
pub const PPR_HEAD: u64 = 0x2030;
/// PPR log tail: byte offset, bits 18:4.
pub const PPR_TAIL: u64 = 0x2038;
/// GA log head: byte offset, bits 15:3.
pub const GA_HEAD: u64 = 0x2040;
/// GA log tail: byte offset, bits 15:3.
pub const GA_TAIL: u64 = 0x2048;

/// Byte offset field of the 16-byte ring pointers, bits 18:4.
pub const RING_POINTER: u64 = mask(18, 4);
/// Bytes of a command, an event, a page request.
pub const RING_ENTRY_BYTES: u64 = 16;
/// Smallest legal log2 of a ring's entries; 0 to 7 are reserved.
pub const RING_LEN_MIN: u64 = 8;
/// Greatest log2 of a ring's entries.
pub const RING_LEN_MAX: u64 = 15;

const PAGE_ADDRESS: u64 = mask(51, 12);

macro_rules! page_address {
    ($type:ident, $what:literal) => {
        impl $type {
            #[doc = concat!($what, ": SPA, bits 51:12.")]
            pub const fn base(self) -> PhysAddr {
                PhysAddr::new(self.0[0] & PAGE_ADDRESS)
            }

            #[doc = concat!("`self` with bits 51:12 of `base` as ", $what, ".")]
            #[must_use]
            pub const fn with_base(mut self, base: PhysAddr) -> Self {
                self.0[0] = self.0[0] & !PAGE_ADDRESS | base.get() & PAGE_ADDRESS;
                self
            }
        }
    };
}

/// Device Table Base Address Register (0000h).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct DeviceTableBase(pub [u64; 1]);

fields! { DeviceTableBase {
    /// Size: the table has `(size + 1) * 4` KiB. 1FFh holds all 65536 entries.
    size, with_size: 0[8:0];
} }
page_address!(DeviceTableBase, "the device table");

impl DeviceTableBase {
    /// Bits that exist.
    pub const MASK: u64 = PAGE_ADDRESS | mask(8, 0);
}

/// Base register of a ring of 16-byte entries: command buffer, event log, PPR log.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RingBase(pub [u64; 1]);

fields! { RingBase {
    /// Length: log2 of the entries, [`RING_LEN_MIN`] to [`RING_LEN_MAX`].
    ring_len, with_ring_len: 0[59:56];
} }
page_address!(RingBase, "the ring");

impl RingBase {
    /// Bits that exist.
    pub const MASK: u64 = PAGE_ADDRESS | mask(59, 56);

    /// Bytes of the ring; `None` for a reserved length.
    pub const fn bytes(self) -> Option<u64> {
        if self.ring_len() < RING_LEN_MIN {
            None
        } else {
            Some(RING_ENTRY_BYTES << self.ring_len())
        }
    }
}

/// Exclusion Base Register (0020h).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct ExclusionBase(pub [u64; 1]);

fields! { ExclusionBase {
    /// ExEn: the range counts.
    ex_en, with_ex_en: 0[0];
    /// Allow: every device may use it; else those with EX in their device table entry.
    allow, with_allow: 0[1];
} }
page_address!(ExclusionBase, "the first page of the range");

impl ExclusionBase {
    /// Bits that exist.
    pub const MASK: u64 = PAGE_ADDRESS | mask(1, 0);
}

/// XT interrupt control: where an interrupt goes when Control.IntCapXTEn is set.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct XtInterrupt(pub [u64; 1]);

fields! { XtInterrupt {
    /// DestMode, set for logical.
    dest_mode, with_dest_mode: 0[2];
    /// Destination 23:0 of the APIC id.
    destination_low, with_destination_low: 0[31:8];
    /// Vector.
    vector, with_vector: 0[39:32];
    /// DelMode: set for arbitrated.
    del_mode, with_del_mode: 0[40];
    /// Destination 31:24 of the APIC id.
    destination_high, with_destination_high: 0[63:56];
} }

impl XtInterrupt {
    /// Bits that exist.
    pub const MASK: u64 = mask(2, 2) | mask(40, 8) | mask(63, 56);
}

/// IOMMU Control Register (0018h).
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Control(pub [u64; 1]);

fields! { Control {
    /// IommuEn: requests are translated. 0 passes them through.
    iommu_en, with_iommu_en: 0[0];
    /// HtTunEn: HyperTransport tunnel.
    ht_tun_en, with_ht_tun_en: 0[1];
    /// EventLogEn: events are logged.
    event_log_en, with_event_log_en: 0[2];
    /// EventIntEn: EventLogInt interrupts.
    event_int_en, with_event_int_en: 0[3];
    /// ComWaitIntEn: ComWaitInt interrupts.
    com_wait_int_en, with_com_wait_int_en: 0[4];
    /// InvTimeOut: 0 none, 1 1 ms, 2 10 ms, 3 100 ms, 4 1 s, 5 10 s, 6 100 s.
    inv_time_out, with_inv_time_out: 0[7:5];
    /// PassPW.
    pass_pw, with_pass_pw: 0[8];
    /// ResPassPW.
    res_pass_pw, with_res_pass_pw: 0[9];
    /// Coherent: device table reads are snooped.
    coherent, with_coherent: 0[10];
    /// Isoc.
    isoc, with_isoc: 0[11];
    /// CmdBufEn: commands are fetched.
    cmd_buf_en, with_cmd_buf_en: 0[12];
    /// PPRLogEn: page requests are logged.
    ppr_log_en, with_ppr_log_en: 0[13];
    /// PprIntEn: PprInt interrupts.
    ppr_int_en, with_ppr_int_en: 0[14];
    /// PPREn: page requests are processed.
    ppr_en, with_ppr_en: 0[15];
    /// GTEn: guest translation.
    gt_en, with_gt_en: 0[16];
    /// GAEn: 128-bit interrupt remapping entries.
    ga_en, with_ga_en: 0[17];
    /// GAMEn: guest virtual APIC mode.
    gam_en, with_gam_en: 0[27:25];
    /// GALogEn.
    ga_log_en, with_ga_log_en: 0[28];
    /// GAIntEn.
    ga_int_en, with_ga_int_en: 0[29];
    /// DevTblSegEn: 2^n device table segments.
    dev_tbl_seg_en, with_dev_tbl_seg_en: 0[36:34];
    /// PrivAbrtEn.
    priv_abrt_en, with_priv_abrt_en: 0[38:37];
    /// NumIntRemapMode: 1 for 2048 interrupts a device.
    num_int_remap_mode, with_num_int_remap_mode: 0[44:43];
    /// EPHEn: enhanced page request handling.
    eph_en, with_eph_en: 0[45];
    /// HADUpdate.
    had_update, with_had_update: 0[47:46];
    /// GDUpdateDis: guest dirty bits are not set.
    gd_update_dis, with_gd_update_dis: 0[48];
    /// XTEn: 32-bit destinations in interrupt remapping entries.
    xt_en, with_xt_en: 0[50];
    /// IntCapXTEn: the IOMMU's own interrupts follow [`XtInterrupt`].
    int_cap_xt_en, with_int_cap_xt_en: 0[51];
    /// GAUpdateDis: guest access bits are not set.
    ga_update_dis, with_ga_update_dis: 0[54];
    /// GCR3TRPMode: DTE GCR3 roots are guest physical.
    gcr3_trp_mode, with_gcr3_trp_mode: 0[58];
    /// IRTCacheDis: interrupt entries are not cached. Reads 0 where unsupported.
    irt_cache_dis, with_irt_cache_dis: 0[59];
} }

impl Control {
    /// Bits that no revision defines: 49 and 57.
    pub const RESERVED: u64 = mask(49, 49) | mask(57, 57);
}

/// IOMMU Status Register (2020h). Bits of [`Status::W1C`] clear when written 1.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Status(pub [u64; 1]);

fields! { Status {
    /// EventOverflow, W1C: an event was lost and the log stopped.
    event_overflow, with_event_overflow: 0[0];
    /// EventLogInt, W1C: an event was written, or the log overflowed.
    event_log_int, with_event_log_int: 0[1];
    /// ComWaitInt, W1C: a COMPLETION_WAIT with I completed.
    com_wait_int, with_com_wait_int: 0[2];
    /// EventLogRun, RO: events are written.
    event_log_run, with_event_log_run: 0[3];
    /// CmdBufRun, RO: commands are fetched.
    cmd_buf_run, with_cmd_buf_run: 0[4];
    /// PprOverflow, W1C.
    ppr_overflow, with_ppr_overflow: 0[5];
    /// PprInt, W1C.
    ppr_int, with_ppr_int: 0[6];
    /// PPRLogRun, RO.
    ppr_log_run, with_ppr_log_run: 0[7];
    /// GALogRun, RO.
    ga_log_run, with_ga_log_run: 0[8];
    /// GALOverflow, W1C.
    ga_log_overflow, with_ga_log_overflow: 0[9];
    /// GAInt, W1C.
    ga_int, with_ga_int: 0[10];
} }

impl Status {
    /// Bits that clear when written 1.
    pub const W1C: u64 = 0x6_8e67;
}

/// Extended Feature Register (0030h), read only.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Efr(pub [u64; 1]);

fields! { Efr {
    /// PreFSup: PREFETCH_IOMMU_PAGES.
    pre_f_sup, with_pre_f_sup: 0[0];
    /// PPRSup: page requests.
    ppr_sup, with_ppr_sup: 0[1];
    /// XTSup: x2APIC destinations.
    xt_sup, with_xt_sup: 0[2];
    /// NXSup: no-execute in guest tables.
    nx_sup, with_nx_sup: 0[3];
    /// GTSup: guest translation.
    gt_sup, with_gt_sup: 0[4];
    /// GAPPISup.
    gappi_sup, with_gappi_sup: 0[5];
    /// IASup: INVALIDATE_IOMMU_ALL.
    ia_sup, with_ia_sup: 0[6];
    /// GASup: 128-bit interrupt remapping entries.
    ga_sup, with_ga_sup: 0[7];
    /// HESup: hardware error registers.
    he_sup, with_he_sup: 0[8];
    /// PCSup: performance counters.
    pc_sup, with_pc_sup: 0[9];
    /// HATS: host page-table levels, 0 four, 1 five, 2 six; 3 no host translation.
    hats, with_hats: 0[11:10];
    /// GATS: guest page-table levels, 0 four, 1 five.
    gats, with_gats: 0[13:12];
    /// GLXSup: greatest DTE GLX.
    glx_sup, with_glx_sup: 0[15:14];
    /// GAMSup: guest virtual APIC.
    gam_sup, with_gam_sup: 0[23:21];
    /// PASmax: PASID bits less 1.
    pas_max, with_pas_max: 0[36:32];
    /// USSup: user and supervisor.
    us_sup, with_us_sup: 0[37];
    /// DevTblSegSup: log2 of device table segments.
    dev_tbl_seg_sup, with_dev_tbl_seg_sup: 0[39:38];
    /// MsiCapMmioSup: MSI registers in MMIO.
    msi_cap_mmio_sup, with_msi_cap_mmio_sup: 0[46];
    /// GIoSup: DTE GIoV.
    gio_sup, with_gio_sup: 0[48];
    /// HASup: host access bits.
    ha_sup, with_ha_sup: 0[49];
    /// EPHSup: enhanced page request handling.
    eph_sup, with_eph_sup: 0[50];
    /// AttrFWSup: DTE attribute fields.
    attr_fw_sup, with_attr_fw_sup: 0[51];
    /// HDSup: host dirty bits.
    hd_sup, with_hd_sup: 0[52];
    /// InvIotlbTypeSup: Type of INVALIDATE_IOTLB_PAGES.
    inv_iotlb_type_sup, with_inv_iotlb_type_sup: 0[54];
    /// vIommuSup.
    viommu_sup, with_viommu_sup: 0[55];
    /// GAUpdateDisSup.
    ga_update_dis_sup, with_ga_update_dis_sup: 0[61];
    /// SNPSup.
    snp_sup, with_snp_sup: 0[63];
} }

/// Extended Feature 2 Register (01A0h), read only.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Efr2(pub [u64; 1]);

fields! { Efr2 {
    /// TMPMSup.
    tmpm_sup, with_tmpm_sup: 0[2];
    /// GCR3TRPModeSup.
    gcr3_trp_mode_sup, with_gcr3_trp_mode_sup: 0[3];
    /// NumIntRemapSup: 1 for 2048 interrupts a device.
    num_int_remap_sup, with_num_int_remap_sup: 0[9:8];
    /// HTRangeIgnore: the HyperTransport ranges are ordinary addresses.
    ht_range_ignore, with_ht_range_ignore: 0[11];
} }

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_has_at_least_256_entries() {
        assert_eq!(RingBase::default().bytes(), None);
        assert_eq!(RingBase::default().with_ring_len(8).bytes(), Some(4096));
        assert_eq!(RingBase::default().with_ring_len(15).bytes(), Some(512 << 10));
    }

    #[test]
    fn status_bits_that_clear_are_the_ones_that_record_something() {
        let run = Status::default()
            .with_event_log_run(true)
            .with_cmd_buf_run(true)
            .with_ppr_log_run(true)
            .with_ga_log_run(true);
        assert_eq!(run.0[0] & Status::W1C, 0);
        let recorded = Status::default()
            .with_event_overflow(true)
            .with_event_log_int(true)
            .with_com_wait_int(true);
        assert_eq!(recorded.0[0] & Status::W1C, 7);
    }
}
