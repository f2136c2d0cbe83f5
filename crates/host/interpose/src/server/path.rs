//! Calls on paths.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use lychgate_iommufd::{Client, NewFile};
use lychgate_machine::Node;
use lychgate_types::Errno;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};

use super::{Answer, Called, Outcome, Server, low, signed};
use crate::attributes::Attributes;
use crate::caller::Caller;
use crate::names;
use crate::paths::{Last, Listing, Place, ProcessFile, Who};
use crate::process;
use crate::sys::notify::{At, Notification};

/// Flags that a reopened file may have; the others act at the open itself.
pub(super) const KEPT: OFlags =
    OFlags::RDONLY.union(OFlags::WRONLY).union(OFlags::RDWR).union(OFlags::NONBLOCK);

impl Server {
    pub(super) fn open(
        &self,
        n: &Notification,
        directory: i32,
        path: u64,
        flags: u32,
        mode: u64,
    ) -> Answer {
        let Some(path) = self.read_path(n, path) else { return Answer::GoOn };
        let flags = OFlags::from_bits_retain(flags);
        let exclusive = flags.contains(OFlags::CREATE | OFlags::EXCL);
        let last =
            if flags.contains(OFlags::NOFOLLOW) || exclusive { Last::Link } else { Last::Follow };
        match self.look_up(n, directory, &path, last) {
            Place::Host => Answer::GoOn,
            Place::HostBy(path) => self.open_real(n, &path, flags, low(mode)),
            Place::Both(path) => self.open_both(n, &path, flags, low(mode)),
            Place::Wrong(Errno::ENOENT) if flags.contains(OFlags::CREATE) => {
                Answer::Value(Err(Errno::EACCES))
            }
            Place::Wrong(errno) => Answer::Value(Err(errno)),
            Place::Descriptor(who, fd) => self.open_descriptor(n, &who, fd, flags),
            Place::Process(who, file) => self.open_process_file(n, &who, file, flags),
            Place::Machine(..) if exclusive => Answer::Value(Err(Errno::EEXIST)),
            Place::Machine(path, kind) => self.open_machine(n, &path, kind, flags),
        }
    }

    pub(super) fn openat2(&self, n: &Notification) -> Answer {
        let caller = Caller::new(self, n, n.pid);
        // struct open_how { __u64 flags, mode, resolve; }
        let mut how = [0; 24];
        if n.args[3] < 24 || caller.read(n.args[2], &mut how).is_err() {
            return Answer::GoOn;
        }
        let word = |at: usize| {
            how.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
        };
        // RESOLVE_NO_XDEV and NO_MAGICLINKS find the same; the others may not, and the kernel's
        // answer for the host is the honest one.
        let restricting = 0x04 | 0x08 | 0x10;
        let (Ok(flags), 0) = (u32::try_from(word(0)), word(16) & restricting) else {
            return Answer::GoOn;
        };
        self.open(n, signed(n.args[0]), n.args[1], flags, word(8))
    }

