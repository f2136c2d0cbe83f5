//! `include/uapi/linux/iommufd.h`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `IOMMUFD_TYPE`, the type byte of every ioctl number: `;`.
pub const IOMMUFD_TYPE: u32 = 0x3b;

/// The structure of one ioctl. The first member is always its size as the caller knows it.
pub trait Argument: FromBytes + IntoBytes + Immutable + KnownLayout + Copy {
    /// The ioctl number.
    const COMMAND: u32;
    /// Its name.
    const NAME: &'static str;
    /// The shortest structure that was ever defined for it, in bytes: shorter ones are `EINVAL`.
    const MIN_SIZE: usize;
}

macro_rules! arguments {
    ($(
        $(#[$doc:meta])*
        $name:ident = $nr:literal, $ioctl:literal, at least $min:literal {
            $($(#[$fdoc:meta])* $field:ident: $ty:ty,)*
        }
    )*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        #[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
        #[repr(C)]
        pub struct $name {
            /// Size of the structure as the caller knows it, in bytes.
            pub size: u32,
            $($(#[$fdoc])* pub $field: $ty,)*
        }

        impl Argument for $name {
            const COMMAND: u32 = IOMMUFD_TYPE << 8 | $nr;
            const NAME: &'static str = $ioctl;
            const MIN_SIZE: usize = $min;
        }
    )*};
}

arguments! {
    /// `struct iommu_destroy`.
    Destroy = 0x80, "IOMMU_DESTROY", at least 8 {
        /// Object to destroy.
        id: u32,
    }

    /// `struct iommu_ioas_alloc`.
    IoasAlloc = 0x81, "IOMMU_IOAS_ALLOC", at least 12 {
        /// Must be 0.
        flags: u32,
        /// The new IOAS.
        out_ioas_id: u32,
    }

    /// `struct iommu_ioas_allow_iovas`.
    IoasAllowIovas = 0x82, "IOMMU_IOAS_ALLOW_IOVAS", at least 24 {
        /// Which IOAS.
        ioas_id: u32,
        /// Elements of the array.
        num_iovas: u32,
        /// Must be 0.
        reserved: u32,
        /// Address of an array of [`IovaRange`].
        allowed_iovas: u64,
    }

    /// `struct iommu_ioas_copy`.
    IoasCopy = 0x83, "IOMMU_IOAS_COPY", at least 40 {
        /// `IOMMU_IOAS_MAP_*`.
        flags: u32,
        /// IOAS to map into.
        dst_ioas_id: u32,
        /// IOAS to take the pages from.
        src_ioas_id: u32,
        /// Bytes.
        length: u64,
        /// Where to map, or where it was mapped.
        dst_iova: u64,
        /// Where the pages are mapped now.
        src_iova: u64,
    }

    /// `struct iommu_ioas_iova_ranges`.
    IoasIovaRanges = 0x84, "IOMMU_IOAS_IOVA_RANGES", at least 32 {
        /// Which IOAS.
        ioas_id: u32,
        /// Elements of the array; on return, ranges that there are.
        num_iovas: u32,
        /// Must be 0.
        reserved: u32,
        /// Address of an array of [`IovaRange`].
        allowed_iovas: u64,
        /// What IOVAs must be a multiple of.
        out_iova_alignment: u64,
    }

    /// `struct iommu_ioas_map`.
    IoasMap = 0x85, "IOMMU_IOAS_MAP", at least 40 {
        /// `IOMMU_IOAS_MAP_*`.
        flags: u32,
        /// IOAS to map into.
        ioas_id: u32,
        /// Must be 0.
        reserved: u32,
        /// Virtual address of the caller.
        user_va: u64,
        /// Bytes.
        length: u64,
        /// Where to map, or where it was mapped.
        iova: u64,
    }

    /// `struct iommu_ioas_unmap`.
    IoasUnmap = 0x86, "IOMMU_IOAS_UNMAP", at least 24 {
        /// Which IOAS.
        ioas_id: u32,
        /// First IOVA.
        iova: u64,
        /// Bytes; on return, bytes that were unmapped.
        length: u64,
    }

    /// `struct iommu_option`.
    Option = 0x87, "IOMMU_OPTION", at least 24 {
        /// `IOMMU_OPTION_*`.
        option_id: u32,
        /// `IOMMU_OPTION_OP_*`.
        op: u16,
        /// Must be 0.
        reserved: u16,
        /// Which object, or 0.
        object_id: u32,
        /// The value.
        val64: u64,
    }

    /// `struct iommu_vfio_ioas`.
    VfioIoas = 0x88, "IOMMU_VFIO_IOAS", at least 12 {
        /// Which IOAS.
        ioas_id: u32,
        /// `IOMMU_VFIO_IOAS_*`.
        op: u16,
        /// Must be 0.
        reserved: u16,
    }

    /// `struct iommu_hwpt_alloc`.
    HwptAlloc = 0x89, "IOMMU_HWPT_ALLOC", at least 24 {
        /// `IOMMU_HWPT_*`.
        flags: u32,
        /// Device that the page table is for.
        dev_id: u32,
        /// IOAS, parent page table or vIOMMU.
        pt_id: u32,
        /// The new page table.
        out_hwpt_id: u32,
        /// Must be 0.
        reserved: u32,
        /// `IOMMU_HWPT_DATA_*`.
        data_type: u32,
        /// Bytes of vendor data.
        data_len: u32,
        /// Address of the vendor data.
        data_uptr: u64,
        /// Fault queue.
        fault_id: u32,
        /// Must be 0.
        reserved2: u32,
    }

    /// `struct iommu_hw_info`.
    HwInfo = 0x8a, "IOMMU_GET_HW_INFO", at least 32 {
        /// `IOMMU_HW_INFO_FLAG_*`.
        flags: u32,
        /// Which device.
        dev_id: u32,
        /// Bytes of the buffer; on return, bytes that there are.
        data_len: u32,
        /// Address of a buffer.
        data_uptr: u64,
        /// `IOMMU_HW_INFO_TYPE_*`: which to get, on return which it is.
        data_type: u32,
        /// Width of the device's PASIDs in bits.
        out_max_pasid_log2: u8,
        /// Must be 0.
        reserved: [u8; 3],
        /// `IOMMU_HW_CAP_*`.
        out_capabilities: u64,
    }

    /// `struct iommu_hwpt_set_dirty_tracking`.
    HwptSetDirtyTracking = 0x8b, "IOMMU_HWPT_SET_DIRTY_TRACKING", at least 16 {
        /// `IOMMU_HWPT_DIRTY_TRACKING_ENABLE` or 0.
        flags: u32,
        /// Which page table.
        hwpt_id: u32,
        /// Not looked at, as in Linux.
        reserved: u32,
    }

    /// `struct iommu_hwpt_get_dirty_bitmap`.
    HwptGetDirtyBitmap = 0x8c, "IOMMU_HWPT_GET_DIRTY_BITMAP", at least 48 {
        /// Which page table.
        hwpt_id: u32,
        /// `IOMMU_HWPT_GET_DIRTY_BITMAP_*`.
        flags: u32,
        /// Must be 0.
        reserved: u32,
        /// First IOVA.
        iova: u64,
        /// Bytes.
        length: u64,
        /// Bytes that one bit stands for.
        page_size: u64,
        /// Address of the bitmap.
        data: u64,
    }

    /// `struct iommu_hwpt_invalidate`.
    HwptInvalidate = 0x8d, "IOMMU_HWPT_INVALIDATE", at least 32 {
        /// Nested page table or vIOMMU.
        hwpt_id: u32,
        /// Address of an array of requests.
        data_uptr: u64,
        /// `IOMMU_HWPT_INVALIDATE_DATA_*` or `IOMMU_VIOMMU_INVALIDATE_DATA_*`.
        data_type: u32,
        /// Bytes of one request.
        entry_len: u32,
        /// Requests; on return, requests that were handled.
        entry_num: u32,
        /// Must be 0.
        reserved: u32,
    }

    /// `struct iommu_fault_alloc`.
    FaultQueueAlloc = 0x8e, "IOMMU_FAULT_QUEUE_ALLOC", at least 16 {
        /// Must be 0.
        flags: u32,
        /// The new fault queue.
        out_fault_id: u32,
        /// Its descriptor.
        out_fault_fd: u32,
    }

    /// `struct iommu_ioas_map_file`.
    IoasMapFile = 0x8f, "IOMMU_IOAS_MAP_FILE", at least 40 {
        /// `IOMMU_IOAS_MAP_*`.
        flags: u32,
        /// IOAS to map into.
        ioas_id: u32,
        /// Descriptor of the file.
        fd: i32,
        /// First byte of the file.
        start: u64,
        /// Bytes.
        length: u64,
        /// Where to map, or where it was mapped.
        iova: u64,
    }

    /// `struct iommu_viommu_alloc`.
    ViommuAlloc = 0x90, "IOMMU_VIOMMU_ALLOC", at least 24 {
        /// Must be 0.
        flags: u32,
        /// `IOMMU_VIOMMU_TYPE_*`.
        kind: u32,
        /// A device behind the IOMMU.
        dev_id: u32,
        /// Nesting parent.
        hwpt_id: u32,
        /// The new vIOMMU.
        out_viommu_id: u32,
        /// Bytes of vendor data.
        data_len: u32,
        /// Must be 0.
        reserved: u32,
        /// Address of the vendor data.
        data_uptr: u64,
    }

    /// `struct iommu_vdevice_alloc`.
    VdeviceAlloc = 0x91, "IOMMU_VDEVICE_ALLOC", at least 24 {
        /// vIOMMU that the device is behind.
        viommu_id: u32,
        /// Which device.
        dev_id: u32,
        /// The new vDEVICE.
        out_vdevice_id: u32,
        /// Its number in the guest's IOMMU.
        virt_id: u64,
    }

    /// `struct iommu_ioas_change_process`.
    IoasChangeProcess = 0x92, "IOMMU_IOAS_CHANGE_PROCESS", at least 8 {
        /// Must be 0.
        reserved: u32,
    }

    /// `struct iommu_veventq_alloc`.
    VeventqAlloc = 0x93, "IOMMU_VEVENTQ_ALLOC", at least 28 {
        /// Must be 0.
        flags: u32,
        /// Which vIOMMU.
        viommu_id: u32,
        /// `IOMMU_VEVENTQ_TYPE_*`.
        kind: u32,
        /// Events that it holds.
        veventq_depth: u32,
        /// The new queue.
        out_veventq_id: u32,
        /// Its descriptor.
        out_veventq_fd: u32,
        /// Must be 0.
        reserved: u32,
    }

    /// `struct iommu_hw_queue_alloc`.
    HwQueueAlloc = 0x94, "IOMMU_HW_QUEUE_ALLOC", at least 40 {
        /// Must be 0.
        flags: u32,
        /// Which vIOMMU.
        viommu_id: u32,
        /// `IOMMU_HW_QUEUE_TYPE_*`.
        kind: u32,
        /// Which queue.
        index: u32,
        /// The new queue.
        out_hw_queue_id: u32,
        /// Where the queue is mapped in the nesting parent.
        nesting_parent_iova: u64,
        /// Bytes.
        length: u64,
    }

    /// `struct iommu_ioas_noiommu_get_pa`.
    IoasNoiommuGetPa = 0x95, "IOMMU_IOAS_NOIOMMU_GET_PA", at least 40 {
        /// Must be 0.
        flags: u32,
        /// Which IOAS.
        ioas_id: u32,
        /// Must be 0.
        reserved: u32,
        /// First IOVA.
        iova: u64,
        /// Bytes; on return, bytes that are contiguous.
        length: u64,
        /// Where it leads.
        out_phys: u64,
    }
}

/// `struct iommu_iova_range`: an inclusive range.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct IovaRange {
    /// First IOVA.
    pub start: u64,
    /// Last IOVA.
    pub last: u64,
}

/// `struct iommu_hwpt_pgfault`: a fault as a fault queue shows it.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HwptPgfault {
    /// `IOMMU_PGFAULT_FLAGS_*`.
    pub flags: u32,
    /// Object of the device.
    pub dev_id: u32,
    /// With which PASID, if `PASID_VALID` is set.
    pub pasid: u32,
    /// Page Request Group Index.
    pub grpid: u32,
    /// `IOMMU_PGFAULT_PERM_*`.
    pub perm: u32,
    /// 0.
    pub reserved: u32,
    /// The page.
    pub addr: u64,
    /// A hint of how much will be used, in bytes; 0 for none.
    pub length: u32,
    /// What an answer names.
    pub cookie: u32,
}

/// `struct iommu_hwpt_page_response`: an answer to a group of faults.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct HwptPageResponse {
    /// Of the group.
    pub cookie: u32,
    /// `IOMMUFD_PAGE_RESP_*`.
    pub code: u32,
}

/// `struct iommufd_vevent_header`: before each event of a vEVENTQ.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct VeventHeader {
    /// `IOMMU_VEVENTQ_FLAG_*`.
    pub flags: u32,
    /// Counts events, lost ones too, from 0 to 2^31 - 1 and again.
    pub sequence: u32,
}

