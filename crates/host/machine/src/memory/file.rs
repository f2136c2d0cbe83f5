//! Files in memory: how their bytes are reached, and the same file however it was found.
//!
//! A file that cannot shrink any more (`F_SEAL_SHRINK`, which QEMU sets on guest memory) is mapped,
//! and DMA is a copy. Any other file could be truncated by its owner between a check and a copy, which
//! would end this process by SIGBUS, so its bytes go through `pread` and `pwrite`, at about half the
//! speed. Files of huge pages cannot be written that way: they are mapped, and their size is checked
//! before each transfer.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use lychgate_iommufd::{MemFile, PinSource};
use lychgate_model::FileBytes;
use lychgate_types::{Errno, PhysRun};
use rustix::fs::{Mode, OFlags, SealFlags};
use rustix::io::Errno as Os;

use super::frames::{Backing, Frames};
use super::layout::{CHUNK, PAGE};
use super::space::Space;
use super::transfer::{self, Reach};
use crate::client::Span;
use crate::mapped::{self, Mapping};

/// Device and inode.
pub(crate) type FileKey = (u64, u64);

/// Most views that are kept of a file without a descriptor.
const MAX_VIEWS: usize = 64;

/// A file as the memory behind frames.
pub(crate) struct FileBacking {
    key: FileKey,
    opened: OnceLock<Opened>,
    views: Mutex<Vec<View>>,
    spaces: Arc<Spaces>,
}

/// The address spaces of all clients: one that has ended may have shared its memory with others.
#[derive(Default)]
struct Spaces(Mutex<Vec<Weak<Space>>>);

/// A descriptor of our own.
struct Opened {
    fd: OwnedFd,
    huge: bool,
    /// A size that the file has had, no larger than it is when it cannot shrink.
    size: AtomicU64,
}

/// A part of a file, mapped in a client that has no descriptor of it any more.
#[derive(Clone)]
struct View {
    space: Arc<Space>,
    start: u64,
    offset: u64,
    len: u64,
}

impl FileBacking {
    pub(crate) fn key(&self) -> FileKey {
        self.key
    }

    /// Size in bytes now; `None` when only clients have the file.
    pub(crate) fn size(&self) -> Option<u64> {
        self.opened.get()?.size_now()
    }

    /// Notes that `len` bytes from `offset` can be reached at `start` of a client.
    pub(crate) fn add_view(&self, space: &Arc<Space>, start: u64, offset: u64, len: u64) {
        let mut views = self.views.lock().unwrap_or_else(PoisonError::into_inner);
        views.retain(|view| {
            !(Arc::ptr_eq(&view.space, space)
                && (view.start, view.offset) == (start, offset)
                && view.len <= len)
        });
        if views.len() == MAX_VIEWS {
            views.remove(0);
        }
        views.push(View { space: Arc::clone(space), start, offset, len });
    }

