//! Numbers and structures of `include/uapi/linux/vfio.h`, in the client's memory layout.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `VFIO_TYPE`, the letter of every ioctl of VFIO and iommufd.
const TYPE: u32 = b';' as u32;
/// `VFIO_BASE`.
const BASE: u32 = 100;

/// `_IO(VFIO_TYPE, VFIO_BASE + nr)`: neither direction nor size is in the number.
const fn io(nr: u32) -> u32 {
    TYPE << 8 | (BASE + nr)
}

macro_rules! commands {
    ($($(#[$doc:meta])* $name:ident = $nr:literal;)*) => {
        $($(#[$doc])* pub const $name: u32 = io($nr);)*
    };
}

commands! {
    /// The group's state.
    VFIO_GROUP_GET_STATUS = 3;
    /// Puts a group into a container.
    VFIO_GROUP_SET_CONTAINER = 4;
    /// Takes a group out of its container.
    VFIO_GROUP_UNSET_CONTAINER = 5;
    /// Opens a device of the group.
    VFIO_GROUP_GET_DEVICE_FD = 6;
    /// What the device is.
    VFIO_DEVICE_GET_INFO = 7;
    /// One region.
    VFIO_DEVICE_GET_REGION_INFO = 8;
    /// One interrupt index.
    VFIO_DEVICE_GET_IRQ_INFO = 9;
    /// Signalling, masking and loopback of interrupts.
    VFIO_DEVICE_SET_IRQS = 10;
    /// Resets the function.
    VFIO_DEVICE_RESET = 11;
    /// Which functions a bus reset takes along.
    VFIO_DEVICE_GET_PCI_HOT_RESET_INFO = 12;
    /// Resets the bus.
    VFIO_DEVICE_PCI_HOT_RESET = 13;
    /// Stores a value in a BAR when an eventfd is signalled.
    VFIO_DEVICE_IOEVENTFD = 16;
    /// Optional features.
    VFIO_DEVICE_FEATURE = 17;
    /// Binds a cdev to an iommufd.
    VFIO_DEVICE_BIND_IOMMUFD = 18;
    /// Attaches a bound device to a page table.
    VFIO_DEVICE_ATTACH_IOMMUFD_PT = 19;
    /// Detaches a bound device.
    VFIO_DEVICE_DETACH_IOMMUFD_PT = 20;
}

/// A structure that is copied whole to and from a client.
pub trait Abi: FromBytes + IntoBytes + Immutable + KnownLayout {}
impl<T: FromBytes + IntoBytes + Immutable + KnownLayout> Abi for T {}

macro_rules! structures {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
            #[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct $name { $($(#[$fdoc])* pub $field: $type,)* }
        )*
    };
}

structures! {
    /// `struct vfio_group_status`.
    GroupStatus {
        /// Size of the structure that the caller has.
        argsz: u32,
        /// [`VFIO_GROUP_FLAGS_VIABLE`] and following.
        flags: u32,
    }

    /// `struct vfio_device_info`.
    DeviceInfo {
        /// Size of the structure that the caller has.
        argsz: u32,
        /// [`VFIO_DEVICE_FLAGS_RESET`] and following.
        flags: u32,
        /// Number of region indexes.
        num_regions: u32,
        /// Number of interrupt indexes.
        num_irqs: u32,
        /// Offset of the first capability in the structure, or 0.
        cap_offset: u32,
        /// Padding.
        pad: u32,
    }

    /// `struct vfio_region_info`.
    RegionInfo {
        /// Size of the structure that the caller has; what it needs, if that is more.
        argsz: u32,
        /// [`VFIO_REGION_INFO_FLAG_READ`] and following.
        flags: u32,
        /// Which region.
        index: u32,
        /// Offset of the first capability in the structure, or 0.
        cap_offset: u32,
        /// Size in bytes; 0 for a region that is not there.
        size: u64,
        /// Offset in the device file.
        offset: u64,
    }

    /// `struct vfio_info_cap_header`.
    CapHeader {
        /// Which capability.
        id: u16,
        /// Its version.
        version: u16,
        /// Offset of the next one in the structure, or 0.
        next: u32,
    }

    /// `struct vfio_region_info_cap_sparse_mmap`, without its areas.
    SparseMmap {
        /// Number of areas behind.
        nr_areas: u32,
        /// Zero.
        reserved: u32,
    }

    /// `struct vfio_region_sparse_mmap_area`.
    SparseMmapArea {
        /// Offset in the region.
        offset: u64,
        /// Length in bytes.
        size: u64,
    }

    /// `struct vfio_irq_info`.
    IrqInfo {
        /// Size of the structure that the caller has.
        argsz: u32,
        /// [`VFIO_IRQ_INFO_EVENTFD`] and following.
        flags: u32,
        /// Which interrupt index.
        index: u32,
        /// Interrupts in it.
        count: u32,
    }

    /// `struct vfio_irq_set`, without its data.
    IrqSet {
        /// Size of the structure and its data.
        argsz: u32,
        /// One kind of data and one action.
        flags: u32,
        /// Which interrupt index.
        index: u32,
        /// First interrupt.
        start: u32,
        /// Number of interrupts.
        count: u32,
    }

    /// `struct vfio_pci_hot_reset_info`, without its devices.
    HotResetInfo {
        /// Size of the structure and its devices.
        argsz: u32,
        /// [`VFIO_PCI_HOT_RESET_FLAG_DEV_ID`] and following.
        flags: u32,
        /// Number of devices.
        count: u32,
    }

    /// `struct vfio_pci_dependent_device`.
    DependentDevice {
        /// Group number, or the object id in the caller's iommufd.
        id: u32,
        /// PCI segment.
        segment: u16,
        /// Bus.
        bus: u8,
        /// Device and function.
        devfn: u8,
    }

    /// `struct vfio_pci_hot_reset`, without its descriptors.
    HotReset {
        /// Size of the structure and its descriptors.
        argsz: u32,
        /// Zero.
        flags: u32,
        /// Number of group descriptors.
        count: u32,
    }

    /// `struct vfio_device_ioeventfd`.
    IoEventFd {
        /// Size of the structure.
        argsz: u32,
        /// Width of the store in bytes.
        flags: u32,
        /// Where, as an offset in the device file.
        offset: u64,
        /// What is stored.
        data: u64,
        /// The eventfd; -1 takes the store away.
        fd: i32,
        /// Zero.
        reserved: u32,
    }

    /// `struct vfio_device_feature`, without its data.
    Feature {
        /// Size of the structure and its data.
        argsz: u32,
        /// Which feature, and [`VFIO_DEVICE_FEATURE_GET`] and following.
        flags: u32,
    }

    /// `struct vfio_device_bind_iommufd`.
    BindIommufd {
        /// Size of the structure.
        argsz: u32,
        /// [`VFIO_DEVICE_BIND_FLAG_TOKEN`].
        flags: u32,
        /// Descriptor of the iommufd.
        iommufd: i32,
        /// Object id of the device in the iommufd.
        out_devid: u32,
        /// Address of a 16-byte UUID.
        token_uuid_ptr: u64,
    }

    /// `struct vfio_device_attach_iommufd_pt`.
    AttachIommufdPt {
        /// Size of the structure.
        argsz: u32,
        /// [`VFIO_DEVICE_ATTACH_PASID`].
        flags: u32,
        /// IOAS or page table, and then the page table.
        pt_id: u32,
        /// The PASID, with its flag.
        pasid: u32,
    }

    /// `struct vfio_device_detach_iommufd_pt`.
    DetachIommufdPt {
        /// Size of the structure.
        argsz: u32,
        /// [`VFIO_DEVICE_DETACH_PASID`].
        flags: u32,
        /// The PASID, with its flag.
        pasid: u32,
    }
}

macro_rules! constants {
    ($($name:ident: $type:ty = $value:expr, $doc:literal;)*) => {
        $(#[doc = $doc] pub const $name: $type = $value;)*
    };
}

constants! {
    VFIO_GROUP_FLAGS_VIABLE: u32 = 1, "Nobody else does DMA with a device of the group.";
    VFIO_GROUP_FLAGS_CONTAINER_SET: u32 = 2, "The group is in a container.";

    VFIO_DEVICE_FLAGS_RESET: u32 = 1, "The device can be reset.";
    VFIO_DEVICE_FLAGS_PCI: u32 = 2, "A vfio-pci device.";

    VFIO_REGION_INFO_FLAG_READ: u32 = 1, "The region can be read.";
    VFIO_REGION_INFO_FLAG_WRITE: u32 = 2, "The region can be written.";
    VFIO_REGION_INFO_FLAG_MMAP: u32 = 4, "The region can be mapped.";
    VFIO_REGION_INFO_FLAG_CAPS: u32 = 8, "Capabilities follow.";
    VFIO_REGION_INFO_CAP_SPARSE_MMAP: u16 = 1, "Only some areas can be mapped.";
    VFIO_REGION_INFO_CAP_MSIX_MAPPABLE: u16 = 3, "The MSI-X table may be mapped too.";

    VFIO_IRQ_INFO_EVENTFD: u32 = 1, "Signals eventfds.";
    VFIO_IRQ_INFO_MASKABLE: u32 = 2, "Can be masked.";
    VFIO_IRQ_INFO_AUTOMASKED: u32 = 4, "Masks itself when it is signalled.";
    VFIO_IRQ_INFO_NORESIZE: u32 = 8, "The number of vectors is fixed when they are enabled.";

    VFIO_IRQ_SET_DATA_NONE: u32 = 1, "No data: all of the range.";
    VFIO_IRQ_SET_DATA_BOOL: u32 = 2, "A byte for each interrupt.";
    VFIO_IRQ_SET_DATA_EVENTFD: u32 = 4, "A descriptor for each interrupt.";
    VFIO_IRQ_SET_DATA_TYPE_MASK: u32 = 7, "All kinds of data.";
    VFIO_IRQ_SET_ACTION_MASK: u32 = 8, "Mask.";
    VFIO_IRQ_SET_ACTION_UNMASK: u32 = 16, "Unmask.";
    VFIO_IRQ_SET_ACTION_TRIGGER: u32 = 32, "Signal, or say what is signalled.";
    VFIO_IRQ_SET_ACTION_TYPE_MASK: u32 = 56, "All actions.";

    VFIO_PCI_ROM_REGION_INDEX: u32 = 6, "The expansion ROM.";
    VFIO_PCI_CONFIG_REGION_INDEX: u32 = 7, "Configuration space.";
    VFIO_PCI_VGA_REGION_INDEX: u32 = 8, "Legacy VGA.";
    VFIO_PCI_NUM_REGIONS: u32 = 9, "Regions of every PCI device.";

    VFIO_PCI_INTX_IRQ_INDEX: u32 = 0, "The INTx pin.";
    VFIO_PCI_MSI_IRQ_INDEX: u32 = 1, "MSI.";
    VFIO_PCI_MSIX_IRQ_INDEX: u32 = 2, "MSI-X.";
    VFIO_PCI_ERR_IRQ_INDEX: u32 = 3, "Uncorrectable errors.";
    VFIO_PCI_REQ_IRQ_INDEX: u32 = 4, "The host wants the device back.";
    VFIO_PCI_NUM_IRQS: u32 = 5, "Interrupt indexes of every PCI device.";

    VFIO_PCI_HOT_RESET_FLAG_DEV_ID: u32 = 1, "The ids are iommufd object ids.";
    VFIO_PCI_HOT_RESET_FLAG_DEV_ID_OWNED: u32 = 2, "The caller owns all of the devices.";
    VFIO_PCI_DEVID_OWNED: u32 = 0, "Owned, without an object id.";
    VFIO_PCI_DEVID_NOT_OWNED: u32 = u32::MAX, "Not owned.";

    VFIO_DEVICE_IOEVENTFD_SIZE_MASK: u32 = 0xf, "Widths of a store: 1, 2, 4 or 8.";

    VFIO_DEVICE_FEATURE_MASK: u32 = 0xffff, "Which feature.";
    VFIO_DEVICE_FEATURE_GET: u32 = 1 << 16, "Read the feature.";
    VFIO_DEVICE_FEATURE_SET: u32 = 1 << 17, "Write the feature.";
    VFIO_DEVICE_FEATURE_PROBE: u32 = 1 << 18, "Ask whether it could be read or written.";

    VFIO_DEVICE_BIND_FLAG_TOKEN: u32 = 1, "A VF token is given.";
    VFIO_DEVICE_ATTACH_PASID: u32 = 1, "For one PASID.";
    VFIO_DEVICE_DETACH_PASID: u32 = 1, "For one PASID.";

    REGION_SHIFT: u32 = 40, "`VFIO_PCI_OFFSET_SHIFT`: a region's index in its offset in the file.";
}

/// Offset of a region in the device file.
pub const fn region_offset(index: u32) -> u64 {
    (index as u64) << REGION_SHIFT
}