/// `IOMMU_PGFAULT_FLAGS_PASID_VALID`.
pub const PGFAULT_FLAGS_PASID_VALID: u32 = 1 << 0;
/// `IOMMU_PGFAULT_FLAGS_LAST_PAGE`: the last fault of its group.
pub const PGFAULT_FLAGS_LAST_PAGE: u32 = 1 << 1;
/// `IOMMUFD_PAGE_RESP_SUCCESS`: the page is there.
pub const PAGE_RESP_SUCCESS: u32 = 0;
/// `IOMMUFD_PAGE_RESP_INVALID`: it will never be.
pub const PAGE_RESP_INVALID: u32 = 1;
/// `IOMMU_VEVENTQ_FLAG_LOST_EVENTS`: events were lost, and this is no event.
pub const VEVENTQ_FLAG_LOST_EVENTS: u32 = 1 << 0;

/// `IOMMU_IOAS_MAP_FIXED_IOVA`: map where the caller says.
pub const MAP_FIXED_IOVA: u32 = 1 << 0;
/// `IOMMU_IOAS_MAP_WRITEABLE`: devices may write.
pub const MAP_WRITEABLE: u32 = 1 << 1;
/// `IOMMU_IOAS_MAP_READABLE`: devices may read.
pub const MAP_READABLE: u32 = 1 << 2;

