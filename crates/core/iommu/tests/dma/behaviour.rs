//! One behaviour at a time.

use std::sync::Arc;

use crate::fake::{Dead, FakeDomain, PAGE};
use lychgate_iommu::dma::{
    DmaCache, DmaError, DmaSegment, DmaSpace, DmaSpaceError, LazyDma, Reach,
};
use lychgate_iommu::iova::{AllocError, FlushClock, Limits};
use lychgate_iommu::{MapError, PagingDomain, ReservedKind, ReservedRegion};
use lychgate_types::{Iova, PhysAddr, PhysRun, Prot, StdLocks};

type Space = DmaSpace<FakeDomain, StdLocks>;

const ANY: Reach = Reach::of_bits(64);

fn space(last: u64) -> Arc<Space> {
    Arc::new(Space::new(Arc::new(FakeDomain::new(last)), &[]).unwrap())
}

fn lazy(space: &Arc<Space>, limits: Limits) -> LazyDma<FakeDomain, StdLocks> {
    let clock: Arc<FlushClock<Dead, StdLocks>> = Arc::default();
    LazyDma::new(Arc::clone(space), clock, limits)
}

fn run(start: u64, len: u64) -> PhysRun {
    PhysRun { start: PhysAddr::new(start), len }
}

fn segment(iova: u64, len: u64) -> DmaSegment {
    DmaSegment { iova: Iova::new(iova), len }
}

#[test]
fn a_buffer_keeps_its_offset_and_takes_the_pages_that_it_touches() {
    let space = space((1 << 32) - 1);
    let mut dma = DmaCache::new(Arc::clone(&space));
    let at = dma.map_phys(PhysAddr::new(0x12fff), 2, Prot::READ, ANY).unwrap();
    assert_eq!(at, Iova::new(0xffff_efff));
    assert_eq!(space.domain().iova_to_phys(at), Some(PhysAddr::new(0x12fff)));
    let next = Iova::new(at.get() + 1);
    assert_eq!(space.domain().iova_to_phys(next), Some(PhysAddr::new(0x13000)));
    assert_eq!(space.domain().state().pages.len(), 2);
    dma.unmap_phys(at, 2).unwrap();
    assert_eq!(space.domain().state().pages.len(), 0);
}

#[test]
fn a_buffer_without_bytes_or_end_is_refused() {
    let mut dma = DmaCache::new(space((1 << 48) - 1));
    for len in [0, u64::MAX, u64::MAX - 0x17fe] {
        let mapped = dma.map_phys(PhysAddr::new(0x1800), len, Prot::READ, ANY);
        assert_eq!(mapped, Err(DmaError::Length));
        assert_eq!(dma.unmap_phys(Iova::new(0x1800), len), Err(DmaError::Length));
    }
    let everything = dma.map_phys(PhysAddr::new(0), u64::MAX, Prot::READ, ANY);
    assert_eq!(everything, Err(DmaError::Length));
    let mut to = vec![segment(0, 1)];
    assert_eq!(dma.map_sg(&[], Prot::READ, ANY, &mut to), Err(DmaError::Length));
    assert_eq!(to, []);
    let halves = [run(0, 1 << 63), run(0, 1 << 63)];
    assert_eq!(dma.map_sg(&halves, Prot::READ, ANY, &mut to), Err(DmaError::Length));
    assert_eq!(dma.unmap_sg(&[]), Err(DmaError::Length));
    assert_eq!(dma.unmap_sg(&[segment(0x2000, 1), segment(0x1000, 1)]), Err(DmaError::Length));
}

