//! Memory that a device shares: buffers for DMA and mapped registers. Both sides reach it at any
//! time, so it is only read and written through atomics.

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use anyhow::{Context, Result};
use rustix::mm::{MapFlags, ProtFlags};
use vfio_ioctls::VfioOps;

use crate::way::Opened;

/// Anonymous memory that is mapped for DMA until it is unmapped or dropped.
pub struct DmaBuffer {
    mapping: Mapping,
    iova: u64,
    mapped_in: Option<Arc<dyn VfioOps>>,
}

impl DmaBuffer {
    /// Allocates `len` bytes, a multiple of the page size, all zero, and maps them for DMA.
    pub fn new(opened: &Opened, len: u64) -> Result<Self> {
        let mapping = Mapping::anonymous(usize::try_from(len)?)?;
        let mut buffer = Self { mapping, iova: opened.iova(len), mapped_in: None };
        buffer.map(opened)?;
        Ok(buffer)
    }

    /// The bus address of byte `offset`.
    pub fn iova(&self, offset: u64) -> u64 {
        self.iova + offset
    }

    /// Gives memory that was taken away to the device again, at the same address.
    pub fn map(&mut self, opened: &Opened) -> Result<()> {
        self.unmap()?;
        // SAFETY: the memory is reached through atomics alone, and `drop` unmaps it from the
        // device's address space before it unmaps it from ours.
        unsafe { opened.space.vfio_dma_map(self.iova, self.mapping.len, self.mapping.at.as_ptr()) }
            .context("mapping memory for DMA")?;
        self.mapped_in = Some(Arc::clone(&opened.space));
        Ok(())
    }

    /// Takes the memory away from the device; it stays readable here.
    pub fn unmap(&mut self) -> Result<()> {
        if let Some(space) = self.mapped_in.take() {
            space.vfio_dma_unmap(self.iova, self.mapping.len).context("unmapping memory")?;
        }
        Ok(())
    }

    /// The little-endian word at byte `offset`, a multiple of 8.
    pub fn load_u64(&self, offset: u64) -> u64 {
        u64::from_le(self.mapping.word64(offset).load(Ordering::Acquire))
    }

    /// Stores a little-endian word at byte `offset`, a multiple of 8.
    pub fn store_u64(&self, offset: u64, value: u64) {
        self.mapping.word64(offset).store(value.to_le(), Ordering::Release);
    }

    /// The little-endian word at byte `offset`, a multiple of 4.
    pub fn load_u32(&self, offset: u64) -> u32 {
        u32::from_le(self.mapping.word32(offset).load(Ordering::Acquire))
    }

    /// Stores a little-endian word at byte `offset`, a multiple of 4.
    pub fn store_u32(&self, offset: u64, value: u32) {
        self.mapping.word32(offset).store(value.to_le(), Ordering::Release);
    }

    /// Sets every byte.
    pub fn fill(&self, byte: u8) {
        for at in (0..self.mapping.len as u64).step_by(8) {
            self.store_u64(at, u64::from_le_bytes([byte; 8]));
        }
    }

    /// Whether every byte is `byte`.
    pub fn is_filled_with(&self, byte: u8) -> bool {
        (0..self.mapping.len as u64)
            .step_by(8)
            .all(|at| self.load_u64(at) == u64::from_le_bytes([byte; 8]))
    }
}

impl Drop for DmaBuffer {
    fn drop(&mut self) {
        if let Err(error) = self.unmap() {
            eprintln!("demo-client: {error:#}");
        }
    }
}

/// Registers of the device, mapped.
pub struct Registers(Mapping);

impl Registers {
    /// Maps `len` bytes of the device's file from `offset`.
    pub fn new(opened: &Opened, offset: u64, len: usize) -> Result<Self> {
        let file = opened.device_file()?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let at =
            unsafe { rustix::mm::mmap(ptr::null_mut(), len, prot, MapFlags::SHARED, file, offset) }
                .context("mapping the registers")?;
        Ok(Self(Mapping::from_kernel(at, len)?))
    }

    /// Reads a 32-bit register.
    pub fn read32(&self, offset: u64) -> u32 {
        u32::from_le(self.0.word32(offset).load(Ordering::Acquire))
    }

    /// Reads a 64-bit register.
    pub fn read64(&self, offset: u64) -> u64 {
        u64::from_le(self.0.word64(offset).load(Ordering::Acquire))
    }

    /// Writes a 32-bit register.
    pub fn write32(&self, offset: u64, value: u32) {
        self.0.word32(offset).store(value.to_le(), Ordering::Release);
    }

    /// Writes a 64-bit register.
    pub fn write64(&self, offset: u64, value: u64) {
        self.0.word64(offset).store(value.to_le(), Ordering::Release);
    }
}

struct Mapping {
    at: NonNull<u8>,
    len: usize,
}

impl Mapping {
    fn anonymous(len: usize) -> Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let at =
            unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, prot, MapFlags::PRIVATE) }
                .context("allocating memory")?;
        Self::from_kernel(at, len)
    }

    fn from_kernel(at: *mut c_void, len: usize) -> Result<Self> {
        Ok(Self { at: NonNull::new(at.cast()).context("mapped at address zero")?, len })
    }

    fn word64(&self, offset: u64) -> &AtomicU64 {
        // SAFETY: `address` gives 8 aligned bytes of the mapping, which lives as long as `self`, and
        // everybody here reaches them through atomics alone.
        unsafe { AtomicU64::from_ptr(self.address(offset, 8).cast()) }
    }

    fn word32(&self, offset: u64) -> &AtomicU32 {
        // SAFETY: as in `word64`, for 4 bytes.
        unsafe { AtomicU32::from_ptr(self.address(offset, 4).cast()) }
    }

    fn address(&self, offset: u64, size: usize) -> *mut u8 {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        assert!(
            offset.is_multiple_of(size) && offset <= self.len - size,
            "access outside of the mapping"
        );
        self.at.as_ptr().wrapping_add(offset)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours alone, and references into it borrow `self`.
        if let Err(error) = unsafe { rustix::mm::munmap(self.at.as_ptr().cast(), self.len) } {
            eprintln!("demo-client: unmapping memory: {error}");
        }
    }
}
