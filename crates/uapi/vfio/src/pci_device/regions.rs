//! Regions of the device file: BARs, configuration space, and what can be mapped
//! (`vfio_pci_rdwr.c`).

use std::sync::atomic::Ordering;

use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{Client, MmapRequest, PAGE_SIZE, Refusal};
use lychgate_model::Bar;
use lychgate_types::Errno;

use super::VfioPciDevice;
use crate::abi::{REGION_SHIFT, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ROM_REGION_INDEX};
use crate::user;

/// Bytes that are moved to or from a client at once.
const BLOCK: u64 = 4096;

/// Which part of which region a call is about.
enum Target {
    Config { at: u64 },
    Bar { bar: u8, at: u64, count: u64 },
}

impl VfioPciDevice {
    /// A base address register, by region index.
    pub(super) fn bar(&self, index: u32) -> Option<Bar> {
        self.function().bars().get(usize::try_from(index).ok()?).copied().flatten()
    }

    /// `pread(2)`: the bytes read.
    pub(crate) fn read_region(
        &self,
        client: &dyn Client,
        buffer: u64,
        count: u64,
        offset: u64,
    ) -> Result<u64> {
        if count == 0 {
            return Ok(0);
        }
        let target = self.target(count, offset, false)?;
        let count = target.count(count);
        blocks(count, |done, block| {
            match target {
                Target::Config { at } => self.with_opened(|opened| {
                    self.config_read(opened, config_offset(at + done), block);
                    Ok(())
                })?,
                Target::Bar { bar, at, .. } => {
                    self.bar_access(bar, at + done, Access::Read(block))?
                }
            }
            user::write(client, user::at(buffer, done)?, block)
        })?;
        Ok(count)
    }

    /// `pwrite(2)`: the bytes written.
    pub(crate) fn write_region(
        &self,
        client: &dyn Client,
        buffer: u64,
        count: u64,
        offset: u64,
    ) -> Result<u64> {
        if count == 0 {
            return Ok(0);
        }
        let target = self.target(count, offset, true)?;
        let count = target.count(count);
        blocks(count, |done, block| {
            user::read(client, user::at(buffer, done)?, block)?;
            match target {
                Target::Config { at } => self.with_opened(|opened| {
                    self.config_write(opened, config_offset(at + done), block);
                    Ok(())
                }),
                Target::Bar { bar, at, .. } => {
                    self.bar_access(bar, at + done, Access::Write(block))
                }
            }
        })?;
        Ok(count)
    }

    /// Whether `mmap(2)` may go on: shared, and inside what the function lets be mapped. All `EINVAL`.
    pub(crate) fn check_mmap(&self, request: &MmapRequest) -> Result<()> {
        let index = u32::try_from(request.offset >> REGION_SHIFT).unwrap_or(u32::MAX);
        if !request.shared {
            return refuse(Errno::EINVAL, "a region can only be mapped shared");
        }
        if index >= VFIO_PCI_ROM_REGION_INDEX {
            return refuse(Errno::EINVAL, "only BARs can be mapped");
        }
        let mappable = self.bar(index).map_or(0, |bar| bar.mappable);
        if mappable == 0 {
            return refuse(Errno::EINVAL, "this BAR cannot be mapped");
        }
        let start = request.offset & ((1 << REGION_SHIFT) - 1);
        let end =
            request.len.checked_next_multiple_of(PAGE_SIZE).and_then(|len| start.checked_add(len));
        if end.is_none_or(|end| end > mappable) {
            return refuse(
                Errno::EINVAL,
                format!("only the first {mappable:#x} bytes of the BAR can be mapped"),
            );
        }
        Ok(())
    }

