//! Random maps, unmaps, attachments and DMA against a plain reference, on hardware that never
//! forgets.

use std::collections::BTreeMap;
use std::sync::Arc;

use lychgate_iommu::{Domain, MapError, PagingDomain};
use lychgate_model::{Access, Policy};
use lychgate_types::{Iova, PhysAddr, PhysRun, Prot, RequesterId};
use proptest::prelude::*;

use crate::bench::{ALIAS, Bench, DEVICE, OTHER, RW};

/// First pages of the regions in use: the same tables, another leaf table, and tables that
/// only a larger root reaches.
const REGIONS: [u64; 5] = [0, 0x200, 0x3_fff0, 1 << (39 - 12), (1 << 52) - 64];
const REGION_PAGES: u64 = 32;
const DOMAINS: usize = 3;

#[derive(Clone, Copy, Debug)]
enum Op {
    Map {
        domain: usize,
        page: u64,
        count: u64,
        frame: u64,
        step: u64,
        prot: Prot,
    },
    /// Unmaps the area that the number leads to.
    Unmap {
        domain: usize,
        which: usize,
    },
    /// Unmaps what may not be there.
    UnmapRange {
        domain: usize,
        page: u64,
        count: u64,
    },
    Attach {
        device: usize,
        to: usize,
    },
    /// Puts a new domain in the place of an old one.
    Renew {
        domain: usize,
    },
    Dma {
        requester: usize,
        page: u64,
        offset: u64,
        len: u64,
        write: bool,
    },
}

const DEVICES: [RequesterId; 2] = [DEVICE, OTHER];
const REQUESTERS: [(RequesterId, usize); 3] = [(DEVICE, 0), (ALIAS, 0), (OTHER, 1)];

fn page() -> impl Strategy<Value = u64> {
    (0..REGIONS.len(), 0..REGION_PAGES).prop_map(|(region, page)| REGIONS[region] + page)
}

fn op() -> impl Strategy<Value = Op> {
    let domain = 0..DOMAINS;
    let prot = prop_oneof![4 => Just(RW), 1 => Just(Prot::READ), 1 => Just(Prot::WRITE)];
    let count = prop_oneof![4 => 1..4_u64, 2 => 1..40_u64, 1 => Just(16_u64)];
    prop_oneof![
        6 => (domain.clone(), page(), count.clone(), 0..64_u64, 1..3_u64, prot).prop_map(
            |(domain, page, count, frame, step, prot)| Op::Map {
                domain, page, count, frame, step, prot
            }
        ),
        5 => (domain.clone(), 0..64_usize)
            .prop_map(|(domain, which)| Op::Unmap { domain, which }),
        1 => (domain.clone(), page(), count)
            .prop_map(|(domain, page, count)| Op::UnmapRange { domain, page, count }),
        2 => (0..DEVICES.len(), 0..DOMAINS + 2).prop_map(|(device, to)| Op::Attach { device, to }),
        1 => domain.prop_map(|domain| Op::Renew { domain }),
        8 => (0..REQUESTERS.len(), page(), 0..0x1000_u64, 1..0x5000_u64, any::<bool>()).prop_map(
            |(requester, page, offset, len, write)| Op::Dma { requester, page, offset, len, write }
        ),
    ]
}

/// A domain and what must be in it.
struct Reference {
    domain: Arc<dyn PagingDomain>,
    pages: BTreeMap<u64, (u64, Prot)>,
    /// What was mapped by one call: first page and count.
    areas: Vec<(u64, u64)>,
}

#[derive(Clone, Copy, PartialEq)]
enum Attached {
    Blocked,
    Identity,
    Paging(usize),
}

struct Pair {
    bench: Bench,
    domains: Vec<Reference>,
    attached: [Attached; 2],
}

