//! The size encoding of the S bit: how an address and one bit name a naturally aligned block
//! (AMD 48882 2.2.3 Table 14, 2.4.3).
//!
//! S = 0 is 4 KiB. S = 1 is 2^(p+1) bytes, where p is the lowest zero bit of the address at or
//! above bit 12: an address whose bit 12 is 0 names 8 KiB, 12 = 1 and 13 = 0 name 16 KiB.

use core::ops::RangeInclusive;

/// Address field that, with S = 1, names every address: 7FFF_FFFF_FFFF_F000h.
pub const EVERYTHING: u64 = 0x7fff_ffff_ffff_f000;

/// Smallest block, log2.
pub const MIN_ORDER: u32 = 12;

/// A naturally aligned power-of-two block of addresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Block {
    /// First address.
    pub start: u64,
    /// Size in bytes, log2: 12 to 64.
    pub order: u32,
}

impl Block {
    /// Every address.
    pub const ALL: Self = Self { start: 0, order: 64 };

    /// The smallest block that holds `first` and `last` (`first <= last`), at least 4 KiB.
    pub const fn covering(first: u64, last: u64) -> Self {
        let bits = 64 - (first ^ last).leading_zeros();
        let order = if bits < MIN_ORDER { MIN_ORDER } else { bits };
        Self { start: first & !low_bits(order), order }
    }

    /// The block that `address` (bits 63:12; lower bits are ignored) and `s` name. A first zero at
    /// bit 51 or above names everything, as does the absence of any.
    pub const fn decode(address: u64, s: bool) -> Self {
        if !s {
            return Self { start: address & !0xfff, order: MIN_ORDER };
        }
        let lowest_zero = (!(address | 0xfff)).trailing_zeros();
        if lowest_zero >= 51 {
            return Self::ALL;
        }
        let order = lowest_zero + 1;
        Self { start: address & !low_bits(order), order }
    }

    /// The address field (bits 63:12) and S that name this block. Blocks above 2^51 bytes become
    /// everything.
    pub const fn encode(self) -> (u64, bool) {
        if self.order <= MIN_ORDER {
            (self.start & !0xfff, false)
        } else if self.order > 51 {
            (EVERYTHING, true)
        } else {
            (self.start & !low_bits(self.order) | low_bits(self.order - 1) & !0xfff, true)
        }
    }

    /// Last address.
    pub const fn last(self) -> u64 {
        self.start | low_bits(self.order)
    }

    /// First to last address.
    pub const fn range(self) -> RangeInclusive<u64> {
        self.start..=self.last()
    }
}

const fn low_bits(order: u32) -> u64 {
    match u64::MAX.checked_shl(order) {
        Some(high) => !high,
        None => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_zero_gives_the_size() {
        assert_eq!(Block::decode(0x1234_5000, false), Block { start: 0x1234_5000, order: 12 });
        assert_eq!(Block::decode(0, true).order, 13);
        assert_eq!(Block::decode(0x1000, true).order, 14);
        assert_eq!(
            Block::decode(0x4000_0000 | 0x000f_f000, true),
            Block { start: 0x4000_0000, order: 21 }
        );
        assert_eq!(Block::decode(EVERYTHING, true), Block::ALL);
        assert_eq!(Block::decode(u64::MAX, true), Block::ALL);
    }

    #[test]
    fn encoding_is_the_inverse_of_decoding() {
        for order in 12..=51 {
            let start = 0xfff0_0000_0000_0000 & !low_bits(order) | 1 << 52;
            let block = Block { start, order };
            let (address, s) = block.encode();
            assert_eq!(Block::decode(address, s), block);
        }
        assert_eq!(Block::ALL.encode(), (EVERYTHING, true));
    }

    #[test]
    fn the_covering_block_holds_both_ends() {
        assert_eq!(Block::covering(0x1000, 0x1fff), Block { start: 0x1000, order: 12 });
        assert_eq!(Block::covering(0x1000, 0x2fff), Block { start: 0, order: 14 });
        assert_eq!(Block::covering(0, u64::MAX), Block::ALL);
    }
}
