//! Blocks in a file or on a block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::{Storage, out_of_range};

/// Blocks in a file. The size is the one at opening: bytes that disappear when somebody truncates
/// the file are read errors.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    len: u64,
    read_only: bool,
}

impl FileStorage {
    /// Opens the file at `path`, for reading alone if `read_only`.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        Self::new(file, read_only)
    }

    /// Uses an open file. Its size is where seeking to the end leads, which also holds for a block
    /// device.
    pub fn new(mut file: File, read_only: bool) -> io::Result<Self> {
        let len = file.seek(SeekFrom::End(0))?;
        Ok(Self { file, len, read_only })
    }

    fn check(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(out_of_range()),
        }
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(())
    }

    /// For file systems that cannot punch holes.
    fn write_zeros(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        const ZEROS: &[u8] = &[0; 1 << 16];
        while len > 0 {
            let now = usize::try_from(len).unwrap_or(usize::MAX).min(ZEROS.len());
            self.file.write_all_at(&ZEROS[..now], offset)?;
            offset += now as u64;
            len -= now as u64;
        }
        Ok(())
    }
}

impl AsFd for FileStorage {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Storage for FileStorage {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.check(offset, to.len() as u64)?;
        self.file.read_exact_at(to, offset)
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, from.len() as u64)?;
        self.file.write_all_at(from, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, len)?;
        if len == 0 {
            return Ok(());
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, punch, offset, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => self.write_zeros(offset, len),
            Err(error) => Err(error.into()),
        }
    }
}
