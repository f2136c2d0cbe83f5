//! One behaviour at a time.

use std::sync::Arc;

use lychgate_iommu::iova::{
    AllocError, ConfigError, FreeError, IovaCache, IovaSpace, ReserveError,
};
use lychgate_types::{Iova, StdLocks};

const PAGE: u64 = 1 << 12;
const NO_LIMIT: Iova = Iova::new(u64::MAX);
const BELOW_4G: Iova = Iova::new(u32::MAX as u64);

type Space = IovaSpace<StdLocks>;
type Cache = IovaCache<StdLocks>;

fn space(last: u64) -> Arc<Space> {
    Arc::new(Space::new(Iova::new(0), Iova::new(last), PAGE).unwrap())
}

fn range(first: u64, last: u64) -> std::ops::RangeInclusive<Iova> {
    Iova::new(first)..=Iova::new(last)
}

#[test]
fn iova_0_is_never_given_and_everything_else_is() {
    let space = space(16 * PAGE - 1);
    let mut cache = Cache::new(Arc::clone(&space));
    let given: Vec<u64> = (0..15).map(|_| cache.alloc(1, NO_LIMIT).unwrap().get()).collect();
    assert_eq!(given, (1..16).rev().map(|n| n * PAGE).collect::<Vec<_>>());
    assert_eq!(cache.alloc(1, NO_LIMIT), Err(AllocError::NoSpace));
    assert_eq!(cache.alloc(0, NO_LIMIT), Err(AllocError::Empty));
}

#[test]
fn a_space_needs_a_granule_that_is_a_power_of_two_and_fits() {
    let new = |first, last, granule| {
        Space::new(Iova::new(first), Iova::new(last), granule).map(|space| space.bounds())
    };
    assert_eq!(new(0, 0xffff, 0), Err(ConfigError::Granule));
    assert_eq!(new(0, 0xffff, 0x3000), Err(ConfigError::Granule));
    assert_eq!(new(0, 0xffff, 1 << 49), Err(ConfigError::Granule));
    assert_eq!(new(0, 0x1ffe, 0x1000), Err(ConfigError::Aperture));
    assert_eq!(new(0x5000, 0x4fff, 0x1000), Err(ConfigError::Aperture));
    assert_eq!(new(u64::MAX, u64::MAX, 0x1000), Err(ConfigError::Aperture));
    assert_eq!(new(0x1234, 0x5678, 0x1000), Ok(range(0x2000, 0x4fff)));
    assert_eq!(new(0, u64::MAX, 1), Ok(range(1, u64::MAX)));
    assert_eq!(new(0, u64::MAX, 1 << 48), Ok(range(1 << 48, u64::MAX)));
}

#[test]
fn every_granule_has_its_classes() {
    for shift in [0, 4, 12, 14, 16, 21, 30, 48] {
        let granule = 1 << shift;
        let space = Space::new(Iova::new(0), NO_LIMIT, granule).unwrap();
        let mut cache = Cache::new(Arc::new(space));
        for granules in [1, 2, 3, 5, 4096, 4097] {
            let Ok(at) = cache.alloc(granules * granule, NO_LIMIT) else {
                assert!(shift == 48);
                continue;
            };
            assert!(at.is_aligned(granule * granules.next_power_of_two()));
            cache.free(at, granules * granule).unwrap();
        }
    }
}

#[test]
fn a_range_that_was_freed_is_the_next_one_given() {
    let mut cache = Cache::new(space((1 << 48) - 1));
    for pages in [1, 3, 32, 33, 512, 4096] {
        let first = cache.alloc(pages * PAGE, NO_LIMIT).unwrap();
        let second = cache.alloc(pages * PAGE, NO_LIMIT).unwrap();
        cache.free(first, pages * PAGE).unwrap();
        assert_eq!(cache.alloc(pages * PAGE, NO_LIMIT), Ok(first));
        cache.free(second, pages * PAGE).unwrap();
        assert_eq!(cache.alloc(pages * PAGE, NO_LIMIT), Ok(second));
    }
}

#[test]
fn limits_are_kept_whatever_the_magazines_hold() {
    let mut cache = Cache::new(space((1 << 48) - 1));
    let limits = [u64::MAX, (1 << 40) - 1, u64::from(u32::MAX), (1 << 30) - 1, (1 << 30) + 0x1234];
    let mut live = Vec::new();
    for round in 0..500_u64 {
        for limit in limits {
            let len = (1 + round % 9) * PAGE;
            let at = cache.alloc(len, Iova::new(limit)).unwrap();
            assert!(at.get() + len.next_power_of_two() - 1 <= limit);
            live.push((at, len));
        }
        if round % 3 == 0 {
            for (at, len) in live.drain(..) {
                cache.free(at, len).unwrap();
            }
        }
    }
}

