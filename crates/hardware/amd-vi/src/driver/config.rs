//! What the driver is told of an IOMMU, and why it may refuse one.

use core::fmt;

use lychgate_types::{Errno, OutOfMemory, RequesterId};

use crate::spec::capability;

/// What registers do not say. The embedder knows it from the capability block in the IOMMU's
/// configuration space and from firmware (IVRS).
#[derive(Clone, Debug)]
pub struct Config {
    /// The greatest requester id behind the IOMMU. The device table has an entry for it and for
    /// every smaller one, rounded up to a power of two.
    pub last_device: RequesterId,
    /// NpCache: entries that are not present are cached too, so that mapping has to invalidate.
    pub np_cache: bool,
    /// VAsize: width of IOVAs in bits, 12 to 64. Page tables may reach less.
    pub iova_bits: u32,
    /// PAsize: width of physical addresses in bits, at most 52.
    pub output_bits: u32,
    /// log2 of the entries of the command buffer; taken into 8 to 15.
    pub command_buffer_len: u32,
    /// log2 of the entries of the event log; taken into 8 to 15.
    pub event_log_len: u32,
    /// How many times to look for the completion of commands before the hardware counts as stalled.
    pub patience: u32,
}

impl Default for Config {
    /// All requester ids, no NpCache, 64-bit IOVAs, 52-bit physical addresses, rings of
    /// 512 entries as in Linux, and patience for seconds.
    fn default() -> Self {
        Self {
            last_device: RequesterId::new(u16::MAX),
            np_cache: false,
            iova_bits: 64,
            output_bits: 52,
            command_buffer_len: 9,
            event_log_len: 9,
            patience: 1 << 26,
        }
    }
}

impl Config {
    /// From the capability block: its header and miscellaneous information 0 (AMD 48882 3.2). A
    /// width that is given as 0 is no limit.
    pub fn from_capability(header: u32, misc0: u32) -> Self {
        let bits = |shift: u32, most: u32| match misc0 >> shift & 0x7f {
            0 => most,
            bits => bits.min(most),
        };
        Self {
            np_cache: header & capability::HEADER_NP_CACHE != 0,
            iova_bits: bits(15, 64),
            output_bits: bits(8, 52),
            ..Self::default()
        }
    }
}

/// The IOMMU could not be taken over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum InitError {
    /// The hardware has no host page tables (EFR.HATS = 3).
    NoHostTranslation,
    /// No memory for the tables and rings.
    OutOfMemory,
    /// The hardware does not do what its registers tell it, or does not complete commands.
    Hardware,
}

impl InitError {
    /// The errno that stands for it.
    pub const fn errno(self) -> Errno {
        match self {
            Self::NoHostTranslation => Errno::ENODEV,
            Self::OutOfMemory => Errno::ENOMEM,
            Self::Hardware => Errno::EIO,
        }
    }
}

impl fmt::Display for InitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoHostTranslation => "the IOMMU has no host page tables",
            Self::OutOfMemory => "out of memory for the IOMMU's tables and rings",
            Self::Hardware => "the IOMMU does not complete commands",
        })
    }
}

impl core::error::Error for InitError {}

impl From<OutOfMemory> for InitError {
    fn from(_: OutOfMemory) -> Self {
        Self::OutOfMemory
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_capability_block_bounds_addresses_and_tells_of_np_cache() {
        let config = Config::from_capability(1 << 26, 48 << 15 | 44 << 8);
        assert!(config.np_cache);
        assert_eq!((config.iova_bits, config.output_bits), (48, 44));
        let config = Config::from_capability(0, 0x7f << 15);
        assert!(!config.np_cache);
        assert_eq!((config.iova_bits, config.output_bits), (64, 52));
    }
}
