//! Paths as programs spell them, looked up in the machine's tree laid over the host's files.
//!
//! The walk is the kernel's: component by component, following links of both trees, `..` by the
//! directories really passed. A name that both trees have is the machine's if it is no directory
//! there, else the directory is in both and the walk goes on in both. What the host alone has is left
//! to the kernel.
//!
//! Not followed: a client's `chroot` and mount namespace of its own; its paths are read as the
//! supervisor sees them.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use lychgate_types::Errno;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};

use crate::error::Error;
use crate::merged::Listings;

/// The most links that one lookup follows (`MAXSYMLINKS`).
const MAX_LINKS: u32 = 40;

/// Where a path leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Place {
    /// To the host, by the host's own names: the kernel finds it too.
    Host,
    /// To this file of the host, by a way through the machine's tree.
    HostBy(PathBuf),
    /// To this path of the machine, free of links, and what is there.
    Machine(PathBuf, FileType),
    /// To a directory that the host and the machine have.
    Both(PathBuf),
    /// To the descriptor of a thread by `/proc`: the thread as spelt, and the number.
    Descriptor(OsString, i32),
    /// To a file in `/proc` that the machine has a say in: the process or thread as spelt.
    Process(Who, ProcessFile),
    /// To an error.
    Wrong(Errno),
}

/// Of whom a file in `/proc` is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Who {
    /// `self`, or the number of a process or thread.
    Process(OsString),
    /// `thread-self`.
    ThisThread,
    /// The process, and the number behind `task/`.
    Thread(OsString, OsString),
}

/// The files in `/proc` that tell of the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ProcessFile {
    /// `status`, for what is pinned.
    Status,
    /// `fail-nth`.
    FailNth,
}

/// How the end of a path is taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Last {
    /// A link there is followed.
    Follow,
    /// A link there is meant itself.
    Link,
}

/// The machine's tree over the host's.
pub(crate) struct Paths {
    /// Where the tree is, without links.
    root: PathBuf,
    /// The names at the top of the tree: `dev`, `sys`.
    tops: Vec<OsString>,
    listings: Listings,
}

/// What to open for a directory that both have.
pub(crate) enum Listing {
    /// The host's own.
    Host,
    /// This one, in its place.
    Merged(PathBuf),
}

struct Level {
    name: OsString,
    machine: bool,
    host: bool,
}

impl Paths {
    /// For a tree; merged listings go to `scratch`, or where temporary files are.
    pub(crate) fn new(tree: &Path, scratch: Option<PathBuf>) -> Result<Self, Error> {
        let wrong = |source| Error::Tree { path: tree.to_owned(), source };
        let root = tree.canonicalize().map_err(wrong)?;
        let mut tops = Vec::new();
        for entry in std::fs::read_dir(&root).map_err(wrong)? {
            tops.push(entry.map_err(wrong)?.file_name());
        }
        Ok(Self { root, tops, listings: Listings::new(scratch) })
    }

