//! Frames: the physical addresses of client pages.
//!
//! Whatever backs pages is cut into chunks of 1 GiB. A chunk has a number while a page of it is
//! pinned, and a while longer; its frames are computed from the number and the position.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use lychgate_types::{Errno, PhysAddr, PhysRun};

use super::file::{FileBacking, FileKey};
use super::layout::{CHUNK, FrameOrder, MAX_CHUNKS, PAGE, page_number};
use super::pins::Pins;
use super::space::Space;
use crate::mapped::Mapping;

/// Chunks without any pin that keep their number, so that a client that maps and unmaps one buffer
/// over and over does not pay for a new chunk each time.
const MAX_IDLE: usize = 8;

/// What is behind pages.
#[derive(Clone)]
pub(crate) enum Backing {
    /// Private memory; positions are virtual addresses.
    Private(Arc<Space>),
    /// A file; positions are offsets.
    File(Arc<FileBacking>),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Private(u64),
    File(FileKey),
}

impl Backing {
    fn key(&self) -> Key {
        match self {
            Self::Private(space) => Key::Private(space.id()),
            Self::File(file) => Key::File(file.key()),
        }
    }
}

/// 1 GiB of a backing.
pub(crate) struct Chunk {
    number: u32,
    /// Position in the backing, counted in chunks.
    index: u64,
    backing: Backing,
    mapping: OnceLock<Option<Mapping>>,
    pins: Mutex<Pins>,
    queued_as_idle: AtomicBool,
}

impl Chunk {
    pub(crate) fn backing(&self) -> &Backing {
        &self.backing
    }

    /// Position in the backing, counted in chunks.
    pub(crate) fn index(&self) -> u64 {
        self.index
    }

    /// The mapping of a file's chunk, once it is made.
    pub(crate) fn mapping(&self) -> &OnceLock<Option<Mapping>> {
        &self.mapping
    }

