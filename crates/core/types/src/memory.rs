//! How software and models reach physical memory and registers.

use core::fmt;

use crate::addr::{PhysAddr, PhysRun};

/// Nothing answered at a physical address, or what answered could not complete: what a PCIe
/// transaction reports as a master abort or target abort.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BusError {
    /// First byte that could not be reached.
    pub at: PhysAddr,
}

impl fmt::Display for BusError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "no memory answers at physical address {}", self.at)
    }
}

impl core::error::Error for BusError {}

/// Physical memory as a bus master reaches it.
///
/// Bytes are as they stand in memory; the 64-bit operations are little-endian and single-copy
/// atomic, their address a multiple of 8. A failed transfer may have moved a part.
pub trait Memory: Send + Sync {
    /// Fills `to` from the bytes at `from`.
    fn read(&self, from: PhysAddr, to: &mut [u8]) -> Result<(), BusError>;

    /// Stores `from` to the bytes at `to`.
    fn write(&self, to: PhysAddr, from: &[u8]) -> Result<(), BusError>;

    /// Loads the little-endian 64-bit word at `at`, with acquire ordering.
    fn load_u64(&self, at: PhysAddr) -> Result<u64, BusError>;

    /// Stores a little-endian 64-bit word at `at`, with release ordering.
    fn store_u64(&self, at: PhysAddr, value: u64) -> Result<(), BusError>;

    /// ORs `bits` into the word at `at` in one locked access and returns the word before: how
    /// hardware sets access and dirty bits.
    fn fetch_or_u64(&self, at: PhysAddr, bits: u64) -> Result<u64, BusError>;

    /// Gathers the bytes of `runs`, in order, into `to`, whose length is their sum.
    ///
    /// One call per transfer lets an implementation that copies across processes batch.
    fn read_runs(&self, runs: &[PhysRun], to: &mut [u8]) -> Result<(), BusError> {
        let mut rest = to;
        for run in runs {
            let len = usize::try_from(run.len).map_err(|_| BusError { at: run.start })?;
            let (here, after) = rest.split_at_mut_checked(len).ok_or(BusError { at: run.start })?;
            self.read(run.start, here)?;
            rest = after;
        }
        Ok(())
    }

    /// Scatters `from` to the bytes of `runs`, in order; its length is their sum.
    fn write_runs(&self, runs: &[PhysRun], from: &[u8]) -> Result<(), BusError> {
        let mut rest = from;
        for run in runs {
            let len = usize::try_from(run.len).map_err(|_| BusError { at: run.start })?;
            let (here, after) = rest.split_at_checked(len).ok_or(BusError { at: run.start })?;
            self.write(run.start, here)?;
            rest = after;
        }
        Ok(())
    }
}

/// A device's registers, by byte offset into its MMIO region.
///
/// Accesses are naturally aligned. As on a bus there is no error: a read that nothing answers
/// gives all ones, a write that nothing takes is dropped.
pub trait Mmio: Send + Sync {
    /// Reads a 32-bit register.
    fn read32(&self, offset: u64) -> u32;
    /// Reads a 64-bit register.
    fn read64(&self, offset: u64) -> u64;
    /// Writes a 32-bit register.
    fn write32(&self, offset: u64, value: u32);
    /// Writes a 64-bit register.
    fn write64(&self, offset: u64, value: u64);
}
