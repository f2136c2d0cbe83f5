//! Several threads at once: those that map, and those that do DMA.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use lychgate_iommu::{Domain, PagingDomain};
use lychgate_model::{Access, IommuPort, Policy, Translation};
use lychgate_types::{Iova, RequesterId};

use crate::bench::{ALIAS, Bench, DEVICE, OTHER, RW, frames};

const PAGES: u64 = 16;
const FRAMES: usize = 0x100;

/// Which frames may be reached now: `true` from before they are mapped until their unmap returns.
struct Live([AtomicBool; FRAMES]);

impl Live {
    fn new() -> Self {
        Self([const { AtomicBool::new(false) }; FRAMES])
    }

    fn of(&self, frame: u64) -> &AtomicBool {
        &self.0[usize::try_from(frame).unwrap()]
    }
}

/// Reads until told to stop and counts the reads that got through. Panics on one that reaches a
/// frame which is not live.
fn read_all(
    bench: &Bench,
    live: &Live,
    requester: RequesterId,
    stop: &AtomicBool,
    reached: &AtomicU64,
) {
    let mut page = 0;
    while !stop.load(Ordering::Relaxed) {
        page = (page + 7) % (2 * PAGES);
        let iova = if page < PAGES { page << 12 } else { 1 << 40 | page << 12 };
        let request = Translation {
            requester,
            pasid: None,
            start: Iova::new(iova),
            len: 8,
            access: Access::Read,
        };
        let _ = bench.port.with_translation(&[request], &mut |runs| {
            let frame = runs[0].start.get() >> 12;
            assert!(live.of(frame).load(Ordering::SeqCst), "{iova:#x} reached frame {frame:#x}");
            reached.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
    }
}

/// Maps and unmaps pages of its own half, the second of which needs a larger root.
fn map_and_unmap(domain: &dyn PagingDomain, live: &Live, half: u64) {
    for round in 0..1000_u64 {
        let page = half * PAGES + round % PAGES;
        let iova = Iova::new((half << 40) | page << 12);
        let frame = half << 7 | round & 0x7f;
        live.of(frame).store(true, Ordering::SeqCst);
        domain.map(iova, &frames(frame << 12, 0x1000), RW).unwrap();
        if round % 3 == 0 {
            thread::yield_now();
        }
        assert_eq!(domain.unmap(iova, 0x1000), 0x1000);
        live.of(frame).store(false, Ordering::SeqCst);
    }
}

#[test]
fn no_dma_reaches_a_frame_after_its_unmap_has_returned() {
    for policy in [Policy::Plain, Policy::Adversarial] {
        let bench = Bench::new(policy);
        let (live, stop, reached) = (Live::new(), AtomicBool::new(false), AtomicU64::new(0));
        let domain = bench.paging();
        bench.attach_paging(DEVICE, &domain);
        thread::scope(|scope| {
            for requester in [DEVICE, ALIAS] {
                let (bench, live, stop, reached) = (&bench, &live, &stop, &reached);
                scope.spawn(move || read_all(bench, live, requester, stop, reached));
            }
            let workers = [0, 1].map(|half| {
                let (domain, live) = (&domain, &live);
                scope.spawn(move || map_and_unmap(&**domain, live, half))
            });
            for worker in workers {
                worker.join().unwrap();
            }
            // The readers do read.
            live.of(1).store(true, Ordering::SeqCst);
            let before = reached.load(Ordering::Relaxed);
            domain.map(Iova::new(0), &frames(0x1000, 0x1000), RW).unwrap();
            while reached.load(Ordering::Relaxed) == before {
                thread::yield_now();
            }
            stop.store(true, Ordering::Relaxed);
        });
        while bench.driver.handle_interrupt() {}
    }
}

#[test]
fn devices_move_between_domains_under_dma() {
    let bench = Bench::new(Policy::Adversarial);
    let stop = AtomicBool::new(false);
    let domains = [bench.paging(), bench.paging()];
    for (domain, phys) in domains.iter().zip([0x9000, 0xa000]) {
        domain.map(Iova::new(0x1000), &frames(phys, 0x1000), RW).unwrap();
    }
    bench.attach_paging(OTHER, &domains[0]);
    thread::scope(|scope| {
        for requester in [DEVICE, ALIAS] {
            let (bench, stop) = (&bench, &stop);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let reached = bench.read(requester, 0x1000);
                    assert!(matches!(reached, None | Some(0x9000 | 0xa000)), "{reached:?}");
                    // The neighbour is not disturbed.
                    assert_eq!(bench.read(OTHER, 0x1000), Some(0x9000));
                }
            });
        }
        for round in 0..500 {
            let domain = &domains[round % 2];
            bench.attach_paging(DEVICE, domain);
            let expected = [0x9000, 0xa000][round % 2];
            assert_eq!(bench.read(DEVICE, 0x1000), Some(expected));
            assert_eq!(bench.read(ALIAS, 0x1000), Some(expected));
            if round % 5 == 0 {
                bench.attach(DEVICE, &Domain::Blocked);
                assert_eq!(bench.read(ALIAS, 0x1000), None);
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}
