//! Address spaces of clients: which of their pages can be pinned, and whose limit counts.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lychgate_iommufd::{Accounting, Charged, Mm, PinSource};
use lychgate_types::{Errno, PhysAddr, PhysRun};
use rustix::fs::FileType;

use super::file::Files;
use super::frames::{Backing, Frames};
use super::layout::PAGE;
use super::transfer::{self, Reach};
use crate::client::{AddressSpace, Span, Vma};

/// An address space that the machine knows.
pub(crate) struct Space {
    id: u64,
    access: Arc<dyn AddressSpace>,
    /// `mm->locked_vm`, in pages.
    locked: AtomicU64,
    /// `mm->pinned_vm`, in pages.
    pinned: AtomicU64,
}

impl Space {
    pub(crate) fn new(id: u64, access: Arc<dyn AddressSpace>) -> Self {
        Self { id, access, locked: AtomicU64::new(0), pinned: AtomicU64::new(0) }
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn access(&self) -> &dyn AddressSpace {
        self.access.as_ref()
    }
}

/// What `RLIMIT_MEMLOCK` means for memory that is pinned for DMA.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum MemlockPolicy {
    /// Pinned memory is counted, and no limit refuses it: nothing is locked into the host's memory.
    #[default]
    Count,
    /// A mapping that passes the limit is refused, as by Linux.
    Enforce,
}

/// `user_struct.locked_vm` of each user, in pages.
#[derive(Default)]
pub(crate) struct Users {
    policy: MemlockPolicy,
    locked: Mutex<HashMap<u32, u64>>,
}

impl Users {
    pub(crate) fn new(policy: MemlockPolicy) -> Self {
        Self { policy, locked: Mutex::default() }
    }

    /// The limit that counts, in bytes, where a caller has `limit`.
    fn limit(&self, limit: u64) -> u64 {
        match self.policy {
            MemlockPolicy::Count => u64::MAX,
            MemlockPolicy::Enforce => limit,
        }
    }

    fn charge(&self, user: u32, pages: u64, limit: u64) -> Result<(), Errno> {
        let mut users = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        let locked = users.entry(user).or_default();
        *locked = within(*locked, pages, limit).ok_or(Errno::ENOMEM)?;
        Ok(())
    }

    fn uncharge(&self, user: u32, pages: u64) {
        let mut users = self.locked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(locked) = users.get_mut(&user) {
            *locked = locked.saturating_sub(pages);
        }
    }
}

/// `now + pages`, unless that passes a limit in bytes.
fn within(now: u64, pages: u64, limit: u64) -> Option<u64> {
    now.checked_add(pages).filter(|sum| limit == u64::MAX || *sum <= limit / PAGE)
}

/// An address space as the ABI uses it.
pub(crate) struct SpaceMm {
    pub(crate) space: Arc<Space>,
    pub(crate) frames: Arc<Frames>,
    pub(crate) files: Arc<Files>,
    pub(crate) users: Arc<Users>,
}

impl SpaceMm {
    fn reach(&self) -> Reach<'_> {
        Reach { ram: None, frames: &self.frames }
    }

    /// What backs the part of `vma` from `start` on, and at which position: `pin_user_pages` with
    /// `FOLL_LONGTERM`.
    fn backing(
        &self,
        vma: &Vma,
        start: u64,
        len: u64,
        writable: bool,
    ) -> Result<(Backing, u64), Errno> {
        let allowed = if writable { vma.write } else { vma.read };
        if !allowed || is_special(vma) {
            return Err(Errno::EFAULT);
        }
        let private = || (Backing::Private(Arc::clone(&self.space)), start);
        let Some(key) = vma.file.filter(|_| vma.shared) else {
            return Ok(private());
        };
        let inside = start.checked_sub(vma.start).ok_or(Errno::EFAULT)?;
        let offset = vma.offset.checked_add(inside).ok_or(Errno::EFAULT)?;
        if let Some(fd) = self.space.access().open_file(vma) {
            let kind = rustix::fs::fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
            let Ok(file) = self.files.open(fd) else {
                // Devices cannot be pinned; a file that a file system writes back cannot be pinned
                // for writing (`gup_fast_folio_allowed`, `writable_file_mapping_allowed`).
                let regular = kind.is_ok_and(|kind| kind.is_file());
                return if regular && !writable { Ok(private()) } else { Err(Errno::EFAULT) };
            };
            let end = offset.checked_add(len).ok_or(Errno::EFAULT)?;
            if file.size().is_none_or(|size| end > size.next_multiple_of(PAGE)) {
                return Err(Errno::EFAULT);
            }
            return Ok((Backing::File(file), offset));
        }
        if !is_memory(vma) {
            return if writable { Err(Errno::EFAULT) } else { Ok(private()) };
        }
        let file = self.files.get(key);
        file.add_view(&self.space, start, offset, len);
        Ok((Backing::File(file), offset))
    }
}

