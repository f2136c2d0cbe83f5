//! DMA through a paging domain next to the same DMA through the identity domain, in one run:
//! `cargo bench -p lychgate-machine --bench dma`.
//!
//! Memory is a sealed memfd, which the machine maps, so a transfer is a translation and a copy, and
//! frames are scattered, so that every page is a leaf of its own. In the identity domain the runs of
//! the pinned frames are the bus addresses; in the paging domain they are mapped one behind the other.
//! The NVMe rows call the controller from the thread that submits and polls, without any other thread.
//! Figures are medians over rounds of both, taken in turn.

#![expect(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use lychgate_endpoints::{MemoryStorage, Namespace, Nvme, NvmeConfig};
use lychgate_iommu::{AllocFlags, Domain, Owner};
use lychgate_iommufd::MemFile;
use lychgate_machine::{FrameOrder, Machine, MachineBuilder};
use lychgate_model::{DmaRequest, DmaSegment, PciFunction, RegisterFile, Upstream};
use lychgate_types::{Bdf, Iova, Memory, PhysAddr, PhysRun, Prot};
use rustix::fs::{MemfdFlags, SealFlags};

const PAGE: u64 = 4096;
const PAGES: u64 = 1024;
const MIB: usize = 1 << 20;
const ROUNDS: usize = 41;
const OWNER: Owner = Owner(1);
/// Bus address of the first page in the paging domain.
const IOVA: u64 = 0x10_0000;

fn main() {
    let setup = Setup::new();
    println!("{:<38} {:>10} {:>10} {:>7}", "ns per operation", "translated", "identity", "ratio");
    for (name, len, write) in [
        ("read of 4 KiB", 4096, false),
        ("write of 4 KiB", 4096, true),
        ("read of 1 MiB", MIB, false),
        ("write of 1 MiB", MIB, true),
    ] {
        let mut ways = setup.ways().map(|way| Transfer::new(&setup, &way, len, write));
        let inner = if len == MIB { 4 } else { 1024 };
        compare(name, &setup, inner, |which| ways[which].run());
    }
    for (name, depth) in [("NVMe read of 4 KiB, depth 1", 1), ("NVMe read of 4 KiB, depth 32", 32)]
    {
        let mut ways = [0, 1].map(|which| {
            setup.enter(which);
            Driver::new(&setup, &setup.ways()[which])
        });
        let batches = 4 * DATA_PAGES / depth;
        compare(name, &setup, batches, |which| ways[which].batch(depth) / f64::from(depth));
    }
    println!();
    println!("{:<38} {:>10} {:>10} {:>7}", "ns per operation", "memory", "memcpy", "ratio");
    for (name, len) in [("PhysicalMemory::write of 4 KiB", 4096), ("... of 1 MiB", MIB)] {
        physical(&setup, name, len);
    }
    println!();
    pins(&setup);
    machines();
}

/// A machine with one group, and pinned memory that both domains reach.
struct Setup {
    machine: Machine,
    device: Bdf,
    file: Arc<dyn MemFile>,
    runs: Vec<PhysRun>,
    paging: Domain,
}

/// The bus address of each page.
struct Way(Vec<u64>);

impl Setup {
    fn new() -> Self {
        let device: Bdf = "0000:01:00.0".parse().unwrap();
        let order = FrameOrder::Fragmented { seed: 1 };
        let machine = MachineBuilder::new().edu(device).frames(order).build().unwrap();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = rustix::fs::memfd_create("dma", flags).unwrap();
        rustix::fs::ftruncate(&fd, PAGES * PAGE).unwrap();
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        let file = machine.memory().mem_file(fd).unwrap();
        let runs = file.pin(0, PAGES * PAGE, true).unwrap();
        let paging = {
            let mut iommu = machine.iommu().lock().unwrap();
            let id = iommu.find(device).unwrap();
            let domain = iommu.alloc_paging(id, AllocFlags::default(), None).unwrap();
            domain.map(Iova::new(IOVA), &runs, Prot::READ | Prot::WRITE).unwrap();
            Domain::Paging(domain)
        };
        Self { machine, device, file, runs, paging }
    }

    /// Through the page tables, and past them.
    fn ways(&self) -> [Way; 2] {
        let pages = |run: &PhysRun| (run.start.get()..run.start.get() + run.len).step_by(4096);
        let identity = self.runs.iter().flat_map(pages).collect();
        [Way((0..PAGES).map(|page| IOVA + page * PAGE).collect()), Way(identity)]
    }

    /// Attaches the device's group to the domain of a way.
    fn enter(&self, way: usize) {
        let mut iommu = self.machine.iommu().lock().unwrap();
        let group = iommu.group(iommu.find(self.device).unwrap()).unwrap();
        iommu.release_group(group);
        if way == 0 {
            iommu.claim_group(group, OWNER).unwrap();
            iommu.attach_group(group, OWNER, self.paging.clone()).unwrap();
        }
        let paging = matches!(iommu.group_domain(group), Some(Domain::Paging(_)));
        let identity = matches!(iommu.group_domain(group), Some(Domain::Identity));
        assert!(if way == 0 { paging } else { identity }, "the group is in the other domain");
    }
}

