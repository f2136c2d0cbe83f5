//! VFIO's calls, for people: as `strace` would print them.

use lychgate_iommufd::Client;

use crate::abi::*;
use crate::user;

/// Describes an ioctl on a group's or a device's file with what it points to; `None` for a number that
/// such files do not have. The structure is read as it stands: called before the ioctl this shows what
/// is asked, called after it what was answered.
pub fn describe(command: u32, argument: u64, client: &dyn Client) -> Option<String> {
    let name = name(command)?;
    let arguments = arguments(command, argument, client);
    Some(match arguments {
        Some(arguments) => format!("{name}, {arguments}"),
        None if argument == 0 => name.to_owned(),
        None => format!("{name}, {argument:#x}"),
    })
}

fn name(command: u32) -> Option<&'static str> {
    Some(match command {
        VFIO_GROUP_GET_STATUS => "VFIO_GROUP_GET_STATUS",
        VFIO_GROUP_SET_CONTAINER => "VFIO_GROUP_SET_CONTAINER",
        VFIO_GROUP_UNSET_CONTAINER => "VFIO_GROUP_UNSET_CONTAINER",
        VFIO_GROUP_GET_DEVICE_FD => "VFIO_GROUP_GET_DEVICE_FD",
        VFIO_DEVICE_GET_INFO => "VFIO_DEVICE_GET_INFO",
        VFIO_DEVICE_GET_REGION_INFO => "VFIO_DEVICE_GET_REGION_INFO",
        VFIO_DEVICE_GET_IRQ_INFO => "VFIO_DEVICE_GET_IRQ_INFO",
        VFIO_DEVICE_SET_IRQS => "VFIO_DEVICE_SET_IRQS",
        VFIO_DEVICE_RESET => "VFIO_DEVICE_RESET",
        VFIO_DEVICE_GET_PCI_HOT_RESET_INFO => "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
        VFIO_DEVICE_PCI_HOT_RESET => "VFIO_DEVICE_PCI_HOT_RESET",
        VFIO_DEVICE_IOEVENTFD => "VFIO_DEVICE_IOEVENTFD",
        VFIO_DEVICE_FEATURE => "VFIO_DEVICE_FEATURE",
        VFIO_DEVICE_BIND_IOMMUFD => "VFIO_DEVICE_BIND_IOMMUFD",
        VFIO_DEVICE_ATTACH_IOMMUFD_PT => "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
        VFIO_DEVICE_DETACH_IOMMUFD_PT => "VFIO_DEVICE_DETACH_IOMMUFD_PT",
        _ => return None,
    })
}

