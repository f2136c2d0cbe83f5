//! `IOMMU_GET_HW_INFO` (`drivers/iommu/iommufd/device.c`).

use lychgate_iommu::{Capability, HwInfo};
use lychgate_types::Errno;

use crate::abi::{Argument, iommufd as abi};
use crate::command::{Command, offset};
use crate::context::Context;
use crate::error::{Result, refuse};

impl Context {
    /// `IOMMU_GET_HW_INFO`.
    pub(crate) fn get_hw_info(&self, command: &mut Command<'_, abi::HwInfo>) -> Result<()> {
        let argument = command.argument;
        if argument.flags & !abi::HW_INFO_FLAG_INPUT_TYPE != 0 || argument.reserved != [0; 3] {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag or a reserved member is set");
        }
        let kind = match argument.flags & abi::HW_INFO_FLAG_INPUT_TYPE {
            0 => abi::HW_INFO_TYPE_NONE,
            _ => argument.data_type,
        };
        let device = self.lock().objects.device(argument.dev_id)?.device;
        let iommu = self.lock_iommu();
        let info = match iommu.hw_info(device, kind) {
            Some(info) => info,
            None if kind == abi::HW_INFO_TYPE_NONE => HwInfo::default(),
            None => {
                return refuse(Errno::EOPNOTSUPP, format!("the IOMMU has no data of type {kind}"));
            }
        };
        let mut capabilities = 0;
        if iommu.capable(device, Capability::DirtyTracking) {
            capabilities |= abi::HW_CAP_DIRTY_TRACKING;
        }
        if !iommu.capable(device, Capability::PciAts) {
            capabilities |= abi::HW_CAP_PCI_ATS_NOT_SUPPORTED;
        }
        drop(iommu);
        write_padded(command, argument.data_uptr, argument.data_len, &info.bytes)?;
        command.argument.data_type = info.kind;
        command.argument.data_len = u32::try_from(info.bytes.len()).unwrap_or(u32::MAX);
        command.argument.out_capabilities = capabilities;
        command.argument.out_max_pasid_log2 = info.max_pasid_log2;
        command.respond()
    }
}

/// Fills a buffer of the caller with `bytes`, and zeros behind them.
fn write_padded<A: Argument>(
    command: &Command<'_, A>,
    at: u64,
    room: u32,
    bytes: &[u8],
) -> Result<()> {
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    let known = bytes.get(..room).unwrap_or(bytes);
    if !known.is_empty() {
        command.write(at, known)?;
    }
    const ZEROS: [u8; 256] = [0; 256];
    let mut done = known.len();
    while done < room {
        let zeros = ZEROS.get(..room - done).unwrap_or(&ZEROS);
        command.write(offset(at, done as u64)?, zeros)?;
        done += zeros.len();
    }
    Ok(())
}
