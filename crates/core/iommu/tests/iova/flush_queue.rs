//! Flush queues on hardware that caches all it can for as long as it may.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use lychgate_iommu::iova::{Flush, FlushClock, FlushQueue, IovaCache, IovaSpace, Limits, Unmapped};
use lychgate_types::{Iova, StdLocks};
use proptest::prelude::*;

const PAGE: u64 = 1 << 12;
const THREADS: usize = 3;
const NO_LIMIT: Iova = Iova::new(u64::MAX);

type Clock<T> = FlushClock<T, StdLocks>;
type Queue<T> = FlushQueue<T, StdLocks>;

#[derive(Debug, PartialEq, Eq)]
struct Stalled;

/// A domain's tables and IOTLB, and three threads that map and unmap in it. What runs inside a flush
/// stands for what other threads do while it takes place.
struct World {
    pages: RefCell<BTreeMap<u64, u64>>,
    /// Every entry of the tables is cached as soon as it is there, and stays until a flush.
    iotlb: RefCell<BTreeMap<u64, u64>>,
    live: RefCell<Vec<(Iova, u64)>>,
    /// Unmapped and not released: when, and the length.
    waiting: RefCell<BTreeMap<Iova, (u64, u64)>>,
    space: Arc<IovaSpace<StdLocks>>,
    caches: [RefCell<IovaCache<StdLocks>>; THREADS],
    clock: Arc<Clock<u64>>,
    queues: [RefCell<Queue<u64>>; THREADS],
    limits: Limits,
    script: RefCell<VecDeque<Op>>,
    now: Cell<u64>,
    stalled: Cell<bool>,
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Map {
        by: usize,
        pages: u64,
    },
    Unmap {
        by: usize,
        which: usize,
    },
    Poll {
        by: usize,
    },
    Flush {
        by: usize,
    },
    FlushFromOutside,
    /// The thread ends and another begins.
    Replace {
        by: usize,
    },
    Wait(u64),
    Stall(bool),
}

fn op() -> impl Strategy<Value = Op> {
    let by = 0..THREADS;
    prop_oneof![
        8 => (by.clone(), 1..4_u64).prop_map(|(by, pages)| Op::Map { by, pages }),
        8 => (by.clone(), any::<usize>()).prop_map(|(by, which)| Op::Unmap { by, which }),
        2 => by.clone().prop_map(|by| Op::Poll { by }),
        1 => by.clone().prop_map(|by| Op::Flush { by }),
        1 => Just(Op::FlushFromOutside),
        1 => by.prop_map(|by| Op::Replace { by }),
        3 => (1..60_u64).prop_map(Op::Wait),
        1 => prop::bool::weighted(0.3).prop_map(Op::Stall),
    ]
}

/// What thread `by` gives its queue.
struct Hardware<'a> {
    world: &'a World,
    by: usize,
}

impl Flush<u64> for Hardware<'_> {
    type Error = Stalled;

    fn flush(&mut self) -> Result<(), Stalled> {
        let world = self.world;
        let left = world.script.borrow().len();
        world.run(left % 3);
        if world.stalled.get() {
            return Err(Stalled);
        }
        // What is in the tables is cached again at once.
        *world.iotlb.borrow_mut() = world.pages.borrow().clone();
        world.run(left / 3 % 3);
        Ok(())
    }

    fn release(&mut self, unmapped: Unmapped<u64>) {
        let world = self.world;
        let (_, len) = world.waiting.borrow_mut().remove(&unmapped.iova).unwrap();
        assert_eq!((unmapped.len, unmapped.dead), (len, unmapped.iova.get() ^ len));
        world.assert_forgotten(unmapped.iova, len);
        world.caches[self.by].borrow_mut().free(unmapped.iova, len).unwrap();
    }
}

