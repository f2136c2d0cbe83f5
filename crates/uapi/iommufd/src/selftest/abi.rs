//! `drivers/iommu/iommufd/iommufd_test.h`: what the kernel's selftest and its mock driver agree on.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::abi::Argument;
use crate::abi::iommufd::IOMMUFD_TYPE;

/// Bytes of the union in [`TestCmd`].
const UNION: usize = 48;

/// `struct iommu_test_cmd`: one ioctl for all operations.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C, align(8))]
pub struct TestCmd {
    /// Size of the structure as the caller knows it, in bytes.
    pub size: u32,
    /// `IOMMU_TEST_OP_*`.
    pub op: u32,
    /// What it is done to.
    pub id: u32,
    /// Padding.
    pub reserved: u32,
    /// What belongs to `op` alone.
    pub union: [u64; UNION / 8],
    /// The end of the structure as the kernel knows it.
    pub last: u32,
    /// Padding.
    pub padding: u32,
}

impl Argument for TestCmd {
    const COMMAND: u32 = IOMMUFD_TYPE << 8 | 0xa0;
    const NAME: &'static str = "IOMMU_TEST_CMD";
    const MIN_SIZE: usize = 68;
}

impl TestCmd {
    /// Where the union begins, in bytes.
    pub(super) const UNION_OFFSET: usize = 16;

    /// A member of the union.
    pub(super) fn member<T: FromBytes>(&self) -> T {
        // Every member is shorter than the union.
        let member = T::read_from_prefix(self.union.as_bytes());
        member.map_or_else(|_| T::new_zeroed(), |(member, _)| member)
    }

    /// Stores a member of the union.
    pub(super) fn set_member<T: IntoBytes + Immutable>(&mut self, member: &T) {
        // Every member is shorter than the union.
        let _ = member.write_to_prefix(self.union.as_mut_bytes());
    }
}

/// `IOMMU_TEST_OP_*`.
pub mod op {
    /// Reserves IOVAs of an IOAS.
    pub const ADD_RESERVED: u32 = 1;
    /// Makes a mock device and attaches it.
    pub const MOCK_DOMAIN: u32 = 2;
    /// Compares what a page table holds with the caller's memory.
    pub const MD_CHECK_MAP: u32 = 3;
    /// Counts the pins of the caller's memory.
    pub const MD_CHECK_REFS: u32 = 4;
    /// Makes an access and a file for it.
    pub const CREATE_ACCESS: u32 = 5;
    /// Unpins what `ACCESS_PAGES` pinned.
    pub const DESTROY_ACCESS_PAGES: u32 = 6;
    /// Pins pages through an access.
    pub const ACCESS_PAGES: u32 = 7;
    /// Copies bytes through an access.
    pub const ACCESS_RW: u32 = 8;
    /// How much memory a batch of pages may take.
    pub const SET_TEMP_MEMORY_LIMIT: u32 = 9;
    /// Attaches a mock device to something else.
    pub const MOCK_DOMAIN_REPLACE: u32 = 10;
    /// Moves an access to another IOAS.
    pub const ACCESS_REPLACE_IOAS: u32 = 11;
    /// As `MOCK_DOMAIN`, with properties of the device.
    pub const MOCK_DOMAIN_FLAGS: u32 = 12;
    /// Writes to pages as a device would.
    pub const DIRTY: u32 = 13;
    /// Compares what a nested page table has cached.
    pub const MD_CHECK_IOTLB: u32 = 14;
    /// A mock device asks for a page.
    pub const TRIGGER_IOPF: u32 = 15;
    /// Compares what a mock device has cached.
    pub const DEV_CHECK_CACHE: u32 = 16;
    /// A mock device has an event for its vIOMMU.
    pub const TRIGGER_VEVENT: u32 = 17;
    /// Attaches a PASID.
    pub const PASID_ATTACH: u32 = 18;
    /// Attaches a PASID to something else.
    pub const PASID_REPLACE: u32 = 19;
    /// Detaches a PASID.
    pub const PASID_DETACH: u32 = 20;
    /// Compares what a PASID is attached to.
    pub const PASID_CHECK_HWPT: u32 = 21;
    /// Makes a dma-buf.
    pub const DMABUF_GET: u32 = 22;
    /// Takes the memory of a dma-buf away, or gives it back.
    pub const DMABUF_REVOKE: u32 = 23;
}

