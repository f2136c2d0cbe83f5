//! The AMD-Vi model at its registers: whatever software, tables and devices hold, it answers and
//! returns, and once its caches are flushed it translates as a naive reading of the tables does.

#![no_main]
#![forbid(unsafe_code)]

use std::sync::{Arc, OnceLock, Weak};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_amd_vi::model::{AmdVi, Config};
use lychgate_amd_vi::spec::registers as regs;
use lychgate_amd_vi::spec::size::Block;
use lychgate_amd_vi::spec::{Command, Efr, Efr2, Status};
use lychgate_fuzz::amd;
use lychgate_fuzz::memory::SmallMemory;
use lychgate_model::{Access, IommuPort, PciFunction, Policy, Translation};
use lychgate_types::{Iova, Memory, Mmio, Pasid, PhysAddr, RequesterId};

const START: u64 = 0x10_0000;
const PAGES: u64 = 32;
const DEVICE_TABLE: u64 = START;
const COMMANDS: u64 = START + 0x1000;
const EVENTS: u64 = START + 0x2000;
const RING_BYTES: u64 = 4096;
/// Requests grow with their length; devices bound it, and so does this.
const MOST_BYTES: u64 = 1 << 18;

#[derive(Arbitrary, Debug)]
struct Input {
    policy: Forgetting,
    efr: u64,
    efr2: u64,
    /// Every feature, or what `efr` says.
    all_features: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Forgetting {
    Plain,
    Adversarial,
    Random(u64),
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write64(Register, Word),
    Write32(Register, bool, u32),
    /// A command behind the others.
    Run(Order),
    Store(Address, Word),
    /// An entry of the device table that is nearly right.
    Entry {
        device: u8,
        mode: u8,
        root: u8,
        domain: u8,
        flags: u8,
        noise: Option<(u8, u64)>,
    },
    /// A table entry that is nearly right.
    Table {
        page: u8,
        index: u16,
        to: u8,
        next: u8,
        flags: u8,
        noise: Option<u64>,
    },
    /// Tables that lead to a page, and a request for it right after everything was flushed.
    Path(Path),
    Request(Request),
    /// A request right after everything was flushed.
    Flushed(Request),
    Msi {
        device: Device,
        at: Address,
        data: u32,
    },
    Configure {
        at: u16,
        bytes: [u8; 4],
    },
    ReadAll,
}

#[derive(Arbitrary, Debug)]
struct Path {
    mode: u8,
    /// Level of the page's entry.
    leaf: u8,
    sized: bool,
    /// IR and IW of the entry of each level, and of the device's at 0.
    rights: [u8; 7],
    frame: u64,
    domain: u8,
    request: Request,
}

#[derive(Arbitrary, Debug)]
enum Device {
    Known(u8),
    Any(u16),
}

#[derive(Arbitrary, Debug)]
enum Register {
    Low(u8),
    High(u8),
    Any(u16),
}

#[derive(Arbitrary, Debug)]
enum Address {
    Memory {
        page: u8,
        offset: u16,
    },
    /// Below a table of some level.
    Translated {
        index: u8,
        level: u8,
        low: u16,
    },
    Special(u8, u32),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
enum Word {
    Any(u64),
    Bits { address: Address, low: u16, high: u16 },
    Small(u8),
}

#[derive(Arbitrary, Debug)]
enum Order {
    Wait { at: Address, data: u64, interrupt: bool },
    Devtab(Device),
    Pages { domain: u8, at: Address, order: u8, directories: bool },
    All,
    Raw(u64, u64),
    Opcode { opcode: u8, device: Device, high: u64 },
}

#[derive(Arbitrary, Debug)]
struct Request {
    device: Device,
    pasid: Option<u16>,
    at: Address,
    len: u32,
    write: bool,
}

impl Device {
    fn id(&self) -> u16 {
        match *self {
            Self::Known(id) => u16::from(id % 4),
            Self::Any(id) => id,
        }
    }
}

impl Register {
    fn offset(&self) -> u64 {
        match *self {
            Self::Low(index) => u64::from(index % 0x40) * 8,
            Self::High(index) => 0x2000 + u64::from(index % 16) * 8,
            Self::Any(index) => u64::from(index) * 8,
        }
    }
}

impl Address {
    fn get(&self) -> u64 {
        match *self {
            // A few pages beyond the end are among them.
            Self::Memory { page, offset } => {
                START + u64::from(page) % (PAGES + 2) * 4096 + u64::from(offset % 4096)
            }
            Self::Translated { index, level, low } => {
                u64::from(index) << (12 + 9 * (u32::from(level) % 6)) | u64::from(low)
            }
            Self::Special(which, offset) => {
                let starts = [0xfee0_0000, 0xfd_f800_0000, 0xfd_f910_0000, 0xfd_fc00_0000];
                starts[usize::from(which) % starts.len()] + u64::from(offset)
            }
            Self::Any(at) => at,
        }
    }
}

impl Word {
    fn get(&self) -> u64 {
        match self {
            Self::Any(word) => *word,
            Self::Bits { address, low, high } => {
                address.get() & 0x000f_ffff_ffff_f000
                    | u64::from(*low & 0xfff)
                    | u64::from(*high) << 52
            }
            Self::Small(word) => u64::from(*word),
        }
    }
}

impl Order {
    fn words(&self) -> [u64; 2] {
        match self {
            Self::Wait { at, data, interrupt } => {
                Command::completion_wait(PhysAddr::new(at.get() & !7), *data, *interrupt).0
            }
            Self::Devtab(device) => {
                Command::invalidate_devtab_entry(RequesterId::new(device.id())).0
            }
            Self::Pages { domain, at, order, directories } => {
                let order = 12 + u32::from(*order) % 53;
                let mask = u64::MAX.checked_shl(order).unwrap_or(0);
                let block = Block { start: at.get() & mask, order };
                Command::invalidate_iommu_pages(u16::from(domain % 4), block, *directories).0
            }
            Self::All => Command::invalidate_iommu_all().0,
            Self::Raw(low, high) => [*low, *high],
            Self::Opcode { opcode, device, high } => {
                [u64::from(opcode % 16) << 60 | u64::from(device.id()), *high]
            }
        }
    }
}

struct Rig {
    memory: Arc<SmallMemory>,
    iommu: Arc<AmdVi>,
}

impl Rig {
    /// Set up as a driver would, and enabled.
    fn new(input: &Input) -> Self {
        let memory = Arc::new(SmallMemory::new(START, PAGES * 4096));
        let policy = match input.policy {
            Forgetting::Plain => Policy::Plain,
            Forgetting::Adversarial => Policy::Adversarial,
            Forgetting::Random(seed) => Policy::EvictRandom(seed),
        };
        let mut config = Config { policy, ..Config::default() };
        if !input.all_features {
            config.efr = Efr([input.efr]);
            config.efr2 = Efr2([input.efr2]);
        }
        // An interrupt's handler looks at the registers, as a driver's does.
        let behind: Arc<OnceLock<Weak<AmdVi>>> = Arc::default();
        let handler = Arc::clone(&behind);
        let msi = Arc::new(move |_| {
            let iommu: Arc<AmdVi> = handler.get().and_then(Weak::upgrade).expect("still there");
            iommu.write64(regs::STATUS, iommu.read64(regs::STATUS));
        });
        let iommu = Arc::new(AmdVi::new(config, Arc::clone(&memory) as Arc<dyn Memory>, msi));
        behind.set(Arc::downgrade(&iommu)).expect("set once");
        let rig = Self { memory, iommu };
        rig.write(regs::DEVICE_TABLE_BASE, DEVICE_TABLE);
        rig.write(regs::COMMAND_BUFFER_BASE, COMMANDS | 8 << 56);
        rig.write(regs::EVENT_LOG_BASE, EVENTS | 8 << 56);
        // IOMMU, event log and its interrupt, wait interrupt, command buffer, GA.
        rig.write(regs::CONTROL, 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 12 | 1 << 28);
        rig.iommu.config_write(2 + rig.msi_capability(), &[1]);
        rig
    }

