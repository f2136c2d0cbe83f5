//! The device table and its entries (AMD 48882 2.2.2 Figure 7, Table 7).

use super::fields::{fields, mask};
use lychgate_types::PhysAddr;

/// Bytes of an entry. The entry of a DeviceID is at device table base + 32 * DeviceID.
pub const BYTES: u64 = 32;

/// A device table entry: four words. Hardware reads it in one 256-bit access.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Dte(pub [u64; 4]);

/// [`Dte::had`]: no access or dirty bits.
pub const HAD_NONE: u64 = 0;
/// [`Dte::had`]: hardware sets A (HASup).
pub const HAD_ACCESS: u64 = 1;
/// [`Dte::had`]: hardware sets A and D (HASup and HDSup).
pub const HAD_ACCESS_DIRTY: u64 = 3;

/// [`Dte::int_ctl`]: fixed and arbitrated interrupts are aborted.
pub const INT_CTL_ABORT: u64 = 0;
/// [`Dte::int_ctl`]: they pass unmapped.
pub const INT_CTL_FORWARD: u64 = 1;
/// [`Dte::int_ctl`]: they are remapped through the interrupt table.
pub const INT_CTL_REMAP: u64 = 2;

/// [`Dte::io_ctl`]: port I/O space accesses are aborted.
pub const IO_CTL_ABORT: u64 = 0;
/// [`Dte::io_ctl`]: they pass unmapped.
pub const IO_CTL_FORWARD: u64 = 1;
/// [`Dte::io_ctl`]: they are translated by the page tables.
pub const IO_CTL_TRANSLATE: u64 = 2;

/// [`Dte::sys_mgt`]: system management messages are aborted.
pub const SYS_MGT_ABORT: u64 = 0;
/// [`Dte::sys_mgt`]: all pass unmapped.
pub const SYS_MGT_FORWARD: u64 = 1;
/// [`Dte::sys_mgt`]: only INTx messages pass.
pub const SYS_MGT_FORWARD_INTX: u64 = 2;
/// [`Dte::sys_mgt`]: they are translated by the page tables.
pub const SYS_MGT_TRANSLATE: u64 = 3;

/// Greatest [`Dte::int_tab_len`]: 2048 entries.
pub const INT_TAB_LEN_MAX: u64 = 11;
/// Greatest [`Dte::mode`]: six levels.
pub const MODE_MAX: u64 = 6;

/// Bits that are reserved whatever the features, by word. A set bit makes an entry with V = 1
/// (words 0 and 1) or IV = 1 (word 2) illegal.
pub const RESERVED: [u64; 4] =
    [mask(6, 2) | mask(63, 63), 0, mask(53, 52), mask(14, 0) | mask(52, 48)];

const HOST_ROOT: u64 = mask(51, 12);
const INT_ROOT: u64 = mask(51, 6);

fields! { Dte {
    /// V: bits 127:1 and more are valid. 0 passes requests through untranslated.
    v, with_v: 0[0];
    /// TV: the translation information is valid. 0 with V = 1 terminates every request.
    tv, with_tv: 0[1];
    /// HAD: host access and dirty bits, [`HAD_NONE`] and following; 2 is reserved.
    had, with_had: 0[8:7];
    /// Mode: levels of the host page table, 1 to 6; 0 for none (GPA = SPA); 7 is reserved.
    mode, with_mode: 0[11:9];
    /// PPR: guest peripheral page requests (EPHSup).
    ppr, with_ppr: 0[52];
    /// GPRP: the PRG response carries the PASID.
    gprp, with_gprp: 0[53];
    /// GIoV: requests without PASID use GCR3 entry 0 (GIoSup).
    giov, with_giov: 0[54];
    /// GV: guest translation is valid (GTSup).
    gv, with_gv: 0[55];
    /// GLX: levels of the GCR3 table less 1, 0 to 2; 3 is reserved.
    glx, with_glx: 0[57:56];
    /// IR: reads are allowed.
    ir, with_ir: 0[61];
    /// IW: writes are allowed.
    iw, with_iw: 0[62];
    /// DomainID: the tag of cached translations, 16 bits.
    domain_id, with_domain_id: 1[15:0];
    /// I: the device may have an IOTLB (ATS).
    i, with_i: 1[32];
    /// SE: only the first I/O page fault is logged until the entry is fetched again.
    se, with_se: 1[33];
    /// SA: no I/O page fault is logged.
    sa, with_sa: 1[34];
    /// IoCtl: port I/O space, [`IO_CTL_ABORT`] and following; 3 is reserved.
    io_ctl, with_io_ctl: 1[36:35];
    /// Cache: a hint for the processor's caches.
    cache, with_cache: 1[37];
    /// SD: snoop disable for ATS answers.
    sd, with_sd: 1[38];
    /// EX: the device may use the exclusion range.
    ex, with_ex: 1[39];
    /// SysMgt: system management messages, [`SYS_MGT_ABORT`] and following.
    sys_mgt, with_sys_mgt: 1[41:40];
    /// SATS: secure ATS (SATSSup).
    sats, with_sats: 1[42];
    /// IV: the interrupt half is valid.
    iv, with_iv: 2[0];
    /// IntTabLen: log2 of the interrupt table's entries, 0 to [`INT_TAB_LEN_MAX`].
    int_tab_len, with_int_tab_len: 2[4:1];
    /// IG: unmapped interrupts are not logged.
    ig, with_ig: 2[5];
    /// GuestPagingMode: 0 four levels, 1 five; others are reserved.
    guest_paging_mode, with_guest_paging_mode: 2[55:54];
    /// InitPass: INIT passes unmapped.
    init_pass, with_init_pass: 2[56];
    /// EIntPass: ExtInt passes unmapped.
    eint_pass, with_eint_pass: 2[57];
    /// NMIPass: NMI passes unmapped.
    nmi_pass, with_nmi_pass: 2[58];
    /// HPTMode: a hint.
    hpt_mode, with_hpt_mode: 2[59];
    /// IntCtl: fixed and arbitrated interrupts, [`INT_CTL_ABORT`] and following; 3 is reserved.
    int_ctl, with_int_ctl: 2[61:60];
    /// Lint0Pass: legacy PIC interrupts pass unmapped.
    lint0_pass, with_lint0_pass: 2[62];
    /// Lint1Pass: legacy NMI passes unmapped.
    lint1_pass, with_lint1_pass: 2[63];
    /// vImuEn: the device belongs to a guest's virtual IOMMU (vIommuSup).
    vimu_en, with_vimu_en: 3[15];
    /// GDeviceID: DeviceID as the guest knows it.
    guest_device_id, with_guest_device_id: 3[31:16];
    /// GuestID.
    guest_id, with_guest_id: 3[47:32];
    /// AttrV: the attribute fields are valid (AttrFWSup).
    attr_v, with_attr_v: 3[54];
    /// Mode0FC: forced coherence with Mode 0.
    mode0_fc, with_mode0_fc: 3[55];
    /// SnoopAttribute.
    snoop_attribute, with_snoop_attribute: 3[63:56];
} }

