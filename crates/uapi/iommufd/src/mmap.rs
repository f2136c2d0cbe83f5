//! Memory of a context that clients map: pages that drivers share with guests
//! (`iommufd_fops_mmap`, `struct iommufd_mmap`).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lychgate_iommu::SharedMemory;
use lychgate_types::Errno;
use rustix::fs::MemfdFlags;

use crate::client::Client;
use crate::error::{Result, refuse};
use crate::file::MmapRequest;
use crate::mm::PAGE_SIZE;

/// The regions of one open file, in one sparse file. Offsets are never given out twice.
pub(crate) struct Regions {
    /// `None` when the machine could not make one: then there are no regions.
    file: Option<Arc<OwnedFd>>,
    list: Mutex<List>,
}

struct List {
    /// Where the next region begins.
    next: u64,
    regions: Vec<Arc<Region>>,
}

/// A region.
pub(crate) struct Region {
    file: Arc<OwnedFd>,
    offset: u64,
    len: u64,
    /// Whether a client ever asked to map it.
    asked: AtomicBool,
}

impl Regions {
    /// None yet. The first comes one page into the file, as in Linux, where 0 means nothing.
    pub(crate) fn new() -> Self {
        let file = rustix::fs::memfd_create("lychgate:/dev/iommu", MemfdFlags::CLOEXEC);
        let list = List { next: PAGE_SIZE, regions: Vec::new() };
        Self { file: file.ok().map(Arc::new), list: Mutex::new(list) }
    }

    /// The file that clients map.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|file| file.as_fd())
    }

    /// Makes a region. `EINVAL` when `len` is 0 or not a multiple of a page; `ENOMEM`.
    pub(crate) fn alloc(&self, len: u64) -> Result<Arc<Region>, Errno> {
        if len == 0 || !len.is_multiple_of(PAGE_SIZE) {
            return Err(Errno::EINVAL);
        }
        let file = self.file.as_ref().ok_or(Errno::ENOMEM)?;
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = list.next;
        let end = offset.checked_add(len).ok_or(Errno::ENOMEM)?;
        rustix::fs::ftruncate(file, end).map_err(|_| Errno::ENOMEM)?;
        list.next = end;
        let asked = AtomicBool::new(false);
        let region = Arc::new(Region { file: Arc::clone(file), offset, len, asked });
        list.regions.push(Arc::clone(&region));
        Ok(region)
    }

    /// Takes a region away: it can be mapped no more.
    pub(crate) fn free(&self, region: &Arc<Region>) {
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        list.regions.retain(|other| !Arc::ptr_eq(other, region));
    }

    /// Whether a client may map what it asks for. The whole of a region, and nothing else.
    pub(crate) fn check(&self, request: &MmapRequest) -> Result<()> {
        if !request.shared || !request.offset.is_multiple_of(PAGE_SIZE) {
            return refuse(Errno::EINVAL, "the mapping is private or does not start at a page");
        }
        if request.exec {
            return refuse(Errno::EPERM, "the mapping is executable");
        }
        let len = request.len.checked_next_multiple_of(PAGE_SIZE);
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it =
            |region: &&Arc<Region>| region.offset == request.offset && Some(region.len) == len;
        match list.regions.iter().find(is_it) {
            Some(region) => {
                region.asked.store(true, Ordering::Relaxed);
                Ok(())
            }
            None => refuse(Errno::ENXIO, "no region has this offset and this length"),
        }
    }
}

impl Region {
    /// Whether a process maps a part of it.
    pub(crate) fn is_mapped(&self, client: &dyn Client) -> bool {
        self.asked.load(Ordering::Relaxed)
            && client.is_mapped(self.file.as_fd(), self.offset, self.len)
    }

    /// Where byte `at` is in the file, if `len` bytes from there are in the region.
    fn position(&self, at: u64, len: usize) -> Result<u64, Errno> {
        let end = at.checked_add(len as u64).filter(|end| *end <= self.len);
        end.and_then(|_| self.offset.checked_add(at)).ok_or(Errno::EFAULT)
    }
}

impl SharedMemory for Region {
    fn offset(&self) -> u64 {
        self.offset
    }

    fn size(&self) -> u64 {
        self.len
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let position = self.position(at, to.len())?;
        let len = to.len();
        match rustix::io::pread(&self.file, to, position) {
            Ok(read) if read == len => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let position = self.position(at, from.len())?;
        match rustix::io::pwrite(&self.file, from, position) {
            Ok(written) if written == from.len() => Ok(()),
            _ => Err(Errno::EFAULT),
        }
    }
}
