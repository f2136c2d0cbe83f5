//! Ioctls as text, as strace shows them.

use std::fmt::{Display, Write};

use zerocopy::{FromBytes, IntoBytes};

use crate::abi::{Argument, iommufd as abi, type1};
use crate::client::Client;
use crate::command::{read, read_value};
use crate::selftest::abi::TestCmd;

/// The name of an ioctl on a context and its structure as it is in the caller's memory now: called
/// before and after the ioctl, it shows what went in and what came out.
///
/// `None` for a number that is none of a context's, and when the memory cannot be read.
pub fn describe(command: u32, argument: u64, client: &dyn Client) -> Option<String> {
    let at = Source { command, argument, client };
    let fields = match command & 0xff {
        0x80 => at.fields(|a: abi::Destroy, f| f.number("id", a.id)),
        0x81 => at.fields(|a: abi::IoasAlloc, f| {
            f.hex("flags", a.flags).number("out_ioas_id", a.out_ioas_id)
        }),
        0x82 => at.fields(|a: abi::IoasAllowIovas, f| {
            f.number("ioas_id", a.ioas_id).number("num_iovas", a.num_iovas).ranges(
                "allowed_iovas",
                client,
                a.allowed_iovas,
                a.num_iovas,
            )
        }),
        0x83 => at.fields(|a: abi::IoasCopy, f| {
            f.flags("flags", a.flags, MAP_FLAGS)
                .number("dst_ioas_id", a.dst_ioas_id)
                .number("src_ioas_id", a.src_ioas_id)
                .hex("length", a.length)
                .hex("dst_iova", a.dst_iova)
                .hex("src_iova", a.src_iova)
        }),
        0x84 => at.fields(|a: abi::IoasIovaRanges, f| {
            f.number("ioas_id", a.ioas_id)
                .number("num_iovas", a.num_iovas)
                .ranges("allowed_iovas", client, a.allowed_iovas, a.num_iovas)
                .number("out_iova_alignment", a.out_iova_alignment)
        }),
        0x85 => at.fields(|a: abi::IoasMap, f| {
            f.flags("flags", a.flags, MAP_FLAGS)
                .number("ioas_id", a.ioas_id)
                .hex("user_va", a.user_va)
                .hex("length", a.length)
                .hex("iova", a.iova)
        }),
        0x86 => at.fields(|a: abi::IoasUnmap, f| {
            f.number("ioas_id", a.ioas_id).hex("iova", a.iova).hex("length", a.length)
        }),
        0x87 => at.fields(|a: abi::Option, f| {
            f.name("option_id", a.option_id.into(), &["RLIMIT_MODE", "HUGE_PAGES"])
                .name("op", a.op.into(), &["SET", "GET"])
                .number("object_id", a.object_id)
                .number("val64", a.val64)
        }),
        0x88 => at.fields(|a: abi::VfioIoas, f| {
            f.number("ioas_id", a.ioas_id).name("op", a.op.into(), &["GET", "SET", "CLEAR"])
        }),
        0x89 => at.fields(|a: abi::HwptAlloc, f| {
            f.flags("flags", a.flags, HWPT_FLAGS)
                .number("dev_id", a.dev_id)
                .number("pt_id", a.pt_id)
                .number("out_hwpt_id", a.out_hwpt_id)
                .name("data_type", a.data_type.into(), HWPT_DATA_TYPES)
                .number("data_len", a.data_len)
                .hex("data_uptr", a.data_uptr)
                .number("fault_id", a.fault_id)
        }),
        0x8a => at.fields(|a: abi::HwInfo, f| {
            f.flags("flags", a.flags, &["INPUT_TYPE"])
                .number("dev_id", a.dev_id)
                .number("data_len", a.data_len)
                .hex("data_uptr", a.data_uptr)
                .name("data_type", a.data_type.into(), HW_INFO_TYPES)
                .number("out_max_pasid_log2", a.out_max_pasid_log2)
                .hex("out_capabilities", a.out_capabilities)
        }),
        0x8b => at.fields(|a: abi::HwptSetDirtyTracking, f| {
            f.flags("flags", a.flags, &["ENABLE"]).number("hwpt_id", a.hwpt_id)
        }),
        0x8c => at.fields(|a: abi::HwptGetDirtyBitmap, f| {
            f.number("hwpt_id", a.hwpt_id)
                .flags("flags", a.flags, &["NO_CLEAR"])
                .hex("iova", a.iova)
                .hex("length", a.length)
                .hex("page_size", a.page_size)
                .hex("data", a.data)
        }),
        0x8d => at.fields(|a: abi::HwptInvalidate, f| {
            f.number("hwpt_id", a.hwpt_id)
                .hex("data_uptr", a.data_uptr)
                .number("data_type", a.data_type)
                .number("entry_len", a.entry_len)
                .number("entry_num", a.entry_num)
        }),
        0x8e => at.fields(|a: abi::FaultQueueAlloc, f| {
            f.hex("flags", a.flags)
                .number("out_fault_id", a.out_fault_id)
                .number("out_fault_fd", a.out_fault_fd)
        }),
        0x8f => at.fields(|a: abi::IoasMapFile, f| {
            f.flags("flags", a.flags, MAP_FLAGS)
                .number("ioas_id", a.ioas_id)
                .number("fd", a.fd)
                .hex("start", a.start)
                .hex("length", a.length)
                .hex("iova", a.iova)
        }),
        0x90 => at.fields(|a: abi::ViommuAlloc, f| {
            f.hex("flags", a.flags)
                .name("type", a.kind.into(), VIOMMU_TYPES)
                .number("dev_id", a.dev_id)
                .number("hwpt_id", a.hwpt_id)
                .number("out_viommu_id", a.out_viommu_id)
                .number("data_len", a.data_len)
                .hex("data_uptr", a.data_uptr)
        }),
        0x91 => at.fields(|a: abi::VdeviceAlloc, f| {
            f.number("viommu_id", a.viommu_id)
                .number("dev_id", a.dev_id)
                .number("out_vdevice_id", a.out_vdevice_id)
                .hex("virt_id", a.virt_id)
        }),
        0x92 => at.fields(|_: abi::IoasChangeProcess, f| f),
        0x93 => at.fields(|a: abi::VeventqAlloc, f| {
            f.hex("flags", a.flags)
                .number("viommu_id", a.viommu_id)
                .name("type", a.kind.into(), VIOMMU_TYPES)
                .number("veventq_depth", a.veventq_depth)
                .number("out_veventq_id", a.out_veventq_id)
                .number("out_veventq_fd", a.out_veventq_fd)
        }),
        0x94 => at.fields(|a: abi::HwQueueAlloc, f| {
            f.hex("flags", a.flags)
                .number("viommu_id", a.viommu_id)
                .number("type", a.kind)
                .number("index", a.index)
                .number("out_hw_queue_id", a.out_hw_queue_id)
                .hex("nesting_parent_iova", a.nesting_parent_iova)
                .hex("length", a.length)
        }),
        0x95 => at.fields(|a: abi::IoasNoiommuGetPa, f| {
            f.number("ioas_id", a.ioas_id)
                .hex("iova", a.iova)
                .hex("length", a.length)
                .hex("out_phys", a.out_phys)
        }),
        0xa0 => {
            at.fields(|a: TestCmd, f| f.name("op", a.op.into(), TEST_OPERATIONS).number("id", a.id))
        }
        _ => None,
    };
    fields.or_else(|| describe_container(command, argument, client))
}