    fn target(&self, count: u64, offset: u64, write: bool) -> Result<Target> {
        let index = u32::try_from(offset >> REGION_SHIFT).unwrap_or(u32::MAX);
        let at = offset & ((1 << REGION_SHIFT) - 1);
        match index {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                let size = self.with_opened(|opened| Ok(opened.config.size()))?;
                if at.checked_add(count).is_none_or(|end| end > size) {
                    return refuse(Errno::EFAULT, "configuration space ends before that");
                }
                Ok(Target::Config { at })
            }
            0..VFIO_PCI_ROM_REGION_INDEX => {
                let size = self.bar(index).map_or(0, |bar| bar.size);
                if at >= size {
                    return refuse(Errno::EINVAL, "the BAR is not there, or ends before that");
                }
                let bar = u8::try_from(index).unwrap_or(u8::MAX);
                Ok(Target::Bar { bar, at, count: count.min(size - at) })
            }
            VFIO_PCI_ROM_REGION_INDEX if write => {
                refuse(Errno::EINVAL, "the ROM cannot be written")
            }
            _ => refuse(Errno::EINVAL, "the function does not have this region"),
        }
    }

    /// Reads or writes a BAR in the widest aligned accesses; the MSI-X table reads as ones and keeps
    /// what it has. `EIO` while memory decoding is off.
    fn bar_access(&self, bar: u8, at: u64, mut access: Access<'_>) -> Result<()> {
        let table = self.with_opened(|opened| Ok(opened.msix_table))?;
        let (table_start, table_end) = match table {
            Some((table_bar, start, len)) if table_bar == bar => (start, start + len),
            _ => (0, 0),
        };
        let mut done = 0;
        while done < access.len() {
            if !self.memory_enabled.load(Ordering::Acquire) {
                return Err(Refusal::new(Errno::EIO, "memory decoding is off"));
            }
            let at = at + done as u64;
            let left = (access.len() - done) as u64;
            if (table_start..table_end).contains(&at) {
                let len = usize::try_from(left.min(table_end - at)).unwrap_or(1);
                access.hide(done, len);
                done += len;
                continue;
            }
            let open = if at < table_start { left.min(table_start - at) } else { left };
            let width =
                [8, 4, 2].into_iter().find(|width| open >= *width && at.is_multiple_of(*width));
            let width = usize::try_from(width.unwrap_or(1)).unwrap_or(1);
            access.perform(self.function(), bar, at, done, width);
            done += width;
        }
        Ok(())
    }
}

impl Target {
    fn count(&self, count: u64) -> u64 {
        match self {
            Self::Config { .. } => count,
            Self::Bar { count, .. } => *count,
        }
    }
}

/// An access to a BAR, and its data.
enum Access<'a> {
    Read(&'a mut [u8]),
    Write(&'a [u8]),
}

impl Access<'_> {
    fn len(&self) -> usize {
        match self {
            Self::Read(data) => data.len(),
            Self::Write(data) => data.len(),
        }
    }

    /// What lies in the MSI-X table: reads give ones, writes are dropped.
    fn hide(&mut self, start: usize, len: usize) {
        if let Self::Read(data) = self
            && let Some(data) = data.get_mut(start..start + len)
        {
            data.fill(0xff);
        }
    }

    fn perform(
        &mut self,
        function: &dyn lychgate_model::PciFunction,
        bar: u8,
        at: u64,
        start: usize,
        width: usize,
    ) {
        match self {
            Self::Read(data) => {
                if let Some(data) = data.get_mut(start..start + width) {
                    function.bar_read(bar, at, data);
                }
            }
            Self::Write(data) => {
                if let Some(data) = data.get(start..start + width) {
                    function.bar_write(bar, at, data);
                }
            }
        }
    }
}

/// Calls `f` with a buffer for each block of `count` bytes, and the bytes done before.
fn blocks(count: u64, mut f: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; usize::try_from(count.min(BLOCK)).unwrap_or(0)];
    let mut done = 0;
    while done < count {
        let len = (count - done).min(BLOCK);
        let Some(block) = buffer.get_mut(..usize::try_from(len).unwrap_or(0)) else { break };
        f(done, block)?;
        done += len;
    }
    Ok(())
}

/// An offset that was checked against the size of configuration space.
fn config_offset(at: u64) -> u16 {
    u16::try_from(at).unwrap_or(u16::MAX)
}
