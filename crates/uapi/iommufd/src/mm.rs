//! Memory that can be pinned for DMA: a process's address space, or a file.

use std::any::Any;

use lychgate_types::{Errno, PhysAddr, PhysRun};

/// Size of a page of the processes that are served, in bytes.
pub const PAGE_SIZE: u64 = 4096;

/// Something whose pages can be held in place while devices reach them.
///
/// Positions are virtual addresses for an address space and byte offsets for a file. They and the
/// lengths are multiples of [`PAGE_SIZE`].
pub trait PinSource: Send + Sync {
    /// Pins `len` bytes from `start` and gives their frames, adjacent ones merged. Each pin counts:
    /// a page pinned twice stays until it was unpinned twice.
    ///
    /// `EFAULT` when a page is not there or may not be written as asked, as `pin_user_pages` gives
    /// it; `EINVAL` past the end of a file. On an error nothing stays pinned.
    fn pin(&self, start: u64, len: u64, writable: bool) -> Result<Vec<PhysRun>, Errno>;

    /// Undoes one pin of the frames in `runs`, which need not be cut as `pin` gave them.
    fn unpin(&self, runs: &[PhysRun]);

    /// Fills `to`, as long as `runs` together, from frames that are pinned, whether or not the
    /// process that had them still lives: `EFAULT` where they cannot be reached.
    fn read_frames(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), Errno> {
        let _ = (runs, to);
        Err(Errno::EFAULT)
    }

    /// Stores `from` in pinned frames, as [`PinSource::read_frames`].
    fn write_frames(&self, runs: &[PhysRun], from: &[u8]) -> Result<(), Errno> {
        let _ = (runs, from);
        Err(Errno::EFAULT)
    }
}

/// Whose limit a pin counts against (`iommufd_ctx::account_mode`).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Accounting {
    /// Nobody's: the caller had `CAP_IPC_LOCK` when it mapped. Shown as `VmPin` all the same.
    None,
    /// The user's: pages of all the user's processes against the caller's `RLIMIT_MEMLOCK`.
    User,
    /// The address space's: `VmLck` against `RLIMIT_MEMLOCK`, as VFIO's containers count.
    Mm,
}

/// What is charged to an address space, in pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Charged {
    /// `mm->pinned_vm`, which `/proc/PID/status` shows as `VmPin`.
    pub pinned: u64,
    /// `mm->locked_vm`, `VmLck`: what [`Accounting::Mm`] counts.
    pub locked: u64,
}

/// The address space of a process, as it was when a call came: a later `exec` makes another.
pub trait Mm: PinSource {
    /// Distinct for each address space in the life of the machine.
    fn id(&self) -> u64;

    /// Counts `pages` pinned pages; `ENOMEM` when that passes `limit`, in bytes, the
    /// `RLIMIT_MEMLOCK` of the caller that mapped.
    fn charge(&self, pages: u64, mode: Accounting, limit: u64) -> Result<(), Errno>;

    /// Undoes a charge.
    fn uncharge(&self, pages: u64, mode: Accounting);

    /// What is charged now.
    fn charged(&self) -> Charged;

    /// How often the frame at `at` is pinned, by whomever; 0 where no frame is.
    fn pin_count(&self, at: PhysAddr) -> u32;

    /// Reads memory of the address space at `at`, whoever calls: `EFAULT` where nothing is.
    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno>;

    /// Writes memory of the address space at `at`, whoever calls.
    fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno>;
}

/// A file whose pages can be pinned: a memfd.
pub trait MemFile: PinSource + Any {
    /// Size in bytes now.
    fn len(&self) -> Result<u64, Errno>;

    /// Whether nothing is in it.
    fn is_empty(&self) -> Result<bool, Errno> {
        Ok(self.len()? == 0)
    }
}
