//! Listings of directories that the host and the machine both have.
//!
//! `getdents64` is the kernel's own work on whatever is open, so such a directory is opened as a real
//! one that has an entry for each name of either side, with the type that is there. Nothing else of
//! an entry is used: paths that go through it are looked up anew by their names.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, CWD, FileType, Mode};

/// All listings of a run, in a directory that is made for the first and goes with the run.
#[derive(Default)]
pub(crate) struct Listings {
    /// Where that directory is made; `None` for where temporary files are.
    place: Option<PathBuf>,
    made: Mutex<Made>,
}

#[derive(Default)]
struct Made {
    /// Where they are, without links.
    root: Option<(PathBuf, tempfile::TempDir)>,
    /// The newest for each directory.
    newest: HashMap<PathBuf, (PathBuf, Names)>,
    /// Which directory each number is of.
    directories: Vec<PathBuf>,
}

type Names = BTreeMap<OsString, FileType>;

impl Listings {
    /// None yet; those to come are in `place`, or where temporary files are.
    pub(crate) fn new(place: Option<PathBuf>) -> Self {
        Self { place, made: Mutex::default() }
    }

    /// A real directory that lists `host` and `machine`; `None` when the machine adds nothing.
    /// `is_node` tells which regular files of the machine are device nodes, by name.
    pub(crate) fn make(
        &self,
        host: &Path,
        machine: &Path,
        is_node: impl Fn(&Path) -> bool,
    ) -> io::Result<Option<PathBuf>> {
        // What the host shows to nobody but root does not hide what the machine adds.
        let mut names = entries(host).unwrap_or_default();
        let mut adds = false;
        for (name, kind) in entries(machine)? {
            let kind = if is_node(&host.join(&name)) { FileType::CharacterDevice } else { kind };
            adds |= names.insert(name, kind).is_none();
        }
        if !adds {
            return Ok(None);
        }
        let mut made = self.made();
        if let Some((listing, same)) = made.newest.get(host)
            && *same == names
        {
            return Ok(Some(listing.clone()));
        }
        let number = made.directories.len().to_string();
        let listing = made.root(self.place.as_deref())?.join(number);
        std::fs::create_dir(&listing)?;
        for (name, kind) in &names {
            place(&listing.join(name), *kind, &host.join(name), &machine.join(name))?;
        }
        made.directories.push(host.to_owned());
        made.newest.insert(host.to_owned(), (listing.clone(), names));
        Ok(Some(listing))
    }

    /// The path that a link in `/proc` into a listing stands for.
    pub(crate) fn shown(&self, link: &Path) -> Option<PathBuf> {
        let made = self.made();
        let (root, _) = made.root.as_ref()?;
        let mut rest = link.strip_prefix(root).ok()?.components();
        let number: usize = rest.next()?.as_os_str().to_str()?.parse().ok()?;
        Some(made.directories.get(number)?.join(rest.as_path()))
    }

    fn made(&self) -> MutexGuard<'_, Made> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Made {
    fn root(&mut self, place: Option<&Path>) -> io::Result<&Path> {
        let (root, _) = match self.root.take() {
            Some(root) => self.root.insert(root),
            None => {
                let mut builder = tempfile::Builder::new();
                builder.prefix("lychgate-");
                let directory = match place {
                    Some(place) => builder.tempdir_in(place)?,
                    None => builder.tempdir()?,
                };
                self.root.insert((directory.path().canonicalize()?, directory))
            }
        };
        Ok(root)
    }
}

fn entries(directory: &Path) -> io::Result<Names> {
    let mut names = Names::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if let Ok(stat) = rustix::fs::statat(CWD, entry.path(), AtFlags::SYMLINK_NOFOLLOW) {
            names.insert(entry.file_name(), FileType::from_raw_mode(stat.st_mode));
        }
    }
    Ok(names)
}

/// An entry of this type. A character device of number 0 needs no rights since Linux 5.8; whatever
/// cannot be had is a regular file.
fn place(at: &Path, kind: FileType, host: &Path, machine: &Path) -> io::Result<()> {
    match kind {
        FileType::Directory => std::fs::create_dir(at),
        FileType::Symlink => {
            let target = std::fs::read_link(machine).or_else(|_| std::fs::read_link(host))?;
            std::os::unix::fs::symlink(target, at)
        }
        FileType::CharacterDevice => {
            let device = rustix::fs::makedev(0, 0);
            let made = rustix::fs::mknodat(CWD, at, kind, Mode::empty(), device);
            made.map_err(io::Error::from).or_else(|_| std::fs::write(at, ""))
        }
        _ => std::fs::write(at, ""),
    }
}

#[cfg(test)]
mod tests;
