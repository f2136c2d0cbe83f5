//! Files, directories and relative links below a root, by the absolute paths that programs use.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Writes below a root.
pub(super) struct Builder<'a> {
    root: &'a Path,
    /// Directories that were asked for and are there.
    made: HashSet<PathBuf>,
}

impl<'a> Builder<'a> {
    pub(super) fn new(root: &'a Path) -> Self {
        Self { root, made: HashSet::new() }
    }

    /// Makes a directory and those above it.
    pub(super) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.make(&self.below(path))
    }

    /// Writes a file, and makes the directories above it.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        let at = self.below(path);
        self.make_parent(&at)?;
        fs::write(at, content)
    }

    /// Writes a file of one line.
    pub(super) fn line(&mut self, path: &str, content: &str) -> io::Result<()> {
        self.file(path, format!("{content}\n").as_bytes())
    }

    /// Writes a file that shows a text and, as its rights say, takes one.
    pub(super) fn writable(&mut self, path: &str, text: &str) -> io::Result<()> {
        self.file(path, text.as_bytes())?;
        fs::set_permissions(self.below(path), fs::Permissions::from_mode(0o644))
    }

    /// Makes a link at `path` that leads to the absolute path `target` by a relative way, as sysfs
    /// has them.
    pub(super) fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        let at = self.below(path);
        self.make_parent(&at)?;
        symlink(relative(path, target), at)
    }

    fn make_parent(&mut self, path: &Path) -> io::Result<()> {
        path.parent().map_or(Ok(()), |parent| self.make(parent))
    }

    fn make(&mut self, directory: &Path) -> io::Result<()> {
        if !self.made.contains(directory) {
            fs::create_dir_all(directory)?;
            self.made.insert(directory.to_owned());
        }
        Ok(())
    }

    fn below(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }
}

/// The way from the directory of `from` to `to`; both are absolute.
fn relative(from: &str, to: &str) -> String {
    let mut from = from.trim_start_matches('/').split('/').collect::<Vec<_>>();
    from.pop();
    let to = to.trim_start_matches('/').split('/').collect::<Vec<_>>();
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = std::iter::repeat_n("..", from.len() - common);
    up.chain(to[common..].iter().copied()).collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    #[test]
    fn links_are_relative_as_in_sysfs() {
        assert_eq!(
            super::relative(
                "/sys/bus/pci/devices/0000:01:00.0",
                "/sys/devices/pci0000:00/0000:00:01.0/0000:01:00.0"
            ),
            "../../../devices/pci0000:00/0000:00:01.0/0000:01:00.0"
        );
    }
}
