//! Sizes, tails and numbers of structures.

use std::collections::BTreeMap;

use crate::common::{PAGE, SCRATCH, VA, World};
use iommufd_bindings as linux;
use lychgate_iommufd::OpenFile;
use lychgate_iommufd::abi::{Argument, iommufd as abi};
use lychgate_types::Errno;
use proptest::prelude::*;

#[test]
fn structures_are_laid_out_as_in_linux() {
    macro_rules! same {
        ($($ours:ident = $theirs:ident, $nr:ident { $($field:ident = $their_field:ident),* };)*) => {$(
            assert_eq!(size_of::<abi::$ours>(), size_of::<linux::$theirs>());
            assert_eq!(abi::$ours::COMMAND, 0x3b00 | linux::$nr);
            $(assert_eq!(
                std::mem::offset_of!(abi::$ours, $field),
                std::mem::offset_of!(linux::$theirs, $their_field)
            );)*
        )*};
    }
    same! {
        Destroy = iommu_destroy, IOMMUFD_CMD_DESTROY { id = id };
        IoasAlloc = iommu_ioas_alloc, IOMMUFD_CMD_IOAS_ALLOC { out_ioas_id = out_ioas_id };
        IoasAllowIovas = iommu_ioas_allow_iovas, IOMMUFD_CMD_IOAS_ALLOW_IOVAS {
            num_iovas = num_iovas, allowed_iovas = allowed_iovas
        };
        IoasCopy = iommu_ioas_copy, IOMMUFD_CMD_IOAS_COPY {
            dst_ioas_id = dst_ioas_id, src_ioas_id = src_ioas_id, dst_iova = dst_iova
        };
        IoasIovaRanges = iommu_ioas_iova_ranges, IOMMUFD_CMD_IOAS_IOVA_RANGES {
            num_iovas = num_iovas, out_iova_alignment = out_iova_alignment
        };
        IoasMap = iommu_ioas_map, IOMMUFD_CMD_IOAS_MAP {
            flags = flags, ioas_id = ioas_id, user_va = user_va, length = length, iova = iova
        };
        IoasUnmap = iommu_ioas_unmap, IOMMUFD_CMD_IOAS_UNMAP { iova = iova, length = length };
        Option = iommu_option, IOMMUFD_CMD_OPTION { op = op, object_id = object_id, val64 = val64 };
        VfioIoas = iommu_vfio_ioas, IOMMUFD_CMD_VFIO_IOAS { ioas_id = ioas_id, op = op };
        HwptAlloc = iommu_hwpt_alloc, IOMMUFD_CMD_HWPT_ALLOC {
            dev_id = dev_id, out_hwpt_id = out_hwpt_id, data_uptr = data_uptr, fault_id = fault_id
        };
        HwInfo = iommu_hw_info, IOMMUFD_CMD_GET_HW_INFO {
            data_uptr = data_uptr, data_type = __bindgen_anon_1,
            out_max_pasid_log2 = out_max_pasid_log2, out_capabilities = out_capabilities
        };
        HwptSetDirtyTracking = iommu_hwpt_set_dirty_tracking,
            IOMMUFD_CMD_HWPT_SET_DIRTY_TRACKING { hwpt_id = hwpt_id };
        HwptGetDirtyBitmap = iommu_hwpt_get_dirty_bitmap,
            IOMMUFD_CMD_HWPT_GET_DIRTY_BITMAP { page_size = page_size, data = data };
        HwptInvalidate = iommu_hwpt_invalidate, IOMMUFD_CMD_HWPT_INVALIDATE {
            data_uptr = data_uptr, entry_num = entry_num
        };
        FaultQueueAlloc = iommu_fault_alloc, IOMMUFD_CMD_FAULT_QUEUE_ALLOC {
            out_fault_fd = out_fault_fd
        };
        IoasMapFile = iommu_ioas_map_file, IOMMUFD_CMD_IOAS_MAP_FILE { fd = fd, start = start };
        ViommuAlloc = iommu_viommu_alloc, IOMMUFD_CMD_VIOMMU_ALLOC {
            out_viommu_id = out_viommu_id, data_uptr = data_uptr
        };
        VdeviceAlloc = iommu_vdevice_alloc, IOMMUFD_CMD_VDEVICE_ALLOC { virt_id = virt_id };
        IoasChangeProcess = iommu_ioas_change_process, IOMMUFD_CMD_IOAS_CHANGE_PROCESS {};
        VeventqAlloc = iommu_veventq_alloc, IOMMUFD_CMD_VEVENTQ_ALLOC {
            out_veventq_fd = out_veventq_fd
        };
        HwQueueAlloc = iommu_hw_queue_alloc, IOMMUFD_CMD_HW_QUEUE_ALLOC {
            nesting_parent_iova = nesting_parent_iova
        };
    }
    assert_eq!(size_of::<abi::IoasNoiommuGetPa>(), 40);
    assert_eq!(size_of::<abi::IovaRange>(), size_of::<linux::iommu_iova_range>());
}

