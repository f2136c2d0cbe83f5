//! The thread that made a call, as the files of the machine see it.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use lychgate_iommufd::{Cap, Client, EventFd, MemFile, Mm, OpenFile};
use lychgate_machine::Span;
use lychgate_types::Errno;
use rustix::fs::{FileType, OFlags};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use rustix::thread::CapabilitySet;

use crate::mappings;
use crate::process;
use crate::server::Server;
use crate::sys::memory;
use crate::sys::notify::Notification;

/// A caller, for as long as its notification is not answered.
pub(crate) struct Caller<'a> {
    pub(crate) server: &'a Server,
    pub(crate) notification: &'a Notification,
    pub(crate) process: u32,
    ahead: RefCell<Ahead>,
}

/// What was read behind a small read: most structures are read twice, for their size and then whole.
struct Ahead {
    start: u64,
    bytes: [u8; AHEAD],
    len: usize,
}

/// Larger than most structures.
const AHEAD: usize = 64;
/// Reading ahead stays in a page, since the next one need not be there.
const PAGE: u64 = 4096;

impl Ahead {
    /// Fills `to` if all of it is here.
    fn copy(&self, from: u64, to: &mut [u8]) -> bool {
        let offset = from.checked_sub(self.start).and_then(|offset| usize::try_from(offset).ok());
        let here = self
            .bytes
            .get(..self.len)
            .zip(offset)
            .and_then(|(bytes, offset)| bytes.get(offset..)?.get(..to.len()));
        here.map(|bytes| to.copy_from_slice(bytes)).is_some()
    }
}

/// An eventfd that this side holds too.
struct Event(OwnedFd);

impl EventFd for Event {
    fn signal(&self) {
        // It cannot block: at its maximum the counter would, and then it is signalled anyway.
        if !matches!(rustix::event::poll(&mut [self.writable()], Some(&NOW)), Ok(1)) {
            return;
        }
        let _ = rustix::io::write(&self.0, &1_u64.to_le_bytes());
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

const NOW: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };

impl Event {
    fn writable(&self) -> rustix::event::PollFd<'_> {
        rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::OUT)
    }
}

impl<'a> Caller<'a> {
    /// The one of a notification, in `process`.
    pub(crate) fn new(server: &'a Server, notification: &'a Notification, process: u32) -> Self {
        let ahead = RefCell::new(Ahead { start: 0, bytes: [0; AHEAD], len: 0 });
        Self { server, notification, process, ahead }
    }

    fn thread(&self) -> u32 {
        self.notification.pid
    }

    /// Fills `to`, as far as memory is there.
    pub(crate) fn read_some(&self, from: u64, to: &mut [u8]) -> Result<usize, Errno> {
        let spans = [Span { start: from, len: to.len() }];
        memory::read(self.thread(), &spans, to).map_err(|error| self.explain(&error))
    }

    /// `EFAULT`, and a warning when it is not the address that is wrong.
    fn explain(&self, error: &std::io::Error) -> Errno {
        if error.raw_os_error() == Some(libc::EPERM) {
            self.server.warn(
                self.process,
                "its memory cannot be read: it has made itself undumpable, its program file is not \
                 readable, or a security module forbids it",
            );
        }
        Errno::EFAULT
    }

    fn fetch(&self, fd: i32) -> Result<OwnedFd, Errno> {
        let pid = i32::try_from(self.process).ok().and_then(Pid::from_raw).ok_or(Errno::EBADF)?;
        let errno = |error: rustix::io::Errno| Errno::new(error.raw_os_error());
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(errno)?;
        pidfd_getfd(pidfd, fd, PidfdGetfdFlags::empty()).map_err(errno)
    }
}

impl Client for Caller<'_> {
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        if to.is_empty() {
            return Ok(());
        }
        let mut ahead = self.ahead.borrow_mut();
        if ahead.copy(from, to) {
            return Ok(());
        }
        let room = usize::try_from(PAGE - from % PAGE).unwrap_or(0).min(AHEAD);
        if to.len() < room {
            let Ahead { start, bytes, len } = &mut *ahead;
            *len = 0;
            *len = self.read_some(from, bytes.get_mut(..room).ok_or(Errno::EFAULT)?)?;
            *start = from;
            return if ahead.copy(from, to) { Ok(()) } else { Err(Errno::EFAULT) };
        }
        let length = self.read_some(from, to)?;
        if length == to.len() { Ok(()) } else { Err(Errno::EFAULT) }
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        if from.is_empty() {
            return Ok(());
        }
        self.ahead.borrow_mut().len = 0;
        // Another thread's `exec` ends this one, and the number would be the next program's.
        if !self.server.listener.waits(self.notification.id) {
            return Err(Errno::EFAULT);
        }
        let spans = [Span { start: to, len: from.len() }];
        match memory::write(self.thread(), &spans, from) {
            Ok(length) if length == from.len() => Ok(()),
            Ok(_) => Err(Errno::EFAULT),
            Err(error) => Err(self.explain(&error)),
        }
    }

    fn capable(&self, cap: Cap) -> bool {
        if self.server.system.grants(cap) {
            return true;
        }
        let cap = match cap {
            Cap::IpcLock => CapabilitySet::IPC_LOCK,
            Cap::SysRawio => CapabilitySet::SYS_RAWIO,
            Cap::SysResource => CapabilitySet::SYS_RESOURCE,
        };
        let thread = i32::try_from(self.thread()).ok().and_then(Pid::from_raw);
        let has = |thread| rustix::thread::capabilities(Some(thread)).map(|sets| sets.effective);
        // The machine's initial user namespace is the supervisor's.
        thread.is_some_and(|thread| has(thread).is_ok_and(|set| set.contains(cap)))
            && process::is_in_our_user_namespace(self.thread())
    }

    fn memlock_limit(&self) -> u64 {
        process::memlock_limit(self.thread()).unwrap_or(0)
    }

    fn mm(&self) -> Arc<dyn Mm> {
        self.server.mm(self.process, self.notification.instruction)
    }

    fn file(&self, fd: i32) -> Option<Arc<dyn OpenFile>> {
        let found = self.server.files.find(self.thread(), fd).ok()??;
        Some(found.opened.file.clone())
    }

    fn mem_file(&self, fd: i32) -> Result<Arc<dyn MemFile>, Errno> {
        let stat = process::stat_file(self.thread(), fd)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(Errno::EINVAL);
        }
        let opened = process::reopen(self.thread(), fd, OFlags::RDWR)
            .or_else(|_| process::reopen(self.thread(), fd, OFlags::RDONLY))
            .or_else(|_| {
                self.fetch(fd).map_err(|errno| rustix::io::Errno::from_raw_os_error(errno.get()))
            })
            .map_err(|_| Errno::EBADF)?;
        self.server.system.mem_file(opened)
    }

    fn is_mapped(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
        mappings::is_mapped(file, offset, len)
    }

    fn eventfd(&self, fd: i32) -> Result<Arc<dyn EventFd>, Errno> {
        if fd < 0 || !process::is_open(self.thread(), fd.cast_unsigned()) {
            return Err(Errno::EBADF);
        }
        let id = process::file_info(self.thread(), fd, "eventfd-id").ok_or(Errno::EINVAL)?;
        let file = match self.server.eventfds.get(&id) {
            Some(ours) => ours,
            None => self.fetch(fd).inspect_err(|_| {
                self.server.warn(
                    self.process,
                    "an eventfd of it cannot be fetched: pidfd_getfd is denied, and it was not made \
                     under this run",
                );
            })?,
        };
        Ok(Arc::new(Event(file)))
    }
}
