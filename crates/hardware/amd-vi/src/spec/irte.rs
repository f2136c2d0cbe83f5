//! Interrupt remapping table entries (AMD 48882 2.2.5). Control.GAEn chooses 128-bit entries.

use super::fields::{fields, mask};

/// Bytes of a 32-bit entry.
pub const BYTES_32: u64 = 4;
/// Bytes of a 128-bit entry.
pub const BYTES_128: u64 = 16;

/// IntType: fixed.
pub const INT_TYPE_FIXED: u64 = 0;
/// IntType: arbitrated (lowest priority).
pub const INT_TYPE_ARBITRATED: u64 = 1;

/// A 32-bit entry, in the low half of the word.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Irte32(pub [u64; 1]);

/// Reserved bits of an [`Irte32`]: GuestMode, which needs 128-bit entries, and 31:24.
pub const IRTE32_RESERVED: u64 = mask(7, 7) | mask(31, 24);

fields! { Irte32 {
    /// RemapEn: the entry is valid.
    remap_en, with_remap_en: 0[0];
    /// SupIOPF: faults of this entry are not logged.
    sup_iopf, with_sup_iopf: 0[1];
    /// IntType: [`INT_TYPE_FIXED`], [`INT_TYPE_ARBITRATED`]; others are reserved.
    int_type, with_int_type: 0[4:2];
    /// RqEoi: end of interrupt is requested.
    rq_eoi, with_rq_eoi: 0[5];
    /// DM: destination mode, set for logical.
    dm, with_dm: 0[6];
    /// Destination: APIC id.
    destination, with_destination: 0[15:8];
    /// Vector.
    vector, with_vector: 0[23:16];
} }

/// A 128-bit entry: two words. Software stores it in one 16-byte access.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Debug)]
pub struct Irte128(pub [u64; 2]);

/// Reserved bits of an [`Irte128`] with GuestMode = 0, by word. Bits 63:32 of word 0 hold the
/// GATag, which is not used in this mode but not checked either.
pub const IRTE128_RESERVED: [u64; 2] = [0, mask(55, 8)];

fields! { Irte128 {
    /// RemapEn: the entry is valid.
    remap_en, with_remap_en: 0[0];
    /// SupIOPF: faults of this entry are not logged.
    sup_iopf, with_sup_iopf: 0[1];
    /// IntType: [`INT_TYPE_FIXED`], [`INT_TYPE_ARBITRATED`]; others are reserved.
    int_type, with_int_type: 0[4:2];
    /// RqEoi: end of interrupt is requested.
    rq_eoi, with_rq_eoi: 0[5];
    /// DM: destination mode, set for logical.
    dm, with_dm: 0[6];
    /// GuestMode: the interrupt goes to a virtual APIC (GAMSup).
    guest_mode, with_guest_mode: 0[7];
    /// Destination 23:0 of the APIC id; only 7:0 counts while Control.XTEn is 0.
    destination_low, with_destination_low: 0[31:8];
    /// GATag.
    ga_tag, with_ga_tag: 0[63:32];
    /// Vector.
    vector, with_vector: 1[7:0];
    /// Destination 31:24 of the APIC id, with Control.XTEn.
    destination_high, with_destination_high: 1[63:56];
} }