impl World {
    fn new(limits: Limits, script: Vec<Op>) -> Self {
        let space = IovaSpace::new(Iova::new(0), Iova::new(64 * PAGE - 1), PAGE).unwrap();
        let space = Arc::new(space);
        let clock = Arc::new(Clock::new());
        Self {
            pages: RefCell::default(),
            iotlb: RefCell::default(),
            live: RefCell::default(),
            waiting: RefCell::default(),
            caches: [(); THREADS].map(|()| RefCell::new(IovaCache::new(Arc::clone(&space)))),
            queues: [(); THREADS].map(|()| RefCell::new(Queue::new(Arc::clone(&clock), limits))),
            space,
            clock,
            limits,
            script: RefCell::new(script.into()),
            now: Cell::new(1000),
            stalled: Cell::new(false),
        }
    }

    fn assert_forgotten(&self, iova: Iova, len: u64) {
        let range = iova.get()..iova.get() + len;
        assert_eq!(self.iotlb.borrow().range(range).next(), None);
    }

    /// Takes `count` steps of the script.
    fn run(&self, count: usize) {
        for _ in 0..count {
            let Some(op) = self.script.borrow_mut().pop_front() else { return };
            self.step(op);
        }
    }

    fn step(&self, op: Op) {
        let hardware = |by| Hardware { world: self, by };
        match op {
            Op::Map { by, pages } => {
                let len = pages.next_power_of_two() * PAGE;
                let Ok(iova) = self.caches[by].borrow_mut().alloc(len, NO_LIMIT) else { return };
                self.assert_forgotten(iova, len);
                for at in (iova.get()..iova.get() + len).step_by(4096) {
                    self.pages.borrow_mut().insert(at, len);
                    self.iotlb.borrow_mut().insert(at, len);
                }
                self.live.borrow_mut().push((iova, len));
            }
            Op::Unmap { by, which } => {
                // Whose flush is under way is busy with that.
                let Ok(mut queue) = self.queues[by].try_borrow_mut() else { return };
                let mut live = self.live.borrow_mut();
                let count = live.len();
                let Some((iova, len)) = (count != 0).then(|| live.swap_remove(which % count))
                else {
                    return;
                };
                drop(live);
                self.pages
                    .borrow_mut()
                    .retain(|at, _| !(iova.get()..iova.get() + len).contains(at));
                self.waiting.borrow_mut().insert(iova, (self.now.get(), len));
                let unmapped = Unmapped { iova, len, dead: iova.get() ^ len };
                let pushed = queue.push(self.now.get(), unmapped, &mut hardware(by));
                if pushed.is_ok() {
                    assert!(queue.len() < self.limits.entries.max(2));
                }
            }
            Op::Poll { by } => {
                let Ok(mut queue) = self.queues[by].try_borrow_mut() else { return };
                let left = self.script.borrow().len();
                let polled = queue.poll(self.now.get(), &mut hardware(by));
                // Time may come for others while it takes place.
                let alone = self.script.borrow().len() == left;
                if polled.is_ok() && alone {
                    let now = self.now.get();
                    assert!(queue.deadline().is_none_or(|deadline| deadline > now));
                }
            }
            Op::Flush { by } => {
                let Ok(mut queue) = self.queues[by].try_borrow_mut() else { return };
                if queue.flush(&mut hardware(by)).is_ok() {
                    assert!(queue.is_empty());
                }
            }
            Op::FlushFromOutside => {
                let _ = self.clock.flush(&mut hardware(0));
            }
            Op::Replace { by } => {
                let Ok(mut queue) = self.queues[by].try_borrow_mut() else { return };
                *queue = Queue::new(Arc::clone(&self.clock), self.limits);
            }
            Op::Wait(time) => self.now.set(self.now.get() + time),
            Op::Stall(stalled) => self.stalled.set(stalled),
        }
    }
}