/// What the argument points to; `None` when it points to nothing, or cannot be read.
fn arguments(command: u32, argument: u64, client: &dyn Client) -> Option<String> {
    Some(match command {
        VFIO_GROUP_GET_STATUS => {
            let status: GroupStatus = get(client, argument)?;
            let flags = flags(status.flags, &[(1, "VIABLE"), (2, "CONTAINER_SET")]);
            format!("{{argsz={}, flags={flags}}}", status.argsz)
        }
        VFIO_GROUP_SET_CONTAINER => {
            let mut fd = [0; 4];
            client.read(argument, &mut fd).ok()?;
            format!("[{}]", i32::from_le_bytes(fd))
        }
        VFIO_GROUP_GET_DEVICE_FD => format!("{:?}", device_name(client, argument)?),
        VFIO_DEVICE_GET_INFO => {
            let info: DeviceInfo = user::copy_in(client, argument, 16).ok()?;
            format!(
                "{{argsz={}, flags={}, num_regions={}, num_irqs={}}}",
                info.argsz,
                flags(info.flags, &[(1, "RESET"), (2, "PCI")]),
                info.num_regions,
                info.num_irqs
            )
        }
        VFIO_DEVICE_GET_REGION_INFO => {
            let info: RegionInfo = get(client, argument)?;
            format!(
                "{{argsz={}, flags={}, index={}, cap_offset={}, size={:#x}, offset={:#x}}}",
                info.argsz,
                flags(info.flags, &[(1, "READ"), (2, "WRITE"), (4, "MMAP"), (8, "CAPS")]),
                region(info.index),
                info.cap_offset,
                info.size,
                info.offset
            )
        }
        VFIO_DEVICE_GET_IRQ_INFO => {
            let info: IrqInfo = get(client, argument)?;
            const FLAGS: &[(u32, &str)] =
                &[(1, "EVENTFD"), (2, "MASKABLE"), (4, "AUTOMASKED"), (8, "NORESIZE")];
            format!(
                "{{argsz={}, flags={}, index={}, count={}}}",
                info.argsz,
                flags(info.flags, FLAGS),
                irq(info.index),
                info.count
            )
        }
        VFIO_DEVICE_SET_IRQS => irq_set(client, argument)?,
        VFIO_DEVICE_GET_PCI_HOT_RESET_INFO => {
            let info: HotResetInfo = get(client, argument)?;
            format!("{{argsz={}, flags={:#x}, count={}}}", info.argsz, info.flags, info.count)
        }
        VFIO_DEVICE_PCI_HOT_RESET => {
            let reset: HotReset = get(client, argument)?;
            format!("{{argsz={}, flags={:#x}, count={}}}", reset.argsz, reset.flags, reset.count)
        }
        VFIO_DEVICE_IOEVENTFD => {
            let call: IoEventFd = user::copy_in(client, argument, 28).ok()?;
            format!(
                "{{argsz={}, flags={}, offset={:#x}, data={:#x}, fd={}}}",
                call.argsz, call.flags, call.offset, call.data, call.fd
            )
        }
        VFIO_DEVICE_FEATURE => {
            let feature: Feature = get(client, argument)?;
            let how = flags(feature.flags >> 16, &[(1, "GET"), (2, "SET"), (4, "PROBE")]);
            let id = feature.flags & VFIO_DEVICE_FEATURE_MASK;
            format!("{{argsz={}, flags={how}, feature={}}}", feature.argsz, self::feature(id))
        }
        VFIO_DEVICE_BIND_IOMMUFD => {
            let bind: BindIommufd = user::copy_in(client, argument, 16).ok()?;
            format!(
                "{{argsz={}, flags={}, iommufd={}, out_devid={}}}",
                bind.argsz,
                flags(bind.flags, &[(1, "TOKEN")]),
                bind.iommufd,
                bind.out_devid
            )
        }
        VFIO_DEVICE_ATTACH_IOMMUFD_PT => {
            let attach: AttachIommufdPt = user::copy_in(client, argument, 12).ok()?;
            let flags = flags(attach.flags, &[(1, "PASID")]);
            format!("{{argsz={}, flags={flags}, pt_id={}}}", attach.argsz, attach.pt_id)
        }
        VFIO_DEVICE_DETACH_IOMMUFD_PT => {
            let detach: DetachIommufdPt = user::copy_in(client, argument, 8).ok()?;
            let flags = flags(detach.flags, &[(1, "PASID")]);
            format!("{{argsz={}, flags={flags}}}", detach.argsz)
        }
        _ => return None,
    })
}

fn get<T: Abi>(client: &dyn Client, argument: u64) -> Option<T> {
    user::copy_in(client, argument, size_of::<T>()).ok()
}

