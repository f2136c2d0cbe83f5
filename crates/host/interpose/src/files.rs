//! The files of ours that clients have open.
//!
//! Each file that the machine opens is an open file description in the clients: of a memfd of its
//! own, of the file's backing where it can be mapped, or of a pipe where it can be waited for. It
//! carries a mark ([`crate::sys::lock`]) for as long as anybody has it. Descriptors are recognised by
//! inode, and by mark where several descriptions share one. `inotify` hints at the end of one;
//! whether it has come is for the mark to say, because the kernel merges equal hints.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommufd::{OpenFile, Readiness};
use lychgate_types::Errno;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::fs::{MemfdFlags, Mode, OFlags, Stat};

use crate::process;
use crate::sys::lock;

/// How often a hint is looked at again: the hint comes just before the mark goes.
const LOOKS: u32 = 12;

/// How many threads' tables are kept open.
const MANY_THREADS: usize = 64;

/// Inode and device, as `stat` gives them.
pub(crate) type Inode = (u64, u64);

/// A file that a client has open.
pub(crate) struct Opened {
    /// What serves it.
    pub(crate) file: Arc<dyn OpenFile>,
    /// What it calls itself.
    pub(crate) name: String,
    /// The path that was opened, of a device node or a text; `None` for an anonymous inode.
    pub(crate) node: Option<PathBuf>,
    /// The file position for `read` and `write`, in bytes.
    pub(crate) position: Mutex<u64>,
}

/// A descriptor of ours that a client named.
pub(crate) struct Found {
    inode: Inode,
    /// How the client opened it.
    access: OFlags,
    pub(crate) opened: Arc<Opened>,
}

impl Found {
    pub(crate) fn readable(&self) -> bool {
        !self.access.contains(OFlags::WRONLY)
    }

    pub(crate) fn writable(&self) -> bool {
        writes(self.access)
    }
}

/// All of them.
pub(crate) struct Files {
    inotify: OwnedFd,
    table: Mutex<Table>,
    /// `/proc/THREAD/fd` of threads that made calls: a look-up in one that is open takes half the
    /// time.
    threads: Mutex<HashMap<u32, Arc<OwnedFd>>>,
    /// Held from the hints up to the end of the releases they bring about.
    releasing: Mutex<()>,
}

#[derive(Default)]
struct Table {
    inodes: HashMap<Inode, Entry>,
    watches: HashMap<i32, Inode>,
    next_mark: u64,
    /// Inodes with a hint, and how often it is still looked at.
    hints: HashMap<Inode, u32>,
}

struct Description {
    mark: u64,
    access: OFlags,
    opened: Arc<Opened>,
}

struct Entry {
    /// Another description of the inode, open for reading and writing, without a mark.
    probe: OwnedFd,
    watch: i32,
    descriptions: Vec<Description>,
}

/// Tells the pipe behind a file whether there is something to read.
struct Token {
    pipe: OwnedFd,
    state: Mutex<bool>,
}

impl Readiness for Token {
    fn set_readable(&self, readable: bool) {
        let mut state = guard(&self.state);
        if *state == readable {
            return;
        }
        // The pipe does not block, and holds one byte or none.
        let done = if readable {
            rustix::io::write(&self.pipe, b"!")
        } else {
            rustix::io::read(&self.pipe, &mut [0_u8; 16])
        };
        if done.is_ok() || !readable {
            *state = readable;
        }
    }
}