/// Both ways in turn: `run` gives the nanoseconds of one operation, of which `inner` reach every page.
/// As many come before those that count, because the change of domains has emptied the caches.
fn compare(name: &str, setup: &Setup, inner: u32, mut run: impl FnMut(usize) -> f64) {
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        for (way, samples) in samples.iter_mut().enumerate() {
            setup.enter(way);
            (0..inner).for_each(|_| {
                run(way);
            });
            let sum: f64 = (0..inner).map(|_| run(way)).sum();
            samples.push(sum / f64::from(inner));
        }
    }
    let [translated, identity] = samples.map(median);
    row(name, translated, identity);
}

fn row(name: &str, cost: f64, peer: f64) {
    println!("{name:<38} {cost:>10.0} {peer:>10.0} {:>7.2}", cost / peer);
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn nanoseconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64() * 1e9
}

/// Transfers over the whole memory, one behind the other, as segments of pages.
struct Transfer {
    upstream: Arc<dyn Upstream>,
    requester: lychgate_types::RequesterId,
    segments: Vec<DmaSegment>,
    pages: usize,
    next: usize,
    buffer: Vec<u8>,
    write: bool,
}

impl Transfer {
    fn new(setup: &Setup, way: &Way, len: usize, write: bool) -> Self {
        let segment = |at: &u64| DmaSegment { start: Iova::new(*at), len: PAGE };
        Self {
            upstream: setup.machine.upstream(),
            requester: setup.device.requester,
            segments: way.0.iter().map(segment).collect(),
            pages: len / 4096,
            next: 0,
            buffer: vec![1; len],
            write,
        }
    }

    fn run(&mut self) -> f64 {
        let segments = &self.segments[self.next..self.next + self.pages];
        self.next = (self.next + self.pages) % self.segments.len();
        let (requester, initiator) = (self.requester, &"benchmark");
        let request = DmaRequest { requester, pasid: None, segments, initiator };
        let (upstream, buffer) = (&self.upstream, &mut self.buffer);
        let write = self.write;
        nanoseconds(|| {
            let done = if write {
                upstream.write(&request, buffer)
            } else {
                upstream.read(&request, buffer)
            };
            black_box(done).unwrap();
        })
    }
}

struct Registers(Vec<AtomicU32>);

impl RegisterFile for Registers {
    fn words(&self) -> &[AtomicU32] {
        &self.0
    }
}

const ENTRIES: u32 = 64;
const FIRST_DATA_PAGE: usize = 16;
const DATA_PAGES: u32 = 128;

/// A controller of its own, and the smallest driver for it.
struct Driver {
    nvme: Nvme,
    registers: Arc<Registers>,
    memory: Arc<lychgate_machine::PhysicalMemory>,
    /// Bus and physical address of each page.
    bus: Vec<u64>,
    frames: Vec<u64>,
    admin: Queue,
    io: Queue,
    block: u32,
}

#[derive(Default)]
struct Queue {
    id: u16,
    tail: u32,
    head: u32,
    round: u16,
}

impl Queue {
    /// Submission and completion queue take a page each.
    fn pages(&self) -> [usize; 2] {
        [usize::from(self.id) * 2, usize::from(self.id) * 2 + 1]
    }
}