macro_rules! members {
    ($($(#[$doc:meta])* $name:ident { $($(#[$fdoc:meta])* $field:ident: $ty:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
        #[repr(C)]
        pub struct $name { $($(#[$fdoc])* pub $field: $ty,)* }

        const _: () = assert!(size_of::<$name>() <= UNION);
    )*};
}

members! {
    /// `add_reserved`.
    AddReserved {
        /// First IOVA.
        start: u64,
        /// Bytes.
        length: u64,
    }

    /// `mock_domain` and `mock_domain_flags`.
    MockDomain {
        /// The mock device.
        out_stdev_id: u32,
        /// What it is attached to.
        out_hwpt_id: u32,
        /// The device of iommufd.
        out_idev_id: u32,
        /// `MOCK_FLAGS_DEVICE_*`; not looked at by `MOCK_DOMAIN`.
        dev_flags: u32,
    }

    /// `mock_domain_replace`.
    MockDomainReplace {
        /// What to attach to; on return, the page table.
        pt_id: u32,
    }

    /// `check_map`.
    CheckMap {
        /// First IOVA.
        iova: u64,
        /// Bytes.
        length: u64,
        /// The memory that should be there.
        uptr: u64,
    }

    /// `check_refs`.
    CheckRefs {
        /// Bytes.
        length: u64,
        /// The memory.
        uptr: u64,
        /// How often each page should be pinned.
        refs: u32,
        /// Padding.
        padding: u32,
    }

    /// `create_access`.
    CreateAccess {
        /// The new file.
        out_access_fd: u32,
        /// `MOCK_FLAGS_ACCESS_CREATE_*`.
        flags: u32,
    }

    /// `destroy_access_pages`.
    DestroyAccessPages {
        /// What `ACCESS_PAGES` gave.
        access_pages_id: u32,
    }

    /// `access_pages`.
    AccessPages {
        /// `MOCK_FLAGS_ACCESS_*`.
        flags: u32,
        /// Number of what was pinned.
        out_access_pages_id: u32,
        /// First IOVA.
        iova: u64,
        /// Bytes.
        length: u64,
        /// The memory that should be there; 0 for none to compare with.
        uptr: u64,
    }

    /// `access_rw`.
    AccessRw {
        /// First IOVA.
        iova: u64,
        /// Bytes.
        length: u64,
        /// From where, or to where.
        uptr: u64,
        /// `MOCK_ACCESS_RW_*`.
        flags: u32,
        /// Padding.
        padding: u32,
    }

    /// `memory_limit`.
    MemoryLimit {
        /// Bytes.
        limit: u32,
    }

    /// `access_replace_ioas`.
    AccessReplaceIoas {
        /// The new IOAS.
        ioas_id: u32,
    }

    /// `dirty`.
    DirtyPages {
        /// Not looked at.
        flags: u32,
        /// Padding.
        padding: u32,
        /// First IOVA.
        iova: u64,
        /// Bytes.
        length: u64,
        /// Bytes that a bit of the bitmap stands for.
        page_size: u64,
        /// The bitmap.
        uptr: u64,
        /// How many bits were set.
        out_nr_dirty: u64,
    }

    /// `check_iotlb`.
    CheckIotlb {
        /// Which entry.
        id: u32,
        /// What it should hold.
        iotlb: u32,
    }

    /// `trigger_iopf`.
    TriggerIopf {
        /// Which device.
        dev_id: u32,
        /// With which PASID; 0 for none.
        pasid: u32,
        /// Page Request Group Index.
        grpid: u32,
        /// `IOMMU_PGFAULT_PERM_*`.
        perm: u32,
        /// The page.
        addr: u64,
    }

    /// `check_dev_cache`.
    CheckDevCache {
        /// Which entry.
        id: u32,
        /// What it should hold.
        cache: u32,
    }

    /// `trigger_vevent`.
    TriggerVevent {
        /// Which device.
        dev_id: u32,
    }

    /// `pasid_attach` and `pasid_replace`.
    PasidAttach {
        /// The PASID.
        pasid: u32,
        /// What to attach to; on return, the page table.
        pt_id: u32,
    }

    /// `pasid_detach`.
    PasidDetach {
        /// The PASID.
        pasid: u32,
    }

    /// `pasid_check`.
    PasidCheck {
        /// The PASID.
        pasid: u32,
        /// What it should be attached to; 0 for nothing.
        hwpt_id: u32,
    }

    /// `dmabuf_get`.
    DmabufGet {
        /// Bytes.
        length: u32,
        /// `O_CLOEXEC`.
        open_flags: u32,
    }

    /// `dmabuf_revoke`.
    DmabufRevoke {
        /// Which dma-buf.
        dmabuf_fd: i32,
        /// Whether its memory is to be away.
        revoked: u32,
    }
}

/// `MOCK_FLAGS_DEVICE_NO_DIRTY`: the IOMMU of the device does not track dirty pages.
pub const DEVICE_NO_DIRTY: u32 = 1 << 0;
/// `MOCK_FLAGS_DEVICE_PASID`: the device has PASIDs.
pub const DEVICE_PASID: u32 = 1 << 2;

/// `MOCK_FLAGS_ACCESS_WRITE`: pin for writing.
pub const ACCESS_WRITE: u32 = 1 << 0;
/// `MOCK_FLAGS_ACCESS_SYZ`: the IOVA is the number of an area and an offset into it.
pub const ACCESS_SYZ: u32 = 1 << 16;

/// `MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES`: the access will pin.
pub const ACCESS_CREATE_NEEDS_PIN_PAGES: u32 = 1 << 0;

/// `MOCK_ACCESS_RW_WRITE`: into the IOAS.
pub const ACCESS_RW_WRITE: u32 = 1 << 0;
/// `MOCK_ACCESS_RW_SLOW_PATH`: pin the pages, whatever else would do.
pub const ACCESS_RW_SLOW_PATH: u32 = 1 << 2;

/// `MOCK_APERTURE_START`: first IOVA of a page table of the default type.
pub const APERTURE_START: u64 = 1 << 24;
/// `MOCK_APERTURE_LAST`.
pub const APERTURE_LAST: u64 = (1 << 31) - 1;
/// log2 of `MOCK_PAGE_SIZE`.
pub const PAGE_SHIFT: u32 = 11;
/// `MOCK_HUGE_PAGE_SIZE`.
pub const HUGE_PAGE_SIZE: u64 = 512 << PAGE_SHIFT;
/// `MOCK_PASID_WIDTH`.
pub const PASID_WIDTH: u8 = 20;
/// `IOMMU_TEST_PASID_RESERVED`: a PASID whose second attachment fails.
pub const PASID_RESERVED: u32 = 1024;

/// `MOCK_IOMMUPT_DEFAULT`.
pub const PAGE_TABLE_DEFAULT: u32 = 0;
/// `MOCK_IOMMUPT_HUGE`: huge pages, in all IOVAs.
pub const PAGE_TABLE_HUGE: u32 = 1;

/// `IOMMU_HW_INFO_TYPE_SELFTEST`.
pub const HW_INFO_TYPE: u32 = 0xfeed_beef;
/// `IOMMU_HW_INFO_SELFTEST_REGVAL`.
pub const HW_INFO_REGISTER: u32 = 0xdead_beef;

/// `struct iommu_test_hw_info`.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct HwInfoData {
    /// Always 0.
    pub flags: u32,
    /// [`HW_INFO_REGISTER`].
    pub test_reg: u32,
}

/// `IOMMU_HWPT_DATA_SELFTEST`.
pub const HWPT_DATA: u32 = 0xdead;

/// `struct iommu_hwpt_selftest`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct HwptData {
    /// What a nested page table has cached at first.
    pub iotlb: u32,
    /// [`PAGE_TABLE_DEFAULT`] or [`PAGE_TABLE_HUGE`].
    pub pagetable_type: u32,
}

/// `MOCK_NESTED_DOMAIN_IOTLB_NUM`.
pub const IOTLB_ENTRIES: usize = 4;
/// `MOCK_DEV_CACHE_NUM`.
pub const DEVICE_CACHE_ENTRIES: usize = 4;
/// `IOMMU_TEST_DEV_CACHE_DEFAULT`: what a mock device has cached at first.
pub const DEVICE_CACHE_DEFAULT: u32 = 0x00ba_ddad;

/// `IOMMU_HWPT_INVALIDATE_DATA_SELFTEST`.
pub const HWPT_INVALIDATE_DATA: u32 = 0xdead_beef;
/// `IOMMU_VIOMMU_INVALIDATE_DATA_SELFTEST`.
pub const VIOMMU_INVALIDATE_DATA: u32 = 0xdead_beef;
/// `IOMMU_TEST_INVALIDATE_FLAG_ALL`: every entry, whatever the request names.
pub const INVALIDATE_ALL: u32 = 1 << 0;

/// `struct iommu_hwpt_invalidate_selftest`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct HwptInvalidateData {
    /// [`INVALIDATE_ALL`].
    pub flags: u32,
    /// Which entry.
    pub iotlb_id: u32,
}

/// `struct iommu_viommu_invalidate_selftest`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct ViommuInvalidateData {
    /// [`INVALIDATE_ALL`].
    pub flags: u32,
    /// Virtual id of the device.
    pub vdev_id: u32,
    /// Which entry.
    pub cache_id: u32,
}

/// `IOMMU_VIOMMU_TYPE_SELFTEST`.
pub const VIOMMU_TYPE: u32 = 0xdead_beef;

/// `struct iommu_viommu_selftest`.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct ViommuData {
    /// Any value.
    pub in_data: u32,
    /// The same.
    pub out_data: u32,
    /// What to give to `mmap`, to find the value once more.
    pub out_mmap_offset: u64,
    /// How much can be mapped, in bytes.
    pub out_mmap_length: u64,
}

/// `IOMMU_VEVENTQ_TYPE_SELFTEST`.
pub const VEVENTQ_TYPE: u32 = 0xbeef_beef;

/// `struct iommu_viommu_event_selftest`.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct EventData {
    /// Virtual id of the device.
    pub virt_id: u32,
}

/// `IOMMU_HW_QUEUE_TYPE_SELFTEST`.
pub const HW_QUEUE_TYPE: u32 = 0xdead_beef;
/// `IOMMU_TEST_HW_QUEUE_MAX`.
pub const HW_QUEUES: usize = 2;
