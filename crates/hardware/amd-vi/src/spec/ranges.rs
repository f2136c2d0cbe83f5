//! Special address ranges: addresses that the page tables do not translate (AMD 48882 2.1.2
//! Table 3; HyperTransport I/O Link Specification, address map).

use core::ops::RangeInclusive;

/// Message-signalled interrupts of PCI functions.
pub const MSI: RangeInclusive<u64> = 0xfee0_0000..=0xfeef_ffff;
/// The HyperTransport reserved space that the ranges below divide.
pub const HT: RangeInclusive<u64> = 0xfd_0000_0000..=0xff_ffff_ffff;
/// HyperTransport interrupts and EOI.
pub const HT_INTERRUPT: RangeInclusive<u64> = 0xfd_f800_0000..=0xfd_f8ff_ffff;
/// Legacy PIC interrupt acknowledge.
pub const HT_PIC_IACK: RangeInclusive<u64> = 0xfd_f900_0000..=0xfd_f90f_ffff;
/// System management.
pub const HT_SYSTEM_MANAGEMENT: RangeInclusive<u64> = 0xfd_f910_0000..=0xfd_f91f_ffff;
/// HyperTransport address translation services.
pub const HT_ATS: RangeInclusive<u64> = 0xfd_fb00_0000..=0xfd_fbff_ffff;
/// Port I/O.
pub const HT_PORT_IO: RangeInclusive<u64> = 0xfd_fc00_0000..=0xfd_fdff_ffff;
/// Configuration space.
pub const HT_CONFIG: RangeInclusive<u64> = 0xfd_fe00_0000..=0xfd_ffff_ffff;
/// Extended configuration space.
pub const HT_EXTENDED_CONFIG: RangeInclusive<u64> = 0xfe_0000_0000..=0xfe_1fff_ffff;
