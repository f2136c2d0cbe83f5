//! What a space is like, fixed when it is made: bounds, granule, size classes, windows.

use lychgate_types::Iova;

use super::error::{AllocError, ConfigError};
use super::ranges::Want;

/// Size classes: 2^0 to 2^12 granules, 4 KiB to 16 MiB where a granule is a page. Linux caches
/// 2^0 to 2^5.
pub(super) const CLASSES: usize = 13;

/// At or below [`Shape::split`], and above it.
pub(super) const WINDOWS: usize = 2;

/// The window in which 32-bit devices find their IOVA.
pub(super) const LOW: usize = 0;

/// Last IOVA of the window that 32-bit devices reach.
const LOW_LAST: u64 = u32::MAX as u64;

/// Most entries of a magazine, as Linux has it.
const MAGAZINE: u64 = 127;

/// A magazine holds this part of its window at most, so that what waits for one size does not
/// starve the others.
const WINDOW_PART: u64 = 512;

/// Bounds and granule of a space.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    /// First byte that can be given, not 0.
    pub(super) first: u64,
    /// Last byte.
    pub(super) last: u64,
    granule_shift: u32,
    /// Last byte of the low window: `u64::MAX` when there is no other.
    pub(super) split: u64,
}

impl Shape {
    pub(super) fn new(first: Iova, last: Iova, granule: u64) -> Result<Self, ConfigError> {
        if !granule.is_power_of_two() || granule > 1 << 48 {
            return Err(ConfigError::Granule);
        }
        // A device that was never told an address uses 0: it is nobody's, as in Linux.
        let first = first.get().max(1).checked_next_multiple_of(granule);
        let rest = last.get().checked_sub(granule - 1).ok_or(ConfigError::Aperture)?;
        let last = (rest & !(granule - 1)) + (granule - 1);
        let first = first.filter(|first| *first <= last).ok_or(ConfigError::Aperture)?;
        let split = if last <= LOW_LAST { u64::MAX } else { LOW_LAST.max(granule - 1) };
        Ok(Self { first, last, granule_shift: granule.trailing_zeros(), split })
    }

    pub(super) const fn granule(&self) -> u64 {
        1 << self.granule_shift
    }

    /// The class of `len` bytes: log2 of the granules of one of its ranges. What has no class, 0
    /// bytes too, gives [`CLASSES`] or more.
    #[inline(always)]
    pub(super) const fn class(&self, len: u64) -> usize {
        let granules_but_one = len.wrapping_sub(1) >> self.granule_shift;
        (u64::BITS - granules_but_one.leading_zeros()) as usize
    }

    /// Bytes of a range of `class`.
    pub(super) const fn class_bytes(&self, class: usize) -> u64 {
        self.granule() << class
    }

    /// The window of an address, or of a request with that limit.
    #[inline(always)]
    pub(super) fn window(&self, address: u64) -> usize {
        usize::from(address > self.split)
    }

    /// What to ask the tree for: a range of the length's class, or just the granules of a length
    /// beyond the classes; always aligned to the next power of two.
    pub(super) fn want(&self, len: u64, limit: Iova) -> Result<Want, AllocError> {
        let limit = limit.get().min(self.last);
        let bytes = self.bytes(len).ok_or(if len == 0 {
            AllocError::Empty
        } else {
            AllocError::NoSpace
        })?;
        let align = bytes.checked_next_power_of_two().ok_or(AllocError::NoSpace)?;
        Ok(Want { bytes, align, limit })
    }

    /// Bytes that an allocation of `len` bytes takes.
    pub(super) fn bytes(&self, len: u64) -> Option<u64> {
        let class = self.class(len);
        match len {
            0 => None,
            _ if class < CLASSES => Some(self.class_bytes(class)),
            _ => len.checked_next_multiple_of(self.granule()),
        }
    }

    /// Ranges of `class` that a magazine holds: 0 where the window is too small to keep any apart,
    /// and for what is no class.
    pub(super) fn magazine(&self, window: usize, class: usize) -> usize {
        if class >= CLASSES {
            return 0;
        }
        let (first, last) = if window == LOW {
            (self.first, self.last.min(self.split))
        } else {
            (self.first.max(self.split.saturating_add(1)), self.last)
        };
        let bytes = last.saturating_sub(first);
        let count = (bytes / WINDOW_PART / self.class_bytes(class)).min(MAGAZINE);
        usize::try_from(count).unwrap_or(0)
    }
}
