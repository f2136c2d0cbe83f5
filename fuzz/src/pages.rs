//! An allocator of table pages that fails when it is told to, and knows what is given back.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use lychgate_types::{BusError, Memory, OutOfMemory, Pages, PhysAddr};

const START: u64 = 1 << 32;
const PAGE: u64 = 4096;
const WORDS: usize = 512;
const MOST_PAGES: usize = 4096;
/// What a page holds that was given back: not present, not a table, not even zero.
const FREED: u64 = 0xdead_dead_dead_deac;

/// Pages of 4 KiB, made as they are needed.
#[derive(Debug)]
pub struct PagePool {
    pages: Box<[OnceLock<Box<[AtomicU64]>>]>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    live: BTreeSet<u64>,
    free: Vec<u64>,
    made: usize,
    /// Allocations that succeed before all fail, if any shall.
    left: Option<usize>,
}

impl Default for PagePool {
    fn default() -> Self {
        Self::new()
    }
}

impl PagePool {
    /// An empty pool.
    pub fn new() -> Self {
        let pages = (0..MOST_PAGES).map(|_| OnceLock::new()).collect();
        Self { pages, state: Mutex::default() }
    }

    /// Lets so many allocations succeed, or all.
    pub fn fail_after(&self, allocations: Option<usize>) {
        self.lock().left = allocations;
    }

    /// Pages that were not given back.
    pub fn live(&self) -> usize {
        self.lock().live.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn word(&self, at: PhysAddr) -> Result<&AtomicU64, BusError> {
        assert!(at.is_aligned(8), "a 64-bit access to {at}");
        self.words(at, 1).first().ok_or(BusError { at })
    }
}

impl Pages for PagePool {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        assert_eq!(bytes, PAGE, "every table here is a page");
        let mut state = self.lock();
        if let Some(left) = &mut state.left {
            *left = left.checked_sub(1).ok_or(OutOfMemory)?;
        }
        let at = match state.free.pop() {
            Some(at) => at,
            None => {
                let page = self.pages.get(state.made).expect("no target needs as many pages");
                page.get_or_init(|| (0..WORDS).map(|_| AtomicU64::new(0)).collect());
                state.made += 1;
                START + (state.made as u64 - 1) * PAGE
            }
        };
        state.live.insert(at);
        drop(state);
        let at = PhysAddr::new(at);
        self.words(at, WORDS).iter().for_each(|word| word.store(0, Ordering::Relaxed));
        Ok(at)
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        assert_eq!(bytes, PAGE);
        let mut state = self.lock();
        assert!(state.live.remove(&at.get()), "{at} is given back twice");
        // Whoever still walks it goes astray.
        self.words(at, WORDS).iter().for_each(|word| word.store(FREED, Ordering::Relaxed));
        state.free.push(at.get());
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        let Some(offset) = at.get().checked_sub(START) else {
            return &[];
        };
        let index = usize::try_from(offset / PAGE).unwrap_or(usize::MAX);
        let page = self.pages.get(index).and_then(OnceLock::get);
        let first = (offset % PAGE / 8) as usize;
        page.and_then(|page| page.get(first..first.checked_add(count)?)).unwrap_or(&[])
    }
}

impl Memory for PagePool {
    fn read(&self, from: PhysAddr, to: &mut [u8]) -> Result<(), BusError> {
        for (at, byte) in (from.get()..).map(PhysAddr::new).zip(to) {
            let word = self.load_u64(at.align_down(8))?;
            *byte = word.to_le_bytes()[(at.get() % 8) as usize];
        }
        Ok(())
    }

    fn write(&self, to: PhysAddr, from: &[u8]) -> Result<(), BusError> {
        for (at, byte) in (to.get()..).map(PhysAddr::new).zip(from) {
            let mut bytes = self.load_u64(at.align_down(8))?.to_le_bytes();
            bytes[(at.get() % 8) as usize] = *byte;
            self.store_u64(at.align_down(8), u64::from_le_bytes(bytes))?;
        }
        Ok(())
    }

    fn load_u64(&self, at: PhysAddr) -> Result<u64, BusError> {
        Ok(u64::from_le(self.word(at)?.load(Ordering::Acquire)))
    }

    fn store_u64(&self, at: PhysAddr, value: u64) -> Result<(), BusError> {
        self.word(at)?.store(value.to_le(), Ordering::Release);
        Ok(())
    }

    fn fetch_or_u64(&self, at: PhysAddr, bits: u64) -> Result<u64, BusError> {
        Ok(u64::from_le(self.word(at)?.fetch_or(bits.to_le(), Ordering::AcqRel)))
    }
}