    /// The mapping to use for a chunk, if mapping is safe; made at the first call.
    fn mapping<'a>(&self, slot: &'a OnceLock<Option<Mapping>>, chunk: u64) -> Option<&'a Mapping> {
        let opened = self.opened.get()?;
        slot.get_or_init(|| {
            let sealed = rustix::fs::fcntl_get_seals(&opened.fd);
            if !opened.huge && !sealed.is_ok_and(|seals| seals.contains(SealFlags::SHRINK)) {
                return None;
            }
            let len = usize::try_from(CHUNK).ok()?;
            Mapping::shared(opened.fd.as_fd(), chunk.checked_mul(CHUNK)?, len).ok()
        })
        .as_ref()
    }

    /// Fills `to` from `offset` in a chunk of the file.
    pub(crate) fn read(
        &self,
        map: &OnceLock<Option<Mapping>>,
        chunk: u64,
        offset: u64,
        to: &mut [u8],
    ) -> Option<()> {
        let position = chunk.checked_mul(CHUNK)?.checked_add(offset)?;
        if let Some(mapping) = self.mapping(map, chunk) {
            self.check(position, to.len())?;
            return mapping.read(usize::try_from(offset).ok()?, to);
        }
        if let Some(opened) = self.opened.get() {
            return read_file(opened, position, to);
        }
        self.through_views(position, to.len(), |space, span| space.access().read(&[span], to).ok())
    }

    /// Stores `from` at `offset` in a chunk of the file.
    pub(crate) fn write(
        &self,
        map: &OnceLock<Option<Mapping>>,
        chunk: u64,
        offset: u64,
        from: &[u8],
    ) -> Option<()> {
        let position = chunk.checked_mul(CHUNK)?.checked_add(offset)?;
        if let Some(mapping) = self.mapping(map, chunk) {
            self.check(position, from.len())?;
            return mapping.write(usize::try_from(offset).ok()?, from);
        }
        if let Some(opened) = self.opened.get() {
            return write_file(opened, position, from);
        }
        self.through_views(position, from.len(), |space, span| {
            space.access().write(&[span], from).ok()
        })
    }

    /// Stores bytes of another file at `offset` in a chunk of this one, if that takes one copy.
    pub(crate) fn write_from(
        &self,
        map: &OnceLock<Option<Mapping>>,
        chunk: u64,
        offset: u64,
        from: &FileBytes<'_>,
    ) -> Option<()> {
        let position = chunk.checked_mul(CHUNK)?.checked_add(offset)?;
        if let Some(mapping) = self.mapping(map, chunk) {
            self.check(position, from.len)?;
            return mapping.write_from(usize::try_from(offset).ok()?, from);
        }
        let opened = self.opened.get()?;
        let end = position.checked_add(from.len as u64)?;
        if opened.size_now()? < end {
            return None;
        }
        mapped::store(opened.fd.as_fd(), position, from)
    }

    /// The word at `offset` of a chunk, a multiple of 8, where the chunk is mapped.
    pub(crate) fn with_word<R>(
        &self,
        map: &OnceLock<Option<Mapping>>,
        chunk: u64,
        offset: u64,
        f: impl FnOnce(&AtomicU64) -> R,
    ) -> Option<R> {
        let mapping = self.mapping(map, chunk)?;
        self.check(chunk.checked_mul(CHUNK)?.checked_add(offset)?, 8)?;
        mapping.words64().get(usize::try_from(offset / 8).ok()?).map(f)
    }

    /// `None` when the range passes the end of the file.
    fn check(&self, position: u64, len: usize) -> Option<()> {
        let end = position.checked_add(len as u64)?;
        let opened = self.opened.get()?;
        if !opened.huge && end <= opened.size.load(Ordering::Relaxed) {
            return Some(());
        }
        let size = opened.size_now()?;
        opened.size.store(size, Ordering::Relaxed);
        (end <= size).then_some(())
    }

    /// Tries the views that cover the range, the newest first, then whoever else maps it: the
    /// process that pinned it may have ended.
    fn through_views(
        &self,
        position: u64,
        len: usize,
        mut access: impl FnMut(&Space, Span) -> Option<()>,
    ) -> Option<()> {
        let mut through = |view: &View| {
            let inside = position.checked_sub(view.offset)?;
            let fits = inside.checked_add(len as u64)? <= view.len;
            let start = view.start.checked_add(inside).filter(|_| fits)?;
            access(&view.space, Span { start, len })
        };
        let views = self.views.lock().unwrap_or_else(PoisonError::into_inner).clone();
        views.iter().rev().find_map(&mut through).or_else(|| {
            self.spaces.views_of(self.key).iter().find_map(|view| {
                through(view)?;
                self.add_view(&view.space, view.start, view.offset, view.len);
                Some(())
            })
        })
    }
}

impl Spaces {
    /// Where the clients that live map a file.
    fn views_of(&self, key: FileKey) -> Vec<View> {
        let spaces: Vec<_> = {
            let spaces = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            spaces.iter().filter_map(Weak::upgrade).collect()
        };
        let mut views = Vec::new();
        for space in spaces {
            let vmas = space.access().vmas(0, u64::MAX).unwrap_or_default();
            for vma in vmas.iter().filter(|vma| vma.shared && vma.file == Some(key)) {
                let (start, offset) = (vma.start, vma.offset);
                views.push(View { space: Arc::clone(&space), start, offset, len: vma.end - start });
            }
        }
        views
    }
}

impl Opened {
    fn size_now(&self) -> Option<u64> {
        u64::try_from(rustix::fs::fstat(&self.fd).ok()?.st_size).ok()
    }
}

fn read_file(opened: &Opened, mut position: u64, mut to: &mut [u8]) -> Option<()> {
    while !to.is_empty() {
        match rustix::io::pread(&opened.fd, &mut *to, position) {
            Ok(0) => return None,
            Ok(count) => {
                to = to.get_mut(count..)?;
                position += count as u64;
            }
            Err(Os::INTR) => {}
            Err(_) => return None,
        }
    }
    Some(())
}

