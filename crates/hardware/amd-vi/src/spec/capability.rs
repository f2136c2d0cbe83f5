//! The capability block in the configuration space of the IOMMU's PCI function, class 08/06/00
//! (AMD 48882 3.2). Accesses are 32 bits.

/// PCI capability id of a secure device, which an IOMMU is.
pub const CAP_ID: u8 = 0x0f;
/// CapType of an IOMMU in [`HEADER`] bits 18:16.
pub const CAP_TYPE_IOMMU: u32 = 3;
/// CapRev in [`HEADER`] bits 23:19.
pub const CAP_REV: u32 = 1;

/// Base class, sub class, programming interface of the PCI function.
pub const CLASS_CODE: [u8; 3] = [0x08, 0x06, 0x00];

/// Capability header, read only: CapId 7:0, CapPtr 15:8, CapType 18:16, CapRev 23:19, then the
/// flags below.
pub const HEADER: u16 = 0x00;
/// Low half of the MMIO base: Enable 0, address 31:14.
pub const BASE_LOW: u16 = 0x04;
/// High half of the MMIO base: address 63:32.
pub const BASE_HIGH: u16 = 0x08;
/// Range, read only: UnitID 4:0, RngValid 7, bus 15:8, first device 23:16, last device 31:24.
pub const RANGE: u16 = 0x0c;
/// Miscellaneous information 0, read only: MsiNum 4:0, GVAsize 7:5, PAsize 14:8, VAsize 21:15,
/// HtAtsResv 22, MsiNumPPR 31:27.
pub const MISC0: u16 = 0x10;
/// Miscellaneous information 1, read only: MsiNumGA 4:0.
pub const MISC1: u16 = 0x14;
/// Bytes of the block.
pub const SIZE: u16 = 0x18;

/// [`HEADER`]: devices may have IOTLBs, so INVALIDATE_IOTLB_PAGES works.
pub const HEADER_IOTLB_SUP: u32 = 1 << 24;
/// [`HEADER`]: HyperTransport tunnel.
pub const HEADER_HT_TUNNEL: u32 = 1 << 25;
/// [`HEADER`]: not-present page-table entries are cached too.
pub const HEADER_NP_CACHE: u32 = 1 << 26;
/// [`HEADER`]: the extended feature register exists.
pub const HEADER_EFR_SUP: u32 = 1 << 27;
/// [`HEADER`]: [`MISC1`] exists.
pub const HEADER_CAP_EXT: u32 = 1 << 28;

/// [`BASE_LOW`]: the MMIO region decodes and the base is locked; write 1 to set.
pub const BASE_ENABLE: u32 = 1 << 0;
/// [`BASE_LOW`]: address bits of a 16 KiB region.
pub const BASE_LOW_ADDRESS: u32 = 0xffff_c000;