/// The ioctls of VFIO's containers.
fn describe_container(command: u32, argument: u64, client: &dyn Client) -> Option<String> {
    let fields = Fields::default();
    match command {
        type1::GET_API_VERSION => Some("VFIO_GET_API_VERSION".to_owned()),
        type1::CHECK_EXTENSION => Some(format!("VFIO_CHECK_EXTENSION, {}", extension(argument))),
        type1::SET_IOMMU => Some(format!("VFIO_SET_IOMMU, {}", extension(argument))),
        type1::IOMMU_GET_INFO => {
            let head: [u32; 4] = read_value(client, argument).ok()?;
            let [argsz, ..] = head;
            let room = size_of::<type1::Info>().min(argsz as usize);
            let info: type1::Info = read_prefix(client, argument, room)?;
            let fields = fields
                .number("argsz", info.argsz)
                .flags("flags", info.flags, &["PGSIZES", "CAPS"])
                .hex("iova_pgsizes", info.iova_pgsizes)
                .number("cap_offset", info.cap_offset);
            Some(fields.close("VFIO_IOMMU_GET_INFO"))
        }
        type1::IOMMU_MAP_DMA => {
            let map: type1::DmaMap = read_value(client, argument).ok()?;
            let fields = fields
                .number("argsz", map.argsz)
                .flags("flags", map.flags, &["READ", "WRITE", "VADDR"])
                .hex("vaddr", map.vaddr)
                .hex("iova", map.iova)
                .hex("size", map.size);
            Some(fields.close("VFIO_IOMMU_MAP_DMA"))
        }
        type1::IOMMU_UNMAP_DMA => {
            let unmap: type1::DmaUnmap = read_value(client, argument).ok()?;
            let fields = fields
                .number("argsz", unmap.argsz)
                .flags("flags", unmap.flags, &["GET_DIRTY_BITMAP", "ALL", "VADDR"])
                .hex("iova", unmap.iova)
                .hex("size", unmap.size);
            Some(fields.close("VFIO_IOMMU_UNMAP_DMA"))
        }
        type1::IOMMU_DIRTY_PAGES => Some("VFIO_IOMMU_DIRTY_PAGES".to_owned()),
        _ => None,
    }
}

