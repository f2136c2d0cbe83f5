//! Nanoseconds per allocation and free of an IOVA, next to other allocators of ranges and to what two
//! empty calls cost, in the same run, and of a buffer through the DMA API, next to its page table
//! alone: `cargo bench -p lychgate-iommu --bench iova`.
//!
//! Figures are medians over rounds in which all peers take turns. Lengths are rounded up to a power of
//! two for all of them. The peers are not shared between threads, ours is. A word as argument picks
//! workloads by a part of their names.

mod buffers;
mod tables;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use lychgate_iommu::iova::{IovaCache, IovaSpace};
use lychgate_types::{Iova, StdLocks};
use vm_allocator::{AddressAllocator, AllocPolicy};

const PAGE: u64 = 4096;
const LAST: u64 = (1 << 48) - 1;
const NO_LIMIT: Iova = Iova::new(u64::MAX);

/// Who gives ranges of a number of pages.
trait Ranges {
    fn alloc(&mut self, pages: u64) -> u64;
    fn free(&mut self, at: u64, pages: u64);
}

impl Ranges for IovaCache<StdLocks> {
    #[inline(never)]
    fn alloc(&mut self, pages: u64) -> u64 {
        Self::alloc(self, pages * PAGE, NO_LIMIT).map_or(0, Iova::get)
    }

    #[inline(never)]
    fn free(&mut self, at: u64, pages: u64) {
        assert!(Self::free(self, Iova::new(at), pages * PAGE).is_ok());
    }
}

/// The space without a cache: a lock and the tree each time.
struct Tree(Arc<IovaSpace<StdLocks>>);

impl Ranges for Tree {
    #[inline(never)]
    fn alloc(&mut self, pages: u64) -> u64 {
        self.0.alloc(pages * PAGE, NO_LIMIT).map_or(0, Iova::get)
    }

    #[inline(never)]
    fn free(&mut self, at: u64, pages: u64) {
        assert!(self.0.free(Iova::new(at), pages * PAGE).is_ok());
    }
}

struct RangeAlloc(range_alloc::RangeAllocator<u64>);

impl Ranges for RangeAlloc {
    #[inline(never)]
    fn alloc(&mut self, pages: u64) -> u64 {
        self.0.allocate_range(pages.next_power_of_two()).map_or(0, |range| range.start)
    }

    #[inline(never)]
    fn free(&mut self, at: u64, pages: u64) {
        self.0.free_range(at..at + pages.next_power_of_two());
    }
}

struct VmAllocator(AddressAllocator);

impl Ranges for VmAllocator {
    #[inline(never)]
    fn alloc(&mut self, pages: u64) -> u64 {
        let bytes = pages.next_power_of_two() * PAGE;
        self.0.allocate(bytes, bytes, AllocPolicy::FirstMatch).map_or(0, |range| range.start())
    }

    #[inline(never)]
    fn free(&mut self, at: u64, pages: u64) {
        let last = at + pages.next_power_of_two() * PAGE - 1;
        let range = vm_allocator::RangeInclusive::new(at, last);
        assert!(range.is_ok_and(|range| self.0.free(&range).is_ok()));
    }
}

/// Two calls that do nothing.
struct Floor;

impl Ranges for Floor {
    #[inline(never)]
    fn alloc(&mut self, pages: u64) -> u64 {
        black_box(pages)
    }

    #[inline(never)]
    fn free(&mut self, at: u64, _pages: u64) {
        black_box(at);
    }
}

/// The order in which ranges come and go.
#[derive(Clone, Copy)]
enum Order {
    /// One at a time.
    Lifo,
    /// So many, then all of them back, the last first.
    Batch(usize),
    /// The oldest of so many goes, one comes.
    Fifo(usize),
    /// Any of 1024 goes, one of up to so many pages comes.
    Random(u64),
}

/// A workload that is under way.
struct Work<R> {
    ranges: R,
    order: Order,
    live: Vec<(u64, u64)>,
    oldest: usize,
    random: u64,
}

impl<R: Ranges> Work<R> {
    fn new(mut ranges: R, order: Order) -> Self {
        let pages = |n: u64| match order {
            Order::Random(most) => n % most + 1,
            _ => 1,
        };
        let count = match order {
            Order::Fifo(count) => count as u64,
            Order::Random(_) => 1024,
            Order::Lifo | Order::Batch(_) => 0,
        };
        let live = (0..count).map(|n| (ranges.alloc(pages(n)), pages(n))).collect();
        Self { ranges, order, live, oldest: 0, random: 0x9e37_79b9_7f4a_7c15 }
    }