/// Never makes the file longer: a write beyond its end fails.
fn write_file(opened: &Opened, mut position: u64, mut from: &[u8]) -> Option<()> {
    let end = position.checked_add(from.len() as u64)?;
    if opened.size_now()? < end {
        return None;
    }
    while !from.is_empty() {
        match rustix::io::pwrite(&opened.fd, from, position) {
            Ok(0) => return None,
            Ok(count) => {
                from = from.get(count..)?;
                position += count as u64;
            }
            Err(Os::INTR) => {}
            Err(_) => return None,
        }
    }
    Some(())
}

/// The files behind frames, each one once.
#[derive(Default)]
pub(crate) struct Files {
    known: Mutex<HashMap<FileKey, Weak<FileBacking>>>,
    spaces: Arc<Spaces>,
}

impl Files {
    /// Makes an address space known, in which files may be mapped.
    pub(crate) fn add_space(&self, space: &Arc<Space>) {
        let mut spaces = self.spaces.0.lock().unwrap_or_else(PoisonError::into_inner);
        spaces.retain(|space| space.strong_count() > 0);
        spaces.push(Arc::downgrade(space));
    }

    /// The file behind a descriptor of ours: `EINVAL` when it is not in memory.
    pub(crate) fn open(&self, fd: OwnedFd) -> Result<Arc<FileBacking>, Errno> {
        const TMPFS_MAGIC: i64 = 0x0102_1994;
        const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
        let kind = rustix::fs::fstatfs(&fd).map_err(os_errno)?.f_type;
        let stat = rustix::fs::fstat(&fd).map_err(os_errno)?;
        let huge = kind == HUGETLBFS_MAGIC;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        if !regular || !(huge || kind == TMPFS_MAGIC) {
            return Err(Errno::EINVAL);
        }
        let backing = self.get((stat.st_dev, stat.st_ino));
        if backing.opened.get().is_none() {
            let opened = Opened { fd: writable(fd), huge, size: AtomicU64::new(0) };
            // Another thread may have been first: its descriptor is as good.
            let _ = backing.opened.set(opened);
        }
        Ok(backing)
    }

    /// The file with a key, perhaps without any descriptor of it.
    pub(crate) fn get(&self, key: FileKey) -> Arc<FileBacking> {
        let mut files = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(backing) = files.get(&key).and_then(Weak::upgrade) {
            return backing;
        }
        files.retain(|_, file| file.strong_count() > 0);
        let backing = Arc::new(FileBacking {
            key,
            opened: OnceLock::new(),
            views: Mutex::default(),
            spaces: Arc::clone(&self.spaces),
        });
        files.insert(key, Arc::downgrade(&backing));
        backing
    }
}

/// A descriptor that can be written, where the file's rights allow one.
fn writable(fd: OwnedFd) -> OwnedFd {
    let flags = rustix::fs::fcntl_getfl(&fd).unwrap_or(OFlags::RDONLY);
    if flags.contains(OFlags::RDWR) {
        return fd;
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap_or(fd)
}

fn os_errno(error: Os) -> Errno {
    Errno::new(error.raw_os_error())
}

/// A file that a client hands over for DMA.
pub(crate) struct PinnedFile {
    pub(crate) frames: Arc<Frames>,
    pub(crate) backing: Arc<FileBacking>,
}

impl PinSource for PinnedFile {
    fn pin(&self, start: u64, len: u64, _writable: bool) -> Result<Vec<PhysRun>, Errno> {
        let size = self.len()?.next_multiple_of(PAGE);
        match start.checked_add(len) {
            Some(end) if end <= size => {}
            _ => return Err(Errno::EINVAL),
        }
        self.frames.pin(&Backing::File(Arc::clone(&self.backing)), start, len)
    }

    fn unpin(&self, runs: &[PhysRun]) {
        self.frames.unpin(runs);
    }

    fn read_frames(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), Errno> {
        transfer::read(self.reach(), runs, to).map_err(|_| Errno::EFAULT)
    }

    fn write_frames(&self, runs: &[PhysRun], from: &[u8]) -> Result<(), Errno> {
        transfer::write(self.reach(), runs, from).map_err(|_| Errno::EFAULT)
    }
}

impl PinnedFile {
    fn reach(&self) -> Reach<'_> {
        Reach { ram: None, frames: &self.frames }
    }
}

impl MemFile for PinnedFile {
    fn len(&self) -> Result<u64, Errno> {
        self.backing.size().ok_or(Errno::EINVAL)
    }
}
