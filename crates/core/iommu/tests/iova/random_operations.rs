//! Random operations on a space and two caches against a plain list of granules.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::sync::Arc;

use lychgate_iommu::iova::{AllocError, FreeError, IovaCache, IovaSpace, ReserveError};
use lychgate_types::{Iova, StdLocks};
use proptest::prelude::*;

const GRANULE: u64 = 1 << 12;
const FOUR_GIB: u64 = 1 << 32;
/// Small enough to run out, large enough for magazines of the smallest classes, and with the end of
/// the 32-bit window inside.
const FIRST: u64 = FOUR_GIB - 2048 * GRANULE;
const LAST: u64 = FOUR_GIB + 1536 * GRANULE - 1;
const NO_LIMIT: u64 = u64::MAX;
const LOW: u64 = FOUR_GIB - 1;
/// Of a device that reaches less than the window has.
const ODD: u64 = FOUR_GIB - 1000 * GRANULE + 0x123;

/// What of the space is not free, by granule.
struct Model {
    taken: Vec<bool>,
    live: BTreeMap<u64, u64>,
}

impl Model {
    fn new() -> Self {
        Self { taken: vec![false; index(LAST + 1)], live: BTreeMap::new() }
    }

    fn span(&self, at: u64, bytes: u64) -> RangeInclusive<usize> {
        index(at)..=index(at + bytes - 1)
    }

    fn is_free(&self, at: u64, bytes: u64) -> bool {
        self.taken[self.span(at, bytes)].iter().all(|taken| !taken)
    }

    /// The highest place.
    fn highest(&self, bytes: u64, limit: u64) -> Option<u64> {
        let align = bytes.next_power_of_two();
        let mut at = (limit.min(LAST) + 1).checked_sub(bytes)? & !(align - 1);
        while at >= FIRST {
            if self.is_free(at, bytes) {
                return Some(at);
            }
            at -= align;
        }
        None
    }

    fn allocate(&mut self, at: u64, bytes: u64) {
        assert!(self.is_free(at, bytes), "{at:#x} is in use");
        let span = self.span(at, bytes);
        self.taken[span].fill(true);
        self.live.insert(at, bytes);
    }

    fn free(&mut self, at: u64) -> u64 {
        let bytes = self.live.remove(&at).unwrap();
        let span = self.span(at, bytes);
        self.taken[span].fill(false);
        bytes
    }

    fn free_ranges(&self) -> Vec<RangeInclusive<Iova>> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for (n, _) in self.taken.iter().enumerate().filter(|(_, taken)| !**taken) {
            let at = FIRST + n as u64 * GRANULE;
            match ranges.last_mut() {
                Some(range) if range.1 + 1 == at => range.1 += GRANULE,
                _ => ranges.push((at, at + GRANULE - 1)),
            }
        }
        ranges.into_iter().map(|(first, last)| Iova::new(first)..=Iova::new(last)).collect()
    }
}

fn index(at: u64) -> usize {
    usize::try_from((at - FIRST) / GRANULE).unwrap()
}