    fn next_random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Does `pairs` allocations and frees.
    fn run(&mut self, pairs: usize) {
        match self.order {
            Order::Lifo => {
                for _ in 0..pairs {
                    let at = self.ranges.alloc(1);
                    self.ranges.free(at, 1);
                }
            }
            Order::Batch(count) => {
                for _ in 0..pairs / count {
                    for _ in 0..count {
                        self.live.push((self.ranges.alloc(1), 1));
                    }
                    while let Some((at, pages)) = self.live.pop() {
                        self.ranges.free(at, pages);
                    }
                }
            }
            Order::Fifo(count) => {
                for _ in 0..pairs {
                    if let Some(range) = self.live.get_mut(self.oldest) {
                        self.ranges.free(range.0, range.1);
                        range.0 = self.ranges.alloc(range.1);
                    }
                    self.oldest = if self.oldest + 1 == count { 0 } else { self.oldest + 1 };
                }
            }
            Order::Random(most) => {
                for _ in 0..pairs {
                    let random = self.next_random();
                    if let Some(range) = self.live.get_mut((random >> 32) as usize % 1024) {
                        self.ranges.free(range.0, range.1);
                        range.1 = (random & 0xffff) % most + 1;
                        range.0 = self.ranges.alloc(range.1);
                    }
                }
            }
        }
    }
}

const ORDERS: [(&str, Order); 6] = [
    ("LIFO, 1 page", Order::Lifo),
    ("batch of 200", Order::Batch(200)),
    ("FIFO of 256", Order::Fifo(256)),
    ("FIFO of 4096", Order::Fifo(4096)),
    ("random 1..32 pages", Order::Random(32)),
    ("random 1..512 pages", Order::Random(512)),
];

fn space() -> Option<Arc<IovaSpace<StdLocks>>> {
    let space = IovaSpace::new(Iova::new(0), Iova::new(LAST), PAGE);
    space.ok().map(Arc::new)
}

fn nanoseconds(mut work: impl FnMut()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e9
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Gives nanoseconds per pair, each time for so many of them.
fn measured<'a, R: Ranges + 'a>(
    ranges: R,
    order: Order,
    pairs: usize,
) -> Box<dyn FnMut() -> f64 + 'a> {
    let mut work = Work::new(ranges, order);
    Box::new(move || nanoseconds(|| work.run(pairs)) / pairs as f64)
}

/// One thread, all peers by turns.
fn one_thread(name: &str, order: Order) {
    let (Some(cached), Some(tree)) = (space(), space()) else {
        return;
    };
    let Ok(vm_allocator) = AddressAllocator::new(PAGE, LAST - PAGE) else {
        return;
    };
    let range_alloc = RangeAlloc(range_alloc::RangeAllocator::new(1..1 << 36));
    let peers = [
        measured(IovaCache::new(cached), order, 100_000),
        measured(Floor, order, 100_000),
        measured(Tree(tree), order, 10_000),
        measured(range_alloc, order, 10_000),
        measured(VmAllocator(vm_allocator), order, 2_000),
    ];
    let mut peers = peers.map(|peer| (peer, vec![]));
    for _ in 0..31 {
        for (peer, samples) in &mut peers {
            samples.push(peer());
        }
    }
    let [ours, floor, tree, range_alloc, vm_allocator] = peers.map(|(_, samples)| median(samples));
    println!(
        "{name:<22} {ours:>7.2} {floor:>7.2} {:>6.2}x {tree:>9.1} {range_alloc:>9.1} {:>6.1}x \
         {vm_allocator:>9.1} {:>6.1}x",
        ours / floor,
        range_alloc / ours,
        vm_allocator / ours
    );
}

/// Nanoseconds per pair of each of `threads` that share a space.
fn shared(order: Order, threads: usize) -> f64 {
    const PAIRS: usize = 400_000;
    let Some(space) = space() else {
        return f64::NAN;
    };
    let ready = AtomicUsize::new(0);
    let best = (0..7).map(|_| {
        ready.store(0, Ordering::Relaxed);
        thread::scope(|scope| {
            let work = || {
                let mut work = Work::new(IovaCache::new(Arc::clone(&space)), order);
                work.run(20_000);
                ready.fetch_add(1, Ordering::AcqRel);
                while ready.load(Ordering::Acquire) < threads {
                    std::hint::spin_loop();
                }
                let cost = nanoseconds(|| work.run(PAIRS)) / PAIRS as f64;
                for (at, pages) in std::mem::take(&mut work.live) {
                    Ranges::free(&mut work.ranges, at, pages);
                }
                cost
            };
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let costs = threads.into_iter().map(|thread| thread.join().unwrap_or(f64::NAN));
            costs.fold(0.0, f64::max)
        })
    });
    best.fold(f64::INFINITY, f64::min)
}

fn main() {
    // Cargo passes `--bench`.
    let word = std::env::args().skip(1).find(|word| !word.starts_with('-'));
    let picked = |name: &str| word.as_deref().is_none_or(|part| name.contains(part));
    println!(
        "{:<22} {:>7} {:>7} {:>7} {:>9} {:>17} {:>17}   ns/pair",
        "one thread", "cache", "floor", "", "tree", "range-alloc", "vm-allocator"
    );
    for (name, order) in ORDERS.into_iter().filter(|(name, _)| picked(name)) {
        one_thread(name, order);
    }
    println!("{:<22} {:>7} {:>7} {:>7}   ns/pair", "threads", "one", "two", "scaling");
    for (name, order) in ORDERS.into_iter().filter(|(name, _)| picked(name)) {
        let (one, two) = (shared(order, 1), shared(order, 2));
        println!("{name:<22} {one:>7.2} {two:>7.2} {:>6.2}x", 2.0 * one / two);
    }
    buffers::all(&picked);
}