    fn pins(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All frames of the machine.
pub(crate) struct Frames {
    order: FrameOrder,
    table: RwLock<Table>,
}

#[derive(Default)]
struct Table {
    chunks: Vec<Option<Arc<Chunk>>>,
    numbers: HashMap<(Key, u64), u32>,
    /// Numbers of chunks that are gone, the oldest first.
    free: VecDeque<u32>,
    idle: VecDeque<u32>,
}

impl Frames {
    pub(crate) fn new(order: FrameOrder) -> Self {
        Self { order, table: RwLock::default() }
    }

    /// Pins `len` bytes of a backing from `start`, multiples of the page size. `ENOMEM` when the
    /// physical address space is used up.
    pub(crate) fn pin(
        &self,
        backing: &Backing,
        start: u64,
        len: u64,
    ) -> Result<Vec<PhysRun>, Errno> {
        let mut runs: Vec<PhysRun> = Vec::new();
        let end = start.checked_add(len).ok_or(Errno::EFAULT)?;
        let mut at = start;
        while at < end {
            let part = (CHUNK - at % CHUNK).min(end - at);
            let Some(chunk) = self.pin_in_chunk(backing, at / CHUNK, pages(at % CHUNK, part))
            else {
                self.unpin(&runs);
                return Err(Errno::ENOMEM);
            };
            self.append_runs(&mut runs, chunk, at % CHUNK, part);
            at += part;
        }
        Ok(runs)
    }

    /// Undoes one pin of each page of `runs`.
    pub(crate) fn unpin(&self, runs: &[PhysRun]) {
        for run in runs {
            let (mut at, mut left) = (run.start, run.len);
            while left > 0 {
                let Some((chunk, offset)) = self.locate(at) else {
                    tracing::error!(%at, "a frame was unpinned that does not exist");
                    break;
                };
                let part = self.order.run_len(offset).min(left);
                self.unpin_in_chunk(&chunk, pages(offset, part));
                at = at.wrapping_add(part);
                left -= part;
            }
        }
    }

    /// The chunk of a frame, and the byte of the chunk's backing that an address leads to.
    pub(crate) fn locate(&self, at: PhysAddr) -> Option<(Arc<Chunk>, u64)> {
        let (number, offset) = self.order.locate(at)?;
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let chunk = table.chunks.get(number as usize)?.as_ref()?;
        Some((Arc::clone(chunk), offset))
    }

    /// How many bytes from `offset` of a chunk's backing have frames in a row.
    pub(crate) fn run_len(&self, offset: u64) -> u64 {
        self.order.run_len(offset)
    }

    /// How often the frame at `at` is pinned.
    pub(crate) fn pin_count(&self, at: PhysAddr) -> u32 {
        self.locate(at).map_or(0, |(chunk, offset)| chunk.pins().count(page_number(offset)))
    }

    /// The pins of all frames.
    pub(crate) fn total_pins(&self) -> u64 {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.chunks.iter().flatten().map(|chunk| chunk.pins().total()).sum()
    }

    fn append_runs(&self, runs: &mut Vec<PhysRun>, chunk: u32, start: u64, len: u64) {
        let mut at = start;
        while at < start + len {
            let part = self.order.run_len(at).min(start + len - at);
            let from = self.order.address(chunk, at);
            match runs.last_mut() {
                Some(last) if last.start.get() + last.len == from.get() => last.len += part,
                _ => runs.push(PhysRun { start: from, len: part }),
            }
            at += part;
        }
    }

    /// Pins pages of a chunk under the lock of the table, so that the chunk cannot go meanwhile.
    fn pin_in_chunk(&self, backing: &Backing, index: u64, pages: Range<u32>) -> Option<u32> {
        let key = (backing.key(), index);
        {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(chunk) = table.find(&key) {
                chunk.pins().add(pages);
                return Some(chunk.number);
            }
        }
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let number = match table.find(&key) {
            Some(chunk) => chunk.number,
            None => table.add(key, backing, index)?,
        };
        table.find(&key)?.pins().add(pages);
        Some(number)
    }

    fn unpin_in_chunk(&self, chunk: &Arc<Chunk>, pages: Range<u32>) {
        let (missing, total) = {
            let mut pins = chunk.pins();
            (pins.remove(pages), pins.total())
        };
        if missing > 0 {
            tracing::error!(missing, "pages were unpinned that were not pinned");
        }
        if total == 0 && !chunk.queued_as_idle.swap(true, Ordering::Relaxed) {
            let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
            table.idle.push_back(chunk.number);
            table.evict();
        }
    }
}

impl Table {
    fn find(&self, key: &(Key, u64)) -> Option<&Arc<Chunk>> {
        self.chunks.get(*self.numbers.get(key)? as usize)?.as_ref()
    }

    fn add(&mut self, key: (Key, u64), backing: &Backing, index: u64) -> Option<u32> {
        // A number comes back as late as can be, so that a stale translation leads nowhere.
        let number = if self.chunks.len() < MAX_CHUNKS {
            self.chunks.push(None);
            u32::try_from(self.chunks.len() - 1).ok()?
        } else {
            self.free.pop_front()?
        };
        let chunk = Chunk {
            number,
            index,
            backing: backing.clone(),
            mapping: OnceLock::new(),
            pins: Mutex::default(),
            queued_as_idle: AtomicBool::new(false),
        };
        *self.chunks.get_mut(number as usize)? = Some(Arc::new(chunk));
        self.numbers.insert(key, number);
        Some(number)
    }

    /// Lets the chunks go that have been idle longest, except those in use again.
    fn evict(&mut self) {
        while self.idle.len() > MAX_IDLE {
            let Some(number) = self.idle.pop_front() else { return };
            let Some(slot) = self.chunks.get_mut(number as usize) else { continue };
            let Some(chunk) = slot else { continue };
            chunk.queued_as_idle.store(false, Ordering::Relaxed);
            if chunk.pins().total() == 0 {
                self.numbers.remove(&(chunk.backing.key(), chunk.index));
                *slot = None;
                self.free.push_back(number);
            }
        }
    }
}

fn pages(offset: u64, len: u64) -> Range<u32> {
    let first = page_number(offset);
    first..first.saturating_add(u32::try_from(len.div_ceil(PAGE)).unwrap_or(u32::MAX))
}
