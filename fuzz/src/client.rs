//! A client of the user interfaces: memory for structures, memory and files that can be pinned, the
//! books about both, and descriptors.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommufd::{
    Accounting, Cap, Charged, Client, EventFd, MemFile, Mm, OpenFile, PinSource,
};
use lychgate_types::{Errno, PhysAddr, PhysRun};
use rustix::event::{EventfdFlags, eventfd};

/// Size of a page in bytes.
pub const PAGE: u64 = 4096;
/// Where structures are put.
pub const SCRATCH: u64 = 0x10_0000;
/// Bytes that can be read and written there; around them is nothing.
pub const SCRATCH_LEN: usize = 0x4000;
/// First address that can be pinned.
pub const VA: u64 = 0x7f00_0000_0000;
/// Pages that can be pinned from there.
pub const VA_PAGES: u64 = 64;
/// The descriptor of a file whose pages can be pinned.
pub const FILE: i32 = 40;
/// Pages of that file.
pub const FILE_PAGES: u64 = 32;
/// The descriptor of a file of nobody's interest.
pub const OTHER_FILE: i32 = 41;
/// Descriptors of two eventfds that can only be signalled, and of one that can be waited on.
pub const EVENTFDS: [i32; 3] = [50, 51, 52];

/// Where the pages of memory and file are in physical memory.
const MEMORY_FRAMES: u64 = 0x1_0000_0000;
const FILE_FRAMES: u64 = 0x2_0000_0000;

/// The frame of a page that can be pinned.
pub fn memory_frame(va: u64) -> u64 {
    MEMORY_FRAMES + (va - VA)
}

/// The frame of a page of the file.
pub fn file_frame(offset: u64) -> u64 {
    FILE_FRAMES + offset
}

/// Counts of pins and charges. It is an error to undo what was not done.
#[derive(Debug, Default)]
pub struct Books {
    pins: Mutex<BTreeMap<u64, u32>>,
    charges: Mutex<BTreeMap<u8, u64>>,
    /// Pins that succeed before all fail; `u32::MAX` for no end.
    left: AtomicU32,
}

impl Books {
    fn new() -> Arc<Self> {
        Arc::new(Self { left: AtomicU32::new(u32::MAX), ..Self::default() })
    }

    /// Lets so many pins succeed, and all later ones fail.
    pub fn fail_after(&self, pins: Option<u32>) {
        self.left.store(pins.unwrap_or(u32::MAX), Ordering::Relaxed);
    }

    /// The frames that are pinned.
    pub fn pinned(&self) -> Vec<u64> {
        lock(&self.pins).keys().copied().collect()
    }

    /// Whether nothing is pinned and nothing charged.
    pub fn balanced(&self) -> bool {
        lock(&self.pins).is_empty() && lock(&self.charges).values().all(|pages| *pages == 0)
    }

    fn pin(&self, frame: u64, len: u64) -> Result<Vec<PhysRun>, Errno> {
        let left = self.left.load(Ordering::Relaxed);
        if left == 0 {
            return Err(Errno::EFAULT);
        }
        if left != u32::MAX {
            self.left.store(left - 1, Ordering::Relaxed);
        }
        let mut pins = lock(&self.pins);
        for page in (frame..frame + len).step_by(PAGE as usize) {
            *pins.entry(page).or_default() += 1;
        }
        Ok(vec![PhysRun { start: PhysAddr::new(frame), len }])
    }

    fn unpin(&self, runs: &[PhysRun]) {
        let mut pins = lock(&self.pins);
        for run in runs {
            assert!((run.start.get() | run.len).is_multiple_of(PAGE));
            for page in (run.start.get()..run.start.get() + run.len).step_by(PAGE as usize) {
                let count = pins.get_mut(&page).expect("unpinned a page that was not pinned");
                *count -= 1;
                if *count == 0 {
                    pins.remove(&page);
                }
            }
        }
    }
}

/// The client's address space.
#[derive(Debug)]
struct Space(Arc<Books>);

impl PinSource for Space {
    fn pin(&self, start: u64, len: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        assert!((start | len).is_multiple_of(PAGE) && len != 0);
        match start.checked_add(len) {
            Some(end) if start >= VA && end <= VA + VA_PAGES * PAGE => {
                self.0.pin(memory_frame(start), len)
            }
            _ => Err(Errno::EFAULT),
        }
    }

    fn unpin(&self, runs: &[PhysRun]) {
        self.0.unpin(runs);
    }
}

impl Mm for Space {
    fn id(&self) -> u64 {
        1
    }

    fn charge(&self, pages: u64, mode: Accounting, limit: u64) -> Result<(), Errno> {
        let mut charges = lock(&self.0.charges);
        let charged = charges.entry(mode as u8).or_default();
        let sum = *charged + pages;
        if mode != Accounting::None && sum.saturating_mul(PAGE) > limit {
            return Err(Errno::ENOMEM);
        }
        *charged = sum;
        Ok(())
    }

    fn uncharge(&self, pages: u64, mode: Accounting) {
        let mut charges = lock(&self.0.charges);
        let charged = charges.entry(mode as u8).or_default();
        *charged = charged.checked_sub(pages).expect("uncharged more than was charged");
    }

    fn charged(&self) -> Charged {
        let charges = lock(&self.0.charges);
        let locked = charges.get(&(Accounting::Mm as u8)).copied().unwrap_or(0);
        Charged { pinned: charges.values().sum(), locked }
    }

