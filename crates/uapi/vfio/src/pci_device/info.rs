//! What the device tells about itself: `VFIO_DEVICE_GET_INFO`, its regions, its interrupts, its
//! features.

use lychgate_iommufd::Client;
use lychgate_iommufd::error::{Result, refuse};
use lychgate_types::Errno;
use zerocopy::IntoBytes;

use super::VfioPciDevice;
use crate::abi::*;
use crate::user;

impl VfioPciDevice {
    /// `VFIO_DEVICE_GET_INFO`.
    pub(crate) fn get_info(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const MIN: usize = 16;
        const WITH_CAPS: usize = 20;
        let mut info: DeviceInfo = user::copy_in(client, argument, MIN)?;
        user::check_argsz(info.argsz, MIN)?;
        let len = if user::check_argsz(info.argsz, WITH_CAPS).is_ok() { WITH_CAPS } else { MIN };
        info.flags = VFIO_DEVICE_FLAGS_PCI | VFIO_DEVICE_FLAGS_RESET;
        info.num_regions = VFIO_PCI_NUM_REGIONS;
        info.num_irqs = VFIO_PCI_NUM_IRQS;
        user::copy_out(client, argument, &info, len)
    }

    /// `VFIO_DEVICE_GET_REGION_INFO`.
    pub(crate) fn get_region_info(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const LEN: usize = size_of::<RegionInfo>();
        let mut info: RegionInfo = user::copy_in(client, argument, LEN)?;
        user::check_argsz(info.argsz, LEN)?;
        let mut capabilities = Vec::new();
        const READ_WRITE: u32 = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
        (info.size, info.flags) = match info.index {
            VFIO_PCI_CONFIG_REGION_INDEX => {
                (self.with_opened(|opened| Ok(opened.config.size()))?, READ_WRITE)
            }
            VFIO_PCI_ROM_REGION_INDEX => (0, 0),
            0..VFIO_PCI_ROM_REGION_INDEX => match self.bar(info.index) {
                None => (0, 0),
                Some(bar) if bar.mappable == 0 => (bar.size, READ_WRITE),
                Some(bar) => {
                    capabilities = self.map_capabilities(info.index, bar.mappable, bar.size)?;
                    (bar.size, READ_WRITE | VFIO_REGION_INFO_FLAG_MMAP)
                }
            },
            _ => return refuse(Errno::EINVAL, "the function does not have this region"),
        };
        info.offset = region_offset(info.index);
        if !capabilities.is_empty() {
            info.flags |= VFIO_REGION_INFO_FLAG_CAPS;
            let needed = LEN + capabilities.len();
            if user::check_argsz(info.argsz, needed).is_ok() {
                user::write(client, user::at(argument, LEN as u64)?, &capabilities)?;
                info.cap_offset = u32::try_from(LEN).unwrap_or(0);
            } else {
                info.argsz = u32::try_from(needed).unwrap_or(u32::MAX);
                info.cap_offset = 0;
            }
        }
        user::copy_out(client, argument, &info, LEN)
    }

    /// The capabilities of a BAR that can be mapped: which part of it, if not all, and that the MSI-X
    /// table is in that part.
    fn map_capabilities(&self, index: u32, mappable: u64, size: u64) -> Result<Vec<u8>> {
        const HEADER: usize = size_of::<CapHeader>();
        let table = self.with_opened(|opened| Ok(opened.msix_table))?;
        let msix = table.is_some_and(|(bar, start, _)| u32::from(bar) == index && start < mappable);
        let mut bytes = Vec::new();
        if mappable < size {
            let len = HEADER + size_of::<SparseMmap>() + size_of::<SparseMmapArea>();
            let next = if msix { size_of::<RegionInfo>() + len } else { 0 };
            let header = CapHeader {
                id: VFIO_REGION_INFO_CAP_SPARSE_MMAP,
                version: 1,
                next: u32::try_from(next).unwrap_or(0),
            };
            bytes.extend_from_slice(header.as_bytes());
            bytes.extend_from_slice(SparseMmap { nr_areas: 1, reserved: 0 }.as_bytes());
            bytes.extend_from_slice(SparseMmapArea { offset: 0, size: mappable }.as_bytes());
        }
        if msix {
            let header = CapHeader { id: VFIO_REGION_INFO_CAP_MSIX_MAPPABLE, version: 1, next: 0 };
            bytes.extend_from_slice(header.as_bytes());
        }
        Ok(bytes)
    }

    /// `VFIO_DEVICE_GET_IRQ_INFO`.
    pub(crate) fn get_irq_info(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const LEN: usize = size_of::<IrqInfo>();
        let mut info: IrqInfo = user::copy_in(client, argument, LEN)?;
        user::check_argsz(info.argsz, LEN)?;
        if info.index >= VFIO_PCI_NUM_IRQS {
            return refuse(Errno::EINVAL, "there is no such interrupt index");
        }
        let (count, pcie) = self.with_opened(|opened| {
            let hardware = self.hardware(&opened.config);
            Ok((hardware.count(info.index), hardware.is_pcie()))
        })?;
        if info.index == VFIO_PCI_ERR_IRQ_INDEX && !pcie {
            return refuse(Errno::EINVAL, "only PCI Express functions report errors");
        }
        info.count = count;
        info.flags = VFIO_IRQ_INFO_EVENTFD
            | match info.index {
                VFIO_PCI_INTX_IRQ_INDEX => VFIO_IRQ_INFO_MASKABLE | VFIO_IRQ_INFO_AUTOMASKED,
                // Vectors can be added while MSI-X is enabled.
                VFIO_PCI_MSIX_IRQ_INDEX => 0,
                _ => VFIO_IRQ_INFO_NORESIZE,
            };
        user::copy_out(client, argument, &info, LEN)
    }

    /// `VFIO_DEVICE_FEATURE`: the flags are checked, but vfio-pci has none of the features for a function
    /// without SR-IOV, migration, DMA logging, runtime power management or dma-bufs. `ENOTTY`.
    pub(crate) fn feature(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const LEN: usize = size_of::<Feature>();
        const GET_SET: u32 = VFIO_DEVICE_FEATURE_GET | VFIO_DEVICE_FEATURE_SET;
        let feature: Feature = user::copy_in(client, argument, LEN)?;
        user::check_argsz(feature.argsz, LEN)?;
        if feature.flags & !(VFIO_DEVICE_FEATURE_MASK | GET_SET | VFIO_DEVICE_FEATURE_PROBE) != 0 {
            return refuse(Errno::EINVAL, "unknown flags");
        }
        if feature.flags & (GET_SET | VFIO_DEVICE_FEATURE_PROBE) == GET_SET {
            return refuse(Errno::EINVAL, "a feature is read or written, not both");
        }
        let id = feature.flags & VFIO_DEVICE_FEATURE_MASK;
        refuse(Errno::ENOTTY, format!("the device does not have feature {id}"))
    }
}