    fn msi_capability(&self) -> u16 {
        let mut at = [0];
        self.iommu.config_read(0x34, &mut at);
        for _ in 0..48 {
            let mut header = [0; 2];
            self.iommu.config_read(u16::from(at[0]), &mut header);
            if header[0] == 5 {
                break;
            }
            at = [header[1]];
        }
        u16::from(at[0])
    }

    fn read(&self, offset: u64) -> u64 {
        self.iommu.read64(offset)
    }

    fn write(&self, offset: u64, value: u64) {
        self.iommu.write64(offset, value);
    }

    fn store(&self, at: u64, word: u64) {
        // A store that nothing answers to is dropped.
        let _ = self.memory.store_u64(PhysAddr::new(at & !7), word);
    }

    fn step(&self, step: &Step) {
        match step {
            Step::Write64(register, word) => self.write(register.offset(), word.get()),
            Step::Write32(register, high, value) => {
                self.iommu.write32(register.offset() + 4 * u64::from(*high), *value);
            }
            Step::Run(order) => self.run(order.words()),
            Step::Store(at, word) => self.store(at.get(), word.get()),
            Step::Entry { device, mode, root, domain, flags, noise } => {
                let root = START + u64::from(*root) % PAGES * 4096;
                let mut words = [0; 4];
                words[0] = 3 | u64::from(*mode % 8) << 9 | root | u64::from(*flags & 3) << 61;
                words[0] |= u64::from(*flags >> 2 & 3) << 7;
                words[1] = u64::from(*domain % 4) | u64::from(*flags >> 4) << 33;
                if let Some((which, bits)) = noise {
                    words[usize::from(*which) % 4] ^= bits;
                }
                for (index, word) in (0..).zip(words) {
                    self.store(DEVICE_TABLE + u64::from(*device % 4) * 32 + index * 8, word);
                }
            }
            Step::Table { page, index, to, next, flags, noise } => {
                let slot = u64::from(*page) % PAGES * 4096 + u64::from(*index % 512) * 8;
                let to = START + u64::from(*to) % PAGES * 4096;
                let entry = to
                    | 1
                    | u64::from(*next % 8) << 9
                    | u64::from(*flags & 3) << 61
                    | noise.unwrap_or(0);
                self.store(START + slot, entry);
            }
            Step::Path(path) => {
                self.lay(path);
                if self.flush() {
                    self.compare(&path.request);
                }
            }
            Step::Request(request) => {
                if let Some(runs) = self.request(request) {
                    let sum: u64 = runs.iter().map(|(_, len)| len).sum();
                    assert_eq!(sum, request.len());
                }
            }
            Step::Flushed(request) => {
                if self.flush() {
                    self.compare(request);
                }
            }
            Step::Msi { device, at, data } => {
                let device = RequesterId::new(device.id());
                let _ = self.iommu.remap_msi(device, at.get(), *data);
            }
            Step::Configure { at, bytes } => self.iommu.config_write(*at, bytes),
            Step::ReadAll => {
                for offset in (0..regs::REGION_BYTES + 16).step_by(8) {
                    self.read(offset);
                }
            }
        }
    }

