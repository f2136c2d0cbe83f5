//! The NVMe controller under wild software: it comes to rest, a reset brings it back, and as long as
//! software keeps to queues and PRPs, it writes into the memory that they name and no other.

#![no_main]
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_endpoints::{MemoryStorage, Namespace, Nvme, NvmeConfig, Storage};
use lychgate_fuzz::host::{Host, Words};
use lychgate_model::{PciFunction, RegisterFile, Service};

const MEMORY: u64 = 0x4_0000;
const PAGE: u64 = 4096;
/// Pages of queues; those behind are for data and PRP lists.
const ADMIN_SQ: u64 = 0;
const ADMIN_CQ: u64 = PAGE;
const IO_SQ: u64 = 2 * PAGE;
const IO_CQ: u64 = 3 * PAGE;
const DATA_PAGES: u64 = MEMORY / PAGE - 4;
const ENTRIES: u32 = 16;

const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;
const DOORBELLS: u64 = 0x1000;
/// EN, with entries of 64 and 16 bytes.
const ENABLE: u32 = 1 | 6 << 16 | 4 << 20;

const IDENTIFY: u8 = 0x06;
const GET_LOG_PAGE: u8 = 0x02;
const CREATE_CQ: u8 = 0x05;
const GET_FEATURES: u8 = 0x0a;
const READ: u8 = 0x02;
const ADMIN_OPCODES: [u8; 10] =
    [IDENTIFY, GET_LOG_PAGE, GET_FEATURES, 0x09, 0x08, 0x0c, CREATE_CQ, 0x01, 0x04, 0x00];
const IO_OPCODES: [u8; 6] = [READ, 0x01, 0x05, 0x08, 0x09, 0x00];