#[test]
fn sizes_are_checked_before_anything_else() {
    fn check<A: Argument>() {
        let world = World::new();
        let put =
            |size: usize| world.client.put(SCRATCH, &u32::try_from(size).unwrap().to_le_bytes());
        let call = || world.raw(A::COMMAND, SCRATCH);
        assert_eq!(world.raw(A::COMMAND, 0), Err(Errno::EFAULT));
        assert_eq!(world.raw(A::COMMAND | 1 << 30, SCRATCH), Err(Errno::ENOTTY));
        put(A::MIN_SIZE - 1);
        assert_eq!(call(), Err(Errno::EINVAL), "{}", A::NAME);
        put(size_of::<A>() + 700);
        world.client.put(SCRATCH + size_of::<A>() as u64 + 699, &[1]);
        assert_eq!(call(), Err(Errno::E2BIG), "{}", A::NAME);
        world.client.put(SCRATCH + size_of::<A>() as u64 + 699, &[0]);
        let longer = call();
        put(size_of::<A>());
        assert_eq!(longer, call(), "{}", A::NAME);
        put(1 << 30);
        assert_eq!(call(), Err(Errno::EFAULT), "{}", A::NAME);
    }
    check::<abi::Destroy>();
    check::<abi::IoasAllowIovas>();
    check::<abi::IoasCopy>();
    check::<abi::IoasIovaRanges>();
    check::<abi::IoasMap>();
    check::<abi::IoasUnmap>();
    check::<abi::Option>();
    check::<abi::VfioIoas>();
    check::<abi::HwptAlloc>();
    check::<abi::HwInfo>();
    check::<abi::HwptSetDirtyTracking>();
    check::<abi::HwptGetDirtyBitmap>();
    check::<abi::HwptInvalidate>();
    check::<abi::FaultQueueAlloc>();
    check::<abi::IoasMapFile>();
    check::<abi::ViommuAlloc>();
    check::<abi::VdeviceAlloc>();
    check::<abi::IoasChangeProcess>();
    check::<abi::VeventqAlloc>();
    check::<abi::HwQueueAlloc>();
    check::<abi::IoasNoiommuGetPa>();
}

#[test]
fn a_short_structure_is_extended_with_zeros_and_answered_in_part() {
    let world = World::new();
    let device = world.device(0x100);
    let bound = world.reference().bind(device).unwrap();
    let ioas = world.ioas();
    let alloc = abi::HwptAlloc {
        size: 24,
        dev_id: bound.id(),
        pt_id: ioas,
        data_type: 7,
        data_len: 7,
        ..Default::default()
    };
    world.client.put(SCRATCH, zerocopy::IntoBytes::as_bytes(&alloc));
    assert_eq!(world.raw(abi::HwptAlloc::COMMAND, SCRATCH), Ok(0));
    assert_eq!(world.client.get(SCRATCH + 16, 4), [3, 0, 0, 0]);
    assert_eq!(world.client.get(SCRATCH + 24, 4), [7, 0, 0, 0], "not touched");
}

#[test]
fn other_numbers_are_not_known() {
    let world = World::new();
    for command in [0x3b7f, 0x3b96, 0x3ba0, 0x3b75, 0, u32::MAX, 0x3aff] {
        assert_eq!(world.raw(command, SCRATCH), Err(Errno::ENOTTY), "{command:#x}");
    }
    assert_eq!(world.context.name(), "/dev/iommu");
    assert_eq!(world.context.device_number(), Some((10, 127)));
}

#[test]
fn an_object_shows_only_after_its_number_was_told() {
    let world = World::new();
    *world.client.read_only_from.lock().unwrap() = 0;
    assert_eq!(world.call(abi::IoasAlloc::default()), Err(Errno::EFAULT));
    *world.client.read_only_from.lock().unwrap() = u64::MAX;
    assert_eq!(world.destroy(1), Err(Errno::ENOENT));
    assert_eq!(world.ioas(), 1, "the number is free again");
}

#[test]
fn the_lowest_free_number_is_given_out() {
    let world = World::new();
    assert_eq!([world.ioas(), world.ioas(), world.ioas()], [1, 2, 3]);
    world.destroy(2).unwrap();
    world.destroy(1).unwrap();
    assert_eq!([world.ioas(), world.ioas(), world.ioas()], [1, 2, 4]);
    assert_eq!(world.destroy(0), Err(Errno::ENOENT));
    assert_eq!(world.destroy(u32::MAX), Err(Errno::ENOENT));
}

proptest! {
    /// Structures of small random numbers reach deep; none of them panics, and no page stays pinned.
    #[test]
    fn random_structures_never_panic(
        calls in prop::collection::vec(
            (0x60_u32..0xa2, any::<bool>(), prop::collection::vec(value(), 12)), 1..40
        )
    ) {
        let world = World::new();
        let device = world.device(0x100);
        let bound = world.reference().bind(device).unwrap();
        let ioas = world.ioas();
        let _ = bound.attach(ioas);
        world.reference().create_compat_ioas().unwrap();
        for (nr, exact, words) in calls {
            let sizes = BTreeMap::from([(0x80, 8), (0x81, 12), (0x82, 24), (0x84, 32), (0x86, 24),
                (0x87, 24), (0x88, 12), (0x89, 48), (0x8b, 16), (0x8c, 48), (0x8d, 32),
                (0x8e, 16), (0x91, 24), (0x92, 8), (0x93, 32)]);
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            world.client.put(SCRATCH, &bytes);
            if exact {
                let size = sizes.get(&nr).copied().unwrap_or(40_u32);
                world.client.put(SCRATCH, &size.to_le_bytes());
            }
            let _ = world.raw(0x3b00 | nr, SCRATCH);
            let _ = lychgate_iommufd::trace::describe(0x3b00 | nr, SCRATCH, &world.client);
        }
        drop(bound);
        world.context.release();
        prop_assert_eq!(world.client.mm.pinned(), 0);
    }
}

/// 64 bits that are often flags, numbers of objects, addresses or lengths.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        (0_u64..8, 0_u64..5).prop_map(|(low, high)| low | high << 32),
        (0_u64..16).prop_map(|page| page * PAGE),
        (0_u64..16).prop_map(|page| VA + page * PAGE),
        Just(SCRATCH + 0x800),
        Just(u64::MAX),
        any::<u64>(),
    ]
}
