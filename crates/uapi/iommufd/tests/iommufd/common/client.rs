//! A process: memory for structures, memory that can be pinned, and the books about it.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::os::fd::BorrowedFd;
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
    /// Whether the frame of each page lies before that of the page before.
    pub(crate) scattered: bool,
    /// What was written, by physical address; all else is 0.
    bytes: HashMap<u64, u8>,
}

impl Books {
    /// The frame of page `n`.
    fn frame(&self, n: u64) -> u64 {
        PHYS + PAGE * if self.scattered { VA_PAGES - 1 - n } else { n }
    }

    /// Whether the frames in `runs` are pinned: their physical addresses, byte by byte.
    fn pinned_bytes(&self, runs: &[PhysRun]) -> Result<Vec<u64>, Errno> {
        let all = runs.iter().flat_map(|run| run.start.get()..run.start.get() + run.len);
        let pinned = |at: &u64| self.pins.contains_key(&(at & !(PAGE - 1)));
        let all: Vec<u64> = all.collect();
        if all.iter().all(pinned) { Ok(all) } else { Err(Errno::EFAULT) }
    }

    fn read(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), Errno> {
        let from = self.pinned_bytes(runs)?;
        assert_eq!(from.len(), to.len());
        for (to, from) in to.iter_mut().zip(from) {
            *to = self.bytes.get(&from).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn write(&mut self, runs: &[PhysRun], from: &[u8]) -> Result<(), Errno> {
        let to = self.pinned_bytes(runs)?;
        assert_eq!(from.len(), to.len());
        self.bytes.extend(to.into_iter().zip(from.iter().copied()));
        Ok(())
    }
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
        let books = self.books.lock().unwrap();
        books.pins.get(&books.frame((va - VA) / PAGE)).copied().unwrap_or(0)
    }

    /// The process is gone: what is not pinned cannot be any more.
    pub(crate) fn exit(&self) {
        self.books.lock().unwrap().end = Some(VA);
    }

    /// Where the bytes from a virtual address on are, if they are there.
    fn locate(books: &Books, va: u64, len: usize) -> Result<Vec<u64>, Errno> {
        let end = books.end.unwrap_or(VA + VA_PAGES * PAGE);
        if va < VA || va.checked_add(len as u64).is_none_or(|last| last > end) {
            return Err(Errno::EFAULT);
        }
        let at = |va: u64| books.frame((va - VA) / PAGE) + va % PAGE;
        Ok((va..va + len as u64).map(at).collect())
    }

    /// Where page `n` of the memory that can be pinned is.
    pub(crate) fn frame(&self, n: u64) -> u64 {
        self.books.lock().unwrap().frame(n)
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
    let first = (start - base) / PAGE;
    for page in first..first + len / PAGE {
        *books.pins.entry(books.frame(page)).or_default() += 1;
    }
    if books.scattered {
        let run = |page| PhysRun { start: PhysAddr::new(books.frame(page)), len: PAGE };
        return Ok((first..first + len / PAGE).map(run).collect());
    }
    Ok(vec![PhysRun { start: PhysAddr::new(books.frame(first)), len }])
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

    fn read_frames(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), Errno> {
        self.books.lock().unwrap().read(runs, to)
    }

    fn write_frames(&self, runs: &[PhysRun], from: &[u8]) -> Result<(), Errno> {
        self.books.lock().unwrap().write(runs, from)
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

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let books = self.books.lock().unwrap();
        let from = Self::locate(&books, at, to.len())?;
        for (to, from) in to.iter_mut().zip(from) {
            *to = books.bytes.get(&from).copied().unwrap_or(0);
        }
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let mut books = self.books.lock().unwrap();
        let to = Self::locate(&books, at, from.len())?;
        books.bytes.extend(to.into_iter().zip(from.iter().copied()));
        Ok(())
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

    fn read_frames(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), Errno> {
        self.books.lock().unwrap().read(runs, to)
    }

    fn write_frames(&self, runs: &[PhysRun], from: &[u8]) -> Result<(), Errno> {
        self.books.lock().unwrap().write(runs, from)
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
    /// Files of the machine's own.
    pub(crate) ours: Mutex<HashMap<i32, Arc<dyn OpenFile>>>,
    memory: Mutex<Vec<u8>>,
    /// Bytes of the scratch memory from here on cannot be written.
    pub(crate) read_only_from: Mutex<u64>,
    /// Whether a process maps whatever is asked for, and how often that was asked.
    mapped: Mutex<(bool, u32)>,
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
            ours: Mutex::default(),
            memory: Mutex::new(vec![0; SCRATCH_LEN]),
            read_only_from: Mutex::new(u64::MAX),
            mapped: Mutex::default(),
        }
    }

    pub(crate) fn set_mapped(&self, mapped: bool) {
        self.mapped.lock().unwrap().0 = mapped;
    }

    pub(crate) fn asked_for_mappings(&self) -> u32 {
        self.mapped.lock().unwrap().1
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
        if from >= VA {
            return self.mm.read(from, to);
        }
        let span = Self::span(from, to.len())?;
        to.copy_from_slice(&self.memory.lock().unwrap()[span]);
        Ok(())
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        if to >= VA {
            return self.mm.write(to, from);
        }
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

    fn file(&self, fd: i32) -> Option<Arc<dyn OpenFile>> {
        self.ours.lock().unwrap().get(&fd).cloned()
    }

    fn mem_file(&self, fd: i32) -> Result<Arc<dyn MemFile>, Errno> {
        match self.files.lock().unwrap().get(&fd) {
            Some(Some(file)) => Ok(Arc::<FakeFile>::clone(file)),
            Some(None) => Err(Errno::EINVAL),
            None => Err(Errno::EBADF),
        }
    }

    fn is_mapped(&self, _: BorrowedFd<'_>, _: u64, _: u64) -> bool {
        let mut mapped = self.mapped.lock().unwrap();
        mapped.1 += 1;
        mapped.0
    }

    fn eventfd(&self, _: i32) -> Result<Arc<dyn EventFd>, Errno> {
        Err(Errno::EBADF)
    }
}
