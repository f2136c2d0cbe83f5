//! Whatever a program does in whatever order: no call panics, and when its files are closed nothing
//! stays pinned, allocated or attached (`World`'s end looks).

use lychgate_iommufd::abi::iommufd as linux;
use lychgate_iommufd::selftest::abi::{self, TestCmd, op};
use proptest::prelude::*;

use crate::common::{BASE, Mock, PAGE, World};

#[derive(Clone, Debug)]
enum Step {
    Ioas,
    Destroy {
        id: u32,
    },
    Map {
        ioas: u32,
        page: u64,
        pages: u64,
        at: u64,
    },
    Unmap {
        ioas: u32,
        at: u64,
        pages: u64,
    },
    Mock {
        pt: u32,
        flags: u32,
    },
    Hwpt {
        dev: u32,
        pt: u32,
        flags: u32,
        data: Option<u32>,
        fault: u32,
    },
    FaultQueue,
    Viommu {
        dev: u32,
        hwpt: u32,
    },
    Vdevice {
        viommu: u32,
        dev: u32,
        id: u64,
    },
    Veventq {
        viommu: u32,
    },
    HwQueue {
        viommu: u32,
        index: u32,
        at: u64,
    },
    Invalidate {
        id: u32,
        requests: Vec<u32>,
    },
    Track {
        hwpt: u32,
        enable: u32,
    },
    /// An operation of the selftest; `at` counts pages from the aperture's start.
    Test {
        op: u32,
        id: u32,
        words: [u32; 4],
        at: u64,
        pages: u64,
        page: u64,
    },
    Close {
        file: usize,
    },
}

/// Which of the objects of a kind that were made; now and then a number as it is.
fn id() -> impl Strategy<Value = u32> {
    prop_oneof![9 => 0_u32..8, 1 => 100_u32..120]
}

/// Numbers of what was made so far, some of it perhaps gone.
#[derive(Default)]
struct Made {
    ioases: Vec<u32>,
    mocks: Vec<Mock>,
    hwpts: Vec<u32>,
    faults: Vec<u32>,
    viommus: Vec<u32>,
    others: Vec<u32>,
    accesses: Vec<u32>,
    dma_bufs: Vec<u32>,
}

fn pick(from: &[u32], which: u32) -> u32 {
    match from.len() {
        0 => which,
        _ if which >= 100 => which - 100,
        len => from[which as usize % len],
    }
}

impl Made {
    fn idev(&self, which: u32) -> u32 {
        pick(&self.mocks.iter().map(|mock| mock.idev).collect::<Vec<_>>(), which)
    }

    fn stdev(&self, which: u32) -> u32 {
        pick(&self.mocks.iter().map(|mock| mock.stdev).collect::<Vec<_>>(), which)
    }

    /// Something to attach to, or to make a page table on.
    fn pt(&self, which: u32) -> u32 {
        pick(&[&self.ioases[..], &self.hwpts, &self.viommus].concat(), which)
    }

    fn any(&self, which: u32) -> u32 {
        let all = [&self.hwpts[..], &self.faults, &self.viommus, &self.others, &self.ioases];
        match which % 3 {
            0 => self.stdev(which / 3),
            _ => pick(&all.concat(), which),
        }
    }
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || 1_u64..4;
    let at = || 0_u64..12;
    prop_oneof![
        2 => Just(Step::Ioas),
        2 => id().prop_map(|id| Step::Destroy { id }),
        3 => (id(), 0_u64..16, pages(), at())
            .prop_map(|(ioas, page, pages, at)| Step::Map { ioas, page, pages, at }),
        1 => (id(), at(), pages()).prop_map(|(ioas, at, pages)| Step::Unmap { ioas, at, pages }),
        4 => (id(), 0_u32..6).prop_map(|(pt, flags)| Step::Mock { pt, flags }),
        3 => (id(), id(), 0_u32..16, prop::option::of(0_u32..3), id())
            .prop_map(|(dev, pt, flags, data, fault)| Step::Hwpt { dev, pt, flags, data, fault }),
        1 => Just(Step::FaultQueue),
        2 => (id(), id()).prop_map(|(dev, hwpt)| Step::Viommu { dev, hwpt }),
        2 => (id(), id(), 0_u64..3)
            .prop_map(|(viommu, dev, id)| Step::Vdevice { viommu, dev, id }),
        1 => id().prop_map(|viommu| Step::Veventq { viommu }),
        1 => (id(), 0_u32..3, at())
            .prop_map(|(viommu, index, at)| Step::HwQueue { viommu, index, at }),
        1 => (id(), prop::collection::vec(0_u32..5, 0..8))
            .prop_map(|(id, requests)| Step::Invalidate { id, requests }),
        1 => (id(), 0_u32..2).prop_map(|(hwpt, enable)| Step::Track { hwpt, enable }),
        12 => (1_u32..=24, id(), [id(), id(), id(), id()], at(), pages(), 0_u64..16)
            .prop_map(|(op, id, words, at, pages, page)| {
                Step::Test { op, id, words, at, pages, page }
            }),
        1 => (0_usize..6).prop_map(|file| Step::Close { file }),
    ]
}