impl Dte {
    /// Host page-table root: SPA of the top table, bits 51:12.
    pub const fn host_root(self) -> PhysAddr {
        PhysAddr::new(self.0[0] & HOST_ROOT)
    }

    /// `self` with bits 51:12 of `root` as the host page-table root.
    #[must_use]
    pub const fn with_host_root(mut self, root: PhysAddr) -> Self {
        self.0[0] = self.0[0] & !HOST_ROOT | root.get() & HOST_ROOT;
        self
    }

    /// GCR3 table root, bits 51:12: split over 60:58 (14:12), 95:80 (30:15) and 127:107 (51:31).
    pub const fn gcr3_root(self) -> u64 {
        (self.0[0] >> 58 & 0x7) << 12
            | (self.0[1] >> 16 & 0xffff) << 15
            | (self.0[1] >> 43 & 0x1f_ffff) << 31
    }

    /// `self` with bits 51:12 of `root` as the GCR3 table root.
    #[must_use]
    pub const fn with_gcr3_root(mut self, root: u64) -> Self {
        self.0[0] = self.0[0] & !(0x7 << 58) | (root >> 12 & 0x7) << 58;
        self.0[1] = self.0[1] & !(0xffff << 16 | 0x1f_ffff << 43)
            | (root >> 15 & 0xffff) << 16
            | (root >> 31 & 0x1f_ffff) << 43;
        self
    }

    /// Interrupt table root: SPA, bits 51:6.
    pub const fn int_table_root(self) -> PhysAddr {
        PhysAddr::new(self.0[2] & INT_ROOT)
    }

    /// `self` with bits 51:6 of `root` as the interrupt table root.
    #[must_use]
    pub const fn with_int_table_root(mut self, root: PhysAddr) -> Self {
        self.0[2] = self.0[2] & !INT_ROOT | root.get() & INT_ROOT;
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_the_table_says() {
        let dte = Dte::default()
            .with_v(true)
            .with_tv(true)
            .with_mode(3)
            .with_ir(true)
            .with_iw(true)
            .with_host_root(PhysAddr::new(0x12_3456_7000))
            .with_domain_id(0xbeef)
            .with_iv(true)
            .with_int_tab_len(9)
            .with_int_ctl(INT_CTL_REMAP)
            .with_int_table_root(PhysAddr::new(0xabcd_e080));
        assert_eq!(dte.0, [0x6000_0012_3456_7603, 0xbeef, 0x2000_0000_abcd_e093, 0]);
    }

    #[test]
    fn the_gcr3_root_is_put_together_from_its_three_parts() {
        let root = 0x000f_edcb_a987_6000;
        let dte = Dte([0, 0xffff, 0, 0]).with_gcr3_root(root);
        assert_eq!(dte.gcr3_root(), root);
        assert_eq!(dte.domain_id(), 0xffff);
        assert_eq!(dte.with_gcr3_root(0), Dte([0, 0xffff, 0, 0]));
    }
}