impl Driver {
    /// In the domain that the group is attached to now.
    fn new(setup: &Setup, way: &Way) -> Self {
        let registers = Arc::new(Registers((0..2048).map(|_| AtomicU32::new(0)).collect()));
        let config = NvmeConfig { requester: setup.device.requester, ..NvmeConfig::default() };
        let disk = MemoryStorage::new(16 << 20).unwrap();
        let nvme = Nvme::new(
            &config,
            setup.machine.upstream(),
            Arc::clone(&registers) as _,
            vec![Namespace::new(Arc::new(disk))],
        );
        let mut driver = Self {
            nvme: nvme.unwrap(),
            registers,
            memory: Arc::clone(setup.machine.memory()),
            bus: way.0.clone(),
            frames: setup.ways()[1].0.clone(),
            admin: Queue::default(),
            io: Queue { id: 1, ..Queue::default() },
            block: 0,
        };
        for page in 0..FIRST_DATA_PAGE {
            driver.memory.write(PhysAddr::new(driver.frames[page]), &[0; 4096]).unwrap();
        }
        driver.nvme.config_write(4, &6_u16.to_le_bytes());
        driver.set(0x24, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        for (at, page) in [(0x28, 0), (0x30, 1)] {
            driver.set(at, low(driver.bus[page]));
            driver.set(at + 4, low(driver.bus[page] >> 32));
        }
        driver.set(0x14, 4 << 20 | 6 << 16 | 1);
        driver.nvme.service();
        assert_eq!(driver.registers.0[7].load(Ordering::Acquire) & 3, 1, "ready");
        let size = (ENTRIES - 1) << 16 | 1;
        driver.submit(true, [5, 0, size, 1], 3);
        driver.complete(true, 1);
        driver.submit(true, [1, 0, size, 1 << 16 | 1], 2);
        driver.complete(true, 1);
        driver
    }

    fn set(&self, offset: usize, value: u32) {
        self.registers.0[offset / 4].store(value.to_le(), Ordering::Release);
    }

    /// Reads `depth` times one page each, and gives the nanoseconds from the first submission to
    /// the last completion.
    fn batch(&mut self, depth: u32) -> f64 {
        nanoseconds(|| {
            for _ in 0..depth {
                let page = FIRST_DATA_PAGE + (self.block % DATA_PAGES) as usize;
                self.submit(false, [2, 1, self.block * 8, 0], page);
                self.block = (self.block + 1) % 4096;
            }
            self.complete(false, depth);
        })
    }

    /// Opcode, NSID, command dwords 10 and 11, and the page of PRP 1; dword 12 is 8 blocks.
    fn submit(&mut self, admin: bool, [opcode, nsid, dw10, dw11]: [u32; 4], page: usize) {
        let prp = self.bus[page];
        let queue = if admin { &mut self.admin } else { &mut self.io };
        let mut command = [0; 64];
        let dwords =
            [(0, opcode | queue.tail << 16), (1, nsid), (6, low(prp)), (7, low(prp >> 32))];
        for (at, dword) in dwords.into_iter().chain([(10, dw10), (11, dw11), (12, 7)]) {
            command[at * 4..at * 4 + 4].copy_from_slice(&dword.to_le_bytes());
        }
        let at = self.frames[queue.pages()[0]] + u64::from(queue.tail) * 64;
        self.memory.write(PhysAddr::new(at), &command).unwrap();
        queue.tail = (queue.tail + 1) % ENTRIES;
    }

    /// Rings the doorbell, and waits for `count` completions.
    fn complete(&mut self, admin: bool, count: u32) {
        let queue = if admin { &self.admin } else { &self.io };
        let (doorbell, tail) = (0x1000 + usize::from(queue.id) * 8, queue.tail);
        self.set(doorbell, tail);
        self.nvme.service();
        let queue = if admin { &mut self.admin } else { &mut self.io };
        for _ in 0..count {
            let at = self.frames[queue.pages()[1]] + u64::from(queue.head) * 16 + 8;
            let word = self.memory.load_u64(PhysAddr::new(at)).unwrap();
            let status = u16::try_from(word >> 48).unwrap();
            assert_eq!(status, 1 ^ (queue.round & 1), "success, in this round's phase");
            queue.head = (queue.head + 1) % ENTRIES;
            queue.round += u16::from(queue.head == 0) & 1;
            queue.round &= 1;
        }
        let head = queue.head;
        self.set(doorbell + 4, head);
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap()
}

/// Memory by its physical address, next to a copy between two buffers.
fn physical(setup: &Setup, name: &str, len: usize) {
    let from = vec![1; len];
    let mut to = vec![0; len];
    let pages = len / 4096;
    let runs = &setup.ways()[1].0[..pages];
    let runs: Vec<_> =
        runs.iter().map(|at| PhysRun { start: PhysAddr::new(*at), len: PAGE }).collect();
    let inner = if len == MIB { 4 } else { 500 };
    let mut samples = [Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let memory = nanoseconds(|| {
            for _ in 0..inner {
                setup.machine.memory().write_runs(&runs, &from).unwrap();
            }
        });
        let copy = nanoseconds(|| {
            for _ in 0..inner {
                black_box(&mut to).copy_from_slice(black_box(&from));
            }
        });
        samples[0].push(memory / f64::from(inner));
        samples[1].push(copy / f64::from(inner));
    }
    let [memory, copy] = samples.map(median);
    row(name, memory, copy);
}

/// Pins and unpins pages of the file that are pinned already, and others in an idle chunk.
fn pins(setup: &Setup) {
    for (name, pages) in [("pin and unpin of a page, ns", 1), ("... of 256 pages, scattered", 256)]
    {
        let samples = (0..ROUNDS).map(|_| {
            let once = || {
                let runs = setup.file.pin(0, pages * PAGE, true).unwrap();
                setup.file.unpin(&runs);
            };
            nanoseconds(|| (0..100).for_each(|_| once())) / 100.0
        });
        println!("{name:<38} {:>10.0}", median(samples.collect()));
    }
}

fn machines() {
    let samples = (0..ROUNDS).map(|_| {
        let device = "0000:01:00.0".parse().unwrap();
        let builder = MachineBuilder::new()
            .nvme(device, vec![lychgate_machine::NamespaceSource::Memory { bytes: 64 << 20 }]);
        let mut machine = None;
        let built = nanoseconds(|| machine = Some(builder.build().unwrap()));
        drop(machine);
        built / 1e3
    });
    println!("{:<38} {:>10.0}", "a machine with one NVMe, us", median(samples.collect()));
}