const MAP_FLAGS: &[&str] = &["FIXED_IOVA", "WRITEABLE", "READABLE"];
/// `IOMMU_HWPT_DATA_*`.
const HWPT_DATA_TYPES: &[&str] = &["NONE", "VTD_S1", "ARM_SMMUV3", "AMD_GUEST"];
/// `IOMMU_HW_INFO_TYPE_*`.
const HW_INFO_TYPES: &[&str] = &["NONE", "INTEL_VTD", "ARM_SMMUV3", "TEGRA241_CMDQV", "AMD"];
/// `IOMMU_VIOMMU_TYPE_*`; those of queues and events are numbered alike.
const VIOMMU_TYPES: &[&str] = &["DEFAULT", "ARM_SMMUV3", "TEGRA241_CMDQV"];
const HWPT_FLAGS: &[&str] = &["NEST_PARENT", "DIRTY_TRACKING", "FAULT_ID_VALID", "PASID"];

/// `IOMMU_TEST_OP_*`, which count from 1.
const TEST_OPERATIONS: &[&str] = &[
    "0",
    "ADD_RESERVED",
    "MOCK_DOMAIN",
    "MD_CHECK_MAP",
    "MD_CHECK_REFS",
    "CREATE_ACCESS",
    "DESTROY_ACCESS_PAGES",
    "ACCESS_PAGES",
    "ACCESS_RW",
    "SET_TEMP_MEMORY_LIMIT",
    "MOCK_DOMAIN_REPLACE",
    "ACCESS_REPLACE_IOAS",
    "MOCK_DOMAIN_FLAGS",
    "DIRTY",
    "MD_CHECK_IOTLB",
    "TRIGGER_IOPF",
    "DEV_CHECK_CACHE",
    "TRIGGER_VEVENT",
    "PASID_ATTACH",
    "PASID_REPLACE",
    "PASID_DETACH",
    "PASID_CHECK_HWPT",
    "DMABUF_GET",
    "DMABUF_REVOKE",
];

/// Ranges that are shown of an array.
const SHOWN_RANGES: u32 = 8;

