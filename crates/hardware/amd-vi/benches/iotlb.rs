//! Nanoseconds of a translation that hits, next to the least that a look-up can cost in the same
//! run: `cargo bench -p lychgate-amd-vi --bench iotlb`.
//!
//! Frames are scattered, so every page is an entry of its own. The floor is what no cache that
//! another thread may change does without: a lock for reading, and a load for each page, here from a
//! flat array by page number. Figures are medians over rounds.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use lychgate_amd_vi::{driver, model};
use lychgate_iommu::{AllocFlags, Domain, Driver, FaultReport, FaultSink};
use lychgate_model::{Access, IommuPort, Policy, Translation};
use lychgate_types::{HeapPages, Iova, PhysAddr, PhysRun, Prot, RequesterId, StdLocks};

const DEVICE: RequesterId = RequesterId::new(0x0100);
const PAGE: u64 = 4096;
const ROUNDS: usize = 101;
const IOVA: u64 = 0x10_0000;

fn main() {
    println!("{:<34} {:>9} {:>9} {:>8}", "hits", "cost", "floor", "ratio");
    let policies = [("plain", Policy::Plain), ("adversarial", Policy::Adversarial)];
    for (name, policy) in policies {
        for (pages, working_set) in [(1, 64), (1, 2048), (16, 2048), (256, 2048)] {
            run(name, policy, pages, working_set);
        }
    }
}

/// Requests of `pages` pages each, all over `working_set` pages that are mapped.
fn run(name: &str, policy: Policy, pages: u64, working_set: u64) {
    let memory = Arc::new(HeapPages::new());
    let config = model::Config { policy, ..model::Config::default() };
    let port = Arc::new(model::AmdVi::new(config, memory.clone(), Arc::new(|_| {})));
    let config = driver::Config { last_device: RequesterId::new(0x01ff), ..Default::default() };
    let driver: driver::AmdVi<HeapPages, StdLocks> =
        driver::AmdVi::new(port.clone(), memory, Arc::new(Silent), config).unwrap();
    driver.probe(DEVICE, &[]).unwrap();
    let domain = driver.alloc_paging(DEVICE, AllocFlags::default(), None).unwrap();
    let frame = |page: u64| PhysAddr::new((1 << 40) + (page * 7 % working_set) * 2 * PAGE);
    let runs: Vec<_> =
        (0..working_set).map(|page| PhysRun { start: frame(page), len: PAGE }).collect();
    domain.map(Iova::new(IOVA), &runs, Prot::READ | Prot::WRITE).unwrap();
    driver.attach(DEVICE, &Domain::Paging(domain), &Domain::Blocked).unwrap();

    let flat = RwLock::new(runs.iter().map(|run| AtomicU64::new(run.start.get())).collect());
    let request = |page: u64| Translation {
        requester: DEVICE,
        pasid: None,
        start: Iova::new(IOVA + page * PAGE),
        len: pages * PAGE,
        access: Access::Read,
    };
    let translate = |page: u64| {
        let mut seen = 0;
        let done = port.with_translation(&[request(page)], &mut |runs| {
            seen = runs.iter().map(|run| run.len).sum();
            Ok(())
        });
        assert_eq!((done, seen), (Ok(()), pages * PAGE));
    };
    let load = |page: u64| least(&flat, page, pages);
    // Every page is cached before the first round.
    let firsts: Vec<u64> = (0..working_set).step_by(usize::try_from(pages).unwrap()).collect();
    firsts.iter().for_each(|first| translate(*first));
    let per_request = |f: &dyn Fn(u64)| {
        let start = Instant::now();
        firsts.iter().for_each(|first| f(black_box(*first)));
        start.elapsed().as_secs_f64() * 1e9 / f64::from(u32::try_from(firsts.len()).unwrap())
    };
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        samples[0].push(per_request(&translate));
        samples[1].push(per_request(&load));
    }
    let [cost, floor] = samples.map(median);
    let line = format!("{name}, {pages} of {working_set} pages");
    println!("{line:<34} {cost:>9.1} {floor:>9.1} {:>7.2}x  ns/request", cost / floor);
    if pages > 1 {
        let each = f64::from(u32::try_from(pages).unwrap());
        println!("{:<34} {:>9.2} {:>9.2} {:>8}  ns/page", "", cost / each, floor / each, "");
    }
}

fn least(flat: &RwLock<Vec<AtomicU64>>, page: u64, pages: u64) {
    let words = flat.read().unwrap();
    let first = usize::try_from(page).unwrap();
    for word in words.iter().skip(first).take(usize::try_from(pages).unwrap()) {
        black_box(word.load(Ordering::Relaxed));
    }
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// Nobody faults here.
struct Silent;

impl FaultSink for Silent {
    fn fault(&self, _: &FaultReport) {}

    fn faults_lost(&self) {}
}
