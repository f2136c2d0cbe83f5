//! Memory that is mapped into this process and that others change at any time: the machine's RAM,
//! and files in memory that clients map too.
//!
//! The only module of this crate with `unsafe`: it makes the mappings, lends them as atomics, and
//! hands their addresses to system calls.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use lychgate_model::FileBytes;
use rustix::mm::{MapFlags, ProtFlags};

use crate::client::Span;

/// A readable and writable mapping of this process's own, unmapped on drop.
///
/// All access is by atomics, because clients and other threads store at the same time. Where two
/// accesses of different width race, each is one or more plain loads or stores of the machine.
#[derive(Debug)]
pub(crate) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and `Mapping` has no interior state of
// its own besides the mapped bytes, which are reached as atomics alone.
unsafe impl Send for Mapping {}
// SAFETY: as above: every access through `&Mapping` is atomic.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// `len` bytes of zeros, a multiple of the page size, that take memory only as they are
    /// touched.
    pub(crate) fn anonymous(len: usize) -> io::Result<Self> {
        let (prot, flags) =
            (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: a null hint without MAP_FIXED replaces no mapping of the process.
        let base = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, flags) }?;
        Self::new(base.cast(), len)
    }

    /// Asks for huge pages: memory is then taken in larger pieces, with fewer faults. Without them
    /// everything works too.
    pub(crate) fn prefer_huge_pages(&self) {
        let advice = rustix::mm::Advice::LinuxHugepage;
        // SAFETY: the range is the mapping, and the advice changes none of its bytes.
        let advised = unsafe { rustix::mm::madvise(self.base.as_ptr().cast(), self.len, advice) };
        if let Err(error) = advised {
            tracing::debug!(%error, "no huge pages for the machine's RAM");
        }
    }

    /// `len` bytes of a file from `offset`, both multiples of the page size, shared with all who
    /// map it. An access beyond the end of the file ends the process by SIGBUS: the caller checks.
    pub(crate) fn shared(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let (prot, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a null hint without MAP_FIXED replaces no mapping of the process.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), len, prot, flags, file, offset) }?;
        Self::new(base.cast(), len)
    }

    fn new(base: *mut u8, len: usize) -> io::Result<Self> {
        let base = NonNull::new(base).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// Length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// All of it, as the 64-bit words in memory.
    pub(crate) fn words64(&self) -> &[AtomicU64] {
        // SAFETY: `base` is page-aligned and the mapping of `len` bytes, readable and writable,
        // lives as long as `self`. Any bits are an `AtomicU64`, and nothing is reached otherwise
        // than by atomics.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 8) }
    }

    /// All of it, as the 32-bit words in memory.
    pub(crate) fn words32(&self) -> &[AtomicU32] {
        // SAFETY: as in `words64`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len / 4) }
    }

    fn bytes(&self) -> &[AtomicU8] {
        // SAFETY: as in `words64`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().cast(), self.len) }
    }

    /// Fills `to` from `offset`; `None`, without any access, when that passes the end.
    pub(crate) fn read(&self, offset: usize, to: &mut [u8]) -> Option<()> {
        if to.len() >= LEAST_BULK {
            let inside = self.bytes().get(offset..offset.checked_add(to.len())?)?;
            load_bulk(inside, to);
            return Some(());
        }
        let (head, words, tail) = self.split(offset, to.len())?;
        let (to_head, rest) = to.split_at_mut_checked(head.len())?;
        let (to_words, to_tail) = rest.split_at_mut_checked(words.len() * 8)?;
        load_bytes(head, to_head);
        for (word, bytes) in words.iter().zip(to_words.as_chunks_mut::<8>().0) {
            *bytes = u64::from_le(word.load(Ordering::Relaxed)).to_le_bytes();
        }
        load_bytes(tail, to_tail);
        Some(())
    }

    /// Stores `from` at `offset`; `None`, without any access, when that passes the end. 4 or 8
    /// bytes that are aligned are one store, ordered after every earlier one.
    pub(crate) fn write(&self, offset: usize, from: &[u8]) -> Option<()> {
        if let Ok(bytes) = <[u8; 4]>::try_from(from)
            && offset.is_multiple_of(4)
        {
            let word = self.words32().get(offset / 4)?;
            word.store(u32::from_le_bytes(bytes).to_le(), Ordering::Release);
            return Some(());
        }
        if let Ok(bytes) = <[u8; 8]>::try_from(from)
            && offset.is_multiple_of(8)
        {
            let word = self.words64().get(offset / 8)?;
            word.store(u64::from_le_bytes(bytes).to_le(), Ordering::Release);
            return Some(());
        }
        if from.len() >= LEAST_BULK {
            let inside = self.bytes().get(offset..offset.checked_add(from.len())?)?;
            store_bulk(inside, from);
            return Some(());
        }
        let (head, words, tail) = self.split(offset, from.len())?;
        let (from_head, rest) = from.split_at_checked(head.len())?;
        let (from_words, from_tail) = rest.split_at_checked(words.len() * 8)?;
        store_bytes(head, from_head);
        for (word, bytes) in words.iter().zip(from_words.as_chunks::<8>().0) {
            word.store(u64::from_le_bytes(*bytes).to_le(), Ordering::Relaxed);
        }
        store_bytes(tail, from_tail);
        Some(())
    }

    /// Stores bytes of a file at `offset`; `None`, with any part stored, when that passes the end
    /// of one of the two or fails.
    pub(crate) fn write_from(&self, offset: usize, from: &FileBytes<'_>) -> Option<()> {
        let inside = self.bytes().get(offset..offset.checked_add(from.len)?)?;
        let position = libc::off_t::try_from(from.offset).ok()?;
        let to = inside.as_ptr().cast_mut().cast();
        // SAFETY: the bytes lie in the mapping, which is writable, and are atomics, so that the
        // kernel may store to them beside any other access.
        let read = unsafe { libc::pread(from.file.as_raw_fd(), to, from.len, position) };
        (usize::try_from(read) == Ok(from.len)).then_some(())
    }

    /// The bytes before the first aligned word, the words, and the bytes behind the last one.
    fn split(&self, offset: usize, len: usize) -> Option<(&[AtomicU8], &[AtomicU64], &[AtomicU8])> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len)?;
        let first = offset.next_multiple_of(8).min(end);
        let last = (end & !7).max(first);
        let words = if last > first { self.words64().get(first / 8..last / 8)? } else { &[] };
        Some((self.bytes().get(offset..first)?, words, self.bytes().get(last..end)?))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the one that mmap gave, nobody else unmaps it, and no slice of it
        // outlives `self`.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of a mapping of ours");
    }
}