/// `IOMMU_OPTION_RLIMIT_MODE`: 0 counts pins against the user, 1 against the address space.
pub const OPTION_RLIMIT_MODE: u32 = 0;
/// `IOMMU_OPTION_HUGE_PAGES`: whether an IOAS may use large pages.
pub const OPTION_HUGE_PAGES: u32 = 1;
/// `IOMMU_OPTION_OP_SET`.
pub const OPTION_OP_SET: u16 = 0;
/// `IOMMU_OPTION_OP_GET`.
pub const OPTION_OP_GET: u16 = 1;

/// `IOMMU_VFIO_IOAS_GET`.
pub const VFIO_IOAS_GET: u16 = 0;
/// `IOMMU_VFIO_IOAS_SET`.
pub const VFIO_IOAS_SET: u16 = 1;
/// `IOMMU_VFIO_IOAS_CLEAR`.
pub const VFIO_IOAS_CLEAR: u16 = 2;

/// `IOMMU_HWPT_ALLOC_NEST_PARENT`: to be the second stage of nested page tables.
pub const HWPT_ALLOC_NEST_PARENT: u32 = 1 << 0;
/// `IOMMU_HWPT_ALLOC_DIRTY_TRACKING`: to record dirty pages.
pub const HWPT_ALLOC_DIRTY_TRACKING: u32 = 1 << 1;
/// `IOMMU_HWPT_FAULT_ID_VALID`: faults go to a fault queue.
pub const HWPT_FAULT_ID_VALID: u32 = 1 << 2;
/// `IOMMU_HWPT_ALLOC_PASID`: to be attached to PASIDs.
pub const HWPT_ALLOC_PASID: u32 = 1 << 3;
/// `IOMMU_HWPT_DATA_NONE`: no vendor data.
pub const HWPT_DATA_NONE: u32 = 0;

/// `IOMMU_HW_INFO_FLAG_INPUT_TYPE`: the caller names the type that it wants.
pub const HW_INFO_FLAG_INPUT_TYPE: u32 = 1 << 0;
/// `IOMMU_HW_INFO_TYPE_NONE`, and `IOMMU_HW_INFO_TYPE_DEFAULT` on input.
pub const HW_INFO_TYPE_NONE: u32 = 0;
/// `IOMMU_HW_CAP_DIRTY_TRACKING`.
pub const HW_CAP_DIRTY_TRACKING: u64 = 1 << 0;
/// `IOMMU_HW_CAP_PCI_ATS_NOT_SUPPORTED`.
pub const HW_CAP_PCI_ATS_NOT_SUPPORTED: u64 = 1 << 3;

/// `IOMMU_HWPT_DIRTY_TRACKING_ENABLE`.
pub const DIRTY_TRACKING_ENABLE: u32 = 1 << 0;
/// `IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR`.
pub const GET_DIRTY_BITMAP_NO_CLEAR: u32 = 1 << 0;