#[test]
fn a_failed_map_gives_the_iova_back() {
    let space = space(17 * PAGE - 1);
    let mut dma = DmaCache::new(Arc::clone(&space));
    space.domain().state().maps_left = Some(0);
    for _ in 0..100 {
        let mapped = dma.map_phys(PhysAddr::new(PAGE), 8 * PAGE, Prot::READ, ANY);
        assert_eq!(mapped, Err(DmaError::Map(MapError::OutOfMemory)));
        let mut to = vec![];
        let mapped = dma.map_sg(&[run(PAGE, 8 * PAGE)], Prot::READ, ANY, &mut to);
        assert_eq!(mapped, Err(DmaError::Map(MapError::OutOfMemory)));
    }
    space.domain().state().maps_left = None;
    assert!(dma.map_phys(PhysAddr::new(PAGE), 8 * PAGE, Prot::READ, ANY).is_ok());
    let full = dma.map_phys(PhysAddr::new(PAGE), 8 * PAGE, Prot::READ, ANY);
    assert_eq!(full, Err(DmaError::Space(AllocError::NoSpace)));
}

#[test]
fn what_is_not_mapped_is_not_unmapped_and_its_iova_not_given_again() {
    let space = space((1 << 32) - 1);
    let mut dma = DmaCache::new(Arc::clone(&space));
    let at = dma.map_phys(PhysAddr::new(PAGE), PAGE, Prot::READ, ANY).unwrap();
    dma.unmap_phys(at, PAGE).unwrap();
    assert_eq!(dma.unmap_phys(at, PAGE), Err(DmaError::NotUnmapped { bytes: 0 }));

    let at = dma.map_phys(PhysAddr::new(PAGE), PAGE, Prot::READ, ANY).unwrap();
    space.domain().state().stalled = true;
    assert_eq!(dma.unmap_phys(at, PAGE), Err(DmaError::NotUnmapped { bytes: 0 }));
    space.domain().state().stalled = false;
    let other = dma.map_phys(PhysAddr::new(PAGE), PAGE, Prot::READ, ANY).unwrap();
    assert_ne!(other, at);
}

#[test]
fn what_was_mapped_around_the_space_is_not_the_spaces() {
    let domain = Arc::new(FakeDomain::new((1 << 32) - 1));
    let direct = ReservedRegion {
        first: Iova::new(0x10_0000),
        last: Iova::new(0x10_ffff),
        prot: Prot::READ,
        kind: ReservedKind::Direct,
    };
    let space = Space::new(Arc::clone(&domain), &[direct]).unwrap();
    domain.map(direct.first, &[run(0x10_0000, 0x1_0000)], Prot::READ).unwrap();
    let mut dma = DmaCache::new(Arc::new(space));
    // In builds without debug assertions a range of a cached size is not looked up.
    let freed = dma.unmap_phys(direct.first, 0x1_0000);
    if cfg!(debug_assertions) {
        assert!(matches!(freed, Err(DmaError::Free(_))), "{freed:?}");
    }
}

#[test]
fn reserved_regions_are_left_alone_but_for_windows_of_software() {
    let region = |first, last, kind| ReservedRegion {
        first: Iova::new(first),
        last: Iova::new(last),
        prot: Prot::NONE,
        kind,
    };
    let regions = [
        region(0xfee0_0000, 0xfeef_ffff, ReservedKind::Msi),
        region(0x0800_0000, 0x080f_ffff, ReservedKind::SwMsi),
        region(0xffff_0000, u64::MAX, ReservedKind::Reserved),
    ];
    let domain = Arc::new(FakeDomain::new((1 << 40) - 1));
    let space = Space::new(Arc::clone(&domain), &regions).unwrap();
    let free = [0x1000..=0xfedf_ffff, 0xfef0_0000..=0xfffe_ffff_u64]
        .map(|range| Iova::new(*range.start())..=Iova::new(*range.end()));
    assert_eq!(space.iovas().free_ranges(), free);
    let backwards = region(0x2000, 0x1000, ReservedKind::Reserved);
    let refused = Space::new(domain, &[backwards]);
    assert!(matches!(refused, Err(DmaSpaceError::Reserved(_))));
    let nothing = Space::new(Arc::new(FakeDomain::new(0xfff)), &[]);
    assert!(matches!(nothing, Err(DmaSpaceError::Geometry(_))));
}

