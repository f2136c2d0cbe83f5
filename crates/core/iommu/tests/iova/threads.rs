//! Threads with a cache each on one space.

use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::thread;

use lychgate_iommu::iova::{IovaCache, IovaSpace};
use lychgate_types::{Iova, StdLocks};

const PAGE: u64 = 1 << 12;
const THREADS: u64 = 4;

type Space = IovaSpace<StdLocks>;

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Who has which granule, to find one that was given twice.
struct Owners {
    first: u64,
    owners: Vec<Mutex<Option<u64>>>,
}

impl Owners {
    fn new(first: u64, pages: u64) -> Self {
        Self { first, owners: (0..pages).map(|_| Mutex::new(None)).collect() }
    }

    fn turn(&self, at: u64, len: u64, from: Option<u64>, to: Option<u64>) {
        for page in (at - self.first) / PAGE..(at - self.first + len) / PAGE {
            let owner = &self.owners[usize::try_from(page).unwrap()];
            let before = std::mem::replace(&mut *owner.lock().unwrap(), to);
            assert_eq!(before, from, "page {page}");
        }
    }
}

#[test]
fn what_one_thread_has_no_other_gets() {
    let pages = 1 << 14;
    let first = (1 << 32) - pages / 2 * PAGE;
    let space = Space::new(Iova::new(first), Iova::new(first + pages * PAGE - 1), PAGE).unwrap();
    let space = Arc::new(space);
    let before = space.free_ranges();
    let owners = Owners::new(first, pages);
    thread::scope(|scope| {
        for own in 0..THREADS {
            let (space, owners) = (&space, &owners);
            scope.spawn(move || {
                let mut cache = IovaCache::new(Arc::clone(space));
                let mut random = Random(own + 1);
                let mut live = Vec::new();
                for _ in 0..20_000 {
                    if random.below(100) < 52 {
                        let len = PAGE << random.below(7);
                        let limit = [u64::from(u32::MAX), u64::MAX][usize::from(random.0 & 1 == 0)];
                        if let Ok(at) = cache.alloc(len, Iova::new(limit)) {
                            assert!(at.get() + len - 1 <= limit);
                            owners.turn(at.get(), len, None, Some(own));
                            live.push((at, len));
                        }
                    } else if !live.is_empty() {
                        let which = random.below(live.len() as u64);
                        let (at, len) = live.swap_remove(usize::try_from(which).unwrap());
                        owners.turn(at.get(), len, Some(own), None);
                        cache.free(at, len).unwrap();
                    }
                    if random.below(1000) == 0 {
                        space.trim();
                    }
                }
                for (at, len) in live {
                    owners.turn(at.get(), len, Some(own), None);
                    cache.free(at, len).unwrap();
                }
            });
        }
    });
    space.trim();
    assert_eq!(space.free_ranges(), before);
    assert_eq!(space.rejected(), 0);
}

#[test]
fn one_thread_frees_what_another_allocates() {
    let space = Arc::new(Space::new(Iova::new(0), Iova::new((1 << 48) - 1), PAGE).unwrap());
    let before = space.free_ranges();
    let (send, receive) = mpsc::sync_channel(512);
    thread::scope(|scope| {
        let (allocating, freeing) = (Arc::clone(&space), Arc::clone(&space));
        scope.spawn(move || {
            let mut cache = IovaCache::new(allocating);
            for n in 0..100_000 {
                let len = PAGE << (n % 3);
                send.send((cache.alloc(len, Iova::new(u64::MAX)).unwrap(), len)).unwrap();
            }
        });
        scope.spawn(move || {
            let mut cache = IovaCache::new(freeing);
            let mut lowest = Iova::new(u64::MAX);
            for (at, len) in receive {
                lowest = lowest.min(at);
                cache.free(at, len).unwrap();
            }
            // Magazines go round: it is not new ranges all the time.
            assert!(lowest.get() > (1 << 48) - 16384 * PAGE);
        });
    });
    space.trim();
    assert_eq!(space.free_ranges(), before);
}