    /// A real directory for one that the host and the machine have, to be listed: the host's where
    /// the machine adds nothing.
    pub(crate) fn listing(&self, path: &Path, is_node: impl Fn(&Path) -> bool) -> Listing {
        match self.listings.make(path, &self.in_tree(path), is_node) {
            Ok(Some(merged)) => Listing::Merged(merged),
            Ok(None) => Listing::Host,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "cannot list what the machine adds");
                Listing::Host
            }
        }
    }

    /// The directory that both have whose listing a link in `/proc` shows.
    pub(crate) fn shown_in_listing(&self, shown: &Path) -> Option<PathBuf> {
        self.listings.shown(shown)
    }

    /// The file in the tree for a path of the machine.
    pub(crate) fn in_tree(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The path of the machine for a file that a link in `/proc` shows; `None` for the host's.
    pub(crate) fn shown_in_tree(&self, shown: &Path) -> Option<PathBuf> {
        shown.strip_prefix(&self.root).ok().map(|rest| Path::new("/").join(rest))
    }

    /// Looks `path` up; `base` gives the directory that a relative one starts at.
    pub(crate) fn look_up(
        &self,
        base: impl FnOnce() -> Option<PathBuf>,
        path: &OsStr,
        last: Last,
    ) -> Place {
        let bytes = path.as_bytes();
        if bytes.is_empty() {
            return Place::Host;
        }
        let mut within = false;
        let joined = if bytes.first() == Some(&b'/') {
            path.to_owned()
        } else {
            let Some(base) = base().filter(|base| base.is_absolute()) else { return Place::Host };
            let machine = self.shown_in_tree(&base).or_else(|| self.shown_in_listing(&base));
            within = machine.is_some();
            let mut joined = machine.unwrap_or(base).into_os_string();
            joined.push("/");
            joined.push(path);
            joined
        };
        if self.is_foreign(&joined) { Place::Host } else { self.walk(&joined, last, within) }
    }

    /// Whether a path is the host's for sure, at the price of one system call.
    fn is_foreign(&self, path: &OsStr) -> bool {
        let mut names = path.as_bytes().split(|byte| *byte == b'/').filter(|name| !name.is_empty());
        let first = names.next().unwrap_or_default();
        if self.tops.iter().any(|top| top.as_bytes() == first) || first == b".." {
            return false;
        }
        if first == b"proc" || names.any(|name| name == b"..") {
            return false;
        }
        // Without links nothing leads from here into the tree.
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        match rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS) {
            Ok(_) => true,
            Err(error) => matches!(
                error,
                rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR | rustix::io::Errno::ACCESS
            ),
        }
    }

    /// `through_machine`: the kernel would not find the way, since it started in the tree.
    fn walk(&self, path: &OsStr, last: Last, mut through_machine: bool) -> Place {
        let mut levels: Vec<Level> = Vec::new();
        let mut rest: VecDeque<OsString> = names(path);
        let mut must_be_directory = ends_in_directory(path);
        let mut links = 0;
        while let Some(name) = rest.pop_front() {
            if name == "." {
                continue;
            }
            if name == ".." {
                levels.pop();
                continue;
            }
            let (in_machine, in_host) =
                levels.last().map_or((true, true), |level| (level.machine, level.host));
            if in_host && levels.is_empty() && name == "proc" {
                return in_proc(&rest)
                    .filter(|_| !must_be_directory)
                    .unwrap_or_else(|| host(through_machine, &levels, Some((&name, &rest))));
            }
            let at = join(&levels, &name);
            let machine = if in_machine { kind(&self.in_tree(&at)) } else { None };
            let at_end = rest.is_empty() && !must_be_directory;
            let link = match machine {
                Some(FileType::Symlink) => {
                    if at_end && last == Last::Link {
                        return Place::Machine(at, FileType::Symlink);
                    }
                    through_machine = true;
                    std::fs::read_link(self.in_tree(&at))
                }
                Some(FileType::Directory) => {
                    let host = in_host && kind(&at) == Some(FileType::Directory);
                    levels.push(Level { name, machine: true, host });
                    continue;
                }
                Some(_) if !at_end => return Place::Wrong(Errno::ENOTDIR),
                Some(other) => return Place::Machine(at, other),
                None if !in_host => return Place::Wrong(Errno::ENOENT),
                None => match kind(&at) {
                    Some(FileType::Symlink) => {
                        if at_end && last == Last::Link {
                            return host(through_machine, &levels, Some((&name, &rest)));
                        }
                        std::fs::read_link(&at)
                    }
                    Some(FileType::Directory) => {
                        levels.push(Level { name, machine: false, host: true });
                        continue;
                    }
                    _ => return host(through_machine, &levels, Some((&name, &rest))),
                },
            };
            links += 1;
            if links > MAX_LINKS {
                return Place::Wrong(Errno::new(libc::ELOOP));
            }
            let Ok(target) = link else {
                return host(through_machine, &levels, Some((&name, &rest)));
            };
            if target.is_absolute() {
                levels.clear();
            }
            if rest.is_empty() {
                must_be_directory |= ends_in_directory(target.as_os_str());
            }
            for name in names(target.as_os_str()).into_iter().rev() {
                rest.push_front(name);
            }
        }
        match levels.last() {
            Some(level) if level.machine && level.host => Place::Both(path_of(&levels)),
            Some(level) if level.machine => Place::Machine(path_of(&levels), FileType::Directory),
            _ => host(through_machine, &levels, None),
        }
    }
}

fn host(through: bool, levels: &[Level], rest: Option<(&OsString, &VecDeque<OsString>)>) -> Place {
    if !through {
        return Place::Host;
    }
    let mut path = path_of(levels);
    if let Some((name, rest)) = rest {
        path.push(name);
        path.extend(rest);
    }
    Place::HostBy(path)
}

/// `WHO/fd/N`, `WHO/FILE` or `WHO/task/TID/FILE` behind `/proc`, where WHO is `self`, `thread-self` or
/// a number.
fn in_proc(rest: &VecDeque<OsString>) -> Option<Place> {
    let mut names = rest.iter();
    let who = names.next()?;
    let mut name = names.next()?.to_str()?;
    if name == "fd" {
        let fd = names.next()?.to_str()?.parse().ok()?;
        return names.next().is_none().then(|| Place::Descriptor(who.clone(), fd));
    }
    let who = if name == "task" {
        let thread = names.next()?;
        name = names.next()?.to_str()?;
        Who::Thread(who.clone(), thread.clone())
    } else if who == "thread-self" {
        Who::ThisThread
    } else {
        Who::Process(who.clone())
    };
    let file = match name {
        "status" => ProcessFile::Status,
        "fail-nth" => ProcessFile::FailNth,
        _ => return None,
    };
    names.next().is_none().then_some(Place::Process(who, file))
}

fn kind(path: &Path) -> Option<FileType> {
    let stat = rustix::fs::statat(CWD, path, AtFlags::SYMLINK_NOFOLLOW).ok()?;
    Some(FileType::from_raw_mode(stat.st_mode))
}

fn names(path: &OsStr) -> VecDeque<OsString> {
    path.as_bytes()
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty())
        .map(|name| OsString::from_vec(name.to_vec()))
        .collect()
}

/// A path that ends in `/` or `/.` must be a directory.
fn ends_in_directory(path: &OsStr) -> bool {
    let bytes = path.as_bytes();
    bytes.ends_with(b"/") || bytes.ends_with(b"/.")
}

fn path_of(levels: &[Level]) -> PathBuf {
    let mut path = PathBuf::from("/");
    path.extend(levels.iter().map(|level| &level.name));
    path
}

fn join(levels: &[Level], name: &OsStr) -> PathBuf {
    let mut path = path_of(levels);
    path.push(name);
    path
}

#[cfg(test)]
mod tests;
