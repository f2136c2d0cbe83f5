//! The structures and numbers against the kernel's own headers.

use vfio_bindings::bindings::vfio as kernel;

use crate::abi::*;

macro_rules! same_layout {
    ($ours:ty, $theirs:ident: $($field:ident = $their_field:ident),*) => {
        $(
            assert_eq!(
                std::mem::offset_of!($ours, $field),
                std::mem::offset_of!(kernel::$theirs, $their_field),
                concat!(stringify!($theirs), ".", stringify!($their_field))
            );
        )*
    };
}

#[test]
fn structures_lie_as_the_kernels_do() {
    assert_eq!(size_of::<GroupStatus>(), size_of::<kernel::vfio_group_status>());
    assert_eq!(size_of::<DeviceInfo>(), size_of::<kernel::vfio_device_info>());
    assert_eq!(size_of::<RegionInfo>(), size_of::<kernel::vfio_region_info>());
    assert_eq!(size_of::<CapHeader>(), size_of::<kernel::vfio_info_cap_header>());
    assert_eq!(size_of::<SparseMmapArea>(), size_of::<kernel::vfio_region_sparse_mmap_area>());
    assert_eq!(
        size_of::<CapHeader>() + size_of::<SparseMmap>(),
        size_of::<kernel::vfio_region_info_cap_sparse_mmap>()
    );
    assert_eq!(size_of::<IrqInfo>(), size_of::<kernel::vfio_irq_info>());
    assert_eq!(size_of::<IrqSet>(), size_of::<kernel::vfio_irq_set>());
    assert_eq!(size_of::<DependentDevice>(), size_of::<kernel::vfio_pci_dependent_device>());
    assert_eq!(size_of::<HotResetInfo>(), size_of::<kernel::vfio_pci_hot_reset_info>());
    assert_eq!(size_of::<HotReset>(), size_of::<kernel::vfio_pci_hot_reset>());
    assert_eq!(size_of::<IoEventFd>(), size_of::<kernel::vfio_device_ioeventfd>());
    assert_eq!(size_of::<Feature>(), size_of::<kernel::vfio_device_feature>());
    same_layout!(DeviceInfo, vfio_device_info: flags = flags, num_regions = num_regions,
        num_irqs = num_irqs, cap_offset = cap_offset);
    same_layout!(RegionInfo, vfio_region_info: flags = flags, index = index,
        cap_offset = cap_offset, size = size, offset = offset);
    same_layout!(IrqSet, vfio_irq_set: flags = flags, index = index, start = start, count = count);
    same_layout!(IoEventFd, vfio_device_ioeventfd: flags = flags, offset = offset, data = data,
        fd = fd);
}

#[test]
fn structures_newer_than_the_bindings_have_the_sizes_of_the_header() {
    // include/uapi/linux/vfio.h of Linux 7.3.
    assert_eq!(size_of::<BindIommufd>(), 24);
    assert_eq!(size_of::<AttachIommufdPt>(), 16);
    assert_eq!(size_of::<DetachIommufdPt>(), 12);
    assert_eq!(std::mem::offset_of!(BindIommufd, out_devid), 12);
    assert_eq!(std::mem::offset_of!(AttachIommufdPt, pt_id), 8);
}

#[test]
fn numbers_are_the_kernels() {
    let ours = [
        VFIO_GROUP_GET_STATUS,
        VFIO_DEVICE_GET_INFO,
        VFIO_DEVICE_SET_IRQS,
        VFIO_DEVICE_FEATURE,
        VFIO_DEVICE_BIND_IOMMUFD,
        VFIO_DEVICE_DETACH_IOMMUFD_PT,
    ];
    assert_eq!(ours, [0x3b67, 0x3b6b, 0x3b6e, 0x3b75, 0x3b76, 0x3b78]);
    assert_eq!(
        VFIO_DEVICE_FLAGS_RESET | VFIO_DEVICE_FLAGS_PCI,
        kernel::VFIO_DEVICE_FLAGS_RESET | kernel::VFIO_DEVICE_FLAGS_PCI
    );
    assert_eq!(VFIO_REGION_INFO_FLAG_CAPS, kernel::VFIO_REGION_INFO_FLAG_CAPS);
    assert_eq!(
        u32::from(VFIO_REGION_INFO_CAP_SPARSE_MMAP),
        kernel::VFIO_REGION_INFO_CAP_SPARSE_MMAP
    );
    assert_eq!(
        u32::from(VFIO_REGION_INFO_CAP_MSIX_MAPPABLE),
        kernel::VFIO_REGION_INFO_CAP_MSIX_MAPPABLE
    );
    assert_eq!(VFIO_IRQ_INFO_NORESIZE, kernel::VFIO_IRQ_INFO_NORESIZE);
    assert_eq!(VFIO_IRQ_SET_ACTION_TRIGGER, kernel::VFIO_IRQ_SET_ACTION_TRIGGER);
    assert_eq!(VFIO_DEVICE_FEATURE_PROBE, kernel::VFIO_DEVICE_FEATURE_PROBE);
    assert_eq!(VFIO_PCI_NUM_REGIONS, kernel::VFIO_PCI_NUM_REGIONS);
    assert_eq!(VFIO_PCI_NUM_IRQS, kernel::VFIO_PCI_NUM_IRQS);
}
