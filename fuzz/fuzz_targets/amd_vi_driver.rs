//! The AMD-Vi driver on the model: devices reach what is mapped for them, with the rights that were
//! asked for, and never anything else, on hardware that forgets only what it is told to forget.

#![no_main]
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_amd_vi::{driver, model};
use lychgate_fuzz::pages::PagePool;
use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Domain, Driver, FaultReport, FaultSink, MapError,
    PagingDomain,
};
use lychgate_model::{Access, IommuPort, Policy, Translation};
use lychgate_types::{Iova, PhysAddr, PhysRun, Prot, RequesterId, StdLocks};

/// First pages of the regions in use: the same tables, another leaf table, and tables that only a
/// larger root reaches.
const REGIONS: [u64; 5] = [0, 0x200, 0x3_fff0, 1 << (39 - 12), (1 << 52) - 64];
const REGION_PAGES: u64 = 32;
const DOMAINS: usize = 3;
/// Each id that a request can carry, and the device that it belongs to.
const REQUESTERS: [(RequesterId, usize); 3] =
    [(RequesterId::new(0x18), 0), (RequesterId::new(0x10), 0), (RequesterId::new(0x20), 1)];
const DEVICES: [RequesterId; 2] = [RequesterId::new(0x18), RequesterId::new(0x20)];
/// Where frames begin: away from the tables.
const FRAMES: u64 = 0x10_0000_0000;
/// An interrupt handler that finds more than this to do does not end.
const MOST_EVENTS: usize = 10_000;

#[derive(Arbitrary, Debug)]
struct Input {
    /// A seed for hardware that forgets at random besides; else it never forgets by itself.
    forgets: Option<u64>,
    np_cache: bool,
    operations: Vec<Operation>,
}

#[derive(Arbitrary, Debug)]
enum Operation {
    Map {
        domain: u8,
        page: Page,
        count: u8,
        frame: u8,
        step: u8,
        prot: u8,
        memory: Memory,
    },
    /// Unmaps the area that the number leads to.
    Unmap {
        domain: u8,
        which: u8,
    },
    /// Unmaps what may not be there.
    UnmapRange {
        domain: u8,
        page: Page,
        count: u8,
    },
    Attach {
        device: bool,
        to: u8,
        memory: Memory,
    },
    /// Puts a new domain in the place of an old one.
    Renew {
        domain: u8,
        memory: Memory,
    },
    Dma {
        requester: u8,
        page: Page,
        offset: u16,
        len: u16,
        write: bool,
    },
    HandleInterrupt,
    Sweep,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
struct Page {
    region: u8,
    page: u8,
}

/// How many allocations succeed, if they may fail.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Memory {
    Enough,
    Left(u8),
}

