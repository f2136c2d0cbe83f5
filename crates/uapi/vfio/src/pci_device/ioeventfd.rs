//! `VFIO_DEVICE_IOEVENTFD`: a store to a BAR each time an eventfd is signalled.

use std::sync::Arc;

use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{Client, Refusal};
use lychgate_types::Errno;

use super::VfioPciDevice;
use crate::abi::{IoEventFd, REGION_SHIFT, VFIO_DEVICE_IOEVENTFD_SIZE_MASK};
use crate::irq::Watch;
use crate::user;

/// `VFIO_PCI_IOEVENTFD_MAX`.
const MAX: usize = 1000;

/// The stores of one open device.
#[derive(Default)]
pub(super) struct IoEventFds(Vec<(Store, Watch)>);

/// What is stored, and where.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Store {
    bar: u8,
    offset: u64,
    data: u64,
    width: usize,
}

impl VfioPciDevice {
    /// Adds a store, or takes it away.
    pub(crate) fn ioeventfd(&self, client: &dyn Client, argument: u64) -> Result<()> {
        const MIN: usize = 28;
        let call: IoEventFd = user::copy_in(client, argument, MIN)?;
        user::check_argsz(call.argsz, MIN)?;
        let width = match call.flags {
            1 | 2 | 4 | 8 => u64::from(call.flags & VFIO_DEVICE_IOEVENTFD_SIZE_MASK),
            _ => return refuse(Errno::EINVAL, "one width of 1, 2, 4 or 8 bytes is needed"),
        };
        if call.fd < -1 {
            return refuse(Errno::EINVAL, "the descriptor is negative");
        }
        let offset = call.offset & ((1 << REGION_SHIFT) - 1);
        let bar = u8::try_from(call.offset >> REGION_SHIFT).unwrap_or(u8::MAX);
        let size = self.bar(u32::from(bar)).map_or(0, |bar| bar.size);
        if offset + width > size || !offset.is_multiple_of(width) {
            return refuse(Errno::EINVAL, "the store is not inside a BAR, or not aligned");
        }
        self.with_opened(|opened| {
            if let Some((table_bar, table, len)) = opened.msix_table
                && table_bar == bar
                && offset < table + len
                && offset + width > table
            {
                return refuse(Errno::EINVAL, "the MSI-X table is not the user's to write");
            }
            let width = usize::try_from(width).unwrap_or(8);
            let store = Store { bar, offset, data: call.data, width };
            let stores = &mut opened.ioeventfds.0;
            let present = stores.iter().position(|(other, _)| *other == store);
            match (present, call.fd) {
                (Some(index), -1) => {
                    stores.remove(index);
                    return Ok(());
                }
                (Some(_), _) => return refuse(Errno::EEXIST, "this store is there already"),
                (None, -1) => return refuse(Errno::ENODEV, "there is no such store"),
                (None, _) if stores.len() >= MAX => {
                    return refuse(Errno::ENOSPC, "the device has 1000 stores");
                }
                (None, _) => {}
            }
            let eventfd = client.eventfd(call.fd).map_err(|errno| {
                Refusal::new(errno, format!("descriptor {} is no eventfd", call.fd))
            })?;
            let function = Arc::clone(&self.parts.function);
            let watch = Watch::new(eventfd, move || {
                let bytes = store.data.to_le_bytes();
                function.bar_write(
                    store.bar,
                    store.offset,
                    bytes.get(..store.width).unwrap_or(&bytes),
                );
            })?;
            stores.push((store, watch));
            Ok(())
        })
    }
}