/// A file that is mapped for system calls alone. Nothing here accesses it, so that no truncation
/// ends this process.
#[derive(Debug)]
pub(crate) struct Window {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and a `Window` gives out no more than
// its address.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

impl Window {
    /// The first `len` bytes of a file, read-only.
    pub(crate) fn new(file: BorrowedFd<'_>, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        let (prot, flags) = (ProtFlags::READ, MapFlags::SHARED);
        // SAFETY: a null hint without MAP_FIXED replaces no mapping of the process.
        let base = unsafe { rustix::mm::mmap(ptr::null_mut(), len, prot, flags, file, 0) }?;
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, len })
    }

    /// The address of `len` bytes at `offset`, if they are inside and in memory, so that a system
    /// call hardly ever waits for the medium.
    pub(crate) fn address(&self, offset: u64, len: usize) -> Option<usize> {
        const PAGE: usize = 4096;
        /// A transfer of 16 MiB, not aligned.
        const MOST: usize = 4097;
        let offset = usize::try_from(offset).ok()?;
        let end = offset.checked_add(len).filter(|end| *end <= self.len)?;
        let first = offset & !(PAGE - 1);
        let mut resident = [0_u8; MOST];
        let pages = resident.get_mut(..(end - first).div_ceil(PAGE))?;
        let start = self.base.as_ptr().wrapping_add(first).cast();
        // SAFETY: the range lies in the mapping, and `pages` has a byte for each page of it.
        let result = unsafe { libc::mincore(start, end - first, pages.as_mut_ptr()) };
        let there = result == 0 && pages.iter().all(|page| page & 1 == 1);
        there.then(|| self.base.as_ptr().addr() + offset)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the range is the one that mmap gave, and nobody else unmaps it.
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of a mapping of ours");
    }
}

/// Copies the bytes at an address of this process to `to` in another one, in one call; `None`, with
/// any part copied, when either is not there, or the process is this one.
pub(crate) fn send(process: u32, from: usize, to: &[Span]) -> Option<()> {
    if process == std::process::id() {
        return None;
    }
    let remote = to.iter().map(|span| {
        let base = usize::try_from(span.start).ok()?;
        Some(libc::iovec { iov_base: ptr::without_provenance_mut(base), iov_len: span.len })
    });
    let remote = remote.collect::<Option<Vec<_>>>()?;
    let len = to.iter().try_fold(0_usize, |sum, span| sum.checked_add(span.len))?;
    let local = libc::iovec { iov_base: ptr::without_provenance_mut(from), iov_len: len };
    let process = libc::pid_t::try_from(process).ok()?;
    let count = libc::c_ulong::try_from(remote.len()).ok()?;
    // SAFETY: the kernel loads from this process's side, or fails where nothing is mapped. What it
    // stores to is not this process's memory, as was just checked.
    let sent = unsafe { libc::process_vm_writev(process, &local, 1, remote.as_ptr(), count, 0) };
    (usize::try_from(sent) == Ok(len)).then_some(())
}

