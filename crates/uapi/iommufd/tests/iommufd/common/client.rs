//! A process: memory for structures, memory that can be pinned, and the books about it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use lychgate_iommufd::{
    Accounting, Cap, Charged, Client, EventFd, MemFile, Mm, OpenFile, PinSource,
};
use lychgate_types::{Errno, PhysAddr, PhysRun};

use super::PAGE;

/// Where structures are put: 64 KiB.
pub(crate) const SCRATCH: u64 = 0x10_0000;
const SCRATCH_LEN: usize = 0x1_0000;
/// First address that can be pinned, aligned to 1 GiB.
pub(crate) const VA: u64 = 0x7f00_0000_0000;
/// Pages that can be pinned from there.
const VA_PAGES: u64 = 1 << 18;
/// Where they are in physical memory.
pub(crate) const PHYS: u64 = 0x1_0000_0000;

/// Counts of pins, and what shall go wrong.
#[derive(Default)]
pub(crate) struct Books {
    pub(crate) pins: BTreeMap<u64, u32>,
    /// Pages from here on are not there.
    pub(crate) end: Option<u64>,
    /// Pins that succeed before all fail.
    pub(crate) pins_left: Option<u32>,
    pub(crate) charged: HashMap<Accounting, u64>,
}

pub(crate) struct FakeMm {
    pub(crate) id: u64,
    pub(crate) books: Mutex<Books>,
}

impl FakeMm {
    pub(crate) fn new(id: u64) -> Arc<Self> {
        Arc::new(Self { id, books: Mutex::default() })
    }

    /// How often the page at an address is pinned.
    pub(crate) fn pins(&self, va: u64) -> u32 {
        let page = PHYS + (va - VA) / PAGE * PAGE;
        self.books.lock().unwrap().pins.get(&page).copied().unwrap_or(0)
    }

    /// Pages that are pinned.
    pub(crate) fn pinned(&self) -> usize {
        self.books.lock().unwrap().pins.len()
    }

    pub(crate) fn charged(&self, mode: Accounting) -> u64 {
        self.books.lock().unwrap().charged.get(&mode).copied().unwrap_or(0)
    }
}

impl Drop for FakeMm {
    /// Whoever pinned has let go by now.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let books = self.books.lock().unwrap();
            assert!(books.pins.is_empty() && books.charged.values().all(|pages| *pages == 0));
        }
    }
}

fn pin(books: &mut Books, base: u64, start: u64, len: u64) -> Result<Vec<PhysRun>, Errno> {
    assert!(start.is_multiple_of(PAGE) && len.is_multiple_of(PAGE) && len > 0);
    let end = books.end.unwrap_or(base + VA_PAGES * PAGE);
    if start < base || start + len > end || books.pins_left == Some(0) {
        return Err(Errno::EFAULT);
    }
    if let Some(left) = &mut books.pins_left {
        *left -= 1;
    }
    let phys = PHYS + (start - base);
    for page in (phys..phys + len).step_by(4096) {
        *books.pins.entry(page).or_default() += 1;
    }
    Ok(vec![PhysRun { start: PhysAddr::new(phys), len }])
}

fn unpin(books: &mut Books, runs: &[PhysRun]) {
    for run in runs {
        for page in (run.start.get()..run.start.get() + run.len).step_by(4096) {
            let count = books.pins.get_mut(&page).expect("unpinned a page that was not pinned");
            *count -= 1;
            if *count == 0 {
                books.pins.remove(&page);
            }
        }
    }
}

impl PinSource for FakeMm {
    fn pin(&self, start: u64, len: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        pin(&mut self.books.lock().unwrap(), VA, start, len)
    }

    fn unpin(&self, runs: &[PhysRun]) {
        unpin(&mut self.books.lock().unwrap(), runs);
    }
}

impl Mm for FakeMm {
    fn id(&self) -> u64 {
        self.id
    }

    fn charge(&self, pages: u64, mode: Accounting, limit: u64) -> Result<(), Errno> {
        let mut books = self.books.lock().unwrap();
        let charged = books.charged.entry(mode).or_default();
        if mode != Accounting::None && (*charged + pages).saturating_mul(PAGE) > limit {
            return Err(Errno::ENOMEM);
        }
        *charged += pages;
        Ok(())
    }

