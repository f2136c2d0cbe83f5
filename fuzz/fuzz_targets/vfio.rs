//! VFIO's files on two functions: whatever a client asks of groups, device nodes and devices, there
//! is an answer, interrupts go only to vectors that were taken for them, and closing everything
//! leaves functions that do no DMA.

#![no_main]
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_endpoints::{Edu, EduConfig, MemoryStorage, Namespace, Nvme, NvmeConfig};
use lychgate_fuzz::client::{EVENTFDS, FILE, FuzzClient, PAGE, SCRATCH, SCRATCH_LEN, VA};
use lychgate_fuzz::driver::FuzzDriver;
use lychgate_fuzz::host::Words;
use lychgate_iommu::Iommu;
use lychgate_iommufd::abi::{iommufd, type1};
use lychgate_iommufd::{
    Client, Config, Context, MmapRequest, NodeKind, OpenFile, Reply, SharedIommu,
};
use lychgate_model::{DmaError, DmaRequest, Msi, PciFunction, Upstream};
use lychgate_types::{Bdf, Errno, RequesterId};
use lychgate_vfio::abi::*;
use lychgate_vfio::{Handler, Interrupts, Parts, Vfio, VfioPciDevice};
use zerocopy::{Immutable, IntoBytes};

const DESCRIPTORS: i32 = 8;
const FUNCTIONS: usize = 2;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Whether both functions are in one slot, and so in one group.
    together: bool,
    /// How many interrupt vectors there are, if not enough.
    vectors: Option<u8>,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    OpenContext {
        container: bool,
    },
    OpenGroup(u8),
    OpenCdev(u8),
    Close(u8),
    SetContainer {
        group: u8,
        container: u8,
    },
    SetIommu {
        container: u8,
        kind: u8,
    },
    GetDeviceFd {
        group: u8,
        function: u8,
        more: Vec<u8>,
    },
    Bind {
        file: u8,
        context: u8,
    },
    IoasAlloc(u8),
    Attach {
        file: u8,
        pt: u8,
    },
    Detach(u8),
    MapDma {
        context: u8,
        page: u8,
        iova: u8,
    },
    Map {
        context: u8,
        ioas: u8,
        page: u8,
        iova: u8,
    },
    RegionInfo {
        file: u8,
        argsz: u8,
        index: u8,
    },
    IrqInfo {
        file: u8,
        index: u8,
    },
    SetIrqs {
        file: u8,
        argsz: u8,
        data: u8,
        action: u8,
        index: u8,
        start: u8,
        count: u8,
        fds: [u8; 4],
    },
    HotReset {
        file: u8,
        count: u8,
        fds: [u8; 2],
    },
    HotResetInfo {
        file: u8,
        argsz: u8,
    },
    IoEventFd {
        file: u8,
        width: u8,
        region: u8,
        at: u16,
        value: u64,
        fd: u8,
    },
    /// Any ioctl of VFIO with any bytes.
    Raw {
        file: u8,
        command: u8,
        argument: At,
        bytes: [u8; 40],
    },
    Any {
        file: u8,
        command: u32,
        argument: u64,
    },
    Read {
        file: u8,
        region: u8,
        at: Place,
        count: u16,
    },
    Write {
        file: u8,
        region: u8,
        at: Place,
        bytes: Vec<u8>,
    },
    Mmap {
        file: u8,
        region: u8,
        offset: u16,
        len: u64,
        flags: u8,
    },
    /// edu is told to interrupt, behind the client's back.
    Interrupt(u8),
    Serve(u8),
    Budget {
        maps: Option<u8>,
        allocs: Option<u8>,
        attaches: Option<u8>,
        pins: Option<u8>,
    },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum At {
    Start,
    NearEnd(u8),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Place {
    Low(u8),
    Page(u16),
    Any(u64),
}

impl At {
    fn get(self) -> u64 {
        match self {
            Self::Start => SCRATCH,
            Self::NearEnd(left) => SCRATCH + SCRATCH_LEN as u64 - u64::from(left % 64),
            Self::Any(at) => at,
        }
    }
}

impl Place {
    fn in_region(self, region: u8) -> u64 {
        let region = region_offset(u32::from(region % 10));
        match self {
            Self::Low(at) => region + u64::from(at),
            Self::Page(at) => region + u64::from(at),
            Self::Any(at) => region.wrapping_add(at),
        }
    }
}

/// The interrupt controller: a message finds its handler, or it is a finding.
#[derive(Default)]
struct Controller {
    handlers: Mutex<BTreeMap<(u64, u32), Handler>>,
    next: AtomicU32,
    limit: Option<usize>,
}

const MESSAGES: u64 = 0x1_fee0_1000;

impl Controller {
    fn deliver(&self, address: u64, data: u32) {
        let handler = lock(&self.handlers).get(&(address, data)).cloned();
        handler.unwrap_or_else(|| panic!("a message to {address:#x}, {data:#x} is nobody's"))();
    }

    fn room(&self, count: usize) -> bool {
        self.limit.is_none_or(|limit| lock(&self.handlers).len() + count <= limit)
    }
}

impl Interrupts for Controller {
    fn request(&self, handler: Handler) -> Result<Msi, Errno> {
        self.request_block(&[handler])
    }

    fn request_block(&self, handlers: &[Handler]) -> Result<Msi, Errno> {
        assert!(handlers.len().is_power_of_two());
        if !self.room(handlers.len()) {
            return Err(Errno::ENOSPC);
        }
        let count = handlers.len() as u32;
        let first = self.next.load(Ordering::Relaxed).next_multiple_of(count);
        self.next.store(first + count, Ordering::Relaxed);
        let mut taken = lock(&self.handlers);
        for (data, handler) in (first..).zip(handlers) {
            taken.insert((MESSAGES, data), Arc::clone(handler));
        }
        Ok(Msi { address: MESSAGES, data: first })
    }

    fn free(&self, msi: Msi) {
        let freed = lock(&self.handlers).remove(&(msi.address, msi.data));
        assert!(freed.is_some(), "a vector is freed once");
    }
}

/// The way up from a function: no memory, but interrupts.
struct Up {
    controller: Arc<Controller>,
    device: OnceLock<Weak<VfioPciDevice>>,
}

impl Upstream for Up {
    fn read(&self, request: &DmaRequest<'_>, _: &mut [u8]) -> Result<(), DmaError> {
        Err(DmaError { at: request.segments[0].start })
    }

    fn write(&self, request: &DmaRequest<'_>, _: &[u8]) -> Result<(), DmaError> {
        Err(DmaError { at: request.segments[0].start })
    }

    fn msi(&self, _: RequesterId, address: u64, data: u32) {
        self.controller.deliver(address, data);
    }

    fn intx(&self, _: RequesterId, asserted: bool) {
        if let Some(device) = self.device.get().and_then(Weak::upgrade) {
            device.intx(asserted);
        }
    }
}

struct Machine {
    controller: Arc<Controller>,
    driver: Arc<FuzzDriver>,
    iommu: SharedIommu,
    vfio: Vfio,
    functions: [Arc<dyn PciFunction>; FUNCTIONS],
    names: [String; FUNCTIONS],
    client: FuzzClient,
    next: i32,
}

impl Machine {
    fn new(input: &Input) -> Self {
        let limit = input.vectors.map(|vectors| usize::from(vectors % 8));
        let controller = Arc::new(Controller { limit, ..Controller::default() });
        let up = || {
            let controller = Arc::clone(&controller);
            Arc::new(Up { controller, device: OnceLock::new() })
        };
        let ups: [Arc<Up>; FUNCTIONS] = [up(), up()];
        let edu = EduConfig { dma_delay: Duration::ZERO, ..EduConfig::default() };
        let nvme = NvmeConfig { io_queue_pairs: 3, ..NvmeConfig::default() };
        let storage = Arc::new(MemoryStorage::new(1 << 16).expect("little memory"));
        let registers = Arc::new(Words::new(2048));
        let namespaces = vec![Namespace::new(storage)];
        let nvme = Nvme::new(&nvme, Arc::clone(&ups[1]) as _, registers, namespaces);
        let functions: [Arc<dyn PciFunction>; FUNCTIONS] = [
            Arc::new(Edu::new(edu, Arc::clone(&ups[0]) as _)),
            Arc::new(nvme.expect("sizes that it takes")),
        ];
        let ids = if input.together { [0x100, 0x101] } else { [0x100, 0x200] };
        let bdfs = ids.map(|id| Bdf { segment: 0, requester: RequesterId::new(id) });
        let driver = FuzzDriver::new();
        let iommu: SharedIommu = Arc::new(Mutex::new(Iommu::new()));
        let vfio = Vfio::new(Arc::clone(&iommu));
        for ((function, bdf), up) in functions.iter().zip(bdfs).zip(&ups) {
            let device = driver.add(&mut lock(&iommu), bdf);
            let device = Arc::new(VfioPciDevice::new(Parts {
                function: Arc::clone(function),
                device,
                bdf,
                interrupts: Arc::clone(&controller) as _,
                regions: None,
            }));
            let _ = up.device.set(Arc::downgrade(&device));
            vfio.add(device).expect("a device that is not there yet");
        }
        let names = bdfs.map(|bdf| bdf.to_string());
        let client = FuzzClient::new();
        Self { controller, driver, iommu, vfio, functions, names, client, next: 0 }
    }

    fn install(&mut self, file: Arc<dyn OpenFile>) {
        let fd = self.next % DESCRIPTORS;
        self.next += 1;
        self.client.close(fd);
        assert!(!file.name().is_empty());
        self.client.install(fd, file);
    }

    fn file(&self, fd: u8) -> Option<Arc<dyn OpenFile>> {
        self.client.file(descriptor(fd))
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::OpenContext { container } => {
                let node = if *container { NodeKind::VfioContainer } else { NodeKind::Iommu };
                let config =
                    Config { node, device_number: (10, 196), allow_unsafe_interrupts: false };
                let context = Context::open(Arc::clone(&self.iommu), Arc::new(()), config);
                self.install(context);
            }
            Step::OpenGroup(number) => {
                if let Ok(file) = self.vfio.open_group(u32::from(number % 3)) {
                    self.install(file);
                }
            }
            Step::OpenCdev(index) => {
                if let Ok(file) = self.vfio.open_cdev(u32::from(index % 3)) {
                    self.install(file);
                }
            }
            Step::Close(fd) => self.client.close(descriptor(*fd)),
            Step::Read { file, region, at, count } => {
                if let Some(file) = self.file(*file) {
                    let at = at.in_region(*region);
                    let read = file.read_at(&self.client, SCRATCH, u64::from(*count), at);
                    assert!(read.ok().is_none_or(|read| read <= u64::from(*count)));
                }
            }
            Step::Write { file, region, at, bytes } => {
                if let Some(file) = self.file(*file) {
                    self.client.put(0, bytes);
                    let (at, count) = (at.in_region(*region), bytes.len() as u64);
                    let written = file.write_at(&self.client, SCRATCH, count, at);
                    assert!(written.ok().is_none_or(|written| written <= count));
                }
            }
            Step::Mmap { file, region, offset, len, flags } => {
                if let Some(file) = self.file(*file) {
                    let bit = |bit: u8| flags >> bit & 1 != 0;
                    let _ = file.mmap(&MmapRequest {
                        offset: Place::Page(0).in_region(*region) + u64::from(*offset) * PAGE,
                        len: *len,
                        read: bit(0),
                        write: bit(1),
                        exec: bit(2),
                        shared: bit(3),
                    });
                }
            }
            Step::Interrupt(value) => {
                // Where it is not decoded it is dropped, as on a bus.
                self.functions[0].bar_write(0, 0x60, &u32::from(*value).to_le_bytes());
            }
            Step::Serve(which) => {
                let function = &self.functions[usize::from(*which) % FUNCTIONS];
                for _ in 0..4 {
                    function.service();
                }
            }
            Step::Budget { maps, allocs, attaches, pins } => {
                let left = |count: &Option<u8>| count.map(|count| u32::from(count % 8));
                self.driver.budget().set(left(maps), left(allocs), left(attaches));
                self.client.books.fail_after(left(pins));
            }
            call => self.ask(call),
        }
    }

    /// Steps that are ioctls.
    fn ask(&mut self, step: &Step) {
        match *step {
            Step::SetContainer { group, container } => {
                self.call(group, VFIO_GROUP_SET_CONTAINER, &descriptor(container));
            }
            Step::SetIommu { container, kind } => {
                self.ioctl(container, type1::SET_IOMMU, u64::from(kind % 4));
            }
            Step::GetDeviceFd { group, function, ref more } => {
                let mut name = self.names[usize::from(function) % FUNCTIONS].clone().into_bytes();
                name.extend(more.iter().take(64));
                name.push(0);
                self.call(group, VFIO_GROUP_GET_DEVICE_FD, &name[..]);
            }
            Step::Bind { file, context } => {
                let iommufd = descriptor(context);
                let bind = BindIommufd { argsz: 24, iommufd, ..BindIommufd::default() };
                self.call(file, VFIO_DEVICE_BIND_IOMMUFD, &bind);
            }
            Step::IoasAlloc(context) => {
                let alloc = iommufd::IoasAlloc { size: 12, ..Default::default() };
                self.call(context, <iommufd::IoasAlloc as iommufd::Argument>::COMMAND, &alloc);
            }
            Step::Attach { file, pt } => {
                let pt_id = u32::from(pt % 6);
                let attach = AttachIommufdPt { argsz: 12, pt_id, ..AttachIommufdPt::default() };
                self.call(file, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &attach);
            }
            Step::Detach(file) => {
                let detach = DetachIommufdPt { argsz: 8, ..DetachIommufdPt::default() };
                self.call(file, VFIO_DEVICE_DETACH_IOMMUFD_PT, &detach);
            }
            Step::MapDma { context, page, iova } => {
                let map = type1::DmaMap {
                    argsz: 32,
                    flags: 3,
                    vaddr: VA + u64::from(page) * PAGE,
                    iova: u64::from(iova) << 20,
                    size: u64::from(page % 4) * PAGE,
                };
                self.call(context, type1::IOMMU_MAP_DMA, &map);
            }
            Step::Map { context, ioas, page, iova } => {
                let map = iommufd::IoasMap {
                    size: 40,
                    flags: 7,
                    ioas_id: u32::from(ioas % 6),
                    user_va: VA + u64::from(page) * PAGE,
                    length: u64::from(page % 4) * PAGE,
                    iova: u64::from(iova) << 20,
                    ..Default::default()
                };
                self.call(context, <iommufd::IoasMap as iommufd::Argument>::COMMAND, &map);
            }
            Step::RegionInfo { file, argsz, index } => {
                let (argsz, index) = (u32::from(argsz), u32::from(index % 12));
                let info = RegionInfo { argsz, index, ..RegionInfo::default() };
                self.call(file, VFIO_DEVICE_GET_REGION_INFO, &info);
            }
            Step::IrqInfo { file, index } => {
                let index = u32::from(index % 6);
                let info = IrqInfo { argsz: 16, index, ..IrqInfo::default() };
                self.call(file, VFIO_DEVICE_GET_IRQ_INFO, &info);
            }
            Step::SetIrqs { file, argsz, data, action, index, start, count, fds } => {
                let count = u32::from(count % 6);
                let data = if data < 0xf0 { 1 << (data % 3) } else { u32::from(data) };
                let action = if action < 0xf0 { 8 << (action % 3) } else { u32::from(action) };
                let set = IrqSet {
                    argsz: if argsz < 0xe0 { 20 + 4 * count } else { u32::from(argsz) },
                    flags: data | action,
                    index: u32::from(index % 6),
                    start: u32::from(start % 6),
                    count,
                };
                let mut bytes = set.as_bytes().to_vec();
                bytes.extend(fds.iter().flat_map(|fd| eventfd(*fd).to_le_bytes()));
                self.call(file, VFIO_DEVICE_SET_IRQS, &bytes[..]);
            }
            Step::HotReset { file, count, fds } => {
                let count = u32::from(count % 3);
                let reset = HotReset { argsz: 12 + 4 * count, flags: 0, count };
                let mut bytes = reset.as_bytes().to_vec();
                bytes.extend(fds.iter().flat_map(|fd| descriptor(*fd).to_le_bytes()));
                self.call(file, VFIO_DEVICE_PCI_HOT_RESET, &bytes[..]);
            }
            Step::HotResetInfo { file, argsz } => {
                let info = HotResetInfo { argsz: u32::from(argsz), ..HotResetInfo::default() };
                self.call(file, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, &info);
            }
            Step::IoEventFd { file, width, region, at, value, fd } => {
                let call = IoEventFd {
                    argsz: 32,
                    flags: 1 << (width % 5),
                    offset: Place::Page(at).in_region(region),
                    data: value,
                    fd: eventfd(fd),
                    reserved: 0,
                };
                self.call(file, VFIO_DEVICE_IOEVENTFD, &call);
            }
            Step::Raw { file, command, argument, ref bytes } => {
                let at = argument.get();
                if let Ok(offset) = usize::try_from(at.wrapping_sub(SCRATCH)) {
                    self.client.put(offset, bytes);
                }
                self.ioctl(file, VFIO_GROUP_GET_STATUS - 3 + u32::from(command % 24), at);
            }
            Step::Any { file, command, argument } => self.ioctl(file, command, argument),
            _ => {}
        }
    }

    fn call<T: IntoBytes + Immutable + ?Sized>(&mut self, file: u8, command: u32, argument: &T) {
        self.client.put(0, argument.as_bytes());
        self.ioctl(file, command, SCRATCH);
    }

    fn ioctl(&mut self, file: u8, command: u32, argument: u64) {
        let Some(file) = self.file(file) else {
            return;
        };
        match file.ioctl(&self.client, command, argument) {
            Ok(Reply::File(new)) => self.install(new.file),
            Ok(Reply::FileAt { .. }) => panic!("no call here answers so"),
            Ok(Reply::Value(value)) => assert!(value >= 0),
            Err(refusal) => assert!(!refusal.why.is_empty()),
        }
    }

    /// Closes everything.
    fn close(&self) {
        (0..DESCRIPTORS).for_each(|fd| self.client.close(fd));
        assert_eq!(lock(&self.controller.handlers).len(), 0, "vectors are given back");
        assert!(self.client.books.balanced(), "pins are left: {:?}", self.client.books);
        for function in &self.functions {
            let mut command = [0; 2];
            function.config_read(4, &mut command);
            assert_eq!(command[0] & 4, 0, "{} may still do DMA", function.name());
            // A function that is not in use sends nothing: nobody would take it.
            function.service();
        }
        for group in self.vfio.groups() {
            let file = self.vfio.open_group(group.number).expect("nobody has it open");
            file.release();
        }
        let iommu = lock(&self.iommu);
        for bdf in self.vfio.devices().iter().map(|node| node.bdf) {
            let group = iommu.find(bdf).and_then(|device| iommu.group(device));
            assert!(!iommu.group_owned(group.expect("it has a group")), "{bdf} has an owner");
            assert_eq!(self.driver.reach(bdf.requester), None, "{bdf} reaches memory");
        }
    }
}

fn descriptor(fd: u8) -> i32 {
    i32::from(fd) % (DESCRIPTORS + 1)
}

/// An eventfd, none, something else, or nothing.
fn eventfd(fd: u8) -> i32 {
    match fd % 7 {
        which @ 0..=2 => EVENTFDS[usize::from(which)],
        3 | 4 => -1,
        5 => FILE,
        _ => 99,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fuzz_target!(|input: Input| {
    let mut machine = Machine::new(&input);
    for step in input.steps.iter().take(100) {
        machine.step(step);
    }
    machine.close();
});
