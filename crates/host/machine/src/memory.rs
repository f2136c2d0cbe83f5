//! Physical memory of the machine: its own RAM, and the frames of client pages.
//!
//! | from | what |
//! |---|---|
//! | 4 GiB | RAM, up to 16 GiB: device tables, page tables, queues |
//! | 1 TiB | frames, up to the end of the 52-bit space |
//!
//! A frame's number is a function of what backs its page, so the same page is the same frame however
//! it was reached. How its bytes are reached depends on the backing: RAM and files that cannot shrink
//! are mapped; other files are read and written; private memory is copied across processes, with one
//! call per transfer. Copies of 4 and 8 aligned bytes are single accesses in mapped memory; elsewhere
//! they are what the kernel makes of them, ascending.

mod file;
mod frames;
mod layout;
mod pins;
mod ram;
mod space;
#[cfg(test)]
mod tests;
mod transfer;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_iommufd::{MemFile, Mm};
use lychgate_model::FileBytes;
use lychgate_types::{BusError, Errno, Memory, OutOfMemory, Pages, PhysAddr, PhysRun};

use self::file::{Files, PinnedFile};
use self::frames::{Backing, Frames};
use self::ram::Ram;
use self::space::{Space, SpaceMm, Users};
use self::transfer::Reach;
use crate::client::AddressSpace;

pub use self::layout::FrameOrder;
pub use self::space::MemlockPolicy;

/// The machine's physical memory.
pub struct PhysicalMemory {
    ram: Ram,
    frames: Arc<Frames>,
    files: Arc<Files>,
    users: Arc<Users>,
    next_space: AtomicU64,
}

impl PhysicalMemory {
    /// Memory without any client page. Fails when not even 64 MiB of address space can be had.
    pub fn new(order: FrameOrder, memlock: MemlockPolicy) -> io::Result<Self> {
        Ok(Self {
            ram: Ram::new()?,
            frames: Arc::new(Frames::new(order)),
            files: Arc::default(),
            users: Arc::new(Users::new(memlock)),
            next_space: AtomicU64::new(1),
        })
    }

    /// Makes an address space known: its private pages get frames when they are pinned.
    pub fn mm(&self, access: Arc<dyn AddressSpace>) -> Arc<dyn Mm> {
        let id = self.next_space.fetch_add(1, Ordering::Relaxed);
        let space = Arc::new(Space::new(id, access));
        self.files.add_space(&space);
        Arc::new(SpaceMm {
            space,
            frames: Arc::clone(&self.frames),
            files: Arc::clone(&self.files),
            users: Arc::clone(&self.users),
        })
    }

    /// Makes a file in memory known. `EINVAL` for any other file.
    pub fn mem_file(&self, fd: OwnedFd) -> Result<Arc<dyn MemFile>, Errno> {
        let backing = self.files.open(fd)?;
        Ok(Arc::new(PinnedFile { frames: Arc::clone(&self.frames), backing }))
    }

    /// How often the frame at an address is pinned; 0 where no frame is.
    pub fn pin_count(&self, at: PhysAddr) -> u32 {
        self.frames.pin_count(at)
    }

    /// The pins of all frames, each page counted as often as it is pinned.
    pub fn total_pins(&self) -> u64 {
        self.frames.total_pins()
    }

    /// Runs `f` with the word at `at`, if it is mapped: RAM, or a file that cannot shrink.
    fn with_word<R>(&self, at: PhysAddr, f: impl Fn(&AtomicU64) -> R) -> Option<R> {
        if let Some(word) = self.ram.word(at) {
            return Some(f(word));
        }
        let (chunk, offset) = self.frames.locate(at).filter(|_| at.is_aligned(8))?;
        match chunk.backing() {
            Backing::File(file) => file.with_word(chunk.mapping(), chunk.index(), offset, f),
            Backing::Private(_) => None,
        }
    }

    /// As [`Memory::write_runs`], with bytes that are still in a file. Each goes the way of one copy
    /// or fails.
    pub(crate) fn write_runs_from(
        &self,
        runs: &[PhysRun],
        from: &FileBytes<'_>,
    ) -> Result<(), BusError> {
        transfer::write_from(self.reach(), runs, from)
    }

    fn reach(&self) -> Reach<'_> {
        Reach { ram: Some(&self.ram), frames: &self.frames }
    }

    fn load(&self, at: PhysAddr) -> Result<u64, BusError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

impl Memory for PhysicalMemory {
    fn read(&self, from: PhysAddr, to: &mut [u8]) -> Result<(), BusError> {
        if let Some(offset) = self.ram.offset(from) {
            return self.ram.bytes().read(offset, to).ok_or(BusError { at: from });
        }
        transfer::read(self.reach(), &[PhysRun { start: from, len: to.len() as u64 }], to)
    }

    fn write(&self, to: PhysAddr, from: &[u8]) -> Result<(), BusError> {
        if let Some(offset) = self.ram.offset(to) {
            return self.ram.bytes().write(offset, from).ok_or(BusError { at: to });
        }
        transfer::write(self.reach(), &[PhysRun { start: to, len: from.len() as u64 }], from)
    }

    fn load_u64(&self, at: PhysAddr) -> Result<u64, BusError> {
        match self.with_word(at, |word| word.load(Ordering::Acquire)) {
            Some(word) => Ok(u64::from_le(word)),
            None => self.load(at),
        }
    }

    fn store_u64(&self, at: PhysAddr, value: u64) -> Result<(), BusError> {
        match self.with_word(at, |word| word.store(value.to_le(), Ordering::Release)) {
            Some(()) => Ok(()),
            None => self.write(at, &value.to_le_bytes()),
        }
    }

    /// Where the word is not mapped, a store of the client between load and store is lost.
    fn fetch_or_u64(&self, at: PhysAddr, bits: u64) -> Result<u64, BusError> {
        match self.with_word(at, |word| word.fetch_or(bits.to_le(), Ordering::AcqRel)) {
            Some(word) => Ok(u64::from_le(word)),
            None => {
                let before = self.load(at)?;
                self.write(at, &(before | bits).to_le_bytes())?;
                Ok(before)
            }
        }
    }

    fn read_runs(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), BusError> {
        match runs {
            [run] if run.len == to.len() as u64 => self.read(run.start, to),
            _ => transfer::read(self.reach(), runs, to),
        }
    }

    fn write_runs(&self, runs: &[PhysRun], from: &[u8]) -> Result<(), BusError> {
        match runs {
            [run] if run.len == from.len() as u64 => self.write(run.start, from),
            _ => transfer::write(self.reach(), runs, from),
        }
    }
}

impl Pages for PhysicalMemory {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.ram.alloc(bytes, true)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.ram.alloc(bytes, false)
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        self.ram.free(at, bytes);
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        self.ram.words(at, count)
    }
}