/// What an allocation of `pages` takes, by the rule of the documentation.
fn taken(pages: u64) -> u64 {
    GRANULE * if pages <= 4096 { pages.next_power_of_two() } else { pages }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    /// By 0 the space itself, by 1 and 2 a cache.
    Alloc {
        by: usize,
        pages: u64,
        limit: u64,
    },
    /// The live range that follows a fraction of all.
    Free {
        by: usize,
        which: usize,
    },
    FreeTwice {
        by: usize,
        which: usize,
    },
    FreeOther {
        by: usize,
        which: usize,
        offset: u64,
        pages: u64,
    },
    Reserve {
        first: u64,
        len: u64,
    },
    Trim,
    Drain {
        by: usize,
    },
    Relieve {
        by: usize,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let by = 0..3_usize;
    let pages = prop_oneof![4 => 1..9_u64, 2 => 1..200_u64, 1 => Just(512_u64)];
    let limit = prop_oneof![3 => Just(NO_LIMIT), 2 => Just(LOW), 1 => Just(ODD)];
    let which = any::<usize>();
    prop_oneof![
        20 => (by.clone(), pages, limit)
            .prop_map(|(by, pages, limit)| Op::Alloc { by, pages, limit }),
        16 => (by.clone(), which).prop_map(|(by, which)| Op::Free { by, which }),
        1 => (by.clone(), which).prop_map(|(by, which)| Op::FreeTwice { by, which }),
        1 => (by.clone(), which, 0..5_u64, 1..40_u64)
            .prop_map(|(by, which, offset, pages)| Op::FreeOther { by, which, offset, pages }),
        1 => (FIRST - 0x5000..LAST, 1..0x2_0000_u64)
            .prop_map(|(first, len)| Op::Reserve { first, len }),
        1 => Just(Op::Trim),
        1 => by.clone().prop_map(|by| Op::Drain { by }),
        1 => by.prop_map(|by| Op::Relieve { by }),
    ]
}

struct Pair {
    space: Arc<IovaSpace<StdLocks>>,
    caches: [IovaCache<StdLocks>; 2],
    model: Model,
}

impl Pair {
    fn new() -> Self {
        let space = IovaSpace::new(Iova::new(FIRST), Iova::new(LAST), GRANULE).unwrap();
        let space = Arc::new(space);
        let caches = [(); 2].map(|()| IovaCache::new(Arc::clone(&space)));
        Self { space, caches, model: Model::new() }
    }

    fn alloc(&mut self, by: usize, len: u64, limit: u64) -> Result<Iova, AllocError> {
        match by {
            0 => self.space.alloc(len, Iova::new(limit)),
            _ => self.caches[by - 1].alloc(len, Iova::new(limit)),
        }
    }

    fn free(&mut self, by: usize, at: u64, len: u64) -> Result<(), FreeError> {
        match by {
            0 => self.space.free(Iova::new(at), len),
            _ => self.caches[by - 1].free(Iova::new(at), len),
        }
    }

    fn drain(&mut self) {
        self.caches.iter_mut().for_each(IovaCache::drain);
        self.space.trim();
    }

    fn check_alloc(&mut self, by: usize, pages: u64, limit: u64) {
        let bytes = taken(pages);
        assert_eq!(self.space.allocation_size(pages * GRANULE), Some(bytes));
        let mut given = self.alloc(by, pages * GRANULE, limit);
        if given.is_err() {
            // The other caches have been told; when they have heard, it is final.
            self.caches.iter_mut().for_each(IovaCache::relieve);
            given = self.alloc(by, pages * GRANULE, limit);
        }
        match given {
            Ok(iova) => {
                let at = iova.get();
                assert!(iova.is_aligned(bytes.next_power_of_two()));
                assert!(at >= FIRST && at + bytes - 1 <= LAST.min(limit));
                self.model.allocate(at, bytes);
            }
            Err(error) => {
                assert_eq!(error, AllocError::NoSpace);
                assert_eq!(self.model.highest(bytes, limit), None);
            }
        }
    }

    fn pick(&self, which: usize) -> Option<(u64, u64)> {
        let count = self.model.live.len().max(1);
        self.model.live.iter().nth(which % count).map(|(at, bytes)| (*at, *bytes))
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Alloc { by, pages, limit } => self.check_alloc(by, pages, limit),
            Op::Free { by, which } => {
                if let Some((at, bytes)) = self.pick(which) {
                    assert_eq!(self.free(by, at, bytes), Ok(()));
                    self.model.free(at);
                }
            }
            Op::FreeTwice { by, which } => {
                if let Some((at, bytes)) = self.pick(which) {
                    assert_eq!(self.free(by, at, bytes), Ok(()));
                    self.model.free(at);
                    if cfg!(debug_assertions) {
                        assert_eq!(self.free(by, at, bytes), Err(FreeError::NotAllocated));
                    }
                }
            }
            Op::FreeOther { by, which, offset, pages } => {
                let Some((at, bytes)) = self.pick(which) else { return };
                let other = at + offset * GRANULE;
                let is_live = self.model.live.get(&other) == Some(&taken(pages));
                if cfg!(debug_assertions) && !is_live {
                    let refused = self.free(by, other, pages * GRANULE);
                    let aligned = other.is_multiple_of(taken(pages).next_power_of_two());
                    let expected = if aligned && other + taken(pages) - 1 <= LAST {
                        FreeError::NotAllocated
                    } else {
                        FreeError::Foreign
                    };
                    assert_eq!(refused, Err(expected), "{at:#x} has {bytes:#x} bytes");
                }
            }
            Op::Reserve { first, len } => self.check_reserve(first, len),
            Op::Trim => self.space.trim(),
            Op::Drain { by: 0 } => self.drain(),
            Op::Drain { by } => self.caches[by - 1].drain(),
            Op::Relieve { by } => {
                if let Some(cache) = by.checked_sub(1) {
                    self.caches[cache].relieve();
                }
            }
        }
    }

    fn check_reserve(&mut self, first: u64, len: u64) {
        let range = Iova::new(first)..=Iova::new(first + len - 1);
        // What waits in caches counts as allocated.
        self.drain();
        let (low, high) = (first.max(FIRST), (first + len - 1).min(LAST));
        if low > high {
            assert_eq!(self.space.reserve(range), Ok(()));
            return;
        }
        let mut live = self.model.live.iter();
        let in_use = live.any(|(at, bytes)| at / GRANULE <= high / GRANULE && at + bytes > low);
        match self.space.reserve(range) {
            Ok(()) => {
                assert!(!in_use);
                let span = index(low)..=index(high);
                self.model.taken[span].fill(true);
            }
            Err(error) => {
                assert!(in_use && matches!(error, ReserveError::InUse { .. }), "{error}");
            }
        }
    }
}

proptest! {
    #[test]
    fn nothing_is_given_twice_and_everything_comes_back(
        ops in prop::collection::vec(op(), 1..400),
    ) {
        let mut pair = Pair::new();
        for op in ops {
            pair.step(op);
        }
        pair.drain();
        prop_assert_eq!(pair.space.free_ranges(), pair.model.free_ranges());
        while let Some((at, bytes)) = pair.pick(0) {
            prop_assert_eq!(pair.free(1, at, bytes), Ok(()));
            pair.model.free(at);
        }
        let Pair { space, caches, model } = pair;
        drop(caches);
        space.trim();
        prop_assert_eq!(space.free_ranges(), model.free_ranges());
        prop_assert_eq!(space.rejected(), 0);
    }

    #[test]
    fn a_space_without_caches_allocates_the_highest_that_fits(
        ops in prop::collection::vec(op(), 1..200),
    ) {
        let mut pair = Pair::new();
        for op in ops {
            match op {
                Op::Alloc { pages, limit, .. } => {
                    let expected = pair.model.highest(taken(pages), limit);
                    let given = pair.alloc(0, pages * GRANULE, limit);
                    prop_assert_eq!(given.ok().map(Iova::get), expected);
                    if let Some(at) = expected {
                        pair.model.allocate(at, taken(pages));
                    }
                }
                Op::Free { which, .. } => pair.step(Op::Free { by: 0, which }),
                Op::Reserve { first, len } => pair.check_reserve(first, len),
                _ => {}
            }
        }
        prop_assert_eq!(pair.space.free_ranges(), pair.model.free_ranges());
    }
}