impl Files {
    /// None yet.
    pub(crate) fn new() -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let table = Mutex::new(Table { next_mark: 1, ..Table::default() });
        Ok(Self { inotify, table, threads: Mutex::default(), releasing: Mutex::new(()) })
    }

    /// What becomes readable when [`Files::settle`] has something to do.
    pub(crate) fn hints(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }

    /// Makes the description of a file that a client is to have; `access` is how the client opened
    /// it. When the description is closed, by the caller too, the file is released.
    pub(crate) fn open(&self, opened: Opened, access: OFlags) -> Result<OwnedFd, Errno> {
        let file = opened.file.clone();
        self.open_inode(opened, access).map_err(|error| {
            tracing::warn!(%error, file = file.name(), "cannot make a descriptor");
            file.release();
            Errno::new(error.raw_os_error().unwrap_or(libc::EMFILE))
        })
    }

    fn open_inode(&self, opened: Opened, access: OFlags) -> io::Result<OwnedFd> {
        let probe = inode_for(&opened)?;
        let stat = rustix::fs::fstat(&probe)?;
        let mut table = self.table();
        self.describe(&mut table, (stat.st_dev, stat.st_ino), probe, Arc::new(opened), access)
    }

    /// Another description of a file that is open, for `dup`: it shares all but the flags.
    pub(crate) fn again(&self, found: &Found) -> io::Result<OwnedFd> {
        let mut table = self.table();
        let entry = table.inodes.get(&found.inode).ok_or(io::ErrorKind::NotFound)?;
        let probe = entry.probe.try_clone()?;
        self.describe(&mut table, found.inode, probe, found.opened.clone(), found.access)
    }

    fn describe(
        &self,
        table: &mut Table,
        inode: Inode,
        probe: OwnedFd,
        opened: Arc<Opened>,
        access: OFlags,
    ) -> io::Result<OwnedFd> {
        let mark = table.next_mark;
        table.next_mark += 1;
        let description = reopen(probe.as_fd(), access)?;
        lock::put(description.as_fd(), mark, writes(access))?;
        let described = Description { mark, access, opened };
        if let Some(entry) = table.inodes.get_mut(&inode) {
            entry.descriptions.push(described);
        } else {
            let path = own_path(probe.as_fd());
            let watch = inotify::add_watch(&self.inotify, path, WatchFlags::CLOSE)?;
            let entry = Entry { probe, watch, descriptions: vec![described] };
            table.watches.insert(watch, inode);
            table.inodes.insert(inode, entry);
        }
        Ok(description)
    }

    /// The file behind a descriptor of a thread: `Ok(None)` for one that is not ours, `EBADF` for
    /// none at all.
    pub(crate) fn find(&self, thread: u32, fd: i32) -> Result<Option<Found>, Errno> {
        let stat = self.stat(thread, fd)?;
        Ok(self.find_inode(thread, fd, (stat.st_dev, stat.st_ino)))
    }

    /// The file behind a descriptor of a thread, by its inode. `EBADF` when it is not open.
    pub(crate) fn stat(&self, thread: u32, fd: i32) -> Result<Stat, Errno> {
        if fd < 0 {
            return Err(Errno::EBADF);
        }
        let known = guard(&self.threads).get(&thread).cloned();
        if let Some(stat) = known.and_then(|table| process::stat_file_in(&table, fd)) {
            return Ok(stat);
        }
        let table = Arc::new(process::open_table(thread).map_err(|_| Errno::EBADF)?);
        let stat = process::stat_file_in(&table, fd).ok_or(Errno::EBADF)?;
        let mut threads = guard(&self.threads);
        if threads.len() >= MANY_THREADS {
            threads.clear();
        }
        threads.insert(thread, table);
        Ok(stat)
    }

    /// [`Files::find`] for a descriptor whose inode is known.
    pub(crate) fn find_inode(&self, thread: u32, fd: i32, inode: Inode) -> Option<Found> {
        let table = self.table();
        let entry = table.inodes.get(&inode)?;
        let description = if let [only] = entry.descriptions.as_slice() {
            only
        } else {
            let mark = mark_of(thread, fd)?;
            entry.descriptions.iter().find(|description| description.mark == mark)?
        };
        let opened = description.opened.clone();
        Some(Found { inode, access: description.access, opened })
    }

    /// Releases the files of which the last reference is gone. Returns when that is done, also where
    /// another thread does it. `true` when it is worth to come again soon.
    pub(crate) fn settle(&self) -> bool {
        let _releasing = guard(&self.releasing);
        let (ended, again) = {
            let mut table = self.table();
            self.take_hints(&mut table);
            (self.look(&mut table), !table.hints.is_empty())
        };
        for opened in ended {
            opened.file.release();
        }
        again
    }

    /// Releases all, whoever has them.
    pub(crate) fn release_all(&self) {
        let _releasing = guard(&self.releasing);
        let table = std::mem::take(&mut *self.table());
        let all = table.inodes.into_values().flat_map(|entry| entry.descriptions);
        let mut released: Vec<Arc<Opened>> = Vec::new();
        for Description { opened, .. } in all {
            if !released.iter().any(|other| Arc::ptr_eq(other, &opened)) {
                opened.file.release();
                released.push(opened);
            }
        }
    }

    fn take_hints(&self, table: &mut Table) {
        let mut buffer = [const { MaybeUninit::uninit() }; 4096];
        let mut reader = inotify::Reader::new(&self.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            if event.events().contains(ReadFlags::QUEUE_OVERFLOW) {
                table.hints.extend(table.inodes.keys().map(|inode| (*inode, LOOKS)));
            } else if let Some(inode) = table.watches.get(&event.wd()) {
                table.hints.insert(*inode, LOOKS);
            }
        }
    }

    /// Removes descriptions whose mark is gone; gives the files of which none is left.
    fn look(&self, table: &mut Table) -> Vec<Arc<Opened>> {
        let mut ended = Vec::new();
        let hinted: Vec<Inode> = table.hints.keys().copied().collect();
        for inode in hinted {
            if let Some(looks) = table.hints.get_mut(&inode) {
                *looks -= 1;
                if *looks == 0 {
                    table.hints.remove(&inode);
                }
            }
            let Some(entry) = table.inodes.get_mut(&inode) else {
                table.hints.remove(&inode);
                continue;
            };
            let probe = entry.probe.as_fd();
            let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut entry.descriptions)
                .into_iter()
                .partition(|description| lock::is_held(probe, description.mark).unwrap_or(true));
            for Description { opened, .. } in gone {
                let kept = kept.iter().any(|other| Arc::ptr_eq(&other.opened, &opened));
                if !kept && !ended.iter().any(|other| Arc::ptr_eq(other, &opened)) {
                    ended.push(opened);
                }
            }
            if kept.is_empty() {
                let _ = inotify::remove_watch(&self.inotify, entry.watch);
                table.watches.remove(&entry.watch);
                table.hints.remove(&inode);
                table.inodes.remove(&inode);
            } else {
                entry.descriptions = kept;
            }
        }
        ended
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        guard(&self.table)
    }
}