    fn pin_count(&self, at: PhysAddr) -> u32 {
        lock(&self.0.pins).get(&at.get()).copied().unwrap_or(0)
    }

    fn read(&self, _: u64, _: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), Errno> {
        Err(Errno::EFAULT)
    }
}

/// The client's file.
#[derive(Debug)]
struct File(Arc<Books>);

impl PinSource for File {
    fn pin(&self, start: u64, len: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        assert!((start | len).is_multiple_of(PAGE) && len != 0);
        match start.checked_add(len) {
            Some(end) if end <= FILE_PAGES * PAGE => self.0.pin(file_frame(start), len),
            _ => Err(Errno::EINVAL),
        }
    }

    fn unpin(&self, runs: &[PhysRun]) {
        self.0.unpin(runs);
    }
}

impl MemFile for File {
    fn len(&self) -> Result<u64, Errno> {
        Ok(FILE_PAGES * PAGE)
    }
}

/// An eventfd of the client.
#[derive(Debug, Default)]
struct Event {
    signals: AtomicU64,
    fd: Option<OwnedFd>,
}

impl EventFd for Event {
    fn signal(&self) {
        self.signals.fetch_add(1, Ordering::Relaxed);
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.fd.as_ref().map(AsFd::as_fd)
    }
}

/// The client.
pub struct FuzzClient {
    /// What it has pinned.
    pub books: Arc<Books>,
    /// Whether it has every capability, or none.
    pub privileged: AtomicBool,
    /// Its `RLIMIT_MEMLOCK` in bytes.
    pub limit: AtomicU64,
    space: Arc<Space>,
    memory: Mutex<Vec<u8>>,
    files: Mutex<BTreeMap<i32, Arc<dyn OpenFile>>>,
    waitable: Mutex<Option<Arc<Event>>>,
}

impl FuzzClient {
    /// A client with empty memory and no file of ours open.
    pub fn new() -> Self {
        let books = Books::new();
        Self {
            space: Arc::new(Space(Arc::clone(&books))),
            books,
            privileged: AtomicBool::new(true),
            limit: AtomicU64::new(u64::MAX),
            memory: Mutex::new(vec![0; SCRATCH_LEN]),
            files: Mutex::default(),
            waitable: Mutex::default(),
        }
    }

    /// Stores bytes at an offset of the memory for structures; those beyond it are dropped.
    pub fn put(&self, offset: usize, bytes: &[u8]) {
        let mut memory = lock(&self.memory);
        for (to, byte) in memory.iter_mut().skip(offset).zip(bytes) {
            *to = *byte;
        }
    }

    /// `len` bytes at an offset of the memory for structures, zeros beyond it.
    pub fn get(&self, offset: usize, len: usize) -> Vec<u8> {
        let memory = lock(&self.memory);
        let at = |n| memory.get(offset.saturating_add(n)).copied();
        (0..len).map(|n| at(n).unwrap_or(0)).collect()
    }

    /// Opens a file of ours under a descriptor.
    pub fn install(&self, fd: i32, file: Arc<dyn OpenFile>) {
        lock(&self.files).insert(fd, file);
    }

    /// Closes a descriptor of a file of ours.
    pub fn close(&self, fd: i32) {
        let file = lock(&self.files).remove(&fd);
        if let Some(file) = file {
            file.release();
        }
    }

    fn range(at: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let first = at.checked_sub(SCRATCH).and_then(|at| usize::try_from(at).ok());
        let first = first.ok_or(Errno::EFAULT)?;
        let end = first.checked_add(len).filter(|end| *end <= SCRATCH_LEN);
        Ok(first..end.ok_or(Errno::EFAULT)?)
    }
}

impl Default for FuzzClient {
    fn default() -> Self {
        Self::new()
    }
}

impl Client for FuzzClient {
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        let range = Self::range(from, to.len())?;
        to.copy_from_slice(&lock(&self.memory)[range]);
        Ok(())
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        let range = Self::range(to, from.len())?;
        lock(&self.memory)[range].copy_from_slice(from);
        Ok(())
    }

    fn capable(&self, _: Cap) -> bool {
        self.privileged.load(Ordering::Relaxed)
    }

    fn memlock_limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    fn mm(&self) -> Arc<dyn Mm> {
        Arc::clone(&self.space) as _
    }

    fn file(&self, fd: i32) -> Option<Arc<dyn OpenFile>> {
        lock(&self.files).get(&fd).cloned()
    }

    fn mem_file(&self, fd: i32) -> Result<Arc<dyn MemFile>, Errno> {
        match fd {
            FILE => Ok(Arc::new(File(Arc::clone(&self.books)))),
            OTHER_FILE => Err(Errno::EINVAL),
            _ => Err(Errno::EBADF),
        }
    }

    fn eventfd(&self, fd: i32) -> Result<Arc<dyn EventFd>, Errno> {
        if fd == EVENTFDS[2] {
            let mut waitable = lock(&self.waitable);
            let event = waitable.get_or_insert_with(|| {
                let fd = eventfd(0, EventfdFlags::CLOEXEC).expect("a descriptor is left");
                Arc::new(Event { signals: AtomicU64::new(0), fd: Some(fd) })
            });
            return Ok(Arc::clone(event) as _);
        }
        match EVENTFDS.contains(&fd) {
            true => Ok(Arc::<Event>::default()),
            false if fd == FILE || fd == OTHER_FILE => Err(Errno::EINVAL),
            false => Err(Errno::EBADF),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