/// The header, and the first few of the data.
fn irq_set(client: &dyn Client, argument: u64) -> Option<String> {
    const SHOWN: u32 = 8;
    const FLAGS: &[(u32, &str)] = &[
        (1, "DATA_NONE"),
        (2, "DATA_BOOL"),
        (4, "DATA_EVENTFD"),
        (8, "ACTION_MASK"),
        (16, "ACTION_UNMASK"),
        (32, "ACTION_TRIGGER"),
    ];
    let set: IrqSet = get(client, argument)?;
    let shown = usize::try_from(set.count.min(SHOWN)).ok()?;
    let at = argument.checked_add(size_of::<IrqSet>() as u64)?;
    let mut data: Vec<String> = match set.flags & VFIO_IRQ_SET_DATA_TYPE_MASK {
        VFIO_IRQ_SET_DATA_BOOL => {
            let mut bytes = vec![0; shown];
            client.read(at, &mut bytes).ok()?;
            bytes.iter().map(u8::to_string).collect()
        }
        VFIO_IRQ_SET_DATA_EVENTFD => {
            let mut bytes = vec![0; shown * 4];
            client.read(at, &mut bytes).ok()?;
            bytes.as_chunks().0.iter().map(|fd| i32::from_le_bytes(*fd).to_string()).collect()
        }
        _ => Vec::new(),
    };
    if !data.is_empty() && set.count > SHOWN {
        data.push("...".to_owned());
    }
    Some(format!(
        "{{argsz={}, flags={}, index={}, start={}, count={}, data=[{}]}}",
        set.argsz,
        flags(set.flags, FLAGS),
        irq(set.index),
        set.start,
        set.count,
        data.join(", ")
    ))
}

/// The name of a device as far as a PCI address goes, with what may follow it.
fn device_name(client: &dyn Client, argument: u64) -> Option<String> {
    const SHOWN: u64 = 64;
    let mut name = Vec::new();
    for offset in 0..SHOWN {
        let mut byte = [0];
        client.read(argument.checked_add(offset)?, &mut byte).ok()?;
        match byte {
            [0] => break,
            [byte] => name.push(byte),
        }
    }
    Some(String::from_utf8_lossy(&name).into_owned())
}

/// `A|B`, with what has no name in hexadecimal; `0` for none.
fn flags(value: u32, names: &[(u32, &str)]) -> String {
    let mut rest = value;
    let mut parts = Vec::new();
    for (bit, name) in names {
        if value & bit != 0 {
            parts.push((*name).to_owned());
            rest &= !bit;
        }
    }
    if rest != 0 || parts.is_empty() {
        parts.push(if rest == 0 { "0".to_owned() } else { format!("{rest:#x}") });
    }
    parts.join("|")
}

fn region(index: u32) -> String {
    match index {
        0..VFIO_PCI_ROM_REGION_INDEX => format!("BAR{index}"),
        VFIO_PCI_ROM_REGION_INDEX => "ROM".to_owned(),
        VFIO_PCI_CONFIG_REGION_INDEX => "CONFIG".to_owned(),
        VFIO_PCI_VGA_REGION_INDEX => "VGA".to_owned(),
        other => other.to_string(),
    }
}

fn irq(index: u32) -> String {
    match index {
        VFIO_PCI_INTX_IRQ_INDEX => "INTX".to_owned(),
        VFIO_PCI_MSI_IRQ_INDEX => "MSI".to_owned(),
        VFIO_PCI_MSIX_IRQ_INDEX => "MSIX".to_owned(),
        VFIO_PCI_ERR_IRQ_INDEX => "ERR".to_owned(),
        VFIO_PCI_REQ_IRQ_INDEX => "REQ".to_owned(),
        other => other.to_string(),
    }
}

fn feature(id: u32) -> String {
    const NAMES: [&str; 12] = [
        "PCI_VF_TOKEN",
        "MIGRATION",
        "MIG_DEVICE_STATE",
        "LOW_POWER_ENTRY",
        "LOW_POWER_ENTRY_WITH_WAKEUP",
        "LOW_POWER_EXIT",
        "DMA_LOGGING_START",
        "DMA_LOGGING_STOP",
        "DMA_LOGGING_REPORT",
        "MIG_DATA_SIZE",
        "BUS_MASTER",
        "DMA_BUF",
    ];
    let name = usize::try_from(id).ok().and_then(|id| NAMES.get(id));
    name.map_or_else(|| id.to_string(), |name| (*name).to_owned())
}