fn extension(number: u64) -> String {
    let name = match number {
        type1::TYPE1_IOMMU => "VFIO_TYPE1_IOMMU",
        2 => "VFIO_SPAPR_TCE_IOMMU",
        type1::TYPE1V2_IOMMU => "VFIO_TYPE1v2_IOMMU",
        type1::DMA_CC_IOMMU => "VFIO_DMA_CC_IOMMU",
        5 => "VFIO_EEH",
        6 => "VFIO_TYPE1_NESTING_IOMMU",
        7 => "VFIO_SPAPR_TCE_v2_IOMMU",
        8 => "VFIO_NOIOMMU_IOMMU",
        type1::UNMAP_ALL => "VFIO_UNMAP_ALL",
        10 => "VFIO_UPDATE_VADDR",
        _ => return format!("{number}"),
    };
    name.to_owned()
}

struct Source<'a> {
    command: u32,
    argument: u64,
    client: &'a dyn Client,
}

impl Source<'_> {
    /// The text of structure `A`, whose members `show` adds, if the command is that of `A`.
    fn fields<A: Argument>(&self, show: impl FnOnce(A, Fields) -> Fields) -> Option<String> {
        if self.command != A::COMMAND {
            return None;
        }
        let size: u32 = read_value(self.client, self.argument).ok()?;
        let known = size_of::<A>().min(size as usize);
        let argument = read_prefix(self.client, self.argument, known)?;
        Some(show(argument, Fields::default()).close(A::NAME))
    }
}

/// The first `len` bytes of a structure, zero behind them.
fn read_prefix<T: FromBytes + IntoBytes>(client: &dyn Client, at: u64, len: usize) -> Option<T> {
    let mut value = T::new_zeroed();
    read(client, at, value.as_mut_bytes().get_mut(..len)?).ok()?;
    Some(value)
}

/// `name=value` pairs.
#[derive(Default)]
struct Fields(String);

impl Fields {
    fn add(mut self, name: &str, value: impl Display) -> Self {
        let comma = if self.0.is_empty() { "" } else { ", " };
        // Writing to a string cannot fail.
        let _ = write!(self.0, "{comma}{name}={value}");
        self
    }

    fn number(self, name: &str, value: impl Display) -> Self {
        self.add(name, value)
    }

    fn hex(self, name: &str, value: impl Into<u64>) -> Self {
        match value.into() {
            0 => self.add(name, 0),
            value => self.add(name, format_args!("{value:#x}")),
        }
    }

    /// One of `names`, counted from 0.
    fn name(self, name: &str, value: u64, names: &[&str]) -> Self {
        match usize::try_from(value).ok().and_then(|index| names.get(index)) {
            Some(known) => self.add(name, known),
            None => self.add(name, value),
        }
    }

    /// Bits, named from bit 0 on.
    fn flags(self, name: &str, value: u32, names: &[&str]) -> Self {
        let mut rest = value;
        let mut text = String::new();
        for (bit, known) in names.iter().enumerate() {
            if value & 1 << bit != 0 {
                rest &= !(1 << bit);
                text += if text.is_empty() { "" } else { "|" };
                text += known;
            }
        }
        if rest != 0 || value == 0 {
            text += if text.is_empty() { "" } else { "|" };
            text += &if rest == 0 { "0".to_owned() } else { format!("{rest:#x}") };
        }
        self.add(name, text)
    }

    /// An array of ranges in the caller's memory, its first ones.
    fn ranges(self, name: &str, client: &dyn Client, at: u64, count: u32) -> Self {
        let mut text = String::new();
        for index in 0..count.min(SHOWN_RANGES) {
            let offset = u64::from(index) * size_of::<abi::IovaRange>() as u64;
            let range = at.checked_add(offset).map(|at| read_value(client, at));
            let Some(Ok(abi::IovaRange { start, last })) = range else {
                return self.hex(name, at);
            };
            text += if index == 0 { "" } else { ", " };
            text += &format!("{start:#x}..={last:#x}");
        }
        let more = if count > SHOWN_RANGES { ", ..." } else { "" };
        self.add(name, format_args!("[{text}{more}]"))
    }

    fn close(self, name: &str) -> String {
        format!("{name}, {{{}}}", self.0)
    }
}
