//! Ioctls on what no IOMMU here has: nested page tables, vIOMMUs and their queues, fault queues, the
//! software table of no-IOMMU mode. Arguments are checked as Linux checks them, then the answer is
//! what Linux gives on hardware without the feature.

use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::mm::PAGE_SIZE;

/// Requests in one `IOMMU_HWPT_INVALIDATE`, and events that a queue may hold.
const LIMIT: u32 = 1 << 19;

impl Context {
    /// `IOMMU_HWPT_INVALIDATE`: no nested page table and no vIOMMU is there. Nothing is handled, and
    /// that is told even on an error.
    pub(crate) fn hwpt_invalidate(
        &self,
        command: &mut Command<'_, abi::HwptInvalidate>,
    ) -> Result<()> {
        let argument = command.argument;
        let result = self.check_invalidate(&argument);
        command.argument.entry_num = 0;
        command.respond()?;
        result
    }

    fn check_invalidate(&self, argument: &abi::HwptInvalidate) -> Result<()> {
        if argument.reserved != 0 {
            return refuse(Errno::EOPNOTSUPP, "a reserved member is set");
        }
        let empty = argument.data_uptr == 0 || argument.entry_len == 0;
        let long = u64::from(argument.entry_len) > PAGE_SIZE;
        if argument.entry_num > LIMIT || argument.entry_num != 0 && (empty || long) {
            return refuse(Errno::EINVAL, "the array of requests has no valid size or address");
        }
        self.lock().objects.get(argument.hwpt_id)?;
        refuse(
            Errno::EINVAL,
            format!("object {} is neither a nested page table nor a vIOMMU", argument.hwpt_id),
        )
    }

    /// `IOMMU_FAULT_QUEUE_ALLOC`: no driver here reports I/O page faults.
    pub(crate) fn fault_queue_alloc(
        &self,
        command: &mut Command<'_, abi::FaultQueueAlloc>,
    ) -> Result<()> {
        if command.argument.flags != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
        }
        refuse(Errno::EOPNOTSUPP, "no device here reports I/O page faults")
    }

    /// `IOMMU_VIOMMU_ALLOC`: no driver here has vIOMMUs.
    pub(crate) fn viommu_alloc(&self, command: &mut Command<'_, abi::ViommuAlloc>) -> Result<()> {
        let argument = command.argument;
        if argument.flags != 0 || argument.kind == 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set, or no type is given");
        }
        self.lock().objects.device(argument.dev_id)?;
        refuse(Errno::EOPNOTSUPP, "the IOMMU of the device has no vIOMMUs")
    }

    /// `IOMMU_VDEVICE_ALLOC`: there is no vIOMMU.
    pub(crate) fn vdevice_alloc(&self, command: &mut Command<'_, abi::VdeviceAlloc>) -> Result<()> {
        no_viommu(command.argument.viommu_id)
    }

    /// `IOMMU_VEVENTQ_ALLOC`: there is no vIOMMU.
    pub(crate) fn veventq_alloc(&self, command: &mut Command<'_, abi::VeventqAlloc>) -> Result<()> {
        let argument = command.argument;
        if argument.flags != 0 || argument.reserved != 0 || argument.kind == 0 {
            return refuse(
                Errno::EOPNOTSUPP,
                "an unknown flag or a reserved member is set, or no type is given",
            );
        }
        if !(1..=LIMIT).contains(&argument.veventq_depth) {
            return refuse(Errno::EINVAL, format!("the depth is 0 or above {LIMIT}"));
        }
        no_viommu(argument.viommu_id)
    }

    /// `IOMMU_HW_QUEUE_ALLOC`: there is no vIOMMU.
    pub(crate) fn hw_queue_alloc(
        &self,
        command: &mut Command<'_, abi::HwQueueAlloc>,
    ) -> Result<()> {
        let argument = command.argument;
        if argument.flags != 0 || argument.kind == 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set, or no type is given");
        }
        if argument.length == 0 {
            return refuse(Errno::EINVAL, "the length is 0");
        }
        if argument.nesting_parent_iova.checked_add(argument.length - 1).is_none() {
            return refuse(Errno::EOVERFLOW, "the queue passes the end of the IOVA space");
        }
        no_viommu(argument.viommu_id)
    }

    /// `IOMMU_IOAS_NOIOMMU_GET_PA`: there is no no-IOMMU mode.
    pub(crate) fn ioas_noiommu_get_pa(
        &self,
        _: &mut Command<'_, abi::IoasNoiommuGetPa>,
    ) -> Result<()> {
        refuse(Errno::EOPNOTSUPP, "there is no no-IOMMU mode")
    }
}

fn no_viommu(id: u32) -> Result<()> {
    refuse(Errno::ENOENT, format!("object {id} is no vIOMMU"))
}
