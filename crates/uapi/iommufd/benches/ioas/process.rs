//! A process whose memory is one array for structures, and any amount to be pinned.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_iommufd::{
    Accounting, Cap, Charged, Client, EventFd, MemFile, Mm, OpenFile, PAGE_SIZE, PinSource,
};
use lychgate_types::{Errno, PhysAddr, PhysRun};

/// Where structures are.
pub(crate) const SCRATCH: u64 = 0x1000;
/// The memory that is mapped, aligned to 1 GiB.
pub(crate) const VA: u64 = 1 << 40;
const PHYS: u64 = 1 << 41;
/// Pages that can be mapped: 1 GiB.
const VA_PAGES: u64 = 1 << 18;

/// Pins cost nothing but their count: the figures are those of iommufd.
pub(crate) struct Space {
    /// Whether no page's frame is next to that of the page before.
    scattered: bool,
    pinned: AtomicU64,
}

impl Space {
    /// Pages that are pinned.
    pub(crate) fn pinned(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }
}

impl PinSource for Space {
    fn pin(&self, start: u64, len: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        let pages = len / PAGE_SIZE;
        self.pinned.fetch_add(pages, Ordering::Relaxed);
        let first = start.checked_sub(VA).ok_or(Errno::EFAULT)? / PAGE_SIZE;
        let at = |frame: u64| PhysAddr::new(PHYS + frame * PAGE_SIZE);
        if !self.scattered {
            return Ok(vec![PhysRun { start: at(first), len }]);
        }
        // Odd, so that it is a permutation.
        let frame = |page: u64| page.wrapping_mul(0x9e37_79b1) % VA_PAGES;
        let run = |page| PhysRun { start: at(frame(page)), len: PAGE_SIZE };
        Ok((first..first + pages).map(run).collect())
    }

    fn unpin(&self, runs: &[PhysRun]) {
        let bytes: u64 = runs.iter().map(|run| run.len).sum();
        self.pinned.fetch_sub(bytes / PAGE_SIZE, Ordering::Relaxed);
    }
}

impl Mm for Space {
    fn id(&self) -> u64 {
        1
    }

    fn charge(&self, _: u64, _: Accounting, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn uncharge(&self, _: u64, _: Accounting) {}

    fn charged(&self) -> Charged {
        Charged::default()
    }

    fn pin_count(&self, _: PhysAddr) -> u32 {
        0
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }
}

/// The caller.
pub(crate) struct Process {
    pub(crate) space: Arc<Space>,
    memory: RefCell<Vec<u8>>,
}

impl Process {
    pub(crate) fn new(scattered: bool) -> Self {
        let space = Arc::new(Space { scattered, pinned: AtomicU64::new(0) });
        Self { space, memory: RefCell::new(vec![0; 1 << 20]) }
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        assert!(self.write(at, bytes).is_ok());
    }

    fn range(at: u64, len: usize) -> std::ops::Range<usize> {
        let start = usize::try_from(at - SCRATCH).unwrap_or(usize::MAX);
        start..start.saturating_add(len)
    }
}

impl Client for Process {
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        let memory = self.memory.borrow();
        to.copy_from_slice(memory.get(Self::range(from, to.len())).ok_or(Errno::EFAULT)?);
        Ok(())
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        let mut memory = self.memory.borrow_mut();
        let to = memory.get_mut(Self::range(to, from.len())).ok_or(Errno::EFAULT)?;
        to.copy_from_slice(from);
        Ok(())
    }

    fn capable(&self, _: Cap) -> bool {
        false
    }

    fn memlock_limit(&self) -> u64 {
        u64::MAX
    }

    fn mm(&self) -> Arc<dyn Mm> {
        Arc::<Space>::clone(&self.space)
    }

    fn file(&self, _: i32) -> Option<Arc<dyn OpenFile>> {
        None
    }

    fn mem_file(&self, _: i32) -> Result<Arc<dyn MemFile>, Errno> {
        Err(Errno::EBADF)
    }

    fn eventfd(&self, _: i32) -> Result<Arc<dyn EventFd>, Errno> {
        Err(Errno::EBADF)
    }
}