    fn lay(&self, path: &Path) {
        let mode = 1 + u64::from(path.mode % 6);
        let leaf = 1 + u64::from(path.leaf) % mode;
        let table = |level: u64| START + (8 + level) * 4096;
        // A level whose rights are not both there is rare.
        let rights = |level: u64| match path.rights[level as usize] {
            few @ 0xc0.. => u64::from(!few & 3) << 61,
            _ => 3 << 61,
        };
        let device = DEVICE_TABLE + u64::from(path.request.device.id()) * 32;
        self.store(device, 3 | mode << 9 | table(mode) | rights(0));
        self.store(device + 8, u64::from(path.domain % 4));
        for level in leaf..=mode {
            let index = path.request.at.get() >> (12 + 9 * (level - 1)) & 511;
            let address = path.frame & 0x000f_ffff_ffff_f000;
            let entry = match level == leaf {
                true if path.sized => address | 7 << 9,
                true => address,
                false => table(level - 1) | (level - 1) << 9,
            };
            self.store(table(level) + index * 8, entry | 1 | rights(level));
        }
    }

    fn run(&self, words: [u64; 2]) {
        let base = self.read(regs::COMMAND_BUFFER_BASE) & 0x000f_ffff_ffff_f000;
        let tail = self.read(regs::COMMAND_TAIL) % RING_BYTES;
        self.store(base.wrapping_add(tail), words[0]);
        self.store(base.wrapping_add(tail + 8), words[1]);
        self.write(regs::COMMAND_TAIL, (tail + 16) % RING_BYTES);
    }