/// The inode that a file gets in its clients, open for reading and writing.
fn inode_for(opened: &Opened) -> io::Result<OwnedFd> {
    if let Some(backing) = opened.file.backing() {
        return Ok(reopen(backing, OFlags::RDWR)?);
    }
    let (read, _write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let pipe = reopen(read.as_fd(), OFlags::RDWR | OFlags::NONBLOCK)?;
    let token = Token { pipe: pipe.try_clone()?, state: Mutex::new(false) };
    if opened.file.wait_with(Arc::new(token)) {
        return Ok(pipe);
    }
    let name = format!("lychgate:{}", opened.name);
    let memfd = rustix::fs::memfd_create(shorten(&name), MemfdFlags::CLOEXEC)?;
    Ok(memfd)
}

/// `memfd_create` takes 249 bytes.
fn shorten(name: &str) -> &str {
    name.char_indices().nth(60).and_then(|(end, _)| name.get(..end)).unwrap_or(name)
}

/// A new description of an open file's inode.
fn reopen(file: BorrowedFd<'_>, access: OFlags) -> rustix::io::Result<OwnedFd> {
    rustix::fs::open(own_path(file), access | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())
}

fn own_path(file: BorrowedFd<'_>) -> PathBuf {
    Path::new("/proc/self/fd").join(file.as_raw_fd().to_string())
}

fn writes(access: OFlags) -> bool {
    access.contains(OFlags::WRONLY) || access.contains(OFlags::RDWR)
}

/// The mark on a descriptor of a thread: `lock: 1: OFDLCK ADVISORY WRITE -1 00:01:7 MARK MARK`.
fn mark_of(thread: u32, fd: i32) -> Option<u64> {
    process::file_info(thread, fd, "lock")?.split_ascii_whitespace().last()?.parse().ok()
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
