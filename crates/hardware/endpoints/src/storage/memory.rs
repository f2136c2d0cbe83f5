//! Blocks in memory, gone with the process.

use std::io;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::{Storage, out_of_range};

/// Bytes of one chunk: a large page.
const CHUNK: usize = 2 << 20;

/// Nothing until something is written to it.
type Chunk = RwLock<Option<Vec<u8>>>;

/// What a chunk reads as before anything is written to it.
static ZEROS: [u8; CHUNK] = [0; CHUNK];

/// Blocks in memory. Memory is taken chunk by chunk as it is first written, so a large storage that
/// is hardly used costs little; unwritten bytes are zeros.
#[derive(Debug)]
pub struct MemoryStorage {
    chunks: Vec<Chunk>,
    len: u64,
    read_only: bool,
}

impl MemoryStorage {
    /// `len` bytes of zeros. Fails when there is no memory for the index of so many.
    pub fn new(len: u64) -> io::Result<Self> {
        let count = usize::try_from(len.div_ceil(CHUNK as u64)).unwrap_or(usize::MAX);
        let mut chunks = Vec::new();
        chunks.try_reserve_exact(count)?;
        chunks.resize_with(count, || RwLock::new(None));
        Ok(Self { chunks, len, read_only: false })
    }

    /// The bytes of `contents`, which nobody may change.
    pub fn read_only(contents: &[u8]) -> io::Result<Self> {
        let mut storage = Self::new(contents.len() as u64)?;
        for (chunk, bytes) in storage.chunks.iter_mut().zip(contents.chunks(CHUNK)) {
            let mut whole = vec![0; CHUNK];
            whole[..bytes.len()].copy_from_slice(bytes);
            *chunk = RwLock::new(Some(whole));
        }
        storage.read_only = true;
        Ok(storage)
    }

    /// The chunk that holds `offset`, where in it, and how many of `len` bytes lie in it.
    fn locate(&self, offset: u64, len: usize) -> Option<(&Chunk, usize, usize)> {
        let left = usize::try_from(self.len.checked_sub(offset)?).unwrap_or(usize::MAX);
        let start = usize::try_from(offset % CHUNK as u64).ok()?;
        let chunk = self.chunks.get(usize::try_from(offset / CHUNK as u64).ok()?)?;
        let now = len.min(CHUNK - start).min(left);
        (now > 0).then_some((chunk, start, now))
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
}

impl Storage for MemoryStorage {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.check(offset, to.len() as u64)?;
        let mut done = 0;
        while let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let copied = self.lend(offset + done as u64, rest.len(), &mut |bytes| {
                rest[..bytes.len()].copy_from_slice(bytes);
            });
            done += copied.ok_or_else(out_of_range)?;
        }
        Ok(())
    }

    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, from.len() as u64)?;
        let mut done = 0;
        while let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) {
            let copied = self.lend_mut(offset + done as u64, rest.len(), &mut |bytes| {
                bytes.copy_from_slice(&rest[..bytes.len()]);
            });
            done += copied.ok_or(io::ErrorKind::OutOfMemory)?;
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_writable()?;
        self.check(offset, len)?;
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let (chunk, start, now) = self.locate(at, left).ok_or_else(out_of_range)?;
            let mut chunk = write(chunk);
            if now == CHUNK {
                *chunk = None;
            } else if let Some(bytes) = chunk.as_mut() {
                bytes[start..start + now].fill(0);
            }
            at += now as u64;
        }
        Ok(())
    }

    fn lend(&self, offset: u64, len: usize, take: &mut dyn FnMut(&[u8])) -> Option<usize> {
        let (chunk, start, now) = self.locate(offset, len)?;
        let chunk = read(chunk);
        let bytes = chunk.as_deref().unwrap_or(&ZEROS);
        take(&bytes[start..start + now]);
        Some(now)
    }

    fn lend_mut(&self, offset: u64, len: usize, fill: &mut dyn FnMut(&mut [u8])) -> Option<usize> {
        if self.read_only {
            return None;
        }
        let (chunk, start, now) = self.locate(offset, len)?;
        let mut chunk = write(chunk);
        if chunk.is_none() {
            let mut bytes = Vec::new();
            bytes.try_reserve_exact(CHUNK).ok()?;
            bytes.resize(CHUNK, 0);
            *chunk = Some(bytes);
        }
        fill(chunk.as_mut()?.get_mut(start..start + now)?);
        Some(now)
    }
}

fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