#[test]
fn when_all_above_4_gib_is_taken_what_is_below_is_given() {
    let space = space((1 << 32) + 4 * PAGE - 1);
    let mut cache = Cache::new(Arc::clone(&space));
    let low = cache.alloc(PAGE, BELOW_4G).unwrap();
    cache.free(low, PAGE).unwrap();
    let given: Vec<u64> = (0..5).map(|_| cache.alloc(1, NO_LIMIT).unwrap().get()).collect();
    let expected: Vec<u64> = (0..5).map(|n| (1 << 32) + 3 * PAGE - n * PAGE).collect();
    assert_eq!(given[..4], expected[..4]);
    assert!(given[4] <= u64::from(u32::MAX));
}

#[test]
fn lengths_beyond_the_classes_take_no_more_than_their_granules() {
    let space = space((1 << 48) - 1);
    let len = 5000 * PAGE;
    assert_eq!(space.allocation_size(len), Some(len));
    assert_eq!(space.allocation_size(4095 * PAGE), Some(4096 * PAGE));
    let at = space.alloc(len, NO_LIMIT).unwrap();
    assert_eq!(at.get(), (1 << 48) - 8192 * PAGE);
    let behind = space.alloc(1024 * PAGE, NO_LIMIT).unwrap();
    assert_eq!(behind.get(), (1 << 48) - 1024 * PAGE);
    assert_eq!(space.free(at, len + PAGE), Err(FreeError::NotAllocated));
    assert_eq!(space.free(Iova::new(at.get() + PAGE), len), Err(FreeError::Foreign));
    assert_eq!(space.free(at, len), Ok(()));
    assert_eq!(space.free(at, len), Err(FreeError::NotAllocated));
    assert_eq!(space.alloc(1 << 63, NO_LIMIT), Err(AllocError::NoSpace));
    assert_eq!(space.alloc(u64::MAX, NO_LIMIT), Err(AllocError::NoSpace));
}

#[test]
fn what_cannot_have_been_given_is_not_taken_back() {
    let space = space((1 << 40) - 1);
    let mut cache = Cache::new(Arc::clone(&space));
    let at = cache.alloc(4 * PAGE, NO_LIMIT).unwrap();
    let mut refuse = |iova, len, error| {
        assert_eq!(cache.free(Iova::new(iova), len), Err(error));
        assert_eq!(space.free(Iova::new(iova), len), Err(error));
    };
    refuse(at.get(), 0, FreeError::Empty);
    refuse(at.get() + PAGE, 4 * PAGE, FreeError::Foreign);
    refuse(at.get() + 1, PAGE, FreeError::Foreign);
    refuse(0, PAGE, FreeError::Foreign);
    refuse(1 << 40, PAGE, FreeError::Foreign);
    refuse(u64::MAX - (PAGE - 1), PAGE, FreeError::Foreign);
    refuse(u64::MAX, u64::MAX, FreeError::Foreign);
    // Never allocated, and the tree knows it.
    assert_eq!(space.free(Iova::new(0x10000), PAGE), Err(FreeError::NotAllocated));
    assert_eq!(cache.free(at, 4 * PAGE), Ok(()));
}

#[test]
fn a_range_freed_twice_is_in_the_tree_once() {
    // In builds with debug assertions the second call is refused; in others the tree finds out.
    let space = space((1 << 48) - 1);
    let before = space.free_ranges();
    let mut cache = Cache::new(Arc::clone(&space));
    let at = cache.alloc(PAGE, NO_LIMIT).unwrap();
    cache.free(at, PAGE).unwrap();
    let again = cache.free(at, PAGE);
    if cfg!(debug_assertions) {
        assert_eq!(again, Err(FreeError::NotAllocated));
    }
    drop(cache);
    assert_eq!(space.rejected(), u64::from(again.is_ok()));
    assert_eq!(space.free_ranges(), before);
}