#[test]
fn below_4_gib_comes_first_until_it_is_full() {
    let domain = Arc::new(FakeDomain::new((1 << 40) - 1));
    let space = Arc::new(Space::new(domain, &[]).unwrap().below_4g_first());
    let keep_low = Iova::new(0x1000)..=Iova::new(0xffff_dfff);
    space.iovas().reserve(keep_low).unwrap();
    let mut dma = DmaCache::new(Arc::clone(&space));
    let mut map = || dma.map_phys(PhysAddr::new(0), PAGE, Prot::READ, ANY).unwrap().get();
    assert_eq!([map(), map()], [0xffff_f000, 0xffff_e000]);
    assert!(map() > u64::from(u32::MAX));
    let narrow = dma.map_phys(PhysAddr::new(0), PAGE, Prot::READ, Reach::of_bits(32));
    assert_eq!(narrow, Err(DmaError::Space(AllocError::NoSpace)));
    dma.unmap_phys(Iova::new(0xffff_f000), PAGE).unwrap();
    // As in Linux, it is not tried again for devices that reach further.
    let wide = dma.map_phys(PhysAddr::new(0), PAGE, Prot::READ, ANY).unwrap();
    assert!(wide.get() > u64::from(u32::MAX));
    let narrow = dma.map_phys(PhysAddr::new(0), PAGE, Prot::READ, Reach::of_bits(32));
    assert_eq!(narrow, Ok(Iova::new(0xffff_f000)));
}

#[test]
fn a_list_is_one_range_and_neighbours_become_one_segment() {
    let space = space((1 << 32) - 1);
    let mut dma = DmaCache::new(Arc::clone(&space));
    let mut to = vec![];
    let buffers = [
        run(0x1_0200, 0xe00),
        run(0x5_0000, 0x2000),
        run(0x3_0000, 0x123),
        run(0x9_0000, 0x1000),
        run(0x7_0fff, 2),
    ];
    dma.map_sg(&buffers, Prot::READ, ANY, &mut to).unwrap();
    let first = 0xffff_8000;
    assert_eq!(
        to,
        [
            segment(first + 0x200, 0x2f23),
            segment(first + 0x4000, 0x1000),
            segment(first + 0x5fff, 2),
        ]
    );
    let there = |iova| space.domain().iova_to_phys(Iova::new(iova)).map(PhysAddr::get);
    assert_eq!(there(first + 0x200), Some(0x1_0200));
    assert_eq!(there(first + 0x1000), Some(0x5_0000));
    assert_eq!(there(first + 0x3122), Some(0x3_0122));
    assert_eq!(there(first + 0x6000), Some(0x7_1000));
    assert_eq!(there(first + 0x7000), None);
    dma.unmap_sg(&to).unwrap();
    assert!(space.domain().state().pages.is_empty());
    drop(dma);
    assert_eq!(space.iovas().free_ranges().len(), 1);

    let mut dma = DmaCache::new(space);
    let short = Reach { max_segment: 0x1800, ..ANY };
    let buffers = [run(0x1_0000, 0x1000), run(0x2_0000, 0x800)];
    dma.map_sg(&buffers, Prot::READ, short, &mut to).unwrap();
    assert_eq!(to.len(), 1);
    dma.unmap_sg(&to).unwrap();
    let shorter = Reach { max_segment: 0x17ff, ..ANY };
    dma.map_sg(&buffers, Prot::READ, shorter, &mut to).unwrap();
    assert_eq!(to.len(), 2);
    dma.unmap_sg(&to).unwrap();
}

