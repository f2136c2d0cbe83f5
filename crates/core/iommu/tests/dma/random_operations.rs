//! Random buffers, strictly and lazily unmapped, in one space that is nearly too small.

use std::sync::Arc;

use crate::fake::{FakeDomain, PAGE};
use lychgate_iommu::PagingDomain;
use lychgate_iommu::dma::{DmaCache, DmaError, DmaSegment, DmaSpace, LazyDma, Reach};
use lychgate_iommu::iova::{AllocError, FlushClock, Limits};
use lychgate_types::{Iova, PhysAddr, PhysRun, Prot, StdLocks};
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Op {
    Map { lazily: bool, start: u64, len: u64, bits: u32 },
    MapList { lazily: bool, buffers: Vec<(u64, u64)>, max_segment: u64 },
    Unmap { which: usize },
    Poll,
    FailMaps(Option<usize>),
}

fn op() -> impl Strategy<Value = Op> {
    let start = || 0..0x8000_u64;
    let len = || prop_oneof![1..0x1000_u64, 1..0x9000_u64];
    let bits = prop_oneof![Just(64_u32), Just(18), Just(32)];
    let buffers = prop::collection::vec((start(), len()), 1..6);
    let max_segment = prop_oneof![Just(u64::MAX), Just(0x2000)];
    prop_oneof![
        6 => (any::<bool>(), start(), len(), bits)
            .prop_map(|(lazily, start, len, bits)| Op::Map { lazily, start, len, bits }),
        3 => (any::<bool>(), buffers, max_segment)
            .prop_map(|(lazily, buffers, max_segment)| Op::MapList { lazily, buffers, max_segment }),
        8 => any::<usize>().prop_map(|which| Op::Unmap { which }),
        1 => Just(Op::Poll),
        1 => prop::option::of(0..3_usize).prop_map(Op::FailMaps),
    ]
}

/// What a device was told, and what it shall find there.
struct Mapped {
    lazily: bool,
    buffers: Vec<PhysRun>,
    segments: Vec<DmaSegment>,
}

/// Byte by byte at the ends of pages, that the device finds the buffers.
fn check(domain: &FakeDomain, mapped: &Mapped) {
    let iovas = mapped
        .segments
        .iter()
        .flat_map(|segment| (segment.iova.get()..segment.iova.get() + segment.len).map(Iova::new));
    let bytes = mapped.buffers.iter().flat_map(|buffer| {
        (buffer.start.get()..buffer.start.get() + buffer.len).map(PhysAddr::new)
    });
    let mut count = 0;
    for (iova, phys) in iovas.zip(bytes) {
        if iova.get() % PAGE < 2 || iova.get() % PAGE > PAGE - 3 {
            assert_eq!(domain.iova_to_phys(iova), Some(phys));
        }
        count += 1;
    }
    assert_eq!(count, mapped.buffers.iter().map(|buffer| buffer.len).sum::<u64>());
}

proptest! {
    #[test]
    fn devices_find_what_was_mapped_and_nothing_stale(ops in prop::collection::vec(op(), 1..80)) {
        let domain = Arc::new(FakeDomain::new(128 * PAGE - 1));
        let space = Arc::new(DmaSpace::new(Arc::clone(&domain), &[]).unwrap());
        let before = space.iovas().free_ranges();
        let clock: Arc<FlushClock<_, StdLocks>> = Arc::default();
        let mut strict = DmaCache::new(Arc::clone(&space));
        let mut lazy = LazyDma::new(Arc::clone(&space), clock, Limits { entries: 9, delay: 20 });
        let mut live: Vec<Mapped> = Vec::new();
        // The domain asserts that nothing is mapped where something is mapped or cached.
        for (now, op) in (0_u64..).zip(ops) {
            match op {
                Op::Map { lazily, start, len, bits } => {
                    let (phys, reach) = (PhysAddr::new(start), Reach::of_bits(bits));
                    let mapped = if lazily {
                        lazy.map_phys(phys, len, Prot::READ, reach)
                    } else {
                        strict.map_phys(phys, len, Prot::READ, reach)
                    };
                    match mapped {
                        Ok(iova) => {
                            prop_assert!(iova.get() + len - 1 <= reach.limit.get());
                            let buffers = vec![PhysRun { start: phys, len }];
                            let segments = vec![DmaSegment { iova, len }];
                            live.push(Mapped { lazily, buffers, segments });
                        }
                        Err(error) => prop_assert!(matches!(
                            error,
                            DmaError::Space(AllocError::NoSpace) | DmaError::Map(_)
                        )),
                    }
                }
                Op::MapList { lazily, buffers, max_segment } => {
                    let buffers: Vec<_> = buffers
                        .into_iter()
                        .map(|(start, len)| PhysRun { start: PhysAddr::new(start), len })
                        .collect();
                    let reach = Reach { max_segment, ..Reach::of_bits(64) };
                    let mut segments = vec![];
                    let mapped = if lazily {
                        lazy.map_sg(&buffers, Prot::READ, reach, &mut segments)
                    } else {
                        strict.map_sg(&buffers, Prot::READ, reach, &mut segments)
                    };
                    if mapped.is_ok() {
                        let longest = buffers.iter().map(|buffer| buffer.len).max().unwrap();
                        let most = max_segment.max(longest);
                        prop_assert!(segments.iter().all(|segment| segment.len <= most));
                        live.push(Mapped { lazily, buffers, segments });
                    } else {
                        prop_assert!(segments.is_empty());
                    }
                }
                Op::Unmap { which } => {
                    let count = live.len().max(1);
                    if let Some(mapped) = live.get(which % count) {
                        check(&domain, mapped);
                        let mapped = live.swap_remove(which % count);
                        let unmapped = if mapped.lazily {
                            lazy.unmap_sg(now, &mapped.segments)
                        } else {
                            strict.unmap_sg(&mapped.segments)
                        };
                        prop_assert_eq!(unmapped, Ok(()));
                    }
                }
                Op::Poll => prop_assert_eq!(lazy.poll(now), Ok(())),
                Op::FailMaps(left) => domain.state().maps_left = left,
            }
        }
        for mapped in &live {
            check(&domain, mapped);
            prop_assert_eq!(strict.unmap_sg(&mapped.segments), Ok(()));
        }
        prop_assert!(domain.state().pages.is_empty());
        drop((strict, lazy));
        space.iovas().trim();
        prop_assert_eq!(space.iovas().free_ranges(), before);
        let state = domain.state();
        prop_assert_eq!(state.dead, state.freed);
        prop_assert!(state.iotlb.is_empty());
    }
}
