//! Which ioctl number does what (`iommufd_fops_ioctl`).

use crate::abi::{Argument, iommufd as abi};
use crate::client::Client;
use crate::command::Command;
use crate::context::Context;
use crate::error::Result;
use crate::file::Reply;
use crate::selftest::abi::TestCmd;

impl Context {
    /// Any ioctl. Numbers that are not iommufd's may be VFIO's.
    pub(crate) fn dispatch(&self, client: &dyn Client, command: u32, at: u64) -> Result<Reply> {
        let call = Call { context: self, client, command, at };
        match command & 0xff {
            0x80 => call.run::<abi::Destroy, _>(Self::destroy),
            0x81 => call.run::<abi::IoasAlloc, _>(Self::ioas_alloc),
            0x82 => call.run::<abi::IoasAllowIovas, _>(Self::ioas_allow_iovas),
            0x83 => call.run::<abi::IoasCopy, _>(Self::ioas_copy),
            0x84 => call.run::<abi::IoasIovaRanges, _>(Self::ioas_iova_ranges),
            0x85 => call.run::<abi::IoasMap, _>(Self::ioas_map),
            0x86 => call.run::<abi::IoasUnmap, _>(Self::ioas_unmap),
            0x87 => call.run::<abi::Option, _>(Self::option),
            0x88 => call.run::<abi::VfioIoas, _>(Self::vfio_ioas),
            0x89 => call.run::<abi::HwptAlloc, _>(Self::hwpt_alloc),
            0x8a => call.run::<abi::HwInfo, _>(Self::get_hw_info),
            0x8b => call.run::<abi::HwptSetDirtyTracking, _>(Self::hwpt_set_dirty_tracking),
            0x8c => call.run::<abi::HwptGetDirtyBitmap, _>(Self::hwpt_get_dirty_bitmap),
            0x8d => call.run::<abi::HwptInvalidate, _>(Self::hwpt_invalidate),
            0x8e => call.run::<abi::FaultQueueAlloc, _>(Self::fault_queue_alloc),
            0x8f => call.run::<abi::IoasMapFile, _>(Self::ioas_map_file),
            0x90 => call.run::<abi::ViommuAlloc, _>(Self::viommu_alloc),
            0x91 => call.run::<abi::VdeviceAlloc, _>(Self::vdevice_alloc),
            0x92 => call.run::<abi::IoasChangeProcess, _>(Self::ioas_change_process),
            0x93 => call.run::<abi::VeventqAlloc, _>(Self::veventq_alloc),
            0x94 => call.run::<abi::HwQueueAlloc, _>(Self::hw_queue_alloc),
            0x95 => call.run::<abi::IoasNoiommuGetPa, _>(Self::ioas_noiommu_get_pa),
            0xa0 if self.selftest.is_some() => call.run::<TestCmd, _>(Self::test),
            _ => self.vfio_ioctl(client, command, at).map(Reply::Value),
        }
    }
}

struct Call<'a> {
    context: &'a Context,
    client: &'a dyn Client,
    command: u32,
    at: u64,
}

impl Call<'_> {
    /// Lets a handler work on the structure; what it gives back is the reply, 0 for nothing.
    fn run<A: Argument, R: Into<Reply>>(
        &self,
        handler: impl FnOnce(&Context, &mut Command<'_, A>) -> Result<R>,
    ) -> Result<Reply> {
        let mut command = Command::take(self.client, self.command, self.at)?;
        handler(self.context, &mut command).map(Into::into)
    }
}