impl Pair {
    fn new(policy: Policy) -> Self {
        let bench = Bench::new(policy);
        let domains = (0..DOMAINS).map(|_| Reference::new(bench.paging())).collect();
        Self { bench, domains, attached: [Attached::Blocked; 2] }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Map { domain, page, count, frame, step, prot } => {
                self.domains[domain].map(page, count, frame, step, prot);
            }
            Op::Unmap { domain, which } => self.domains[domain].unmap_area(which),
            Op::UnmapRange { domain, page, count } => self.domains[domain].unmap(page, count),
            Op::Attach { device, to } => {
                let (domain, attached) = match to {
                    0 => (Domain::Blocked, Attached::Blocked),
                    1 => (Domain::Identity, Attached::Identity),
                    _ => {
                        let domain = self.domains[to - 2].domain.clone();
                        (Domain::Paging(domain), Attached::Paging(to - 2))
                    }
                };
                self.bench.attach(DEVICES[device], &domain);
                self.attached[device] = attached;
            }
            Op::Renew { domain } => {
                for (device, attached) in DEVICES.iter().zip(&mut self.attached) {
                    if *attached == Attached::Paging(domain) {
                        self.bench.attach(*device, &Domain::Blocked);
                        *attached = Attached::Blocked;
                    }
                }
                self.domains[domain] = Reference::new(self.bench.paging());
            }
            Op::Dma { requester, page, offset, len, write } => {
                self.dma(requester, (page << 12) | offset, len, write);
            }
        }
        self.bench.assert_nothing_stale();
    }

    /// Looks at every page of every region with every requester.
    fn sweep(&self) {
        for requester in 0..REQUESTERS.len() {
            for region in REGIONS {
                for page in region..region + REGION_PAGES {
                    self.dma(requester, page << 12, 0x1000, false);
                }
            }
        }
    }

    fn dma(&self, requester: usize, iova: u64, len: u64, write: bool) {
        let Some(last) = iova.checked_add(len - 1) else {
            return;
        };
        let (id, device) = REQUESTERS[requester];
        let access = if write { Access::Write } else { Access::Read };
        let needed = if write { Prot::WRITE } else { Prot::READ };
        let lookup = |page: u64| match self.attached[device] {
            Attached::Blocked => None,
            Attached::Identity => Some(page),
            Attached::Paging(domain) => {
                let (frame, prot) = *self.domains[domain].pages.get(&page)?;
                prot.contains(needed).then_some(frame)
            }
        };
        let got = self.bench.dma(id, iova, len, access);
        let mut expected = Ok(Vec::new());
        for page in iova >> 12..=last >> 12 {
            let (from, to) = (iova.max(page << 12), last.min(page << 12 | 0xfff));
            match (lookup(page), &mut expected) {
                (Some(frame), Ok(runs)) => {
                    runs.push((frame << 12 | from & 0xfff, to - from + 1));
                }
                (None, _) => {
                    expected = Err(Iova::new(from));
                    break;
                }
                (_, Err(_)) => {}
            }
        }
        match (got, expected) {
            (Ok(got), Ok(expected)) => assert_eq!(joined(&got), join(expected), "{iova:#x}"),
            (got, expected) => {
                assert_eq!(got.err(), expected.err(), "{id} {iova:#x} {len:#x} {access:?}");
            }
        }
    }
}

impl Reference {
    fn new(domain: Arc<dyn PagingDomain>) -> Self {
        Self { domain, pages: BTreeMap::new(), areas: Vec::new() }
    }

    fn map(&mut self, page: u64, count: u64, frame: u64, step: u64, prot: Prot) {
        let count = count.min((1 << 52) - page);
        let runs: Vec<PhysRun> = (0..count)
            .map(|index| PhysRun {
                start: PhysAddr::new(0x1_0000_0000 + ((frame + index * step) << 12)),
                len: 0x1000,
            })
            .collect();
        let taken = (page..page + count).find(|page| self.pages.contains_key(page));
        let got = self.domain.map(Iova::new(page << 12), &runs, prot);
        match taken {
            Some(_) => assert!(matches!(got, Err(MapError::AlreadyMapped { .. })), "{got:?}"),
            None => {
                assert_eq!(got, Ok(()));
                for (page, run) in (page..).zip(&runs) {
                    self.pages.insert(page, (run.start.get() >> 12, prot));
                }
                self.areas.push((page, count));
            }
        }
    }

    fn unmap_area(&mut self, which: usize) {
        if self.areas.is_empty() {
            return;
        }
        let (page, count) = self.areas.swap_remove(which % self.areas.len());
        assert_eq!(self.domain.unmap(Iova::new(page << 12), count << 12), count << 12);
        for page in page..page + count {
            assert!(self.pages.remove(&page).is_some());
        }
    }

    /// Unmaps a range that was not mapped as one. Leaves decide where that ends, so the count that
    /// the driver gives is taken as it is, as long as all of it was mapped.
    fn unmap(&mut self, page: u64, count: u64) {
        let count = count.min((1 << 52) - page);
        let bytes = self.domain.unmap(Iova::new(page << 12), count << 12);
        if !self.pages.contains_key(&page) {
            assert_eq!(bytes, 0);
        }
        for gone in page..page + (bytes >> 12) {
            assert!(self.pages.remove(&gone).is_some(), "{gone:#x} was not mapped");
        }
        // What is left of an area is now as many areas as it has pages in a row.
        self.areas.clear();
        for &page in self.pages.keys() {
            match self.areas.last_mut() {
                Some((first, count)) if *first + *count == page => *count += 1,
                _ => self.areas.push((page, 1)),
            }
        }
    }
}

/// Runs that continue each other, made one.
fn join(runs: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut joined: Vec<(u64, u64)> = Vec::new();
    for (start, len) in runs {
        match joined.last_mut() {
            Some((first, sum)) if *first + *sum == start => *sum += len,
            _ => joined.push((start, len)),
        }
    }
    joined
}

fn joined(runs: &[PhysRun]) -> Vec<(u64, u64)> {
    join(runs.iter().map(|run| (run.start.get(), run.len)).collect())
}

fn run(policy: Policy, ops: &[Op]) {
    let mut pair = Pair::new(policy);
    for (index, &op) in ops.iter().enumerate() {
        pair.apply(op);
        if index % 16 == 0 {
            pair.sweep();
        }
    }
    pair.sweep();
    while pair.bench.driver.handle_interrupt() {}
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_device_reaches_what_is_mapped_and_nothing_else(
        ops in proptest::collection::vec(op(), 1..120),
    ) {
        run(Policy::Adversarial, &ops);
    }

    #[test]
    fn hardware_that_forgets_does_not_matter(
        ops in proptest::collection::vec(op(), 1..60),
        seed: u64,
    ) {
        run(Policy::EvictRandom(seed), &ops);
    }
}