/// Mappings without pages that could be pinned: `VM_IO`, `VM_PFNMAP`, secret memory, and registers
/// of the machine's own devices.
fn is_special(vma: &Vma) -> bool {
    const KERNEL: [&str; 4] = ["[vvar]", "[vvar_vclock]", "[vsyscall]", "/secretmem"];
    let device = vma.name.starts_with("/dev/") && !is_memory(vma);
    device
        || KERNEL.iter().any(|name| vma.name.starts_with(name))
        || vma.name.starts_with(DEVICE_MEMFD)
}

/// How `/proc/PID/maps` names the registers of a device of the machine.
const DEVICE_MEMFD: &str = "/memfd:vfio-";

/// Whether the name is one of shared memory: a memfd, `shm_open`, System V, shared anonymous.
fn is_memory(vma: &Vma) -> bool {
    const MEMORY: [&str; 6] =
        ["/memfd:", "/dev/shm/", "/dev/zero", "/SYSV", "/dev/hugepages/", "/anon_hugepage"];
    MEMORY.iter().any(|name| vma.name.starts_with(name))
}

impl PinSource for SpaceMm {
    fn pin(&self, start: u64, len: u64, writable: bool) -> Result<Vec<PhysRun>, Errno> {
        let end = start.checked_add(len).ok_or(Errno::EFAULT)?;
        let vmas = self.space.access().vmas(start, len).map_err(|_| Errno::EFAULT)?;
        let mut parts = Vec::with_capacity(vmas.len());
        let mut at = start;
        for vma in vmas.iter().filter(|vma| vma.end > start) {
            if vma.start > at || at >= end {
                break;
            }
            let part = vma.end.min(end) - at;
            parts.push((self.backing(vma, at, part, writable)?, part));
            at += part;
        }
        if at < end {
            return Err(Errno::EFAULT);
        }
        let mut runs = Vec::new();
        for ((backing, position), part) in parts {
            match self.frames.pin(&backing, position, part) {
                Ok(more) => append(&mut runs, more),
                Err(error) => {
                    self.frames.unpin(&runs);
                    return Err(error);
                }
            }
        }
        Ok(runs)
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

/// Appends runs, merged where they touch.
fn append(runs: &mut Vec<PhysRun>, more: Vec<PhysRun>) {
    for run in more {
        match runs.last_mut() {
            Some(last) if last.start.get() + last.len == run.start.get() => last.len += run.len,
            _ => runs.push(run),
        }
    }
}

impl Mm for SpaceMm {
    fn id(&self) -> u64 {
        self.space.id()
    }

    fn charge(&self, pages: u64, mode: Accounting, limit: u64) -> Result<(), Errno> {
        let limit = self.users.limit(limit);
        match mode {
            Accounting::None => {}
            Accounting::User => self.users.charge(self.space.access().user(), pages, limit)?,
            Accounting::Mm => {
                let charged =
                    self.space.locked.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                        within(now, pages, limit)
                    });
                charged.map_err(|_| Errno::ENOMEM)?;
            }
        }
        self.space.pinned.fetch_add(pages, Ordering::Relaxed);
        Ok(())
    }

    fn uncharge(&self, pages: u64, mode: Accounting) {
        match mode {
            Accounting::None => {}
            Accounting::User => self.users.uncharge(self.space.access().user(), pages),
            Accounting::Mm => subtract(&self.space.locked, pages),
        }
        subtract(&self.space.pinned, pages);
    }

    fn charged(&self) -> Charged {
        Charged {
            pinned: self.space.pinned.load(Ordering::Relaxed),
            locked: self.space.locked.load(Ordering::Relaxed),
        }
    }

    fn pin_count(&self, at: PhysAddr) -> u32 {
        self.frames.pin_count(at)
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let span = [Span { start: at, len: to.len() }];
        let spans = if to.is_empty() { &[][..] } else { &span };
        self.space.access().read(spans, to).map_err(|_| Errno::EFAULT)
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let span = [Span { start: at, len: from.len() }];
        let spans = if from.is_empty() { &[][..] } else { &span };
        self.space.access().write(spans, from).map_err(|_| Errno::EFAULT)
    }
}

fn subtract(counter: &AtomicU64, pages: u64) {
    let less = |now: u64| Some(now.saturating_sub(pages));
    let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
}
