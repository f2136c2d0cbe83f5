//! Getters and setters for the fields of a structure of 64-bit words.

/// Bits `hi` to `lo` set.
pub(crate) const fn mask(hi: u32, lo: u32) -> u64 {
    (u64::MAX >> (63 - hi + lo)) << lo
}

/// Implements fields of `$type`, a newtype over an array of words: `word[hi:lo]` makes a getter
/// and a setter of `u64`, `word[bit]` of `bool`.
macro_rules! fields {
    ($type:ident { $($rest:tt)* }) => {
        impl $type {
            $crate::spec::fields::field! { $($rest)* }
        }
    };
}

macro_rules! field {
    () => {};
    ($(#[$doc:meta])* $get:ident, $set:ident: $word:literal [$hi:literal : $lo:literal]; $($rest:tt)*) => {
        $(#[$doc])*
        pub const fn $get(self) -> u64 {
            (self.0[$word] & $crate::spec::fields::mask($hi, $lo)) >> $lo
        }

        #[doc = concat!("`self` with the field [`Self::", stringify!($get), "`] set to `value`.")]
        #[must_use]
        pub const fn $set(mut self, value: u64) -> Self {
            let mask = $crate::spec::fields::mask($hi, $lo);
            self.0[$word] = self.0[$word] & !mask | value << $lo & mask;
            self
        }

        $crate::spec::fields::field! { $($rest)* }
    };
    ($(#[$doc:meta])* $get:ident, $set:ident: $word:literal [$bit:literal]; $($rest:tt)*) => {
        $(#[$doc])*
        pub const fn $get(self) -> bool {
            self.0[$word] & 1 << $bit != 0
        }

        #[doc = concat!("`self` with the bit [`Self::", stringify!($get), "`] set to `value`.")]
        #[must_use]
        pub const fn $set(mut self, value: bool) -> Self {
            self.0[$word] = self.0[$word] & !(1 << $bit) | (value as u64) << $bit;
            self
        }

        $crate::spec::fields::field! { $($rest)* }
    };
}

pub(crate) use {field, fields};
