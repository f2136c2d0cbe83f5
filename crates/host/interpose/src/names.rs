//! Names of ioctls and flags, for people.

/// The name of a VFIO or iommufd ioctl on a file of this name.
pub(crate) fn ioctl(command: u32, file: &str) -> String {
    let number = command & 0xff;
    let of_iommu = matches!(file, "/dev/vfio/vfio" | "/dev/iommu");
    let name = match number {
        100 => "VFIO_GET_API_VERSION",
        101 => "VFIO_CHECK_EXTENSION",
        102 => "VFIO_SET_IOMMU",
        103 => "VFIO_GROUP_GET_STATUS",
        104 => "VFIO_GROUP_SET_CONTAINER",
        105 => "VFIO_GROUP_UNSET_CONTAINER",
        106 => "VFIO_GROUP_GET_DEVICE_FD",
        107 => "VFIO_DEVICE_GET_INFO",
        108 => "VFIO_DEVICE_GET_REGION_INFO",
        109 => "VFIO_DEVICE_GET_IRQ_INFO",
        110 => "VFIO_DEVICE_SET_IRQS",
        111 => "VFIO_DEVICE_RESET",
        112 if of_iommu => "VFIO_IOMMU_GET_INFO",
        112 => "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO",
        113 if of_iommu => "VFIO_IOMMU_MAP_DMA",
        113 => "VFIO_DEVICE_PCI_HOT_RESET",
        114 if of_iommu => "VFIO_IOMMU_UNMAP_DMA",
        114 => "VFIO_DEVICE_QUERY_GFX_PLANE",
        115 if of_iommu => "VFIO_IOMMU_ENABLE",
        115 => "VFIO_DEVICE_GET_GFX_DMABUF",
        116 if of_iommu => "VFIO_IOMMU_DISABLE",
        116 => "VFIO_DEVICE_IOEVENTFD",
        117 if of_iommu => "VFIO_IOMMU_DIRTY_PAGES",
        117 => "VFIO_DEVICE_FEATURE",
        118 => "VFIO_DEVICE_BIND_IOMMUFD",
        119 => "VFIO_DEVICE_ATTACH_IOMMUFD_PT",
        120 => "VFIO_DEVICE_DETACH_IOMMUFD_PT",
        0x80 => "IOMMU_DESTROY",
        0x81 => "IOMMU_IOAS_ALLOC",
        0x82 => "IOMMU_IOAS_ALLOW_IOVAS",
        0x83 => "IOMMU_IOAS_COPY",
        0x84 => "IOMMU_IOAS_IOVA_RANGES",
        0x85 => "IOMMU_IOAS_MAP",
        0x86 => "IOMMU_IOAS_UNMAP",
        0x87 => "IOMMU_OPTION",
        0x88 => "IOMMU_VFIO_IOAS",
        0x89 => "IOMMU_HWPT_ALLOC",
        0x8a => "IOMMU_GET_HW_INFO",
        0x8b => "IOMMU_HWPT_SET_DIRTY_TRACKING",
        0x8c => "IOMMU_HWPT_GET_DIRTY_BITMAP",
        0x8d => "IOMMU_HWPT_INVALIDATE",
        0x8e => "IOMMU_FAULT_QUEUE_ALLOC",
        0x8f => "IOMMU_IOAS_MAP_FILE",
        0x90 => "IOMMU_VIOMMU_ALLOC",
        0x91 => "IOMMU_VDEVICE_ALLOC",
        0x92 => "IOMMU_IOAS_CHANGE_PROCESS",
        0x93 => "IOMMU_VEVENTQ_ALLOC",
        0x94 => "IOMMU_HW_QUEUE_ALLOC",
        0xa0 => "IOMMU_TEST_CMD",
        _ => return format!("ioctl {command:#x}"),
    };
    name.to_owned()
}

