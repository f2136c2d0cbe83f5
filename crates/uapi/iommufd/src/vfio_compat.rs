//! What VFIO's containers do, on the compatibility IOAS (`drivers/iommu/iommufd/vfio_compat.c`).

use lychgate_types::{Errno, Prot};
use zerocopy::IntoBytes;

use crate::abi::{iommufd as abi, type1};
use crate::client::Client;
use crate::command::{Command, offset, read_value, write, write_value};
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::io_pagetable::last_of;
use crate::ioas::User;

/// `VFIO_API_VERSION`.
const API_VERSION: i32 = 0;

impl Context {
    /// `IOMMU_VFIO_IOAS`.
    pub(crate) fn vfio_ioas(&self, command: &mut Command<'_, abi::VfioIoas>) -> Result<()> {
        if command.argument.reserved != 0 {
            return refuse(Errno::EOPNOTSUPP, "a reserved member is set");
        }
        let mut state = self.lock();
        match command.argument.op {
            abi::VFIO_IOAS_GET => {
                command.argument.ioas_id = state.compat_ioas()?;
                drop(state);
                command.respond()
            }
            abi::VFIO_IOAS_SET => {
                state.objects.ioas(command.argument.ioas_id)?;
                state.compat = Some(command.argument.ioas_id);
                Ok(())
            }
            abi::VFIO_IOAS_CLEAR => {
                state.compat = None;
                Ok(())
            }
            op => refuse(Errno::EOPNOTSUPP, format!("there is no operation {op}")),
        }
    }

    /// The ioctls of a VFIO container.
    pub(crate) fn vfio_ioctl(
        &self,
        client: &dyn Client,
        command: u32,
        argument: u64,
    ) -> Result<i32> {
        match command {
            type1::GET_API_VERSION => Ok(API_VERSION),
            type1::CHECK_EXTENSION => self.check_extension(argument),
            type1::SET_IOMMU => self.set_iommu(argument).map(|()| 0),
            type1::IOMMU_GET_INFO => self.iommu_get_info(client, argument).map(|()| 0),
            type1::IOMMU_MAP_DMA => self.map_dma(client, argument).map(|()| 0),
            type1::IOMMU_UNMAP_DMA => self.unmap_dma(client, argument).map(|()| 0),
            _ => refuse(Errno::ENOTTY, format!("no ioctl has the number {command:#x}")),
        }
    }

    fn check_extension(&self, extension: u64) -> Result<i32> {
        match extension {
            type1::TYPE1_IOMMU | type1::TYPE1V2_IOMMU | type1::UNMAP_ALL => Ok(1),
            type1::DMA_CC_IOMMU => {
                let state = self.lock();
                let ioas = state.objects.ioas(state.compat_ioas()?)?;
                let coherent = |id: &u32| state.objects.hwpt(*id).is_ok_and(|hwpt| hwpt.coherent);
                Ok(i32::from(ioas.hwpts.iter().all(coherent)))
            }
            _ => Ok(0),
        }
    }

    fn set_iommu(&self, kind: u64) -> Result<()> {
        if kind != type1::TYPE1_IOMMU && kind != type1::TYPE1V2_IOMMU {
            return refuse(Errno::EINVAL, format!("there is no IOMMU of type {kind}"));
        }
        let mut state = self.lock();
        let ioas = state.compat_ioas()?;
        let ioas = state.objects.ioas_mut(ioas)?;
        if kind == type1::TYPE1_IOMMU {
            // Its callers may unmap parts of what they mapped.
            ioas.table.set_large_pages(false)?;
        }
        Ok(())
    }

    fn map_dma(&self, client: &dyn Client, at: u64) -> Result<()> {
        let map: type1::DmaMap = read_value(client, at)?;
        let known = type1::DMA_MAP_FLAG_READ | type1::DMA_MAP_FLAG_WRITE;
        if (map.argsz as usize) < size_of::<type1::DmaMap>() || map.flags & !known != 0 {
            return refuse(Errno::EINVAL, "argsz is too small, or an unknown flag is set");
        }
        let mut prot = Prot::CACHE;
        if map.flags & type1::DMA_MAP_FLAG_READ != 0 {
            prot |= Prot::READ;
        }
        if map.flags & type1::DMA_MAP_FLAG_WRITE != 0 {
            prot |= Prot::WRITE;
        }
        let user = User { va: map.vaddr, len: map.size, prot };
        self.map_user(client, |state| state.compat_ioas(), user, Some(map.iova))?;
        Ok(())
    }