const IOVA: u64 = abi::APERTURE_START;

/// A world in which steps are taken.
struct Run {
    world: World,
    made: Made,
}

impl Run {
    /// Takes a step. What it answers depends on all before; that it answers is what counts.
    fn step(&mut self, step: &Step) {
        let (world, made) = (&self.world, &mut self.made);
        match *step {
            Step::Ioas => made.ioases.extend(world.ioas_or().ok()),
            Step::Destroy { id } => drop(world.destroy(made.any(id))),
            Step::Map { ioas, page, pages, at } => {
                let ioas = pick(&made.ioases, ioas);
                let _ = world.map(ioas, BASE + page * PAGE, pages * PAGE, IOVA + at * PAGE);
            }
            Step::Unmap { ioas, at, pages } => {
                let _ = world.unmap(pick(&made.ioases, ioas), IOVA + at * PAGE, pages * PAGE);
            }
            Step::Mock { pt, flags } => made.mocks.extend(world.mock(made.pt(pt), flags).ok()),
            Step::Hwpt { dev, pt, flags, data, fault } => {
                let data_uptr =
                    world.put(&abi::HwptData { iotlb: 1, pagetable_type: data.unwrap_or(0) });
                let alloc = linux::HwptAlloc {
                    flags,
                    dev_id: made.idev(dev),
                    pt_id: made.pt(pt),
                    data_type: data.map_or(0, |_| abi::HWPT_DATA),
                    data_len: data.map_or(0, |_| 8),
                    data_uptr,
                    fault_id: pick(&made.faults, fault),
                    ..Default::default()
                };
                made.hwpts.extend(world.call(alloc).map(|(alloc, _)| alloc.out_hwpt_id).ok());
            }
            Step::FaultQueue => {
                let made_one = world.call(linux::FaultQueueAlloc::default());
                made.faults.extend(made_one.map(|(alloc, _)| alloc.out_fault_id).ok());
            }
            Step::Viommu { dev, hwpt } => {
                let alloc = linux::ViommuAlloc {
                    kind: abi::VIOMMU_TYPE,
                    dev_id: made.idev(dev),
                    hwpt_id: pick(&made.hwpts, hwpt),
                    ..Default::default()
                };
                made.viommus.extend(world.call(alloc).map(|(alloc, _)| alloc.out_viommu_id).ok());
            }
            Step::Vdevice { viommu, dev, id } => {
                let alloc = linux::VdeviceAlloc {
                    viommu_id: pick(&made.viommus, viommu),
                    dev_id: made.idev(dev),
                    virt_id: id,
                    ..Default::default()
                };
                made.others.extend(world.call(alloc).map(|(alloc, _)| alloc.out_vdevice_id).ok());
            }
            Step::Veventq { viommu } => {
                let alloc = linux::VeventqAlloc {
                    viommu_id: pick(&made.viommus, viommu),
                    kind: abi::VEVENTQ_TYPE,
                    veventq_depth: 1,
                    ..Default::default()
                };
                made.others.extend(world.call(alloc).map(|(alloc, _)| alloc.out_veventq_id).ok());
            }
            Step::HwQueue { viommu, index, at } => {
                let alloc = linux::HwQueueAlloc {
                    viommu_id: pick(&made.viommus, viommu),
                    kind: abi::HW_QUEUE_TYPE,
                    index,
                    nesting_parent_iova: IOVA + at * PAGE,
                    length: PAGE,
                    ..Default::default()
                };
                made.others.extend(world.call(alloc).map(|(alloc, _)| alloc.out_hw_queue_id).ok());
            }
            Step::Invalidate { id, ref requests } => {
                let (hwpt, viommu) = (pick(&made.hwpts, id), pick(&made.viommus, id));
                let _ = world.invalidate(hwpt, requests, 8, abi::HWPT_INVALIDATE_DATA);
                let _ = world.invalidate(viommu, requests, 12, abi::VIOMMU_INVALIDATE_DATA);
            }
            Step::Track { hwpt, enable } => {
                let set = linux::HwptSetDirtyTracking {
                    hwpt_id: pick(&made.hwpts, hwpt),
                    flags: enable,
                    ..Default::default()
                };
                let _ = world.call(set);
            }
            Step::Test { op, id, words, at, pages, page } => {
                self.test(op, id, words, (at, pages, page));
            }
            Step::Close { file } => world.process.close_nth(file),
        }
    }