/// Flags of `open`.
pub(crate) fn open_flags(flags: u32) -> String {
    let access = match flags & libc::O_ACCMODE.cast_unsigned() {
        0 => "O_RDONLY",
        1 => "O_WRONLY",
        2 => "O_RDWR",
        _ => "O_ACCMODE",
    };
    // The first two have the bits of those behind them.
    let names = [
        (libc::O_SYNC, "O_SYNC"),
        (libc::O_TMPFILE, "O_TMPFILE"),
        (libc::O_CREAT, "O_CREAT"),
        (libc::O_EXCL, "O_EXCL"),
        (libc::O_NOCTTY, "O_NOCTTY"),
        (libc::O_TRUNC, "O_TRUNC"),
        (libc::O_APPEND, "O_APPEND"),
        (libc::O_NONBLOCK, "O_NONBLOCK"),
        (libc::O_DSYNC, "O_DSYNC"),
        (libc::O_ASYNC, "O_ASYNC"),
        (libc::O_DIRECT, "O_DIRECT"),
        (0o100_000, "O_LARGEFILE"),
        (libc::O_DIRECTORY, "O_DIRECTORY"),
        (libc::O_NOFOLLOW, "O_NOFOLLOW"),
        (libc::O_NOATIME, "O_NOATIME"),
        (libc::O_CLOEXEC, "O_CLOEXEC"),
        (libc::O_PATH, "O_PATH"),
    ];
    join(access.to_owned(), flags & !libc::O_ACCMODE.cast_unsigned(), &names)
}

/// Protection of `mmap`.
pub(crate) fn protection(protection: i32) -> String {
    let names = [
        (libc::PROT_READ, "PROT_READ"),
        (libc::PROT_WRITE, "PROT_WRITE"),
        (libc::PROT_EXEC, "PROT_EXEC"),
    ];
    match protection {
        libc::PROT_NONE => "PROT_NONE".to_owned(),
        _ => join(String::new(), protection.cast_unsigned(), &names),
    }
}

/// Flags of `mmap`.
pub(crate) fn mapping(flags: i32) -> String {
    let kind = match flags & libc::MAP_TYPE {
        libc::MAP_SHARED => "MAP_SHARED",
        libc::MAP_PRIVATE => "MAP_PRIVATE",
        libc::MAP_SHARED_VALIDATE => "MAP_SHARED_VALIDATE",
        _ => "MAP_FILE",
    };
    let names = [
        (libc::MAP_FIXED, "MAP_FIXED"),
        (libc::MAP_FIXED_NOREPLACE, "MAP_FIXED_NOREPLACE"),
        (libc::MAP_32BIT, "MAP_32BIT"),
        (libc::MAP_LOCKED, "MAP_LOCKED"),
        (libc::MAP_NORESERVE, "MAP_NORESERVE"),
        (libc::MAP_POPULATE, "MAP_POPULATE"),
    ];
    join(kind.to_owned(), (flags & !libc::MAP_TYPE).cast_unsigned(), &names)
}

/// `text|NAME|NAME|0xREST`.
fn join(mut text: String, mut flags: u32, names: &[(i32, &str)]) -> String {
    let mut add = |name: &str| {
        if !text.is_empty() {
            text.push('|');
        }
        text.push_str(name);
    };
    for (bits, name) in names {
        let bits = bits.cast_unsigned();
        if flags & bits == bits {
            flags &= !bits;
            add(name);
        }
    }
    if flags != 0 {
        add(&format!("{flags:#x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_named_and_the_rest_is_a_number() {
        assert_eq!(open_flags(0o2_000_002), "O_RDWR|O_CLOEXEC");
        assert_eq!(open_flags(0), "O_RDONLY");
        assert_eq!(open_flags(0o4_010_001), "O_WRONLY|O_SYNC");
        assert_eq!(open_flags(0x8000_0000), "O_RDONLY|0x80000000");
        assert_eq!(protection(3), "PROT_READ|PROT_WRITE");
        assert_eq!(protection(0), "PROT_NONE");
        assert_eq!(mapping(0x11), "MAP_SHARED|MAP_FIXED");
    }
}
