//! A client: memory from a fixed address, files, eventfds.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use lychgate_iommufd::{
    Accounting, Cap, Charged, Client, EventFd, MemFile, Mm, OpenFile, PinSource,
};
use lychgate_types::{Errno, PhysAddr, PhysRun};
use rustix::event::{EventfdFlags, eventfd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Where the client's memory begins.
pub(crate) const MEMORY: u64 = 0x10000;
/// Its length in bytes.
pub(crate) const LEN: u64 = 0x10000;
const LEN_USIZE: usize = 0x10000;

pub(crate) struct TestClient {
    memory: Mutex<Vec<u8>>,
    pub(crate) files: Mutex<BTreeMap<i32, Arc<dyn OpenFile>>>,
    eventfds: Mutex<BTreeMap<i32, Arc<TestEventFd>>>,
}

impl TestClient {
    pub(crate) fn new() -> Self {
        Self {
            memory: Mutex::new(vec![0; LEN_USIZE]),
            files: Mutex::default(),
            eventfds: Mutex::default(),
        }
    }

    /// Puts bytes at an offset into the memory, and gives the address.
    pub(crate) fn put(&self, offset: u64, bytes: &[u8]) -> u64 {
        self.write(MEMORY + offset, bytes).unwrap();
        MEMORY + offset
    }

    /// Puts a structure at the start of the memory, and gives the address.
    pub(crate) fn argument<T: IntoBytes + Immutable>(&self, value: &T) -> u64 {
        self.put(0, value.as_bytes())
    }

    pub(crate) fn get<T: FromBytes>(&self, address: u64) -> T {
        T::read_from_bytes(&self.bytes(address, size_of::<T>())).unwrap()
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(address, &mut bytes).unwrap();
        bytes
    }

    /// Opens an eventfd under a number.
    pub(crate) fn open_eventfd(&self, fd: i32) -> Arc<TestEventFd> {
        let eventfd = Arc::new(TestEventFd {
            count: AtomicU64::new(0),
            fd: eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
        });
        self.eventfds.lock().unwrap().insert(fd, Arc::clone(&eventfd));
        eventfd
    }

    /// Opens a file of ours under a number.
    pub(crate) fn open_file(&self, fd: i32, file: Arc<dyn OpenFile>) {
        self.files.lock().unwrap().insert(fd, file);
    }

    fn range(&self, at: u64, len: usize) -> Result<std::ops::Range<usize>, Errno> {
        let start = at.checked_sub(MEMORY).ok_or(Errno::EFAULT)?;
        let start = usize::try_from(start).map_err(|_| Errno::EFAULT)?;
        let end = start.checked_add(len).filter(|end| *end <= LEN_USIZE);
        Ok(start..end.ok_or(Errno::EFAULT)?)
    }
}

impl Client for TestClient {
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        let range = self.range(from, to.len())?;
        to.copy_from_slice(&self.memory.lock().unwrap()[range]);
        Ok(())
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        let range = self.range(to, from.len())?;
        self.memory.lock().unwrap()[range].copy_from_slice(from);
        Ok(())
    }

    fn capable(&self, _: Cap) -> bool {
        true
    }

    fn memlock_limit(&self) -> u64 {
        u64::MAX
    }

    fn mm(&self) -> Arc<dyn Mm> {
        Arc::new(TestMm)
    }

    fn file(&self, fd: i32) -> Option<Arc<dyn OpenFile>> {
        self.files.lock().unwrap().get(&fd).cloned()
    }

    fn mem_file(&self, _: i32) -> Result<Arc<dyn MemFile>, Errno> {
        Err(Errno::EBADF)
    }

    fn eventfd(&self, fd: i32) -> Result<Arc<dyn EventFd>, Errno> {
        match self.eventfds.lock().unwrap().get(&fd) {
            Some(eventfd) => Ok(Arc::clone(eventfd) as Arc<dyn EventFd>),
            None if self.files.lock().unwrap().contains_key(&fd) => Err(Errno::EINVAL),
            None => Err(Errno::EBADF),
        }
    }
}

/// Counts its signals; the client's own signals go through the descriptor.
pub(crate) struct TestEventFd {
    count: AtomicU64,
    fd: OwnedFd,
}

impl TestEventFd {
    /// Signals since it was asked last.
    pub(crate) fn take(&self) -> u64 {
        self.count.swap(0, Ordering::SeqCst)
    }

    /// The client signals it.
    pub(crate) fn signal_by_client(&self) {
        rustix::io::write(&self.fd, &1u64.to_le_bytes()).unwrap();
    }
}

impl EventFd for TestEventFd {
    fn signal(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(AsFd::as_fd(&self.fd))
    }
}

/// An address space whose virtual addresses are physical ones.
struct TestMm;

impl PinSource for TestMm {
    fn pin(&self, start: u64, len: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        Ok(vec![PhysRun { start: PhysAddr::new(start), len }])
    }

    fn unpin(&self, _: &[PhysRun]) {}
}

impl Mm for TestMm {
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