#[test]
fn reserved_ranges_are_never_given_and_may_overlap() {
    let space = space(64 * PAGE - 1);
    space.reserve(range(0x5800, 0x6000)).unwrap();
    space.reserve(range(0x4000, 0x5fff)).unwrap();
    space.reserve(range(0x4000, 0x6fff)).unwrap();
    space.reserve(range(62 * PAGE, u64::MAX)).unwrap();
    space.reserve(range(1 << 40, 1 << 41)).unwrap();
    space.reserve(range(0, 0)).unwrap();
    assert_eq!(space.free_ranges(), [range(0x1000, 0x3fff), range(0x7000, 62 * PAGE - 1)]);
    let backwards = Iova::new(0x9000)..=Iova::new(0x8fff);
    assert_eq!(space.reserve(backwards), Err(ReserveError::Empty));
    assert_eq!(space.free(Iova::new(0x5000), PAGE), Err(FreeError::NotAllocated));
    assert_eq!(space.alloc(64 * PAGE, NO_LIMIT), Err(AllocError::NoSpace));
    assert_eq!(space.alloc(32 * PAGE, NO_LIMIT), Err(AllocError::NoSpace));
    assert_eq!(space.alloc(16 * PAGE, NO_LIMIT), Ok(Iova::new(32 * PAGE)));
}

#[test]
fn what_is_allocated_cannot_be_reserved_but_what_waits_in_a_depot_can() {
    let space = space((1 << 40) - 1);
    let at = space.alloc(PAGE, BELOW_4G).unwrap();
    let around = range(at.get() - 2 * PAGE, at.get() + 10);
    assert_eq!(
        space.reserve(around.clone()),
        Err(ReserveError::InUse { at: Iova::new(at.get() - 2 * PAGE) })
    );
    space.free(at, PAGE).unwrap();
    assert_eq!(space.reserve(around), Ok(()));

    // More than a cache holds goes to the depot.
    let mut cache = Cache::new(Arc::clone(&space));
    let live: Vec<_> = (0..381).map(|_| cache.alloc(PAGE, BELOW_4G).unwrap()).collect();
    for at in &live {
        cache.free(*at, PAGE).unwrap();
    }
    let in_depot = live[0];
    assert_eq!(space.reserve(in_depot..=in_depot), Ok(()));
    let in_cache = live[380];
    assert!(space.reserve(in_cache..=in_cache).is_err());
    cache.drain();
    assert_eq!(space.reserve(in_cache..=in_cache), Ok(()));
}

#[test]
fn what_other_caches_hold_comes_back_when_space_ends() {
    let space = space(4096 * PAGE - 1);
    let mut holder = Cache::new(Arc::clone(&space));
    let mut taker = Cache::new(Arc::clone(&space));
    let held: Vec<_> = (0..16).map(|_| holder.alloc(PAGE, NO_LIMIT).unwrap()).collect();
    for at in held {
        holder.free(at, PAGE).unwrap();
    }
    let mut taken = Vec::new();
    while let Ok(at) = taker.alloc(PAGE, NO_LIMIT) {
        taken.push(at);
    }
    let missing = 4095 - taken.len();
    assert!(missing > 0, "the other cache keeps some");
    // It fails fast now, and again.
    assert_eq!(taker.alloc(PAGE, NO_LIMIT), Err(AllocError::NoSpace));
    holder.relieve();
    for _ in 0..missing {
        taken.push(taker.alloc(PAGE, NO_LIMIT).unwrap());
    }
    assert_eq!(taker.alloc(PAGE, NO_LIMIT), Err(AllocError::NoSpace));
    taken.sort();
    taken.dedup();
    assert_eq!(taken.len(), 4095);
}

#[test]
fn after_the_32_bit_window_was_full_a_free_makes_room_again() {
    let space = space((1 << 48) - 1);
    let mut cache = Cache::new(Arc::clone(&space));
    let big = 1 << 30;
    let given: Vec<_> = std::iter::from_fn(|| cache.alloc(big, BELOW_4G).ok()).take(10).collect();
    // The lowest GiB holds IOVA 0.
    assert_eq!(given.len(), 3);
    assert_eq!(cache.alloc(big, BELOW_4G), Err(AllocError::NoSpace));
    assert!(cache.alloc(big, NO_LIMIT).is_ok());
    assert!(cache.alloc(big / 2, BELOW_4G).is_ok(), "less may still fit");
    cache.free(given[1], big).unwrap();
    assert_eq!(cache.alloc(big, BELOW_4G), Ok(given[1]));
}

#[test]
fn small_ranges_coalesce_into_what_a_large_one_needs() {
    let space = space(4096 * PAGE - 1);
    let mut cache = Cache::new(Arc::clone(&space));
    let all: Vec<_> = std::iter::from_fn(|| cache.alloc(PAGE, NO_LIMIT).ok()).collect();
    assert_eq!(all.len(), 4095);
    for at in all {
        cache.free(at, PAGE).unwrap();
    }
    assert_eq!(cache.alloc(2048 * PAGE, NO_LIMIT), Ok(Iova::new(2048 * PAGE)));
}