impl Page {
    fn number(self) -> u64 {
        REGIONS[usize::from(self.region) % REGIONS.len()] + u64::from(self.page) % REGION_PAGES
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Attached {
    Blocked,
    Identity,
    Paging(usize),
}

/// A domain and what must be in it: frame and rights of each page.
struct Reference {
    domain: Arc<dyn PagingDomain>,
    pages: BTreeMap<u64, (u64, Prot)>,
    /// What was mapped by one call: first page and count.
    areas: Vec<(u64, u64)>,
}

#[derive(Default)]
struct Sink {
    faults: AtomicUsize,
}

impl FaultSink for Sink {
    fn fault(&self, _: &FaultReport) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    fn faults_lost(&self) {}
}

struct Machine {
    memory: Arc<PagePool>,
    port: Arc<model::AmdVi>,
    driver: driver::AmdVi<PagePool, StdLocks>,
    domains: Vec<Reference>,
    attached: [Attached; 2],
}

impl Machine {
    fn new(input: &Input) -> Self {
        let memory = Arc::new(PagePool::new());
        let policy = input.forgets.map_or(Policy::Adversarial, Policy::EvictRandom);
        let config = model::Config { policy, ..model::Config::default() };
        let port = Arc::new(model::AmdVi::new(config, Arc::clone(&memory) as _, Arc::new(|_| {})));
        let config = driver::Config {
            last_device: RequesterId::new(0x7f),
            np_cache: input.np_cache,
            command_buffer_len: 8,
            event_log_len: 8,
            patience: 1 << 10,
            ..driver::Config::default()
        };
        let sink = Arc::new(Sink::default());
        let driver = driver::AmdVi::new(Arc::clone(&port) as _, Arc::clone(&memory), sink, config)
            .expect("the model is an IOMMU");
        driver.probe(DEVICES[0], &[REQUESTERS[1].0]).expect("a new device");
        driver.probe(DEVICES[1], &[]).expect("a new device");
        let mut machine =
            Self { memory, port, driver, domains: Vec::new(), attached: [Attached::Blocked; 2] };
        for _ in 0..DOMAINS {
            let domain = machine.paging(Memory::Enough).expect("memory is left");
            machine.domains.push(domain);
        }
        machine
    }

    /// Runs `f` with so many allocations left.
    fn with<R>(&self, memory: Memory, f: impl FnOnce() -> R) -> R {
        if let Memory::Left(count) = memory {
            self.memory.fail_after(Some(usize::from(count % 8)));
        }
        let result = f();
        self.memory.fail_after(None);
        result
    }

    fn paging(&self, memory: Memory) -> Option<Reference> {
        let domain =
            self.with(memory, || self.driver.alloc_paging(DEVICES[0], AllocFlags::default(), None));
        match domain {
            Ok(domain) => Some(Reference { domain, pages: BTreeMap::new(), areas: Vec::new() }),
            Err(error) => {
                assert_eq!(error, AllocError::OutOfMemory);
                assert!(matches!(memory, Memory::Left(_)));
                None
            }
        }
    }

    fn apply(&mut self, operation: &Operation) {
        match *operation {
            Operation::Map { domain, page, count, frame, step, prot, memory } => {
                let domain = usize::from(domain) % DOMAINS;
                self.map(
                    domain,
                    page.number(),
                    u64::from(count % 40) + 1,
                    frame,
                    step,
                    prot,
                    memory,
                );
            }
            Operation::Unmap { domain, which } => {
                self.domains[usize::from(domain) % DOMAINS].unmap_area(usize::from(which));
            }
            Operation::UnmapRange { domain, page, count } => {
                let count = u64::from(count % 40) + 1;
                self.domains[usize::from(domain) % DOMAINS].unmap(page.number(), count);
            }
            Operation::Attach { device, to, memory } => {
                self.attach(usize::from(device), usize::from(to) % (DOMAINS + 2), memory);
            }
            Operation::Renew { domain, memory } => {
                let domain = usize::from(domain) % DOMAINS;
                for device in 0..DEVICES.len() {
                    if self.attached[device] == Attached::Paging(domain) {
                        self.attach(device, 0, Memory::Enough);
                    }
                }
                if let Some(fresh) = self.paging(memory) {
                    self.domains[domain] = fresh;
                }
            }
            Operation::Dma { requester, page, offset, len, write } => {
                let requester = usize::from(requester) % REQUESTERS.len();
                let iova = page.number() << 12 | u64::from(offset % 0x1000);
                self.dma(requester, iova, u64::from(len % 0x5000) + 1, write);
            }
            Operation::HandleInterrupt => self.handle_interrupts(),
            Operation::Sweep => self.sweep(),
        }
        assert!(!self.driver.stalled());
    }

    #[expect(clippy::too_many_arguments, reason = "they are those of the operation")]
    fn map(
        &mut self,
        domain: usize,
        page: u64,
        count: u64,
        frame: u8,
        step: u8,
        prot: u8,
        memory: Memory,
    ) {
        let prot = [Prot::READ | Prot::WRITE, Prot::READ, Prot::WRITE][usize::from(prot) % 3];
        let count = count.min((1 << 52) - page);
        // A step of 1 makes large pages, one of 0 maps a frame many times.
        let (frame, step) = (u64::from(frame % 64), u64::from(step % 3));
        let runs: Vec<PhysRun> = (0..count)
            .map(|index| FRAMES + ((frame + index * step) << 12))
            .map(|start| PhysRun { start: PhysAddr::new(start), len: 0x1000 })
            .collect();
        let reference = &self.domains[domain];
        let got = self.with(memory, || reference.domain.map(Iova::new(page << 12), &runs, prot));
        let taken = (page..page + count).find(|page| reference.pages.contains_key(page));
        match got {
            Ok(()) => assert_eq!(taken, None),
            Err(MapError::AlreadyMapped { at }) => {
                assert_eq!(Some(at.get() >> 12), taken);
                return;
            }
            Err(MapError::OutOfMemory) => {
                assert!(matches!(memory, Memory::Left(_)));
                return;
            }
            Err(error) => panic!("{error}"),
        }
        let reference = &mut self.domains[domain];
        for (page, run) in (page..).zip(&runs) {
            reference.pages.insert(page, (run.start.get() >> 12, prot));
        }
        reference.areas.push((page, count));
    }

    fn attach(&mut self, device: usize, to: usize, memory: Memory) {
        let (domain, attached) = match to {
            0 => (Domain::Blocked, Attached::Blocked),
            1 => (Domain::Identity, Attached::Identity),
            _ => {
                let domain = Arc::clone(&self.domains[to - 2].domain);
                (Domain::Paging(domain), Attached::Paging(to - 2))
            }
        };
        let old = match self.attached[device] {
            Attached::Blocked => Domain::Blocked,
            Attached::Identity => Domain::Identity,
            Attached::Paging(domain) => Domain::Paging(Arc::clone(&self.domains[domain].domain)),
        };
        match self.with(memory, || self.driver.attach(DEVICES[device], &domain, &old)) {
            Ok(()) => self.attached[device] = attached,
            Err(error) => {
                assert_eq!(error, AttachError::OutOfMemory);
                assert!(to != 0 && matches!(memory, Memory::Left(_)));
            }
        }
    }

    /// A request leads where the reference says, or stops at the byte that it says.
    fn dma(&self, requester: usize, iova: u64, len: u64, write: bool) {
        let Some(last) = iova.checked_add(len - 1) else {
            return;
        };
        let (id, device) = REQUESTERS[requester];
        let needed = if write { Prot::WRITE } else { Prot::READ };
        let lookup = |page: u64| match self.attached[device] {
            Attached::Blocked => None,
            Attached::Identity => Some(page),
            Attached::Paging(domain) => {
                let (frame, prot) = *self.domains[domain].pages.get(&page)?;
                prot.contains(needed).then_some(frame)
            }
        };
        let mut expected = Ok(Vec::new());
        for page in iova >> 12..=last >> 12 {
            let (from, to) = (iova.max(page << 12), last.min(page << 12 | 0xfff));
            match (lookup(page), &mut expected) {
                (Some(frame), Ok(runs)) => push(runs, frame << 12 | from & 0xfff, to - from + 1),
                _ => {
                    expected = Err(from);
                    break;
                }
            }
        }
        let access = if write { Access::Write } else { Access::Read };
        let request =
            Translation { requester: id, pasid: None, start: Iova::new(iova), len, access };
        let reached = OnceLock::new();
        let got = self.port.with_translation(&[request], &mut |runs| {
            let mut joined = Vec::new();
            runs.iter().for_each(|run| push(&mut joined, run.start.get(), run.len));
            reached.set(joined).expect("memory is accessed once");
            Ok(())
        });
        let got = got.map_err(|aborted| aborted.at.get());
        let got = got.map(|()| reached.into_inner().expect("what passed was accessed"));
        assert_eq!(got, expected, "{id} {iova:#x} {len:#x} {access:?}");
    }

    /// Looks at every page of every region with every requester.
    fn sweep(&self) {
        for requester in 0..REQUESTERS.len() {
            for region in REGIONS {
                for page in region..region + REGION_PAGES + 8 {
                    self.dma(requester, page << 12, 0x1000, false);
                }
            }
        }
    }

    fn handle_interrupts(&self) {
        let ended = (0..MOST_EVENTS).any(|_| !self.driver.handle_interrupt());
        assert!(ended, "the interrupt handler always finds more to do");
    }
}

impl Reference {
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

/// Appends a run, joined to one that it continues.
fn push(runs: &mut Vec<(u64, u64)>, start: u64, len: u64) {
    match runs.last_mut() {
        Some((first, sum)) if *first + *sum == start => *sum += len,
        _ => runs.push((start, len)),
    }
}

fuzz_target!(|input: Input| {
    let mut machine = Machine::new(&input);
    for operation in input.operations.iter().take(100) {
        machine.apply(operation);
    }
    machine.sweep();
    machine.handle_interrupts();
});
