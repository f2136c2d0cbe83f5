//! A little physical memory with nothing around it.

use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_types::{BusError, Memory, PhysAddr};

/// Words from a start address on; every other address aborts.
#[derive(Debug)]
pub struct SmallMemory {
    start: u64,
    words: Vec<AtomicU64>,
}

impl SmallMemory {
    /// `len` zero bytes, a multiple of 8, from `start`, a multiple of 8.
    pub fn new(start: u64, len: u64) -> Self {
        Self { start, words: (0..len / 8).map(|_| AtomicU64::new(0)).collect() }
    }

    fn word(&self, at: PhysAddr) -> Result<&AtomicU64, BusError> {
        assert!(at.is_aligned(8), "a 64-bit access to {at}");
        let index = at.get().checked_sub(self.start).and_then(|at| usize::try_from(at / 8).ok());
        index.and_then(|index| self.words.get(index)).ok_or(BusError { at })
    }

    fn byte(&self, at: PhysAddr) -> Result<u8, BusError> {
        let word = self.word(at.align_down(8)).map_err(|_| BusError { at })?;
        Ok(u64::from_le(word.load(Ordering::Acquire)).to_le_bytes()[(at.get() % 8) as usize])
    }

    fn set_byte(&self, at: PhysAddr, value: u8) -> Result<(), BusError> {
        let word = self.word(at.align_down(8)).map_err(|_| BusError { at })?;
        let mut bytes = u64::from_le(word.load(Ordering::Acquire)).to_le_bytes();
        bytes[(at.get() % 8) as usize] = value;
        word.store(u64::from_le_bytes(bytes).to_le(), Ordering::Release);
        Ok(())
    }
}

impl Memory for SmallMemory {
    fn read(&self, from: PhysAddr, to: &mut [u8]) -> Result<(), BusError> {
        for (offset, byte) in (0..).zip(to) {
            *byte = self.byte(from.wrapping_add(offset))?;
        }
        Ok(())
    }

    fn write(&self, to: PhysAddr, from: &[u8]) -> Result<(), BusError> {
        for (offset, byte) in (0..).zip(from) {
            self.set_byte(to.wrapping_add(offset), *byte)?;
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