proptest! {
    #[test]
    fn nothing_is_given_again_before_a_flush_that_began_after_its_unmap(
        entries in 1..20_usize,
        delay in 1..200_u64,
        script in prop::collection::vec(op(), 1..600),
    ) {
        let world = World::new(Limits { entries, delay }, script);
        let before = world.space.free_ranges();
        while !world.script.borrow().is_empty() {
            world.run(1);
        }
        world.stalled.set(false);
        // With time, everything comes back, and polling is enough.
        world.now.set(world.now.get() + delay);
        for by in 0..THREADS {
            world.step(Op::Poll { by });
        }
        prop_assert!(world.waiting.borrow().is_empty());
        prop_assert!(world.queues.iter().all(|queue| queue.borrow().deadline().is_none()));
        for (iova, len) in world.live.take() {
            prop_assert_eq!(world.space.free(iova, len), Ok(()));
        }
        world.caches.iter().for_each(|cache| cache.borrow_mut().drain());
        world.space.trim();
        prop_assert_eq!(world.space.free_ranges(), before);
    }
}

/// Counts what it is asked for.
#[derive(Default)]
struct Counting {
    flushes: usize,
    released: Vec<u64>,
}

impl Flush<()> for Counting {
    type Error = Stalled;

    fn flush(&mut self) -> Result<(), Stalled> {
        self.flushes += 1;
        Ok(())
    }

    fn release(&mut self, unmapped: Unmapped<()>) {
        self.released.push(unmapped.iova.get());
    }
}

fn unmapped(iova: u64) -> Unmapped<()> {
    Unmapped { iova: Iova::new(iova), len: PAGE, dead: () }
}

#[test]
fn a_full_queue_is_one_flush() {
    let mut queue = Queue::new(Arc::new(Clock::new()), Limits { entries: 256, delay: 1000 });
    let mut hardware = Counting::default();
    for n in 0..2560 {
        queue.push(0, unmapped(n * PAGE), &mut hardware).unwrap();
        assert!(queue.len() < 256);
    }
    assert_eq!(hardware.flushes, 10);
    assert_eq!(hardware.released, (0..2560).map(|n| n * PAGE).collect::<Vec<_>>());
}

#[test]
fn the_oldest_entry_sets_the_time() {
    let mut queue = Queue::new(Arc::new(Clock::new()), Limits { entries: 256, delay: 1000 });
    let mut hardware = Counting::default();
    assert_eq!(queue.deadline(), None);
    queue.push(5000, unmapped(PAGE), &mut hardware).unwrap();
    queue.push(5900, unmapped(2 * PAGE), &mut hardware).unwrap();
    assert_eq!(queue.deadline(), Some(6000));
    queue.poll(5999, &mut hardware).unwrap();
    assert_eq!((queue.len(), hardware.flushes), (2, 0));
    queue.push(6000, unmapped(3 * PAGE), &mut hardware).unwrap();
    assert_eq!((queue.len(), hardware.flushes), (0, 1));
    queue.push(6001, unmapped(4 * PAGE), &mut hardware).unwrap();
    queue.poll(7001, &mut hardware).unwrap();
    assert_eq!((queue.len(), hardware.flushes), (0, 2));
    assert_eq!(queue.deadline(), None);
}

#[test]
fn one_flush_serves_every_queue() {
    let clock = Arc::new(Clock::new());
    let mut queues = [(); 2].map(|()| Queue::new(Arc::clone(&clock), Limits::default()));
    let mut hardware = Counting::default();
    for (n, queue) in (1..).zip(&mut queues) {
        queue.push(0, unmapped(n * PAGE), &mut hardware).unwrap();
        queue.poll(1, &mut hardware).unwrap();
    }
    queues[0].flush(&mut hardware).unwrap();
    assert_eq!(hardware.released, [PAGE]);
    queues[1].poll(2, &mut hardware).unwrap();
    assert_eq!((hardware.flushes, &*hardware.released), (1, &[PAGE, 2 * PAGE][..]));
}

