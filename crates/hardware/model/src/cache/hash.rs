//! A hash for short keys of integers. Keys come from devices and guests, who gain nothing from
//! collisions but their own slow translations.

use std::hash::{BuildHasherDefault, Hasher};

/// Builds [`Folding`] hashers.
pub(super) type Fast = BuildHasherDefault<Folding>;

/// Multiplies to 128 bits and folds the halves, once for each integer of the key.
#[derive(Default)]
pub(super) struct Folding(u64);

impl Hasher for Folding {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u16(&mut self, value: u16) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = fold(self.0 ^ value ^ 0x2d35_8dcc_aa6c_78a5);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
}

/// Mixes all bits of a counter into all bits of the result (SplitMix64's finalizer).
pub(super) const fn scramble(value: u64) -> u64 {
    let value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

#[expect(clippy::cast_possible_truncation, reason = "the two halves of the product")]
fn fold(value: u64) -> u64 {
    let product = u128::from(value) * 0x8bb8_4b93_962e_acc9;
    (product >> 64) as u64 ^ product as u64
}