    fn uncharge(&self, pages: u64, mode: Accounting) {
        let mut books = self.books.lock().unwrap();
        let charged = books.charged.entry(mode).or_default();
        *charged = charged.checked_sub(pages).expect("uncharged more than was charged");
    }

    fn charged(&self) -> Charged {
        let books = self.books.lock().unwrap();
        let locked = books.charged.get(&Accounting::Mm).copied().unwrap_or(0);
        Charged { pinned: books.charged.values().sum(), locked }
    }

    fn pin_count(&self, at: PhysAddr) -> u32 {
        self.books.lock().unwrap().pins.get(&at.get()).copied().unwrap_or(0)
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }
}

/// A memfd of so many bytes.
pub(crate) struct FakeFile {
    pub(crate) len: u64,
    pub(crate) books: Mutex<Books>,
}

impl FakeFile {
    pub(crate) fn new(len: u64) -> Arc<Self> {
        Arc::new(Self { len, books: Mutex::default() })
    }
}

impl PinSource for FakeFile {
    fn pin(&self, start: u64, len: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        if start + len > self.len {
            return Err(Errno::EINVAL);
        }
        pin(&mut self.books.lock().unwrap(), 0, start, len)
    }

    fn unpin(&self, runs: &[PhysRun]) {
        unpin(&mut self.books.lock().unwrap(), runs);
    }
}

impl MemFile for FakeFile {
    fn len(&self) -> Result<u64, Errno> {
        Ok(self.len)
    }
}

pub(crate) struct FakeClient {
    pub(crate) mm: Arc<FakeMm>,
    pub(crate) caps: Mutex<HashSet<Cap>>,
    pub(crate) limit: Mutex<u64>,
    pub(crate) files: Mutex<HashMap<i32, Option<Arc<FakeFile>>>>,
    memory: Mutex<Vec<u8>>,
    /// Bytes of the scratch memory from here on cannot be written.
    pub(crate) read_only_from: Mutex<u64>,
}

impl FakeClient {
    pub(crate) fn new() -> Self {
        Self::with_mm(FakeMm::new(1))
    }

    pub(crate) fn with_mm(mm: Arc<FakeMm>) -> Self {
        Self {
            mm,
            caps: Mutex::default(),
            limit: Mutex::new(u64::MAX),
            files: Mutex::default(),
            memory: Mutex::new(vec![0; SCRATCH_LEN]),
            read_only_from: Mutex::new(u64::MAX),
        }
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at - SCRATCH).unwrap();
        self.memory.lock().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let at = usize::try_from(at - SCRATCH).unwrap();
        self.memory.lock().unwrap()[at..at + len].to_vec()
    }

    fn span(at: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let first = at.checked_sub(SCRATCH).and_then(|at| usize::try_from(at).ok());
        let first = first.ok_or(Errno::EFAULT)?;
        let end = first.checked_add(len).filter(|end| *end <= SCRATCH_LEN);
        Ok(first..end.ok_or(Errno::EFAULT)?)
    }
}

impl Client for FakeClient {
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        let span = Self::span(from, to.len())?;
        to.copy_from_slice(&self.memory.lock().unwrap()[span]);
        Ok(())
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        let span = Self::span(to, from.len())?;
        if to + from.len() as u64 > *self.read_only_from.lock().unwrap() {
            return Err(Errno::EFAULT);
        }
        self.memory.lock().unwrap()[span].copy_from_slice(from);
        Ok(())
    }

    fn capable(&self, cap: Cap) -> bool {
        self.caps.lock().unwrap().contains(&cap)
    }

    fn memlock_limit(&self) -> u64 {
        *self.limit.lock().unwrap()
    }

    fn mm(&self) -> Arc<dyn Mm> {
        Arc::<FakeMm>::clone(&self.mm)
    }

    fn file(&self, _: i32) -> Option<Arc<dyn OpenFile>> {
        None
    }

    fn mem_file(&self, fd: i32) -> Result<Arc<dyn MemFile>, Errno> {
        match self.files.lock().unwrap().get(&fd) {
            Some(Some(file)) => Ok(Arc::<FakeFile>::clone(file)),
            Some(None) => Err(Errno::EINVAL),
            None => Err(Errno::EBADF),
        }
    }

    fn eventfd(&self, _: i32) -> Result<Arc<dyn EventFd>, Errno> {
        Err(Errno::EBADF)
    }
}