#[derive(Arbitrary, Debug)]
struct Input {
    hole: (u16, u16),
    max_transfer_log2: u8,
    /// Steps that keep to the rules of queues, each command by itself.
    orderly: Vec<Command>,
    /// Steps that do not.
    wild: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
struct Command {
    admin: bool,
    opcode: u8,
    flags: u8,
    nsid: u8,
    prp1: Pointer,
    prp2: Pointer,
    dwords: [Dword; 6],
    /// Pages that a PRP list at PRP2 shall name.
    list: Vec<Pointer>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Pointer {
    Page(u8),
    Byte(u32),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Dword {
    Zero,
    Small(u8),
    Halves(u8, u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write {
        bar: u8,
        offset: Offset,
        value: Value,
        width: u8,
    },
    /// A store through a mapping, which the controller does not see.
    Store {
        word: u16,
        value: Value,
    },
    Read {
        bar: u8,
        offset: Offset,
        width: u8,
    },
    Configure {
        at: u16,
        bytes: [u8; 4],
        len: u8,
    },
    Memory {
        page: u8,
        offset: u16,
        bytes: [u8; 16],
    },
    Push(Command),
    Doorbell {
        queue: u8,
        head: bool,
        value: u16,
    },
    Reset,
    Start,
    Serve,
}

#[derive(Arbitrary, Debug)]
enum Offset {
    Register(u8),
    Doorbell(u8),
    Msix(u16),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Value {
    Enable,
    Page(u8),
    Any(u64),
}

impl Pointer {
    fn get(self) -> u64 {
        match self {
            Self::Page(page) => (4 + u64::from(page) % DATA_PAGES) * PAGE,
            Self::Byte(at) => 4 * PAGE + u64::from(at & !3) % (DATA_PAGES * PAGE),
            Self::Any(at) => at,
        }
    }
}

impl Dword {
    fn get(self) -> u32 {
        match self {
            Self::Zero => 0,
            Self::Small(value) => u32::from(value % 16),
            Self::Halves(low, high) => u32::from(low) | u32::from(high) << 16,
            Self::Any(value) => value,
        }
    }
}

impl Offset {
    fn aligned(&self, width: usize) -> u64 {
        let offset = match *self {
            Self::Register(offset) => u64::from(offset % 0x40),
            Self::Doorbell(index) => DOORBELLS + 4 * u64::from(index % 16),
            Self::Msix(offset) => 0x2000 + u64::from(offset % 0x2000),
            Self::Any(offset) => offset,
        };
        offset & !(width as u64 - 1)
    }
}

impl Value {
    fn get(&self) -> u64 {
        match *self {
            Self::Enable => u64::from(ENABLE),
            Self::Page(page) => u64::from(page) % (DATA_PAGES + 8) * PAGE,
            Self::Any(value) => value,
        }
    }
}

impl Command {
    fn dwords(&self, cid: u16) -> [u32; 16] {
        let mut dwords = [0; 16];
        // Fused operations and SGLs are rare, and so are opcodes that there are not.
        let flags = if self.flags < 8 { u32::from(self.flags) << 8 } else { 0 };
        let known: &[u8] = if self.admin { &ADMIN_OPCODES } else { &IO_OPCODES };
        let opcode = match self.opcode {
            0..0xe0 => known[usize::from(self.opcode) % known.len()],
            opcode => opcode,
        };
        dwords[0] = u32::from(opcode) | flags | u32::from(cid) << 16;
        dwords[1] = if self.nsid == 0xff { u32::MAX } else { u32::from(self.nsid % 4) };
        for (at, pointer) in [(6, self.prp1), (8, self.prp2)] {
            dwords[at] = (pointer.get() & 0xffff_ffff) as u32;
            dwords[at + 1] = (pointer.get() >> 32) as u32;
        }
        for (to, dword) in dwords[10..].iter_mut().zip(self.dwords) {
            *to = dword.get();
        }
        dwords
    }
}

struct Bench {
    host: Arc<Host>,
    words: Arc<Words>,
    nvme: Nvme,
    /// Tails of the admin queue and of I/O queue 1.
    tails: [u32; 2],
    next_cid: u16,
}

impl Bench {
    fn new(input: &Input) -> Self {
        // The queues that orderly software uses are there.
        let start = 4 * PAGE + u64::from(input.hole.0) * 4;
        let hole = start..start + u64::from(input.hole.1);
        let host = Arc::new(Host::new(MEMORY as usize, vec![hole]));
        let words = Arc::new(Words::new(2048));
        let config = NvmeConfig {
            io_queue_pairs: 4,
            max_queue_entries: 64,
            max_transfer_log2: input.max_transfer_log2 % 6 + 1,
            ..NvmeConfig::default()
        };
        let storages: [Arc<dyn Storage>; 2] = [
            Arc::new(MemoryStorage::new(0x1_2345).expect("little memory")),
            Arc::new(MemoryStorage::read_only(&[3; 8192]).expect("little memory")),
        ];
        let namespaces = storages.into_iter().map(Namespace::new).collect();
        let nvme = Nvme::new(&config, Arc::clone(&host) as _, Arc::clone(&words) as _, namespaces)
            .expect("sizes that it takes");
        let mut bench = Self { host, words, nvme, tails: [0; 2], next_cid: 1 };
        bench.start();
        bench
    }

    fn write32(&self, at: u64, value: u32) {
        self.nvme.bar_write(0, at, &value.to_le_bytes());
    }

    fn read32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.nvme.bar_read(0, at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Sets the function up after a reset, with queue pair 1.
    fn start(&mut self) {
        self.nvme.config_write(4, &[6, 0]);
        self.write32(CC, 0);
        self.write32(AQA, (ENTRIES - 1) << 16 | (ENTRIES - 1));
        for (register, page) in [(ASQ, ADMIN_SQ), (ACQ, ADMIN_CQ)] {
            self.nvme.bar_write(0, register, &page.to_le_bytes());
        }
        self.write32(CC, ENABLE);
        self.tails = [0; 2];
        let create = |opcode: u32, page: u64, more: u32| {
            let mut dwords = [0; 16];
            dwords[0] = opcode;
            dwords[6] = page as u32;
            dwords[10] = (ENTRIES - 1) << 16 | 1;
            dwords[11] = more;
            dwords
        };
        self.push(0, create(5, IO_CQ, 3));
        self.push(0, create(1, IO_SQ, 1 << 16 | 1));
        self.serve();
    }

    fn push(&mut self, queue: usize, dwords: [u32; 16]) {
        let base = [ADMIN_SQ, IO_SQ][queue];
        let bytes: Vec<u8> = dwords.iter().flat_map(|dword| dword.to_le_bytes()).collect();
        self.host.poke(base + u64::from(self.tails[queue]) * 64, &bytes);
        self.tails[queue] = (self.tails[queue] + 1) % ENTRIES;
        self.write32(DOORBELLS + 8 * queue as u64, self.tails[queue]);
    }

    /// Lets it work until it has nothing to do.
    fn serve(&self) {
        let ended = (0..100_000).any(|_| self.nvme.service() != Service::Busy);
        assert!(ended, "the controller never comes to rest");
    }

    /// Says that every completion so far was seen.
    fn reap(&self, queue: usize) {
        // The completion queue is as long as the submission queue, and no entry was left over.
        let cq = [ADMIN_CQ, IO_CQ][queue];
        let phase = |slot: u32| self.host.peek(cq + u64::from(slot) * 16 + 14, 1)[0] & 1;
        let tail = (1..ENTRIES).find(|slot| phase(*slot) != phase(0)).unwrap_or(0);
        self.write32(DOORBELLS + 8 * queue as u64 + 4, tail);
    }

    /// One command by itself: what it makes the controller write is named by it.
    fn orderly(&mut self, command: &Command) {
        let queue = usize::from(!command.admin);
        let dwords = command.dwords(self.next_cid);
        self.next_cid = self.next_cid.wrapping_add(1);
        let pointers: Vec<u8> =
            command.list.iter().take(64).flat_map(|entry| entry.get().to_le_bytes()).collect();
        if command.prp2.get() < MEMORY && !pointers.is_empty() {
            self.host.poke(command.prp2.get().max(4 * PAGE), &pointers);
        }
        let mut named = self.named(queue, &dwords);
        named.push(ADMIN_CQ..ADMIN_CQ + u64::from(ENTRIES) * 16);
        named.push(IO_CQ..IO_CQ + u64::from(ENTRIES) * 16);
        self.host.take_written();
        self.push(queue, dwords);
        self.serve();
        for written in self.host.take_written() {
            let told =
                named.iter().any(|name| name.start <= written.start && written.end <= name.end);
            assert!(told, "{written:x?} is not in {named:x?}: {dwords:x?}");
        }
        self.reap(queue);
    }

    /// The runs of memory that a command lets the controller write.
    fn named(&self, queue: usize, dwords: &[u32; 16]) -> Vec<Range<u64>> {
        let [opcode, ..] = dwords[0].to_le_bytes();
        let pair = |at: usize| u64::from(dwords[at]) | u64::from(dwords[at + 1]) << 32;
        let len = match (queue, opcode) {
            (0, IDENTIFY) => 4096,
            (0, GET_FEATURES) => 8,
            (0, GET_LOG_PAGE) => {
                ((u64::from(dwords[10] >> 16) | u64::from(dwords[11] & 0xffff) << 16) + 1) * 4
            }
            // Blocks of 512 bytes.
            (1, READ) => (u64::from(dwords[12] & 0xffff) + 1) * 512,
            _ => return Vec::new(),
        };
        let (prp1, prp2) = (pair(6), pair(8));
        let first = len.min(PAGE - prp1 % PAGE);
        let mut runs = Vec::new();
        let mut push = |start: u64, len: u64| match runs.last_mut() {
            Some(Range { end, .. }) if *end == start => *end = start.saturating_add(len),
            _ => runs.push(start..start.saturating_add(len)),
        };
        push(prp1, first);
        let mut rest = len - first;
        if rest != 0 && rest <= PAGE {
            push(prp2, rest);
        } else if rest != 0 {
            // A list, whose last slot leads on when it does not suffice.
            let mut at = prp2;
            // No transfer of these controllers needs as many.
            for _ in 0..4096 {
                if rest == 0 {
                    break;
                }
                let entry = self.host.peek(at, 8);
                let entry = u64::from_le_bytes(entry.try_into().expect("8 bytes"));
                if at % PAGE == PAGE - 8 && rest > PAGE {
                    at = entry;
                    continue;
                }
                push(entry, rest.min(PAGE));
                rest -= rest.min(PAGE);
                at = at.wrapping_add(8);
            }
        }
        runs
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Write { bar, offset, value, width } => {
                let width = 1 << (width % 4);
                let bytes = &value.get().to_le_bytes()[..width];
                self.nvme.bar_write(bar % 8, offset.aligned(width), bytes);
            }
            Step::Store { word, value } => {
                let words = self.words.words();
                let value = (value.get() & 0xffff_ffff) as u32;
                words[usize::from(*word) % words.len()].store(value, Ordering::Relaxed);
            }
            Step::Read { bar, offset, width } => {
                let width = 1 << (width % 4);
                self.nvme.bar_read(bar % 8, offset.aligned(width), &mut [0; 8][..width]);
            }
            Step::Configure { at, bytes, len } => {
                self.nvme.config_write(*at, &bytes[..usize::from(*len) % 5]);
            }
            Step::Memory { page, offset, bytes } => {
                let page = u64::from(*page) % (MEMORY / PAGE) * PAGE;
                self.host.poke(page + u64::from(*offset % 4096), bytes);
            }
            Step::Push(command) => {
                let dwords = command.dwords(self.next_cid % 8);
                self.next_cid = self.next_cid.wrapping_add(1);
                self.push(usize::from(!command.admin), dwords);
            }
            Step::Doorbell { queue, head, value } => {
                let at = DOORBELLS + 8 * u64::from(queue % 6) + 4 * u64::from(*head);
                self.write32(at, u32::from(*value % 80));
            }
            Step::Reset => self.nvme.reset(),
            Step::Start => self.start(),
            Step::Serve => self.serve(),
        }
    }
}

/// Commands that change which queues there are end what the orderly part knows of them.
fn keeps_queues(command: &Command) -> bool {
    let opcode = command.dwords(0)[0] & 0xff;
    !command.admin || !(opcode == 0 || opcode == 1 || opcode == 4 || opcode == u32::from(CREATE_CQ))
}

fuzz_target!(|input: Input| {
    let mut bench = Bench::new(&input);
    for command in input.orderly.iter().filter(|command| keeps_queues(command)).take(40) {
        bench.orderly(command);
    }
    for step in input.wild.iter().take(150) {
        bench.step(step);
    }
    bench.nvme.reset();
    bench.start();
    assert_eq!(bench.read32(CSTS), 1, "a reset brings it back");
});
