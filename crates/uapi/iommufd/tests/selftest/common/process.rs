//! A process whose memory can be read, written and pinned, and that has descriptors.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};

use lychgate_iommufd::{
    Accounting, Cap, Charged, Client, EventFd, MemFile, Mm, OpenFile, PinSource,
};
use lychgate_types::{Errno, PhysAddr, PhysRun};

pub(crate) const PAGE: u64 = 4096;
/// First address of the memory.
pub(crate) const BASE: u64 = 0x7f00_0000_0000;
/// Its pages.
pub(crate) const PAGES: u64 = 64;
/// Where it is in physical memory.
const PHYS: u64 = 0x100_0000_0000;

/// An address space.
pub(crate) struct Space {
    bytes: Mutex<Vec<u8>>,
    pins: Mutex<BTreeMap<u64, u32>>,
    /// Addresses of pages that are not there.
    pub(crate) absent: Mutex<HashSet<u64>>,
}

impl Space {
    fn span(at: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let first = at.checked_sub(BASE).and_then(|at| usize::try_from(at).ok());
        let first = first.ok_or(Errno::EFAULT)?;
        let end = first.checked_add(len).filter(|end| *end as u64 <= PAGES * PAGE);
        Ok(first..end.ok_or(Errno::EFAULT)?)
    }

    fn frames(runs: &[PhysRun]) -> impl Iterator<Item = u64> {
        runs.iter().flat_map(|run| {
            (run.start.get()..run.start.get() + run.len).step_by(usize::try_from(PAGE).unwrap())
        })
    }

    /// Pages that are pinned.
    pub(crate) fn pinned(&self) -> usize {
        self.pins.lock().unwrap().len()
    }
}

impl PinSource for Space {
    fn pin(&self, start: u64, len: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        assert!(start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0);
        Self::span(start, usize::try_from(len).unwrap())?;
        let absent = self.absent.lock().unwrap();
        if absent.iter().any(|page| (start..start + len).contains(page)) {
            return Err(Errno::EFAULT);
        }
        let run = PhysRun { start: PhysAddr::new(PHYS + (start - BASE)), len };
        let mut pins = self.pins.lock().unwrap();
        Self::frames(&[run]).for_each(|frame| *pins.entry(frame).or_default() += 1);
        Ok(vec![run])
    }

    fn unpin(&self, runs: &[PhysRun]) {
        let mut pins = self.pins.lock().unwrap();
        for frame in Self::frames(runs) {
            let count = pins.get_mut(&frame).expect("unpinned a page that was not pinned");
            *count -= 1;
            if *count == 0 {
                pins.remove(&frame);
            }
        }
    }

    fn read_frames(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), Errno> {
        let mut rest = to;
        for run in runs {
            let (here, after) = rest.split_at_mut(usize::try_from(run.len).unwrap());
            Mm::read(self, run.start.get() - PHYS + BASE, here)?;
            rest = after;
        }
        Ok(())
    }

    fn write_frames(&self, runs: &[PhysRun], from: &[u8]) -> Result<(), Errno> {
        let mut rest = from;
        for run in runs {
            let (here, after) = rest.split_at(usize::try_from(run.len).unwrap());
            Mm::write(self, run.start.get() - PHYS + BASE, here)?;
            rest = after;
        }
        Ok(())
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

    fn pin_count(&self, at: PhysAddr) -> u32 {
        self.pins.lock().unwrap().get(&at.get()).copied().unwrap_or(0)
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        to.copy_from_slice(&self.bytes.lock().unwrap()[Self::span(at, to.len())?]);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        self.bytes.lock().unwrap()[Self::span(at, from.len())?].copy_from_slice(from);
        Ok(())
    }
}

/// The process.
pub(crate) struct Process {
    pub(crate) space: Arc<Space>,
    files: Mutex<Vec<Option<Arc<dyn OpenFile>>>>,
    /// Writes to memory fail.
    pub(crate) read_only: Mutex<bool>,
}

impl Process {
    pub(crate) fn new() -> Self {
        let space = Space {
            bytes: Mutex::new(vec![0; usize::try_from(PAGES * PAGE).unwrap()]),
            pins: Mutex::default(),
            absent: Mutex::default(),
        };
        Self { space: Arc::new(space), files: Mutex::default(), read_only: Mutex::new(false) }
    }

    /// A descriptor for a file, from 100 on.
    pub(crate) fn give(&self, file: Arc<dyn OpenFile>) -> i32 {
        let mut files = self.files.lock().unwrap();
        files.push(Some(file));
        99 + i32::try_from(files.len()).unwrap()
    }

    pub(crate) fn close(&self, fd: i32) {
        let index = usize::try_from(fd - 100).unwrap();
        self.files.lock().unwrap()[index].take().unwrap().release();
    }

    /// Closes one of the open descriptors, counted from 0, if there are so many.
    pub(crate) fn close_nth(&self, nth: usize) {
        let file = {
            let mut files = self.files.lock().unwrap();
            files.iter_mut().filter(|file| file.is_some()).nth(nth).and_then(Option::take)
        };
        if let Some(file) = file {
            file.release();
        }
    }

    /// Whether a descriptor is open.
    pub(crate) fn is_open(&self) -> bool {
        self.files.lock().unwrap().iter().any(Option::is_some)
    }
}

impl Client for Process {
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        Mm::read(&*self.space, from, to)
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        if *self.read_only.lock().unwrap() {
            return Err(Errno::EFAULT);
        }
        Mm::write(&*self.space, to, from)
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

    fn file(&self, fd: i32) -> Option<Arc<dyn OpenFile>> {
        let index = usize::try_from(fd.checked_sub(100)?).ok()?;
        self.files.lock().unwrap().get(index)?.clone()
    }

    /// Descriptors below 100 are some other files.
    fn mem_file(&self, fd: i32) -> Result<Arc<dyn MemFile>, Errno> {
        if (0..100).contains(&fd) { Err(Errno::EINVAL) } else { Err(Errno::EBADF) }
    }

    fn eventfd(&self, _: i32) -> Result<Arc<dyn EventFd>, Errno> {
        Err(Errno::EBADF)
    }
}