    fn open_machine(&self, n: &Notification, path: &Path, kind: FileType, flags: OFlags) -> Answer {
        let close_on_exec = flags.contains(OFlags::CLOEXEC);
        // A descriptor that is only a place cannot be handed over: one for reading does instead.
        if flags.contains(OFlags::PATH) && matches!(kind, FileType::RegularFile) {
            if flags.contains(OFlags::DIRECTORY) {
                return Answer::Value(Err(Errno::ENOTDIR));
            }
            let at = self.free_number(n.pid, 0).map_or(At::Lowest, At::Number);
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
            return self.open_at(n, &self.paths.in_tree(path), flags, at, close_on_exec);
        }
        if let Some(text) = self.system.attribute(path) {
            return self.open_text(n, path, text, flags);
        }
        match kind {
            FileType::Symlink => Answer::Value(Err(Errno::new(libc::ELOOP))),
            FileType::Directory if writes(flags) || flags.contains(OFlags::CREATE) => {
                Answer::Value(Err(Errno::new(libc::EISDIR)))
            }
            FileType::Directory => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | (flags & KEPT);
                self.open_at(n, &self.paths.in_tree(path), flags, At::Lowest, close_on_exec)
            }
            _ if flags.contains(OFlags::DIRECTORY) => Answer::Value(Err(Errno::ENOTDIR)),
            _ if self.system.node(path).is_some() => self.open_node(n, path, flags),
            // All other attributes of the machine are there to be read.
            _ if writes(flags) => Answer::Value(Err(Errno::EACCES)),
            _ => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW;
                self.open_at(n, &self.paths.in_tree(path), flags, At::Lowest, close_on_exec)
            }
        }
    }

    fn open_process_file(
        &self,
        n: &Notification,
        who: &Who,
        file: ProcessFile,
        flags: OFlags,
    ) -> Answer {
        // The kernel refuses to have its status written.
        if file == ProcessFile::Status && writes(flags) {
            return Answer::GoOn;
        }
        match self.process_file(n, who, file) {
            Some((path, text)) => self.open_text(n, &path, text, flags),
            None => Answer::GoOn,
        }
    }

    fn open_node(&self, n: &Notification, path: &Path, flags: OFlags) -> Answer {
        let name = path.to_string_lossy().into_owned();
        let called = Called { name: "open".to_owned(), function: "open", fd: None, file: &name };
        self.served(
            n,
            called,
            |_, _| names::open_flags(flags.bits()),
            |caller| {
                let file = self.system.open(path, caller)?;
                let new = NewFile { file, cloexec: flags.contains(OFlags::CLOEXEC) };
                Ok(Outcome::File(new, Some(path.to_owned()), flags & KEPT))
            },
        )
    }

    /// A descriptor by its link in `/proc` is opened like the node it was opened from.
    fn open_descriptor(&self, n: &Notification, who: &OsStr, fd: i32, flags: OFlags) -> Answer {
        let Some(thread) = thread(n, who) else { return Answer::GoOn };
        match self.files.find(thread, fd) {
            Ok(Some(found)) => match &found.opened.node {
                Some(path) => match self.paths.look_up(|| None, path.as_os_str(), Last::Follow) {
                    Place::Process(who, file) => self.open_process_file(n, &who, file, flags),
                    _ => self.open_machine(n, path, FileType::RegularFile, flags),
                },
                // An anonymous inode cannot be opened.
                None => Answer::Value(Err(Errno::ENXIO)),
            },
            _ => match self.node_of_placeholder(thread, fd) {
                Some((path, _)) => self.open_machine(n, &path, FileType::RegularFile, flags),
                None => Answer::GoOn,
            },
        }
    }

    /// A directory that both have, for its listing.
    fn open_both(&self, n: &Notification, path: &Path, flags: OFlags, mode: u32) -> Answer {
        let other = OFlags::PATH | OFlags::WRONLY | OFlags::RDWR | OFlags::CREATE;
        if flags.intersects(other) {
            return self.open_real(n, path, flags, mode);
        }
        match self.paths.listing(path, |path| self.system.node(path).is_some()) {
            Listing::Host => self.open_real(n, path, flags, mode),
            Listing::Merged(listing) => {
                // A number of ours, for `fstat` to show the host's directory as `stat` does.
                let at = self.free_number(n.pid, 0).map_or(At::Lowest, At::Number);
                let close_on_exec = flags.contains(OFlags::CLOEXEC);
                self.open_at(n, &listing, OFlags::RDONLY | OFlags::DIRECTORY, at, close_on_exec)
            }
        }
    }

    /// A real file, in the way that the client asked for it.
    fn open_real(&self, n: &Notification, path: &Path, flags: OFlags, mode: u32) -> Answer {
        let close_on_exec = flags.contains(OFlags::CLOEXEC);
        let flags = if flags.contains(OFlags::PATH) {
            OFlags::RDONLY | OFlags::NONBLOCK | (flags & (OFlags::DIRECTORY | OFlags::NOFOLLOW))
        } else {
            flags
        };
        let opened = rustix::fs::open(
            path,
            flags | OFlags::CLOEXEC | OFlags::NOCTTY,
            Mode::from_bits_truncate(mode),
        );
        match opened {
            Ok(file) => self.give(n, file.as_fd(), At::Lowest, close_on_exec),
            Err(error) => Answer::Value(Err(Errno::new(error.raw_os_error()))),
        }
    }

    fn open_at(
        &self,
        n: &Notification,
        path: &Path,
        flags: OFlags,
        at: At,
        close_on_exec: bool,
    ) -> Answer {
        match rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => self.give(n, file.as_fd(), at, close_on_exec),
            Err(error) => Answer::Value(Err(Errno::new(error.raw_os_error()))),
        }
    }

    pub(super) fn stat(
        &self,
        n: &Notification,
        directory: i32,
        path: u64,
        buffer: u64,
        flags: i32,
    ) -> Answer {
        self.attributes(n, directory, path, flags, |caller, attributes| {
            caller.write(buffer, &attributes.stat())
        })
    }

    pub(super) fn statx(&self, n: &Notification) -> Answer {
        let (directory, flags) = (signed(n.args[0]), signed(n.args[2]));
        self.attributes(n, directory, n.args[1], flags, |caller, attributes| {
            caller.write(n.args[4], &attributes.statx())
        })
    }

    pub(super) fn fstat(&self, n: &Notification) -> Answer {
        match self.attributes_of_file(n.pid, signed(n.args[0])) {
            Some(attributes) => {
                let caller = Caller::new(self, n, n.pid);
                Answer::Value(caller.write(n.args[1], &attributes.stat()).map(|()| 0))
            }
            None => Answer::GoOn,
        }
    }

    fn attributes(
        &self,
        n: &Notification,
        directory: i32,
        path: u64,
        flags: i32,
        store: impl FnOnce(&Caller<'_>, &Attributes) -> Result<(), Errno>,
    ) -> Answer {
        // A null path with AT_EMPTY_PATH is allowed since Linux 6.11.
        let empty_allowed = flags & libc::AT_EMPTY_PATH != 0;
        let path = if empty_allowed && path == 0 {
            Default::default()
        } else {
            let Some(path) = self.read_path(n, path) else { return Answer::GoOn };
            path
        };
        let found = if path.is_empty() {
            if !empty_allowed || directory == libc::AT_FDCWD {
                return Answer::GoOn;
            }
            self.attributes_of_file(n.pid, directory).map(Ok)
        } else {
            let last =
                if flags & libc::AT_SYMLINK_NOFOLLOW != 0 { Last::Link } else { Last::Follow };
            match self.look_up(n, directory, &path, last) {
                Place::Host => None,
                Place::Wrong(errno) => Some(Err(errno)),
                Place::HostBy(path) | Place::Both(path) => Some(attributes_at(&path)),
                Place::Machine(path, _) => {
                    let attributes = attributes_at(&self.paths.in_tree(&path));
                    Some(attributes.map(|attributes| match self.system.node(&path) {
                        Some(node) => attributes.as_node(node),
                        None => attributes,
                    }))
                }
                Place::Descriptor(who, fd) if last == Last::Follow => {
                    thread(n, &who).and_then(|thread| self.attributes_of_file(thread, fd)).map(Ok)
                }
                Place::Descriptor(..) => None,
                Place::Process(who, file) => {
                    self.process_file(n, &who, file).map(|(path, _)| self.attributes_of_text(&path))
                }
            }
        };
        match found {
            None => Answer::GoOn,
            Some(Err(errno)) => Answer::Value(Err(errno)),
            Some(Ok(attributes)) => {
                let caller = Caller::new(self, n, n.pid);
                Answer::Value(store(&caller, &attributes).map(|()| 0))
            }
        }
    }

    /// Those of a descriptor of ours; `None` for any other.
    fn attributes_of_file(&self, thread: u32, fd: i32) -> Option<Attributes> {
        let stat = self.files.stat(thread, fd).ok()?;
        let attributes = Attributes::of(&stat);
        let inode = (stat.st_dev, stat.st_ino);
        if let Some(found) = self.files.find_inode(thread, fd, inode) {
            let Some(path) = &found.opened.node else {
                return Some(attributes.as_open_file(found.opened.file.device_number()));
            };
            return match self.system.node(path) {
                Some(node) => Some(attributes.as_node(node)),
                None => self.attributes_of_text(path).ok(),
            };
        }
        if let Some((_, node)) = self.node_of_placeholder(thread, fd) {
            return Some(attributes.as_node(node));
        }
        let listed = self.paths.shown_in_listing(&process::link_of_file(thread, fd)?)?;
        attributes_at(&listed).ok()
    }

    /// The node whose place in the tree is open, as `O_PATH` opens it.
    fn node_of_placeholder(&self, thread: u32, fd: i32) -> Option<(PathBuf, Node)> {
        let path = self.paths.shown_in_tree(&process::link_of_file(thread, fd)?)?;
        let node = self.system.node(&path)?;
        Some((path, node))
    }

    pub(super) fn access(
        &self,
        n: &Notification,
        directory: i32,
        path: u64,
        mode: u32,
        flags: i32,
    ) -> Answer {
        let Some(path) = self.read_path(n, path) else { return Answer::GoOn };
        let last = if flags & libc::AT_SYMLINK_NOFOLLOW != 0 { Last::Link } else { Last::Follow };
        let (attributes, node) = match self.look_up(n, directory, &path, last) {
            Place::Host | Place::Descriptor(..) => return Answer::GoOn,
            Place::Wrong(errno) => return Answer::Value(Err(errno)),
            Place::Process(who, file) => match self.process_file(n, &who, file) {
                Some((path, _)) => (self.attributes_of_text(&path), None),
                None => return Answer::GoOn,
            },
            Place::HostBy(path) | Place::Both(path) => {
                let access = rustix::fs::Access::from_bits_retain(mode);
                let result = rustix::fs::accessat(CWD, &path, access, AtFlags::EACCESS);
                let errno = |error: rustix::io::Errno| Errno::new(error.raw_os_error());
                return Answer::Value(result.map(|()| 0).map_err(errno));
            }
            Place::Machine(path, _) => {
                (attributes_at(&self.paths.in_tree(&path)), self.system.node(&path))
            }
        };
        let result = attributes.and_then(|attributes| {
            let rights = match node {
                Some(node) => node.mode,
                None => attributes.mode(),
            };
            // Whoever runs the machine is everybody in it: any class of users will do.
            let granted = (rights >> 6 | rights >> 3 | rights) & 7;
            if mode & 7 & !granted == 0 { Ok(0) } else { Err(Errno::EACCES) }
        });
        Answer::Value(result)
    }

    pub(super) fn readlink(
        &self,
        n: &Notification,
        directory: i32,
        path: u64,
        buffer: u64,
        size: u64,
    ) -> Answer {
        let Some(path) = self.read_path(n, path) else { return Answer::GoOn };
        if path.is_empty() {
            return Answer::GoOn;
        }
        let target = match self.look_up(n, directory, &path, Last::Link) {
            Place::Host => return Answer::GoOn,
            Place::Wrong(errno) => return Answer::Value(Err(errno)),
            Place::Both(_) => return Answer::Value(Err(Errno::EINVAL)),
            Place::Process(who, file) => match self.process_file(n, &who, file) {
                Some(_) => return Answer::Value(Err(Errno::EINVAL)),
                None => return Answer::GoOn,
            },
            Place::HostBy(path) => std::fs::read_link(path),
            Place::Machine(path, FileType::Symlink) => {
                std::fs::read_link(self.paths.in_tree(&path))
            }
            Place::Machine(..) => return Answer::Value(Err(Errno::EINVAL)),
            Place::Descriptor(who, fd) => match self.name_of_file(n, &who, fd) {
                Some(name) => Ok(name),
                None => return Answer::GoOn,
            },
        };
        let target = match target {
            Ok(target) => target,
            Err(error) => {
                return Answer::Value(Err(Errno::new(error.raw_os_error().unwrap_or(libc::EIO))));
            }
        };
        let bytes = target.as_os_str().as_bytes();
        let size = match signed(size) {
            size if size > 0 => usize::try_from(size).unwrap_or(0),
            _ => return Answer::Value(Err(Errno::EINVAL)),
        };
        let bytes = bytes.get(..size.min(bytes.len())).unwrap_or_default();
        let caller = Caller::new(self, n, n.pid);
        let length = i64::try_from(bytes.len()).unwrap_or(0);
        Answer::Value(caller.write(buffer, bytes).map(|()| length))
    }

    /// What the link in `/proc` of a descriptor of ours would say: the node, or `anon_inode:[..]`.
    fn name_of_file(&self, n: &Notification, who: &OsStr, fd: i32) -> Option<PathBuf> {
        let thread = thread(n, who)?;
        if let Ok(Some(found)) = self.files.find(thread, fd) {
            let name = || PathBuf::from(format!("anon_inode:[{}]", found.opened.name));
            return Some(found.opened.node.clone().unwrap_or_else(name));
        }
        let link = process::link_of_file(thread, fd)?;
        self.paths.shown_in_tree(&link).or_else(|| self.paths.shown_in_listing(&link))
    }

    /// Whether a path leads to something that only the machine has.
    pub(super) fn is_ours(&self, n: &Notification, directory: i32, path: u64) -> bool {
        let Some(path) = self.read_path(n, path) else { return false };
        matches!(
            self.look_up(n, directory, &path, Last::Follow),
            Place::Machine(_, FileType::RegularFile)
        )
    }

    fn look_up(&self, n: &Notification, directory: i32, path: &OsStr, last: Last) -> Place {
        let base = || match directory {
            libc::AT_FDCWD => process::directory(n.pid),
            fd => process::link_of_file(n.pid, fd),
        };
        self.paths.look_up(base, path, last)
    }
}

/// The thread that a name in `/proc` means to a caller.
fn thread(n: &Notification, who: &OsStr) -> Option<u32> {
    match who.to_str()? {
        "self" | "thread-self" => Some(n.pid),
        number => number.parse().ok(),
    }
}

fn writes(flags: OFlags) -> bool {
    flags.contains(OFlags::WRONLY) || flags.contains(OFlags::RDWR)
}

pub(super) fn attributes_at(path: &Path) -> Result<Attributes, Errno> {
    rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW)
        .map(|stat| Attributes::of(&stat))
        .map_err(|error| Errno::new(error.raw_os_error()))
}
