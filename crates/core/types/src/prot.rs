//! Permissions and attributes of a mapping (`include/linux/iommu.h`, `IOMMU_READ` and following).

use core::fmt;
use core::ops::{BitAnd, BitOr, BitOrAssign};

/// What a mapping allows and how memory is reached through it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Prot(u32);

impl Prot {
    /// No access at all.
    pub const NONE: Self = Self(0);
    /// The device may read (`IOMMU_READ`).
    pub const READ: Self = Self(1 << 0);
    /// The device may write (`IOMMU_WRITE`).
    pub const WRITE: Self = Self(1 << 1);
    /// DMA is cache coherent (`IOMMU_CACHE`).
    pub const CACHE: Self = Self(1 << 2);
    /// The device may not fetch instructions (`IOMMU_NOEXEC`).
    pub const NOEXEC: Self = Self(1 << 3);
    /// The target is device memory (`IOMMU_MMIO`).
    pub const MMIO: Self = Self(1 << 4);
    /// For privileged requests only (`IOMMU_PRIV`).
    pub const PRIV: Self = Self(1 << 5);

    /// Whether every bit of `other` is set in `self`.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The bits as `include/linux/iommu.h` numbers them.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// `self` or `other`, usable in constants.
    pub const fn union(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOr for Prot {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        self.union(other)
    }
}

impl BitOrAssign for Prot {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for Prot {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl fmt::Debug for Prot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const LETTERS: [(Prot, &str); 6] = [
            (Prot::READ, "r"),
            (Prot::WRITE, "w"),
            (Prot::CACHE, "c"),
            (Prot::NOEXEC, "n"),
            (Prot::MMIO, "m"),
            (Prot::PRIV, "p"),
        ];
        for (bit, letter) in LETTERS {
            f.write_str(if self.contains(bit) { letter } else { "-" })?;
        }
        Ok(())
    }
}