#[test]
fn what_a_dropped_queue_held_goes_with_a_later_flush() {
    let clock = Arc::new(Clock::new());
    let limits = Limits { entries: 8, delay: 100 };
    let mut hardware = Counting::default();
    let mut gone = Queue::new(Arc::clone(&clock), limits);
    gone.push(10, unmapped(PAGE), &mut hardware).unwrap();
    drop(gone);
    let mut queue = Queue::new(Arc::clone(&clock), limits);
    assert_eq!(queue.deadline(), Some(110));
    queue.poll(109, &mut hardware).unwrap();
    assert_eq!(hardware.flushes, 0);
    queue.poll(110, &mut hardware).unwrap();
    assert_eq!((hardware.flushes, &*hardware.released), (1, &[PAGE][..]));
    assert_eq!(queue.deadline(), None);
}

/// Tables and IOTLB that threads share, and a device that reads one into the other all the time.
struct Shared {
    table: Vec<AtomicU64>,
    iotlb: Mutex<Vec<u64>>,
}

impl Shared {
    fn iotlb(&self) -> MutexGuard<'_, Vec<u64>> {
        self.iotlb.lock().unwrap()
    }

    /// The device fetches `page` if it has no entry for it.
    fn fetch(&self, page: usize) {
        let mut iotlb = self.iotlb();
        if iotlb[page] == 0 {
            iotlb[page] = self.table[page].load(Ordering::Relaxed);
        }
    }
}

struct Thread<'a> {
    shared: &'a Shared,
    cache: IovaCache<StdLocks>,
}

impl Flush<()> for Thread<'_> {
    type Error = Stalled;

    fn flush(&mut self) -> Result<(), Stalled> {
        self.shared.iotlb().fill(0);
        Ok(())
    }

    fn release(&mut self, unmapped: Unmapped<()>) {
        let page = usize::try_from(unmapped.iova.get() / PAGE).unwrap();
        // Nobody maps it before it is released, so nothing can be there.
        assert_eq!(self.shared.iotlb()[page], 0, "page {page} is still cached");
        self.cache.free(unmapped.iova, unmapped.len).unwrap();
    }
}

#[test]
fn threads_flush_for_each_other_and_a_device_sees_nothing_stale() {
    const PAGES: usize = 512;
    let space = IovaSpace::new(Iova::new(0), Iova::new(PAGES as u64 * PAGE - 1), PAGE).unwrap();
    let (space, clock) = (Arc::new(space), Arc::new(Clock::new()));
    let shared = Shared {
        table: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
        iotlb: Mutex::new(vec![0; PAGES]),
    };
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let threads: Vec<_> = (1..=3)
            .map(|own| {
                let (shared, space, clock) = (&shared, &space, &clock);
                scope.spawn(move || {
                    let cache = IovaCache::new(Arc::clone(space));
                    let mut thread = Thread { shared, cache };
                    let limits = Limits { entries: 40, delay: 1000 };
                    let mut queue = Queue::new(Arc::clone(clock), limits);
                    let mut live = VecDeque::new();
                    for now in 0..20_000 {
                        if let Ok(iova) = thread.cache.alloc(PAGE, NO_LIMIT) {
                            let page = usize::try_from(iova.get() / PAGE).unwrap();
                            assert_eq!(shared.iotlb()[page], 0, "page {page} is cached");
                            shared.table[page].store(own, Ordering::Relaxed);
                            shared.fetch(page);
                            live.push_back((iova, page));
                        }
                        if live.len() > 30 || now % 7 == 0 {
                            let Some((iova, page)) = live.pop_front() else { continue };
                            shared.table[page].store(0, Ordering::Relaxed);
                            let unmapped = Unmapped { iova, len: PAGE, dead: () };
                            queue.push(now, unmapped, &mut thread).unwrap();
                        }
                    }
                    queue.flush(&mut thread).unwrap();
                })
            })
            .collect();
        scope.spawn(|| {
            for page in (0..PAGES).cycle().take_while(|_| !done.load(Ordering::Relaxed)) {
                shared.fetch(page);
            }
        });
        for thread in threads {
            thread.join().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
}