    /// INVALIDATE_IOMMU_ALL. Gives whether the command buffer could be made to run it.
    fn flush(&self) -> bool {
        self.run(Command::invalidate_iommu_all().0);
        let status = Status([self.read(regs::STATUS)]);
        let efr = self.read(regs::EFR);
        let base = PhysAddr::new(self.read(regs::COMMAND_BUFFER_BASE) & 0x000f_ffff_ffff_f000);
        let ring = self.read(regs::COMMAND_BUFFER_BASE) >> 56 & 0xf == 8;
        let answered = self.memory.load_u64(base).is_ok();
        let ran = self.read(regs::COMMAND_HEAD) == self.read(regs::COMMAND_TAIL);
        status.cmd_buf_run() && ran && ring && answered && efr >> 6 & 1 != 0
    }

    fn compare(&self, request: &Request) {
        let registers = amd::Registers {
            control: self.read(regs::CONTROL),
            device_table: self.read(regs::DEVICE_TABLE_BASE),
            exclusion_base: self.read(regs::EXCLUSION_BASE),
            exclusion_limit: self.read(regs::EXCLUSION_LIMIT),
            efr: self.read(regs::EFR),
            efr2: self.read(regs::EFR2),
        };
        let expected = amd::translate(
            &*self.memory,
            &registers,
            request.device.id(),
            request.pasid().is_some(),
            request.at.get(),
            request.len(),
            request.write,
        );
        assert_eq!(self.request(request), expected, "{request:x?} {registers:x?}");
    }

    fn request(&self, request: &Request) -> Option<Vec<(u64, u64)>> {
        let translation = Translation {
            requester: RequesterId::new(request.device.id()),
            pasid: request.pasid(),
            start: Iova::new(request.at.get()),
            len: request.len(),
            access: if request.write { Access::Write } else { Access::Read },
        };
        let mut seen = None;
        let passed = self.iommu.with_translation(&[translation], &mut |runs| {
            assert!(seen.is_none(), "memory is accessed once");
            seen = Some(runs.iter().map(|run| (run.start.get(), run.len)).collect());
            Ok(())
        });
        match passed {
            Ok(()) => Some(seen.expect("what passed was accessed")),
            Err(aborted) => {
                assert!(seen.is_none(), "nothing is accessed by a request that does not pass");
                let offset = aborted.at.get().wrapping_sub(request.at.get());
                assert!(offset <= request.len(), "{aborted} is outside of {request:x?}");
                None
            }
        }
    }
}

impl Request {
    fn pasid(&self) -> Option<Pasid> {
        self.pasid.and_then(|pasid| Pasid::new(u32::from(pasid)))
    }

    fn len(&self) -> u64 {
        // Most fit into a page.
        let len = u64::from(self.len);
        if len >> 29 != 7 { 1 + (len & 0x7f) } else { len % MOST_BYTES }
    }
}

fuzz_target!(|input: Input| {
    let rig = Rig::new(&input);
    for step in input.steps.iter().take(200) {
        rig.step(step);
    }
});
