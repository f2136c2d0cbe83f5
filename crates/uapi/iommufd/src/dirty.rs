//! Dirty tracking: `IOMMU_HWPT_SET_DIRTY_TRACKING` and `IOMMU_HWPT_GET_DIRTY_BITMAP`
//! (`drivers/iommu/iommufd/io_pagetable.c`, `iova_bitmap.c`).

mod bitmap;

use std::sync::Arc;

use lychgate_iommu::{DirtyBits, DirtyTracking, PagingDomain};
use lychgate_types::{Errno, Iova};

use self::bitmap::UserBitmap;
use crate::abi::iommufd as abi;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::io_pagetable::last_of;

impl Context {
    /// `IOMMU_HWPT_SET_DIRTY_TRACKING`. Switching it on forgets what was dirty before
    /// (`iopt_set_dirty_tracking`).
    pub(crate) fn hwpt_set_dirty_tracking(
        &self,
        command: &mut Command<'_, abi::HwptSetDirtyTracking>,
    ) -> Result<()> {
        if command.argument.flags & !abi::DIRTY_TRACKING_ENABLE != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
        }
        let enable = command.argument.flags & abi::DIRTY_TRACKING_ENABLE != 0;
        let state = self.lock();
        let hwpt = state.objects.hwpt(command.argument.hwpt_id)?;
        let dirty = tracking(&hwpt.domain)?;
        dirty.set_dirty_tracking(enable).map_err(not_switched)?;
        // Bits are only kept while recording is on; what was written up to now is not told to
        // anybody, so that nothing is lost when they are cleared after it was switched on.
        if enable && let Some((first, last)) = state.objects.ioas(hwpt.ioas)?.table.span() {
            dirty
                .read_and_clear_dirty(
                    Iova::new(first),
                    len(first, last),
                    DirtyBits::Clear,
                    &mut |_, _| {},
                )
                .map_err(not_switched)?;
        }
        Ok(())
    }

    /// `IOMMU_HWPT_GET_DIRTY_BITMAP`. Bits are only ever set in the caller's bitmap. As in Linux,
    /// an error of the walk through the page table is dropped.
    pub(crate) fn hwpt_get_dirty_bitmap(
        &self,
        command: &mut Command<'_, abi::HwptGetDirtyBitmap>,
    ) -> Result<()> {
        let argument = command.argument;
        if argument.flags & !abi::GET_DIRTY_BITMAP_NO_CLEAR != 0 || argument.reserved != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag or a reserved member is set");
        }
        let state = self.lock();
        let hwpt = state.objects.hwpt(argument.hwpt_id)?;
        let table = &state.objects.ioas(hwpt.ioas)?.table;
        let last = check_range(&argument, table.alignment())?;
        let dirty = tracking(&hwpt.domain)?;
        let bits = match argument.flags & abi::GET_DIRTY_BITMAP_NO_CLEAR {
            0 => DirtyBits::Clear,
            _ => DirtyBits::Keep,
        };
        // Only areas are mapped.
        let Some((first, end)) = table.span() else {
            return Ok(());
        };
        let (first, end) = (first.max(argument.iova), end.min(last));
        if first > end {
            return Ok(());
        }
        let mut bitmap = UserBitmap::new(command.client, &argument);
        let mut written = Ok(());
        let _ = dirty.read_and_clear_dirty(
            Iova::new(first),
            len(first, end),
            bits,
            &mut |iova, len| {
                let start = iova.get().max(first);
                let stop = iova.get().saturating_add(len.saturating_sub(1)).min(end);
                if start <= stop && written.is_ok() {
                    written = bitmap.set(start, stop);
                }
            },
        );
        written.and_then(|()| bitmap.flush())
    }
}

/// The dirty tracking of a page table: `EOPNOTSUPP` when it was not allocated for it.
fn tracking(domain: &Arc<dyn PagingDomain>) -> Result<&dyn DirtyTracking> {
    match domain.dirty() {
        Some(dirty) => Ok(dirty),
        None => refuse(Errno::EOPNOTSUPP, "the page table does not track dirty pages"),
    }
}

fn not_switched(errno: Errno) -> Refusal {
    Refusal::new(errno, "the IOMMU does not switch dirty tracking")
}

/// Whether the range is one of whole pages, of the IOAS and of the bitmap; gives its last IOVA
/// (`iommufd_check_iova_range`).
fn check_range(argument: &abi::HwptGetDirtyBitmap, alignment: u64) -> Result<u64> {
    let last = last_of(argument.iova, argument.length)?;
    let both = argument.iova | last.wrapping_add(1);
    if !both.is_multiple_of(alignment) {
        return refuse(Errno::EINVAL, format!("the range is not a multiple of {alignment}"));
    }
    let page_size = argument.page_size;
    if page_size == 0 || both & (page_size - 1) != 0 {
        return refuse(Errno::EINVAL, "the range is not a multiple of the bitmap's page size");
    }
    Ok(last)
}

/// Bytes of `first..=last`, at most `u64::MAX`.
fn len(first: u64, last: u64) -> u64 {
    (last - first).saturating_add(1)
}