    fn unmap_dma(&self, client: &dyn Client, at: u64) -> Result<()> {
        let mut unmap: type1::DmaUnmap = read_value(client, at)?;
        let short = (unmap.argsz as usize) < size_of::<type1::DmaUnmap>();
        if short || unmap.flags & !type1::DMA_UNMAP_FLAG_ALL != 0 {
            return refuse(Errno::EINVAL, "argsz is too small, or an unknown flag is set");
        }
        let (bytes, result) = self.unmap_compat(&unmap)?;
        unmap.size = bytes;
        write_value(client, at, &unmap, size_of::<type1::DmaUnmap>())?;
        result
    }

    /// Unmaps, and gives what was unmapped even when an error ends it.
    fn unmap_compat(&self, unmap: &type1::DmaUnmap) -> Result<(u64, Result<()>)> {
        let mut state = self.lock();
        let id = state.compat_ioas()?;
        let table = &mut state.objects.ioas_mut(id)?.table;
        if unmap.flags & type1::DMA_UNMAP_FLAG_ALL != 0 {
            if (unmap.iova, unmap.size) != (0, 0) {
                return refuse(Errno::EINVAL, "FLAG_ALL with an IOVA or a size");
            }
            return Ok(self.unmap_areas(state, id, 0, u64::MAX));
        }
        if !table.large_pages() {
            table.cut(unmap.iova.wrapping_add(unmap.size).wrapping_sub(1))?;
            if unmap.iova != 0 {
                table.cut(unmap.iova - 1)?;
            }
        }
        match last_of(unmap.iova, unmap.size) {
            Ok(last) => Ok(self.unmap_areas(state, id, unmap.iova, last)),
            Err(refusal) => Ok((0, Err(refusal))),
        }
    }

    /// `VFIO_IOMMU_GET_INFO`: as much as fits into what the caller gives, and how much all is.
    fn iommu_get_info(&self, client: &dyn Client, at: u64) -> Result<()> {
        let mut head = [0; type1::Info::MIN_SIZE];
        crate::command::read(client, at, &mut head)?;
        let mut info = type1::Info::default();
        if let Some(known) = info.as_mut_bytes().get_mut(..head.len()) {
            known.copy_from_slice(&head);
        }
        let room = info.argsz as usize;
        if room < type1::Info::MIN_SIZE {
            return refuse(Errno::EINVAL, "argsz is too small");
        }
        let (ranges, alignment) = {
            let state = self.lock();
            let table = &state.objects.ioas(state.compat_ioas()?)?.table;
            (table.usable(), table.alignment())
        };
        let first = size_of::<type1::Info>();
        let second = first + size_of::<type1::DmaAvail>().next_multiple_of(8);
        let ranges_at = second + size_of::<type1::IovaRanges>();
        let all = ranges_at + ranges.len() * size_of::<abi::IovaRange>();
        if room >= first + size_of::<type1::DmaAvail>() {
            let next = if room >= second { second } else { 0 };
            let avail =
                type1::DmaAvail { header: header(type1::CAP_DMA_AVAIL, next), avail: u32::MAX };
            write(client, offset(at, first as u64)?, avail.as_bytes())?;
        }
        for (range, here) in ranges.iter().zip((ranges_at..).step_by(size_of::<abi::IovaRange>())) {
            if room >= here + size_of::<abi::IovaRange>() {
                let range = abi::IovaRange { start: *range.start(), last: *range.end() };
                write(client, offset(at, here as u64)?, range.as_bytes())?;
            }
        }
        if room >= all {
            let cap = type1::IovaRanges {
                header: header(type1::CAP_IOVA_RANGE, 0),
                nr_iovas: u32::try_from(ranges.len()).unwrap_or(u32::MAX),
                reserved: 0,
            };
            write(client, offset(at, second as u64)?, cap.as_bytes())?;
        }
        info.flags = type1::INFO_PGSIZES | type1::INFO_CAPS;
        // As Linux: the alignment alone, not the larger pages above it.
        info.iova_pgsizes = alignment;
        info.cap_offset = if room >= all { header_offset(first) } else { 0 };
        info.argsz = header_offset(all);
        write_value(client, at, &info, room.min(first))
    }
}

fn header(id: u16, next: usize) -> type1::CapHeader {
    type1::CapHeader { id, version: 1, next: header_offset(next) }
}

fn header_offset(offset: usize) -> u32 {
    u32::try_from(offset).unwrap_or(u32::MAX)
}