/// Writes bytes of one file to another one at `position`, from the mapping of the first; `None`,
/// with any part written, when that fails.
pub(crate) fn store(to: BorrowedFd<'_>, position: u64, from: &FileBytes<'_>) -> Option<()> {
    let position = libc::off_t::try_from(position).ok()?;
    let address = ptr::without_provenance(from.mapped);
    // SAFETY: the kernel only loads from the address, or fails where nothing is mapped.
    let written = unsafe { libc::pwrite(to.as_raw_fd(), address, from.len, position) };
    (usize::try_from(written) == Ok(from.len)).then_some(())
}

/// From here on the processor's own copy is faster than one word by word.
const LEAST_BULK: usize = 512;

/// Fills `to` from as many bytes of `from`, as relaxed loads in any order would.
fn load_bulk(from: &[AtomicU8], to: &mut [u8]) {
    let len = from.len().min(to.len());
    // SAFETY: both are `len` bytes, and `to` is borrowed for this alone.
    unsafe { copy_bulk(from.as_ptr().cast(), to.as_mut_ptr(), len) };
}

/// Stores `from` to as many bytes of `to`, as relaxed stores in any order would.
fn store_bulk(to: &[AtomicU8], from: &[u8]) {
    let len = to.len().min(from.len());
    // SAFETY: both are `len` bytes; those of `to` are atomics, which may be stored to through a
    // shared reference.
    unsafe { copy_bulk(from.as_ptr(), to.as_ptr().cast_mut().cast(), len) };
}

/// Copies bytes that others may access at the same time, one at a time as far as the language is
/// concerned: it does not see into the instruction.
///
/// # Safety
///
/// `from` can be loaded from and `to` stored to for `len` bytes. Where others access them at the
/// same time, they are atomics.
#[cfg(target_arch = "x86_64")]
unsafe fn copy_bulk(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear at entry to any
    // assembly block.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

/// As above, by atomics on either side.
#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_bulk(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges, and a byte is aligned.
    let (from, to) = unsafe {
        let from = std::slice::from_raw_parts(from.cast::<AtomicU8>(), len);
        (from, std::slice::from_raw_parts(to.cast::<AtomicU8>(), len))
    };
    for (from, to) in from.iter().zip(to) {
        to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

fn load_bytes(from: &[AtomicU8], to: &mut [u8]) {
    for (from, to) in from.iter().zip(to) {
        *to = from.load(Ordering::Relaxed);
    }
}

fn store_bytes(to: &[AtomicU8], from: &[u8]) {
    for (to, from) in to.iter().zip(from) {
        to.store(*from, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn copies_at_any_offset_and_length_are_those_of_a_plain_array(
            writes in prop::collection::vec((0_usize..300, 0_usize..2000, any::<u8>()), 1..8),
            (from, len) in (0_usize..300, 0_usize..2000),
        ) {
            let mapping = Mapping::anonymous(4096).unwrap();
            let mut plain = [0; 4096];
            for (at, len, seed) in writes {
                let bytes: Vec<u8> = (0_u8..=255).cycle().map(|i| seed.wrapping_add(i)).take(len).collect();
                plain[at..at + len].copy_from_slice(&bytes);
                prop_assert_eq!(mapping.write(at, &bytes), Some(()));
            }
            let mut read = vec![0xee; len];
            prop_assert_eq!(mapping.read(from, &mut read), Some(()));
            prop_assert_eq!(&read, &plain[from..from + len]);
        }
    }

    #[test]
    fn nothing_passes_the_end() {
        let mapping = Mapping::anonymous(4096).unwrap();
        for (offset, len) in
            [(4096, 1), (4093, 4), (4092, 5), (4089, 8), (usize::MAX, 8), (1, 4096)]
        {
            assert_eq!(mapping.write(offset, &vec![1; len]), None);
            assert_eq!(mapping.read(offset, &mut vec![1; len]), None);
        }
        assert!(mapping.words64().iter().all(|word| word.load(Ordering::Relaxed) == 0));
    }

    #[test]
    fn a_file_is_the_same_memory_for_all_who_map_it() {
        let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        use std::os::fd::AsFd;
        let [a, b] = [0, 1].map(|_| Mapping::shared(file.as_fd(), 4096, 4096).unwrap());
        a.write(8, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        assert_eq!(b.words32()[2].load(Ordering::Relaxed).to_le(), 0x0403_0201);
    }
}
