//! Disk images: opened, checked and locked, with errors that say what to do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use lychgate_endpoints::{FileStorage, Storage};
use lychgate_model::FileBytes;
use rustix::fs::FlockOperation;

use crate::mapped::Window;

/// Bytes of a logical block.
const BLOCK: u64 = 512;

/// An image cannot be a namespace.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened.
    #[error("cannot open the disk image {}: {error}", path.display())]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// It may be read but not written.
    #[error("the disk image {} may not be written; use it read-only, FILE,ro", path.display())]
    NotWritable {
        /// Which.
        path: PathBuf,
    },
    /// It is a directory, a socket, or the like.
    #[error("{} is no disk image: it is neither a file nor a block device", path.display())]
    NoFile {
        /// Which.
        path: PathBuf,
    },
    /// It has no byte.
    #[error("the disk image {} is empty; give it a size: truncate -s 64M {}", path.display(), path.display())]
    Empty {
        /// Which.
        path: PathBuf,
    },
    /// Its size is not a multiple of 512.
    #[error(
        "the disk image {} has {len} bytes, which is not a multiple of 512; round it up: truncate -s %512 {}",
        path.display(), path.display()
    )]
    PartialBlock {
        /// Which.
        path: PathBuf,
        /// Its size in bytes.
        len: u64,
    },
    /// Another machine, or another namespace of this one, writes to it.
    #[error("the disk image {} is in use by another lychgate or another namespace", path.display())]
    InUse {
        /// Which.
        path: PathBuf,
    },
}

/// Opens an image and holds it: alone if it is writable, with other readers if it is not.
pub(crate) fn open(path: &Path, read_only: bool) -> Result<Image, ImageError> {
    let file = open_file(path, read_only)?;
    let failed = |error| ImageError::Open { path: path.to_owned(), error };
    let kind = file.metadata().map_err(failed)?.file_type();
    if !kind.is_file() && !is_block_device(&kind) {
        return Err(ImageError::NoFile { path: path.to_owned() });
    }
    let lock = if read_only {
        FlockOperation::NonBlockingLockShared
    } else {
        FlockOperation::NonBlockingLockExclusive
    };
    // A file system without locks cannot protect anybody; that is no reason not to work.
    if rustix::fs::flock(&file, lock) == Err(rustix::io::Errno::WOULDBLOCK) {
        return Err(ImageError::InUse { path: path.to_owned() });
    }
    let storage = FileStorage::new(file, read_only).map_err(failed)?;
    match storage.len() {
        0 => Err(ImageError::Empty { path: path.to_owned() }),
        len if !len.is_multiple_of(BLOCK) => {
            Err(ImageError::PartialBlock { path: path.to_owned(), len })
        }
        len => {
            // Without a mapping, large reads take two copies.
            let window = Window::new(storage.as_fd(), len).ok();
            Ok(Image { storage, window })
        }
    }
}

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    storage: FileStorage,
    window: Option<Window>,
}

impl Storage for Image {
    fn len(&self) -> u64 {
        self.storage.len()
    }

    fn read_only(&self) -> bool {
        self.storage.read_only()
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.storage.read_at(offset, to)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.storage.write_at(offset, from)
    }

    fn flush(&self) -> io::Result<()> {
        self.storage.flush()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.storage.discard(offset, len)
    }

    fn file_bytes(&self, offset: u64, len: usize) -> Option<FileBytes<'_>> {
        let mapped = self.window.as_ref()?.address(offset, len)?;
        Some(FileBytes { file: self.storage.as_fd(), offset, len, mapped })
    }
}

fn open_file(path: &Path, read_only: bool) -> Result<File, ImageError> {
    // O_NONBLOCK: opening a FIFO must not wait for its other end.
    use std::os::unix::fs::OpenOptionsExt;
    let nonblocking = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let open =
        |write| OpenOptions::new().read(true).write(write).custom_flags(nonblocking).open(path);
    open(!read_only).map_err(|error| {
        let refused = matches!(
            error.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
        );
        let path = path.to_owned();
        if refused && !read_only && open(false).is_ok() {
            ImageError::NotWritable { path }
        } else {
            ImageError::Open { path, error }
        }
    })
}

fn is_block_device(kind: &std::fs::FileType) -> bool {
    std::os::unix::fs::FileTypeExt::is_block_device(kind)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn image(len: usize) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        fs::write(&path, vec![0; len]).unwrap();
        (directory, path)
    }

    #[test]
    fn an_image_has_one_writer_or_many_readers() {
        let (_directory, path) = image(4096);
        let writer = open(&path, false).unwrap();
        assert!(matches!(open(&path, false), Err(ImageError::InUse { .. })));
        assert!(matches!(open(&path, true), Err(ImageError::InUse { .. })));
        drop(writer);
        let _readers = [open(&path, true).unwrap(), open(&path, true).unwrap()];
        assert!(matches!(open(&path, false), Err(ImageError::InUse { .. })));
    }

    #[test]
    fn a_size_that_is_no_number_of_blocks_is_refused() {
        let (_directory, path) = image(1000);
        let error = open(&path, false).unwrap_err();
        assert!(matches!(error, ImageError::PartialBlock { len: 1000, .. }));
        assert!(error.to_string().contains("512"));
        let (_directory, path) = image(0);
        assert!(matches!(open(&path, false), Err(ImageError::Empty { .. })));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let (directory, path) = image(512);
        assert!(matches!(open(directory.path(), true), Err(ImageError::NoFile { .. })));
        assert!(matches!(open(Path::new("/dev/null"), false), Err(ImageError::NoFile { .. })));
        let error = open(&path.join("x"), false).unwrap_err();
        assert!(matches!(error, ImageError::Open { .. }));
        let error = open(Path::new("/no/such/image"), false).unwrap_err().to_string();
        assert!(error.contains("/no/such/image: No such file"), "{error}");
    }
}
