//! edu at its registers: it moves what the registers say, when they say it, and nothing else.

#![no_main]
#![forbid(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_endpoints::{Clock, Edu, EduConfig};
use lychgate_fuzz::host::Host;
use lychgate_model::{PciFunction, Service};

const MEMORY: u64 = 0x4000;
const BUFFER: u64 = 0x4_0000;
const SOURCE: u64 = 0x80;
const DESTINATION: u64 = 0x88;
const COUNT: u64 = 0x90;
const COMMAND: u64 = 0x98;
/// Both decoding of memory and bus mastering.
const ENABLED: u8 = 6;

#[derive(Arbitrary, Debug)]
struct Input {
    narrow: bool,
    hole: (u16, u16),
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    /// A transfer that is nearly right.
    Transfer {
        memory: u16,
        device: u16,
        count: u16,
        to_memory: bool,
        interrupt: bool,
    },
    Write {
        bar: u8,
        offset: Offset,
        value: u64,
        width: u8,
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
    Enable,
    EnableMsi {
        address: u32,
        data: u16,
    },
    Fill {
        at: u16,
        value: u8,
    },
    Wait(u8),
    Serve,
    Reset,
}

#[derive(Arbitrary, Debug)]
enum Offset {
    Register(u8),
    Any(u64),
}

impl Offset {
    fn aligned(&self, width: usize) -> u64 {
        let offset = match *self {
            Self::Register(offset) => u64::from(offset),
            Self::Any(offset) => offset,
        };
        offset & !(width as u64 - 1)
    }
}

struct Time {
    start: Instant,
    passed: AtomicU64,
}

impl Clock for Time {
    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.passed.load(Ordering::Relaxed))
    }
}

struct Bench {
    host: Arc<Host>,
    time: Arc<Time>,
    mask: u64,
    edu: Edu,
}

impl Bench {
    fn new(input: &Input) -> Self {
        let hole = u64::from(input.hole.0)..u64::from(input.hole.0) + u64::from(input.hole.1);
        let host = Arc::new(Host::new(MEMORY as usize, vec![hole]));
        let time = Arc::new(Time { start: Instant::now(), passed: AtomicU64::new(0) });
        let mask = if input.narrow { 0x3fff } else { u64::MAX };
        let config = EduConfig {
            dma_mask: mask,
            clock: Arc::clone(&time) as Arc<dyn Clock>,
            ..EduConfig::default()
        };
        let edu = Edu::new(config, Arc::clone(&host) as _);
        let bench = Self { host, time, mask, edu };
        bench.enable();
        bench
    }

    fn enable(&self) {
        self.edu.config_write(4, &[ENABLED, 0]);
    }

    fn write(&self, at: u64, value: u64) {
        self.edu.bar_write(0, at, &value.to_le_bytes());
    }

    fn read(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        self.edu.bar_read(0, at, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    fn step(&self, step: &Step) {
        match step {
            Step::Transfer { memory, device, count, to_memory, interrupt } => {
                let memory = u64::from(*memory);
                let device = BUFFER + u64::from(*device % 0x1400);
                let ends = if *to_memory { (device, memory) } else { (memory, device) };
                self.write(SOURCE, ends.0);
                self.write(DESTINATION, ends.1);
                self.write(COUNT, u64::from(*count % 0x1400));
                self.write(COMMAND, 1 | u64::from(*to_memory) << 1 | u64::from(*interrupt) << 2);
            }
            Step::Write { bar, offset, value, width } => {
                let width = 1 << (width % 4);
                let bytes = &value.to_le_bytes()[..width];
                self.edu.bar_write(bar % 8, offset.aligned(width), bytes);
            }
            Step::Read { bar, offset, width } => {
                let width = 1 << (width % 4);
                self.edu.bar_read(bar % 8, offset.aligned(width), &mut [0; 8][..width]);
            }
            Step::Configure { at, bytes, len } => {
                self.edu.config_write(*at, &bytes[..usize::from(*len) % 5]);
            }
            Step::Enable => self.enable(),
            Step::EnableMsi { address, data } => {
                let mut at = [0];
                self.edu.config_read(0x34, &mut at);
                let at = u16::from(at[0]);
                self.edu.config_write(at + 4, &(address & !3).to_le_bytes());
                self.edu.config_write(at + 12, &data.to_le_bytes());
                self.edu.config_write(at + 2, &[1]);
            }
            Step::Fill { at, value } => self.host.poke(u64::from(*at), &[*value; 64]),
            Step::Wait(time) => {
                self.time.passed.fetch_add(u64::from(*time), Ordering::Relaxed);
            }
            Step::Serve => self.serve(),
            Step::Reset => self.edu.reset(),
        }
        assert!(self.host.take_written().is_empty(), "only its own time moves data");
    }

    /// Serves until it is idle: the one transfer that was commanded may write, where it was told.
    fn serve(&self) {
        let mut command = [0; 2];
        self.edu.config_read(4, &mut command);
        let enabled = command[0] & ENABLED == ENABLED;
        let (destination, count, mode) =
            (self.read(DESTINATION), self.read(COUNT), self.read(COMMAND));
        let commanded = mode & 3 == 3;
        let ended = (0..8).any(|_| self.edu.service() != Service::Busy);
        assert!(ended, "a transfer and a factorial do not take so long");
        let written = self.host.take_written();
        if written.is_empty() {
            return;
        }
        if command[0] & 2 == 0 {
            // The registers did not answer above, so what they held is not known.
            assert_eq!(written.len(), 1);
            return;
        }
        assert!(enabled && commanded, "{written:x?} without a command");
        let start = destination & self.mask;
        assert_eq!(written, vec![Range { start, end: start.saturating_add(count) }]);
        assert!(count <= 4096, "no more than the buffer holds");
        assert_eq!(self.read(COMMAND) & 1, 0, "the command has run");
    }
}

fuzz_target!(|input: Input| {
    let bench = Bench::new(&input);
    for step in input.steps.iter().take(200) {
        bench.step(step);
    }
    bench.edu.reset();
    bench.step(&Step::Serve);
});
