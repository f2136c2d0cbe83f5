//! Leaves of one size for consecutive memory: which size, and their words.

use lychgate_types::PhysAddr;
use lychgate_types::sync::AtomicU64;

use crate::format::{Format, item_shift, leaf_entries};
use crate::words;

/// Leaves of 2^`shift` bytes each, `bytes` together.
#[derive(Clone, Copy)]
pub(super) struct Leaves {
    pub(super) shift: u32,
    pub(super) bytes: u64,
}

impl Leaves {
    /// The largest leaf for the start of a run, and as many of them until a larger one fits. All
    /// arguments are multiples of the lowest size in `sizes`, and `len` is not 0.
    #[inline(always)]
    pub(super) const fn best(sizes: u64, iova: u64, phys: u64, len: u64) -> Self {
        let not_larger = u64::MAX >> len.leading_zeros();
        let align = (iova | phys) & (iova | phys).wrapping_neg();
        // For both addresses 0, `align - 1` wraps to all ones: everything is aligned.
        let aligned = align | align.wrapping_sub(1);
        let shift = 63 - (sizes & not_larger & aligned).leading_zeros();
        let larger = sizes & !((2 << shift) - 1);
        let next = larger & larger.wrapping_neg();
        let mut bytes = len;
        if next != 0 && (iova ^ phys) & (next - 1) == 0 {
            let until = iova.wrapping_neg() & (next - 1);
            if until != 0 && until < len && len - until >= next {
                bytes = until;
            }
        }
        Self { shift, bytes: bytes >> shift << shift }
    }

    /// The entries that they take from the start of `words`, of a table of `level`; `None` when
    /// they pass its end, or a place where `phys` does not go on linearly in entries.
    #[inline(always)]
    pub(super) fn slots<F: Format>(
        self,
        level: u32,
        phys: u64,
        words: &[AtomicU64],
    ) -> Option<&[AtomicU64]> {
        if F::LINEAR_BITS < 64 {
            let last = phys.wrapping_add(self.bytes - 1);
            if (phys ^ last) >> (F::LINEAR_BITS & 63) != 0 {
                return None;
            }
        }
        words.get(..usize::try_from(self.bytes >> item_shift::<F>(level)).ok()?)
    }

    /// Writes leaves of this size of consecutive memory from `phys` to all of `slots`, entries of
    /// `level`.
    #[inline(always)]
    pub(super) fn write<F: Format>(
        self,
        slots: &[AtomicU64],
        level: u32,
        phys: u64,
        attributes: u64,
    ) {
        let item = item_shift::<F>(level);
        if self.shift == item {
            let first = F::leaf(level, item, PhysAddr::new(phys), attributes);
            words::fill(slots, first, F::address(PhysAddr::new(1 << item)));
        } else {
            write_groups::<F>(slots, level, self.shift, phys, attributes);
        }
    }
}

/// As [`Leaves::write`], for leaves of several entries each.
#[inline(never)]
fn write_groups<F: Format>(
    slots: &[AtomicU64],
    level: u32,
    shift: u32,
    phys: u64,
    attributes: u64,
) {
    let mut phys = PhysAddr::new(phys);
    for slots in slots.chunks(leaf_entries::<F>(level, shift)) {
        let first = F::leaf(level, shift, phys, attributes);
        words::fill(slots, first, F::replica_step(level, shift));
        phys = phys.wrapping_add(1 << shift);
    }
}
