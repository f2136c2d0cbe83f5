//! I/O virtual and physical addresses.

use core::fmt;
use core::ops::RangeInclusive;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address as a number of bytes from zero.
            pub const fn new(value: u64) -> Self {
                Self(value)
            }

            /// The number of bytes from zero.
            pub const fn get(self) -> u64 {
                self.0
            }

            /// `self + bytes`, or `None` when that passes the end of the 64-bit space.
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(value) => Some(Self(value)),
                    None => None,
                }
            }

            /// `self + bytes` modulo 2^64: for callers that have checked the end of the range.
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// Bytes from `start` to `self`, or `None` when `self` lies before it.
            pub const fn checked_offset_from(self, start: Self) -> Option<u64> {
                self.0.checked_sub(start.0)
            }

            /// Whether the address is a multiple of `size`, a power of two.
            pub const fn is_aligned(self, size: u64) -> bool {
                self.0 & size.wrapping_sub(1) == 0
            }

            /// The greatest multiple of `size`, a power of two, that is not above `self`.
            pub const fn align_down(self, size: u64) -> Self {
                Self(self.0 & !size.wrapping_sub(1))
            }

            /// The inclusive range of `len` bytes from `self`; `None` when `len` is 0 or the range
            /// passes the end of the 64-bit space. The last byte may be `u64::MAX`.
            pub fn span(self, len: u64) -> Option<RangeInclusive<Self>> {
                let last = self.0.checked_add(len.checked_sub(1)?)?;
                Some(self..=Self(last))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl From<$name> for u64 {
            fn from(value: $name) -> Self {
                value.0
            }
        }
    };
}

address! {
    /// An address as a device emits it, before translation.
    Iova
}

address! {
    /// A physical address as page tables hold it and a model's memory answers to it.
    PhysAddr
}

/// `len` bytes of consecutive physical memory from `start`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PhysRun {
    /// First byte.
    pub start: PhysAddr,
    /// Length in bytes.
    pub len: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_may_end_at_the_last_byte_but_not_beyond() {
        let last_page = Iova::new(u64::MAX - 0xfff);
        assert_eq!(last_page.span(0x1000), Some(last_page..=Iova::new(u64::MAX)));
        assert_eq!(last_page.span(0x1001), None);
        assert_eq!(last_page.span(0), None);
    }

    #[test]
    fn alignment_is_by_powers_of_two() {
        let at = PhysAddr::new(0x1234_5678);
        assert_eq!(at.align_down(0x1000), PhysAddr::new(0x1234_5000));
        assert!(!at.is_aligned(0x10));
        assert!(at.is_aligned(8));
    }
}