#[test]
fn buffers_and_lists_may_end_with_the_64_bit_space() {
    let mut dma = DmaCache::new(space(u64::MAX));
    let last_page = u64::MAX - 0xfff;
    let at = dma.map_phys(PhysAddr::new(last_page), PAGE, Prot::READ, ANY).unwrap();
    assert_eq!(at, Iova::new(last_page));
    dma.unmap_phys(at, PAGE).unwrap();
    dma.drain();
    let mut to = vec![];
    dma.map_sg(&[run(0x5000, 0x1000), run(0x8000, 0x1000)], Prot::READ, ANY, &mut to).unwrap();
    assert_eq!(to, [segment(u64::MAX - 0x1fff, 0x2000)]);
    dma.unmap_sg(&to).unwrap();
}

#[test]
fn a_lazy_unmap_costs_a_flush_when_many_wait_or_one_for_long() {
    let space = space((1 << 32) - 1);
    let mut dma = lazy(&space, Limits { entries: 16, delay: 1000 });
    let mut to = vec![];
    for now in 0..32 {
        dma.map_sg(&[run(PAGE, PAGE)], Prot::READ, ANY, &mut to).unwrap();
        dma.unmap_sg(now, &to).unwrap();
    }
    assert_eq!(space.domain().state().flushes, 2);
    let at = dma.map_phys(PhysAddr::new(PAGE), PAGE, Prot::READ, ANY).unwrap();
    dma.unmap_phys(100, at, PAGE).unwrap();
    assert_eq!(dma.deadline(), Some(1100));
    assert_eq!(space.domain().state().iotlb.len(), 1, "the device may still use it");
    dma.poll(1100).unwrap();
    assert_eq!(dma.deadline(), None);
    let state = space.domain().state();
    assert_eq!((state.flushes, state.dead, state.freed, state.iotlb.len()), (3, 33, 33, 0));
}

#[test]
fn a_lazy_map_flushes_when_iova_ends() {
    let space = space(9 * PAGE - 1);
    let mut dma = lazy(&space, Limits { entries: 100, delay: 1000 });
    for now in 0..50 {
        let at = dma.map_phys(PhysAddr::new(PAGE), PAGE, Prot::READ, ANY).unwrap();
        dma.unmap_phys(now, at, PAGE).unwrap();
    }
    assert_eq!(space.domain().state().flushes, 6);
}

#[test]
fn a_lazy_unmap_of_nothing_is_found_out() {
    let space = space((1 << 32) - 1);
    let mut dma = lazy(&space, Limits::default());
    let at = dma.map_phys(PhysAddr::new(PAGE), PAGE, Prot::READ, ANY).unwrap();
    dma.unmap_phys(0, at, PAGE).unwrap();
    assert_eq!(dma.unmap_phys(0, at, PAGE), Err(DmaError::NotUnmapped { bytes: 0 }));
    drop(dma);
    let state = space.domain().state();
    assert_eq!((state.dead, state.freed), (2, 2));
}

#[test]
fn while_hardware_is_stalled_nothing_is_given_again_and_nothing_is_lost() {
    let space = space((1 << 32) - 1);
    let clock: Arc<FlushClock<Dead, StdLocks>> = Arc::default();
    let limits = Limits { entries: 4, delay: 1000 };
    let mut dma = LazyDma::new(Arc::clone(&space), Arc::clone(&clock), limits);
    space.domain().state().stalled = true;
    let mut failed = 0;
    for now in 0..20 {
        let at = dma.map_phys(PhysAddr::new(PAGE), PAGE, Prot::READ, ANY).unwrap();
        failed += usize::from(dma.unmap_phys(now, at, PAGE).is_err());
    }
    assert_eq!(failed, 17);
    assert_eq!(dma.flush(), Err(DmaError::Flush(MapError::Hardware)));
    drop(dma);
    assert_eq!(space.domain().state().freed, 0);
    space.domain().state().stalled = false;
    let mut next = LazyDma::new(Arc::clone(&space), clock, limits);
    next.poll(5000).unwrap();
    drop(next);
    assert_eq!(space.domain().state().freed, 20);
    assert_eq!(space.iovas().free_ranges().len(), 1);
}