    /// Any operation of the selftest, mostly on something that it can be done to.
    fn test(&mut self, op: u32, id: u32, words: [u32; 4], (at, pages, page): (u64, u64, u64)) {
        let made = &mut self.made;
        let (iova, len, uptr) = (IOVA + at * PAGE, pages * PAGE, BASE + page * PAGE);
        let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
        let [a, b, c, d] = words;
        let (id, union) = match op {
            op::ADD_RESERVED => (pick(&made.ioases, id), [iova + (16 << 20), len, 0, 0, 0, 0]),
            op::MOCK_DOMAIN | op::MOCK_DOMAIN_FLAGS => {
                (made.pt(id), [0, pair(0, a % 8), 0, 0, 0, 0])
            }
            op::MOCK_DOMAIN_REPLACE => (made.stdev(id), [pair(made.pt(a), 0), 0, 0, 0, 0, 0]),
            op::MD_CHECK_MAP => (pick(&made.hwpts, id), [iova, len, uptr, 0, 0, 0]),
            op::MD_CHECK_REFS => (0, [len, uptr, u64::from(a), 0, 0, 0]),
            op::MD_CHECK_IOTLB => (pick(&made.hwpts, id), [pair(a, b % 2), 0, 0, 0, 0, 0]),
            op::CREATE_ACCESS => (pick(&made.ioases, id), [pair(0, a % 2), 0, 0, 0, 0, 0]),
            op::DESTROY_ACCESS_PAGES => (pick(&made.accesses, id), [pair(a, 0), 0, 0, 0, 0, 0]),
            op::ACCESS_PAGES => {
                let compared = if b < 6 { 0 } else { uptr };
                (pick(&made.accesses, id), [u64::from(a % 2), iova, len, compared, 0, 0])
            }
            op::ACCESS_RW => (pick(&made.accesses, id), [iova, len, uptr, u64::from(a % 6), 0, 0]),
            op::ACCESS_REPLACE_IOAS => {
                (pick(&made.accesses, id), [pair(pick(&made.ioases, a), 0), 0, 0, 0, 0, 0])
            }
            op::DIRTY => (pick(&made.hwpts, id), [0, iova, len, 2048, uptr, 0]),
            op::TRIGGER_IOPF => (0, [pair(made.idev(a), b % 4), pair(c, d), at, 0, 0, 0]),
            op::DEV_CHECK_CACHE => (made.idev(id), [pair(a, b), 0, 0, 0, 0, 0]),
            op::TRIGGER_VEVENT => (0, [pair(made.idev(a), 0), 0, 0, 0, 0, 0]),
            op::PASID_ATTACH | op::PASID_REPLACE => {
                (made.stdev(id), [pair(a % 4, made.pt(b)), 0, 0, 0, 0, 0])
            }
            op::PASID_DETACH => (made.stdev(id), [pair(a % 4, 0), 0, 0, 0, 0, 0]),
            op::PASID_CHECK_HWPT => {
                (made.stdev(id), [pair(a % 4, pick(&made.hwpts, b)), 0, 0, 0, 0, 0])
            }
            op::DMABUF_GET => (0, [pair(a * 4096, 0), 0, 0, 0, 0, 0]),
            op::DMABUF_REVOKE => (0, [pair(pick(&made.dma_bufs, a), b % 2), 0, 0, 0, 0, 0]),
            _ => (id, [pair(a, b), pair(c, d), at, 0, 0, 0]),
        };
        let Ok((after, value)) = self.world.call(TestCmd { op, id, union, ..Default::default() })
        else {
            return;
        };
        let [first, second, ..] = after.union;
        let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap();
        match op {
            op::MOCK_DOMAIN | op::MOCK_DOMAIN_FLAGS => {
                let (stdev, hwpt, idev) = (low(first), low(first >> 32), low(second));
                made.mocks.push(Mock { stdev, hwpt, idev });
            }
            op::CREATE_ACCESS => made.accesses.push(low(first)),
            op::DMABUF_GET => made.dma_bufs.extend(u32::try_from(value)),
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn nothing_is_left_of_any_sequence_of_calls(steps in prop::collection::vec(step(), 1..80)) {
        let mut run = Run { world: World::new(), made: Made::default() };
        // A start that most of what follows can build on: an IOAS and a device with everything.
        let ioas = run.world.ioas();
        let mock = run.world.mock(ioas, abi::DEVICE_PASID).unwrap();
        let flags = linux::HWPT_ALLOC_NEST_PARENT;
        run.made.hwpts.push(run.world.hwpt(mock.idev, ioas, flags).unwrap());
        run.made.ioases.push(ioas);
        run.made.mocks.push(mock);
        steps.iter().for_each(|step| run.step(step));
        while run.world.process.is_open() {
            run.world.process.close_nth(0);
        }
    }
}
