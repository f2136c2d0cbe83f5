//! Event log entries (AMD 48882 2.5.2 to 2.5.15): 16 bytes, the code in bits 63:60 of word 0.

use super::fields::fields;

/// ILLEGAL_DEV_TABLE_ENTRY.
pub const ILLEGAL_DEV_TABLE_ENTRY: u64 = 0x1;
/// IO_PAGE_FAULT.
pub const IO_PAGE_FAULT: u64 = 0x2;
/// DEV_TAB_HARDWARE_ERROR.
pub const DEV_TAB_HARDWARE_ERROR: u64 = 0x3;
/// PAGE_TAB_HARDWARE_ERROR.
pub const PAGE_TAB_HARDWARE_ERROR: u64 = 0x4;
/// ILLEGAL_COMMAND_ERROR; word 1 is the SPA of the command.
pub const ILLEGAL_COMMAND_ERROR: u64 = 0x5;
/// COMMAND_HARDWARE_ERROR; word 1 is the SPA that was accessed.
pub const COMMAND_HARDWARE_ERROR: u64 = 0x6;
/// IOTLB_INV_TIMEOUT.
pub const IOTLB_INV_TIMEOUT: u64 = 0x7;
/// INVALID_DEVICE_REQUEST.
pub const INVALID_DEVICE_REQUEST: u64 = 0x8;
/// INVALID_PPR_REQUEST.
pub const INVALID_PPR_REQUEST: u64 = 0x9;
/// EVENT_COUNTER_ZERO.
pub const EVENT_COUNTER_ZERO: u64 = 0xa;
/// GUEST_EVENT_FAULT.
pub const GUEST_EVENT_FAULT: u64 = 0xb;
/// VIOMMU_HARDWARE_ERROR.
pub const VIOMMU_HARDWARE_ERROR: u64 = 0xc;
/// RMP_PAGE_FAULT.
pub const RMP_PAGE_FAULT: u64 = 0xd;
/// RMP_HARDWARE_ERROR.
pub const RMP_HARDWARE_ERROR: u64 = 0xe;

/// [`Event::hardware_type`]: master abort.
pub const HARDWARE_MASTER_ABORT: u64 = 1;
/// [`Event::hardware_type`]: target abort.
pub const HARDWARE_TARGET_ABORT: u64 = 2;
/// [`Event::hardware_type`]: data error.
pub const HARDWARE_DATA_ERROR: u64 = 3;

/// [`Event::request_type`] with TR = 0: read or non-posted write in the interrupt range.
pub const REQUEST_INTERRUPT_READ: u64 = 0;
/// [`Event::request_type`] with TR = 0: pre-translated request while DTE.I = 0.
pub const REQUEST_PRETRANSLATED: u64 = 1;
/// [`Event::request_type`] with TR = 0: port I/O while DTE.IoCtl = 0.
pub const REQUEST_PORT_IO: u64 = 2;
/// [`Event::request_type`] with TR = 0: posted write to system management that SysMgt forbids.
pub const REQUEST_SYSTEM_MANAGEMENT: u64 = 3;
/// [`Event::request_type`] with TR = 0: interrupt while DTE.IntCtl = 0.
pub const REQUEST_INTERRUPT: u64 = 4;
/// [`Event::request_type`] with TR = 0: reserved interrupt range.
pub const REQUEST_RESERVED_RANGE: u64 = 5;
/// [`Event::request_type`] with TR = 0: bad system management address.
pub const REQUEST_BAD_SYSTEM_MANAGEMENT: u64 = 6;

/// One event: two words.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Event(pub [u64; 2]);

fields! { Event {
    /// Code.
    code, with_code: 0[63:60];
    /// DeviceID.
    device_id, with_device_id: 0[15:0];
    /// PASID 19:16.
    pasid_high, with_pasid_high: 0[19:16];
    /// DomainID, or PASID 15:0 where GN is set.
    domain_or_pasid, with_domain_or_pasid: 0[47:32];
    /// GN: the address is a guest's.
    gn, with_gn: 0[48];
    /// NX: the request wanted to execute.
    nx, with_nx: 0[49];
    /// US: the request was a user's.
    us, with_us: 0[50];
    /// I: the request was an interrupt.
    i, with_i: 0[51];
    /// PR: the entry was present (interrupt: RemapEn was set).
    pr, with_pr: 0[52];
    /// RW: the request was a write.
    rw, with_rw: 0[53];
    /// PE: permission was missing.
    pe, with_pe: 0[54];
    /// RZ: a reserved bit was set. 0 with PR = 1 and PE = 0: bad level or size.
    rz, with_rz: 0[55];
    /// TR: the request was a translation request.
    tr, with_tr: 0[56];
    /// Type of the hardware errors, [`HARDWARE_MASTER_ABORT`] and following.
    hardware_type, with_hardware_type: 0[58:57];
    /// Type of INVALID_DEVICE_REQUEST, [`REQUEST_INTERRUPT_READ`] and following.
    request_type, with_request_type: 0[59:57];
    /// Address: IOVA, GVA, MSI address or SPA, as the code says.
    address, with_address: 1[63:0];
} }

impl Event {
    /// Name of the code, as the specification spells it.
    pub const fn name(self) -> &'static str {
        match self.code() {
            ILLEGAL_DEV_TABLE_ENTRY => "ILLEGAL_DEV_TABLE_ENTRY",
            IO_PAGE_FAULT => "IO_PAGE_FAULT",
            DEV_TAB_HARDWARE_ERROR => "DEV_TAB_HARDWARE_ERROR",
            PAGE_TAB_HARDWARE_ERROR => "PAGE_TAB_HARDWARE_ERROR",
            ILLEGAL_COMMAND_ERROR => "ILLEGAL_COMMAND_ERROR",
            COMMAND_HARDWARE_ERROR => "COMMAND_HARDWARE_ERROR",
            IOTLB_INV_TIMEOUT => "IOTLB_INV_TIMEOUT",
            INVALID_DEVICE_REQUEST => "INVALID_DEVICE_REQUEST",
            INVALID_PPR_REQUEST => "INVALID_PPR_REQUEST",
            EVENT_COUNTER_ZERO => "EVENT_COUNTER_ZERO",
            GUEST_EVENT_FAULT => "GUEST_EVENT_FAULT",
            VIOMMU_HARDWARE_ERROR => "VIOMMU_HARDWARE_ERROR",
            RMP_PAGE_FAULT => "RMP_PAGE_FAULT",
            RMP_HARDWARE_ERROR => "RMP_HARDWARE_ERROR",
            _ => "unknown event",
        }
    }
}
