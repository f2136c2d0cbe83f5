//! The part of `include/uapi/linux/vfio.h` that containers answer to.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `VFIO_GET_API_VERSION`.
pub const GET_API_VERSION: u32 = 0x3b64;
/// `VFIO_CHECK_EXTENSION`.
pub const CHECK_EXTENSION: u32 = 0x3b65;
/// `VFIO_SET_IOMMU`.
pub const SET_IOMMU: u32 = 0x3b66;
/// `VFIO_IOMMU_GET_INFO`.
pub const IOMMU_GET_INFO: u32 = 0x3b70;
/// `VFIO_IOMMU_MAP_DMA`.
pub const IOMMU_MAP_DMA: u32 = 0x3b71;
/// `VFIO_IOMMU_UNMAP_DMA`.
pub const IOMMU_UNMAP_DMA: u32 = 0x3b72;
/// `VFIO_IOMMU_DIRTY_PAGES`.
pub const IOMMU_DIRTY_PAGES: u32 = 0x3b75;

/// `VFIO_TYPE1_IOMMU`.
pub const TYPE1_IOMMU: u64 = 1;
/// `VFIO_TYPE1v2_IOMMU`.
pub const TYPE1V2_IOMMU: u64 = 3;
/// `VFIO_DMA_CC_IOMMU`.
pub const DMA_CC_IOMMU: u64 = 4;
/// `VFIO_UNMAP_ALL`.
pub const UNMAP_ALL: u64 = 9;

/// `struct vfio_iommu_type1_info`.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Info {
    /// Bytes that the caller gives; on return, bytes that all of it takes.
    pub argsz: u32,
    /// `VFIO_IOMMU_INFO_*`.
    pub flags: u32,
    /// Bit n set: 2^n bytes can be mapped.
    pub iova_pgsizes: u64,
    /// Where the first capability is, from the start of the structure; 0 for none.
    pub cap_offset: u32,
    /// Padding.
    pub pad: u32,
}

impl Info {
    /// Bytes up to and with `iova_pgsizes`.
    pub const MIN_SIZE: usize = 16;
}

/// `VFIO_IOMMU_INFO_PGSIZES`.
pub const INFO_PGSIZES: u32 = 1 << 0;
/// `VFIO_IOMMU_INFO_CAPS`.
pub const INFO_CAPS: u32 = 1 << 1;

/// `struct vfio_info_cap_header`.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CapHeader {
    /// `VFIO_IOMMU_TYPE1_INFO_CAP_*`.
    pub id: u16,
    /// Version of the capability.
    pub version: u16,
    /// Where the next one is, from the start of the whole structure; 0 for none.
    pub next: u32,
}

/// `VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE`.
pub const CAP_IOVA_RANGE: u16 = 1;
/// `VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL`.
pub const CAP_DMA_AVAIL: u16 = 3;

/// `struct vfio_iommu_type1_info_dma_avail`.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DmaAvail {
    /// What it is.
    pub header: CapHeader,
    /// Mappings that can still be made.
    pub avail: u32,
}

/// `struct vfio_iommu_type1_info_cap_iova_range`, without its array of
/// [`super::iommufd::IovaRange`], which `struct vfio_iova_range` is laid out as.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct IovaRanges {
    /// What it is.
    pub header: CapHeader,
    /// Elements of the array.
    pub nr_iovas: u32,
    /// 0.
    pub reserved: u32,
}

/// `struct vfio_iommu_type1_dma_map`.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DmaMap {
    /// Bytes of the structure.
    pub argsz: u32,
    /// `VFIO_DMA_MAP_FLAG_*`.
    pub flags: u32,
    /// Virtual address of the caller.
    pub vaddr: u64,
    /// Where to map.
    pub iova: u64,
    /// Bytes.
    pub size: u64,
}

/// `VFIO_DMA_MAP_FLAG_READ`.
pub const DMA_MAP_FLAG_READ: u32 = 1 << 0;
/// `VFIO_DMA_MAP_FLAG_WRITE`.
pub const DMA_MAP_FLAG_WRITE: u32 = 1 << 1;

/// `struct vfio_iommu_type1_dma_unmap`, without its trailing data.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DmaUnmap {
    /// Bytes of the structure.
    pub argsz: u32,
    /// `VFIO_DMA_UNMAP_FLAG_*`.
    pub flags: u32,
    /// First IOVA.
    pub iova: u64,
    /// Bytes; on return, bytes that were unmapped.
    pub size: u64,
}

/// `VFIO_DMA_UNMAP_FLAG_ALL`.
pub const DMA_UNMAP_FLAG_ALL: u32 = 1 << 1;
