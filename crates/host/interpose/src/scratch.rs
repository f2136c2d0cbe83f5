//! A directory for the files of one run.

use std::ffi::CString;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use crate::sys::janitor::Janitor;

/// A private directory that is gone when this process is, even if it is killed.
///
/// A process of its own sees to that, from before the directory is made until after it is removed.
/// What clients of a run may still hold open stays with them, nameless.
pub struct Scratch {
    path: PathBuf,
    /// Behind [`Scratch`]'s own removal: fields are dropped after it.
    _janitor: Janitor,
}

impl Scratch {
    /// In `XDG_RUNTIME_DIR` or `/dev/shm`, where files are in memory, else in the directory for
    /// temporary files. Best made while the process has one thread and little memory: it forks.
    pub fn new() -> io::Result<Self> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let places = runtime.into_iter().chain([PathBuf::from("/dev/shm"), std::env::temp_dir()]);
        let mut error = io::Error::from(io::ErrorKind::NotFound);
        for place in places.filter(|place| place.is_absolute()) {
            match place.canonicalize().and_then(|place| Self::new_in(&place)) {
                Ok(scratch) => return Ok(scratch),
                Err(other) => error = other,
            }
        }
        Err(error)
    }

    fn new_in(place: &Path) -> io::Result<Self> {
        // Seeded by the system, for a name that nobody foresees.
        let number = RandomState::new().hash_one(std::process::id());
        let path = place.join(format!("lychgate-{number:016x}"));
        if std::fs::symlink_metadata(&path).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let janitor = Janitor::start(&CString::new(path.as_os_str().as_bytes())?)?;
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path, _janitor: janitor })
    }

    /// Where it is, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove a directory");
        }
    }
}
