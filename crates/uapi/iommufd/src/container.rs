//! A context as a VFIO container: the groups that are in it, and what it cannot map because of them.
//!
//! Linux attaches a group's devices only when the first of them is opened; until then a container that
//! iommufd serves says that it can map everything. Programs ask right after `VFIO_SET_IOMMU`, as
//! VFIO's own containers have attached the group by then, and plan with the answer: QEMU's NVMe driver
//! takes a range that ends at the last address for an empty one. So what the devices will not be able
//! to use is reserved from the moment on that their group is in the container.

use std::ops::RangeInclusive;

use lychgate_iommu::{AllocFlags, GroupId, ReservedKind};

use crate::context::Context;
use crate::error::Result;
use crate::reserved::ReservedBy;

impl Context {
    /// Puts a VFIO group into the container, and makes its compatibility IOAS if there is none
    /// (`VFIO_GROUP_SET_CONTAINER`). `EADDRINUSE` when something is mapped that the group's devices
    /// could not use; else as the driver answers that is asked for a page table.
    pub fn add_group(&self, group: GroupId) -> Result<()> {
        let id = self.create_compat_ioas()?;
        let unusable = self.unusable(group)?;
        let mut state = self.lock();
        let table = &mut state.objects.ioas_mut(id)?.table;
        for range in unusable {
            if let Err(refusal) = table.reserve(range, ReservedBy::Group(group)) {
                table.unreserve(ReservedBy::Group(group));
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// Takes a VFIO group out of the container. `IOMMU_VFIO_IOAS` may have made another IOAS the
    /// compatibility one since the group came.
    pub fn remove_group(&self, group: GroupId) {
        for ioas in self.lock().objects.ioases_mut() {
            ioas.table.unreserve(ReservedBy::Group(group));
        }
    }

    /// What the devices of a group reserve, and what a page table for them cannot hold.
    fn unusable(&self, group: GroupId) -> Result<Vec<RangeInclusive<u64>>> {
        let mut iommu = self.lock_iommu();
        let regions = iommu.reserved_regions(group);
        let mut ranges = regions
            .iter()
            .filter(|region| region.kind != ReservedKind::DirectRelaxable)
            .map(|region| region.first.get()..=region.last.get())
            .collect::<Vec<_>>();
        if let Some(device) = iommu.group_devices(group).first() {
            let geometry = iommu.alloc_paging(*device, AllocFlags::default(), None)?.geometry();
            if let Some(last) = geometry.first.get().checked_sub(1) {
                ranges.push(0..=last);
            }
            if let Some(first) = geometry.last.get().checked_add(1) {
                ranges.push(first..=u64::MAX);
            }
        }
        Ok(ranges)
    }
}
