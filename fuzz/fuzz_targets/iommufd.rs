//! `/dev/iommu`: whatever clients ask for, what devices reach is what the IO address spaces hold,
//! what is pinned is what devices reach, and nothing is left when everything is closed.

#![no_main]
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use lychgate_fuzz::client::{self, FILE, FuzzClient, OTHER_FILE, PAGE, SCRATCH, VA, VA_PAGES};
use lychgate_fuzz::content::{Content, Piece, Source};
use lychgate_fuzz::driver::FuzzDriver;
use lychgate_iommu::{DeviceId, Iommu};
use lychgate_iommufd::abi::{Argument, iommufd as abi, type1};
use lychgate_iommufd::{
    BoundDevice, Config, Context, Event, NodeKind, Observer, OpenFile, Reply, SharedIommu,
};
use lychgate_types::{Bdf, Prot, RequesterId};
use zerocopy::{FromBytes, IntoBytes};

const CONTEXTS: usize = 2;
/// The first two share a group.
const DEVICES: [(u16, usize); 3] = [(0x100, 0), (0x101, 0), (0x200, 1)];
const GROUPS: usize = 2;
/// Offset of the arrays that structures point to.
const ARRAY: usize = 0x1000;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Whether the first context is a container's.
    container: bool,
    /// Whether files are closed before devices let go of them.
    files_first: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
struct Step {
    context: bool,
    action: Action,
}

#[derive(Arbitrary, Debug)]
enum Action {
    IoasAlloc,
    Map {
        ioas: Id,
        va: Va,
        len: Len,
        iova: Iova,
        flags: u8,
        size: Size,
    },
    MapFile {
        ioas: Id,
        other: bool,
        start: u8,
        len: Len,
        iova: Iova,
        flags: u8,
    },
    Copy {
        from: Id,
        to: Id,
        len: Len,
        source: Iova,
        iova: Iova,
        flags: u8,
    },
    Unmap {
        ioas: Id,
        iova: Iova,
        len: Len,
    },
    UnmapAll {
        ioas: Id,
    },
    HwptAlloc {
        device: u8,
        pt: Id,
        flags: u8,
        data: u8,
    },
    Destroy(Id),
    Allow {
        ioas: Id,
        ranges: Vec<(Iova, Len)>,
    },
    Ranges {
        ioas: Id,
        count: u8,
    },
    Option {
        option: u8,
        set: bool,
        object: Id,
        value: u8,
    },
    VfioIoas {
        ioas: Id,
        operation: u8,
    },
    ChangeProcess,
    JoinContainer,
    MapDma {
        va: Va,
        len: Len,
        iova: Iova,
        flags: u8,
    },
    UnmapDma {
        iova: Iova,
        len: Len,
        all: bool,
    },
    SetIommu(u8),
    GetInfo(u8),
    CheckExtension(u8),
    Bind(u8),
    Attach {
        device: u8,
        pt: Id,
    },
    Replace {
        device: u8,
        pt: Id,
    },
    Detach(u8),
    Unbind(u8),
    Raw {
        command: Command,
        argument: At,
        bytes: [u8; 48],
    },
    /// Lets so much more succeed.
    Budget {
        pins: Option<u8>,
        maps: Option<u8>,
        allocs: Option<u8>,
        attaches: Option<u8>,
    },
    Client {
        privileged: bool,
        limit: Option<u8>,
    },
    Reopen,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Id {
    Small(u8),
    Any(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Va {
    Page(u8),
    Odd(u32),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    Pages(u8),
    Odd(u16),
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Iova {
    Page { region: u8, page: u8 },
    Odd { region: u8, offset: u16 },
    Any(u64),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Size {
    Right,
    Other(u8),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Command {
    Known(u8),
    Container(u8),
    Any(u32),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum At {
    Start,
    NearEnd(u8),
    Any(u64),
}

impl Id {
    fn get(self) -> u32 {
        match self {
            Self::Small(id) => u32::from(id % 10),
            Self::Any(id) => id,
        }
    }
}

impl Va {
    fn get(self) -> u64 {
        match self {
            // Some lie beyond the end.
            Self::Page(page) => VA + u64::from(page) % (VA_PAGES + 8) * PAGE,
            Self::Odd(offset) => VA + u64::from(offset) % (VA_PAGES * PAGE),
            Self::Any(va) => va,
        }
    }
}

impl Len {
    fn get(self) -> u64 {
        match self {
            Self::Pages(pages) => u64::from(pages % 20) * PAGE,
            Self::Odd(len) => u64::from(len),
            Self::Any(len) => len,
        }
    }
}

impl Iova {
    fn get(self) -> u64 {
        let starts = [0, 0x1_0000, 0xfedf_8000, (1 << 48) - 0x1_0000, u64::MAX - 0xffff];
        let start = |region: u8| starts[usize::from(region) % starts.len()];
        match self {
            Self::Page { region, page } => start(region) + u64::from(page % 16) * PAGE,
            Self::Odd { region, offset } => start(region) + u64::from(offset),
            Self::Any(iova) => iova,
        }
    }
}

#[derive(Default)]
struct Journal(Mutex<Vec<Event>>);

impl Observer for Journal {
    fn event(&self, event: &Event) {
        self.0.lock().expect("nobody panics with it").push(*event);
    }
}

/// An area that a call has added.
struct Mapped {
    serial: u64,
    iova: u64,
    len: u64,
    prot: Prot,
}

/// An object of a context.
type Key = (usize, u32);

/// What there should be.
#[derive(Default)]
struct Model {
    ioases: BTreeSet<Key>,
    /// The numbers of IOASes in events, as far as they have shown.
    serials: BTreeMap<Key, u64>,
    contents: BTreeMap<u64, Content>,
    /// Page tables that were asked for: the IOAS of each.
    hwpts: BTreeMap<Key, u32>,
    /// Page tables that attaching made, some of them gone.
    automatic: BTreeMap<Key, u32>,
    compat: [Option<u32>; CONTEXTS],
    /// The IOAS that a group is attached to.
    groups: [Option<Key>; GROUPS],
    attached: [bool; DEVICES.len()],
}

struct World {
    driver: Arc<FuzzDriver>,
    iommu: SharedIommu,
    journal: Arc<Journal>,
    client: FuzzClient,
    contexts: Vec<Arc<Context>>,
    kinds: [NodeKind; CONTEXTS],
    ids: Vec<DeviceId>,
    bound: [Option<(usize, BoundDevice)>; DEVICES.len()],
    model: Model,
}

impl World {
    fn new(input: &Input) -> Self {
        let driver = FuzzDriver::new();
        let mut iommu = Iommu::new();
        let bdf = |id| Bdf { segment: 0, requester: RequesterId::new(id) };
        let ids = DEVICES.iter().map(|(id, _)| driver.add(&mut iommu, bdf(*id))).collect();
        let first = if input.container { NodeKind::VfioContainer } else { NodeKind::Iommu };
        let mut world = Self {
            driver,
            iommu: Arc::new(Mutex::new(iommu)),
            journal: Arc::default(),
            client: FuzzClient::new(),
            contexts: Vec::new(),
            kinds: [first, NodeKind::Iommu],
            ids,
            bound: [const { None }; DEVICES.len()],
            model: Model::default(),
        };
        world.contexts = (0..CONTEXTS).map(|context| world.open(context)).collect();
        world
    }

    fn open(&self, context: usize) -> Arc<Context> {
        let config = Config {
            node: self.kinds[context],
            device_number: (10, 127),
            allow_unsafe_interrupts: false,
        };
        Context::open(Arc::clone(&self.iommu), Arc::clone(&self.journal) as _, config)
    }

    fn step(&mut self, step: &Step) {
        let context = usize::from(step.context);
        match &step.action {
            Action::Bind(device) => self.bind(context, usize::from(*device) % DEVICES.len()),
            Action::Attach { device, pt } => self.attach(usize::from(*device), pt.get(), false),
            Action::Replace { device, pt } => self.attach(usize::from(*device), pt.get(), true),
            Action::Detach(device) => {
                let device = usize::from(*device) % DEVICES.len();
                if let Some((_, bound)) = &self.bound[device] {
                    bound.detach();
                    self.model.detach(device);
                }
            }
            Action::Unbind(device) => self.unbind(usize::from(*device) % DEVICES.len()),
            Action::Budget { pins, maps, allocs, attaches } => {
                let left = |count: &Option<u8>| count.map(|count| u32::from(count % 16));
                self.client.books.fail_after(left(pins));
                self.driver.budget().set(left(maps), left(allocs), left(attaches));
            }
            Action::Client { privileged, limit } => {
                let limit = limit.map_or(u64::MAX, |pages| u64::from(pages) * PAGE);
                self.client.privileged.store(*privileged, Ordering::Relaxed);
                self.client.limit.store(limit, Ordering::Relaxed);
            }
            Action::JoinContainer => {
                if let Ok(id) = self.contexts[context].create_compat_ioas() {
                    self.model.compat[context] = Some(id);
                    self.model.ioases.insert((context, id));
                }
            }
            Action::Reopen => self.reopen(context),
            action => self.ask(context, action),
        }
        let mapped = self.take_events();
        assert!(mapped.is_empty(), "only calls map");
        self.check();
    }

    /// Steps that are ioctls.
    fn ask(&mut self, context: usize, action: &Action) {
        match action {
            Action::IoasAlloc => self.call(context, abi::IoasAlloc::default()),
            Action::Map { ioas, va, len, iova, flags, size } => {
                let map = abi::IoasMap {
                    flags: map_flags(*flags),
                    ioas_id: ioas.get(),
                    user_va: va.get(),
                    length: len.get(),
                    iova: iova.get(),
                    ..Default::default()
                };
                match size {
                    Size::Right => self.call(context, map),
                    Size::Other(size) => self.call_sized(context, map, u32::from(*size)),
                }
            }
            Action::MapFile { ioas, other, start, len, iova, flags } => {
                let map = abi::IoasMapFile {
                    flags: map_flags(*flags),
                    ioas_id: ioas.get(),
                    fd: if *other { OTHER_FILE } else { FILE },
                    start: u64::from(*start) * (PAGE / 2),
                    length: len.get(),
                    iova: iova.get(),
                    ..Default::default()
                };
                self.call(context, map);
            }
            Action::Copy { from, to, len, source, iova, flags } => {
                let copy = abi::IoasCopy {
                    flags: map_flags(*flags),
                    dst_ioas_id: to.get(),
                    src_ioas_id: from.get(),
                    length: len.get(),
                    dst_iova: iova.get(),
                    src_iova: source.get(),
                    ..Default::default()
                };
                self.call(context, copy);
            }
            Action::Unmap { ioas, iova, len } => {
                let unmap = abi::IoasUnmap {
                    ioas_id: ioas.get(),
                    iova: iova.get(),
                    length: len.get(),
                    ..Default::default()
                };
                self.call(context, unmap);
            }
            Action::UnmapAll { ioas } => {
                let (ioas_id, length) = (ioas.get(), u64::MAX);
                self.call(context, abi::IoasUnmap { ioas_id, length, ..Default::default() });
            }
            Action::HwptAlloc { device, pt, flags, data } => {
                let device = usize::from(*device) % DEVICES.len();
                let bound = self.bound[device].as_ref().map(|(_, bound)| bound.id());
                let alloc = abi::HwptAlloc {
                    flags: u32::from(*flags & 0xf),
                    dev_id: bound.unwrap_or(1),
                    pt_id: pt.get(),
                    data_type: u32::from(*data & 1),
                    data_len: u32::from(*data >> 1),
                    data_uptr: SCRATCH,
                    ..Default::default()
                };
                self.call(context, alloc);
            }
            Action::Destroy(id) => {
                self.call(context, abi::Destroy { id: id.get(), ..Default::default() });
            }
            Action::Allow { ioas, ranges } => {
                let ranges = &ranges[..ranges.len().min(16)];
                for (index, (first, len)) in ranges.iter().enumerate() {
                    let last = first.get().wrapping_add(len.get());
                    let range = abi::IovaRange { start: first.get(), last };
                    self.client.put(ARRAY + 16 * index, range.as_bytes());
                }
                let allow = abi::IoasAllowIovas {
                    ioas_id: ioas.get(),
                    num_iovas: ranges.len() as u32,
                    allowed_iovas: SCRATCH + ARRAY as u64,
                    ..Default::default()
                };
                self.call(context, allow);
            }
            Action::Ranges { ioas, count } => {
                let ranges = abi::IoasIovaRanges {
                    ioas_id: ioas.get(),
                    num_iovas: u32::from(*count),
                    allowed_iovas: SCRATCH + ARRAY as u64,
                    ..Default::default()
                };
                self.call(context, ranges);
            }
            Action::Option { option, set, object, value } => {
                let option = abi::Option {
                    option_id: u32::from(option % 3),
                    op: u16::from(!set),
                    object_id: object.get(),
                    val64: u64::from(value % 3),
                    ..Default::default()
                };
                self.call(context, option);
            }
            Action::VfioIoas { ioas, operation } => {
                let (ioas_id, op) = (ioas.get(), u16::from(operation % 4));
                self.call(context, abi::VfioIoas { ioas_id, op, ..Default::default() });
            }
            Action::ChangeProcess => self.call(context, abi::IoasChangeProcess::default()),
            Action::MapDma { va, len, iova, flags } => {
                let map = type1::DmaMap {
                    argsz: size_of::<type1::DmaMap>() as u32,
                    flags: u32::from(flags & 7),
                    vaddr: va.get(),
                    iova: iova.get(),
                    size: len.get(),
                };
                self.ioctl(context, type1::IOMMU_MAP_DMA, SCRATCH, map.as_bytes());
            }
            Action::UnmapDma { iova, len, all } => {
                let unmap = type1::DmaUnmap {
                    argsz: size_of::<type1::DmaUnmap>() as u32,
                    flags: u32::from(*all) << 1,
                    iova: iova.get(),
                    size: len.get(),
                };
                self.ioctl(context, type1::IOMMU_UNMAP_DMA, SCRATCH, unmap.as_bytes());
            }
            Action::SetIommu(kind) => {
                self.ioctl(context, type1::SET_IOMMU, u64::from(kind % 5), &[]);
            }
            Action::GetInfo(argsz) => {
                let info = type1::Info { argsz: u32::from(*argsz), ..Default::default() };
                self.ioctl(context, type1::IOMMU_GET_INFO, SCRATCH, info.as_bytes());
            }
            Action::CheckExtension(extension) => {
                self.ioctl(context, type1::CHECK_EXTENSION, u64::from(extension % 12), &[]);
            }
            Action::Raw { command, argument, bytes } => {
                let command = match *command {
                    Command::Known(number) => 0x3b80 | u32::from(number % 0x18),
                    Command::Container(number) => 0x3b64 + u32::from(number % 0x14),
                    Command::Any(command) => command,
                };
                let at = match *argument {
                    At::Start => SCRATCH,
                    At::NearEnd(left) => {
                        SCRATCH + client::SCRATCH_LEN as u64 - u64::from(left % 64)
                    }
                    At::Any(at) => at,
                };
                self.ioctl(context, command, at, bytes);
            }
            _ => {}
        }
    }

    fn call<A: Argument>(&mut self, context: usize, argument: A) {
        self.call_sized(context, argument, size_of::<A>() as u32);
    }

    fn call_sized<A: Argument>(&mut self, context: usize, argument: A, size: u32) {
        let mut bytes = argument.as_bytes().to_vec();
        bytes[..4].copy_from_slice(&size.to_le_bytes());
        // Nothing unknown is behind it.
        bytes.resize(256, 0);
        self.ioctl(context, A::COMMAND, SCRATCH, &bytes);
    }

    fn ioctl(&mut self, context: usize, command: u32, argument: u64, bytes: &[u8]) {
        let offset = argument.checked_sub(SCRATCH).and_then(|at| usize::try_from(at).ok());
        if let Some(offset) = offset {
            self.client.put(offset, bytes);
        }
        let peek = |world: &Self| world.client.get(offset.unwrap_or(usize::MAX / 2), 64);
        let before = peek(self);
        let reply = self.contexts[context].ioctl(&self.client, command, argument);
        let removed = self.removed();
        let mapped = self.take_events();
        match reply {
            Ok(Reply::Value(_)) => {
                let after = peek(self);
                self.model.apply(context, command, &before, &after, &mapped, removed);
            }
            // The client can have no more descriptors: what came with the file goes with it.
            Ok(Reply::FileAt { file, .. }) => file.file.release(),
            Ok(Reply::File(_)) => panic!("no ioctl here gives back a file"),
            Err(refusal) => {
                assert!(mapped.is_empty(), "{command:#x} was refused and has mapped: {refusal}");
                assert!(!refusal.why.is_empty());
            }
        }
    }

    /// The bytes that the events say were unmapped.
    fn removed(&self) -> u64 {
        let events = self.journal.0.lock().expect("nobody panics with it");
        events
            .iter()
            .map(|event| if let Event::Unmapped { len, .. } = event { *len } else { 0 })
            .sum()
    }

    /// Does to the model what events say went away; gives what they say came.
    fn take_events(&mut self) -> Vec<Mapped> {
        let events = std::mem::take(&mut *self.journal.0.lock().expect("nobody panics with it"));
        let mut mapped = Vec::new();
        for event in events {
            match event {
                Event::Mapped { ioas, iova, len, prot } => {
                    mapped.push(Mapped { serial: ioas, iova, len, prot });
                }
                Event::Unmapped { ioas, iova, len } => {
                    let content = self.model.contents.get_mut(&ioas);
                    content.expect("something was mapped").remove(iova, iova + (len - 1));
                }
                _ => {}
            }
        }
        mapped
    }

    fn bind(&mut self, context: usize, device: usize) {
        if self.bound[device].is_some() {
            return;
        }
        let reference = Context::from_file(self.contexts[context].as_ref()).expect("a context");
        if let Ok(bound) = reference.bind(self.ids[device]) {
            assert!(!self.model.known((context, bound.id())));
            self.bound[device] = Some((context, bound));
        }
    }

    fn attach(&mut self, device: usize, pt: u32, replace: bool) {
        let device = device % DEVICES.len();
        let Some((context, bound)) = &self.bound[device] else {
            return;
        };
        let attached = if replace { bound.replace(pt) } else { bound.attach(pt) };
        let Ok(hwpt) = attached else {
            return;
        };
        let ioas = self.model.ioas_of((*context, pt));
        if hwpt != pt {
            self.model.automatic.insert((*context, hwpt), ioas);
        }
        self.model.groups[DEVICES[device].1] = Some((*context, ioas));
        self.model.attached[device] = true;
        assert!(bound.is_attached());
    }

    fn unbind(&mut self, device: usize) {
        if self.bound[device].take().is_some() {
            self.model.detach(device);
        }
    }

    fn reopen(&mut self, context: usize) {
        for device in 0..DEVICES.len() {
            if self.bound[device].as_ref().is_some_and(|(bound, _)| *bound == context) {
                self.unbind(device);
            }
        }
        self.contexts[context].release();
        self.contexts[context] = self.open(context);
        assert!(self.take_events().is_empty());
        self.model.close(context);
    }

    /// Devices reach what their IOAS holds, and just that is pinned.
    fn check(&self) {
        let mut used: BTreeSet<Key> = self.model.groups.iter().flatten().copied().collect();
        used.extend(self.model.hwpts.iter().map(|((context, _), ioas)| (*context, *ioas)));
        let mut frames = BTreeSet::new();
        for key in &used {
            frames.extend(self.model.pages(*key).values().map(|(frame, _)| *frame));
        }
        let frames: Vec<u64> = frames.into_iter().collect();
        assert_eq!(self.client.books.pinned(), frames, "what is pinned");
        for (requester, group) in DEVICES {
            let expected = self.model.groups[group].map(|key| self.model.pages(key));
            let reach = self.driver.reach(RequesterId::new(requester));
            assert_eq!(reach, expected, "what {requester:#x} reaches");
        }
    }

    /// Closes everything.
    fn close(mut self, files_first: bool) {
        if files_first {
            self.contexts.iter().for_each(|context| context.release());
        }
        for bound in &mut self.bound {
            *bound = None;
        }
        if !files_first {
            self.contexts.iter().for_each(|context| context.release());
        }
        self.take_events();
        assert!(self.model.contents.values().all(|content| content.pieces().next().is_none()));
        assert!(self.client.books.balanced(), "pins or charges are left: {:?}", self.client.books);
        for (requester, _) in DEVICES {
            assert_eq!(self.driver.reach(RequesterId::new(requester)), None);
        }
    }
}

impl Model {
    fn known(&self, key: Key) -> bool {
        self.ioases.contains(&key) || self.hwpts.contains_key(&key)
    }

    /// The IOAS that an attachment to an object leads to.
    fn ioas_of(&self, key: Key) -> u32 {
        if self.ioases.contains(&key) {
            return key.1;
        }
        let hwpt = self.hwpts.get(&key).or_else(|| self.automatic.get(&key));
        *hwpt.expect("a device is attached to something that there is not")
    }

    fn detach(&mut self, device: usize) {
        self.attached[device] = false;
        let group = DEVICES[device].1;
        let others = DEVICES.iter().zip(self.attached);
        if !others.into_iter().any(|((_, other), attached)| *other == group && attached) {
            self.groups[group] = None;
        }
    }

    /// Does what a successful call says.
    fn apply(
        &mut self,
        context: usize,
        command: u32,
        before: &[u8],
        after: &[u8],
        mapped: &[Mapped],
        removed: u64,
    ) {
        // What the caller's structure does not have is 0.
        let mut before = before.to_vec();
        if command & 0x80 != 0 {
            let size = u32::read_from_prefix(&before).map_or(0, |(size, _)| size as usize);
            before.iter_mut().skip(size).for_each(|byte| *byte = 0);
        }
        let before = &before;
        match command {
            abi::IoasAlloc::COMMAND => {
                let alloc: abi::IoasAlloc = read(after);
                assert!(!self.known((context, alloc.out_ioas_id)));
                self.ioases.insert((context, alloc.out_ioas_id));
            }
            abi::IoasMap::COMMAND => {
                let (map, answer): (abi::IoasMap, abi::IoasMap) = (read(before), read(after));
                let fixed = map.flags & abi::MAP_FIXED_IOVA != 0;
                assert!(!fixed || map.iova == answer.iova);
                self.one((context, map.ioas_id), mapped, answer.iova, map.length);
                self.insert(&mapped[0], Source::Memory, map.user_va);
            }
            abi::IoasMapFile::COMMAND => {
                let (map, answer): (abi::IoasMapFile, abi::IoasMapFile) =
                    (read(before), read(after));
                assert!(map.flags & abi::MAP_FIXED_IOVA == 0 || map.iova == answer.iova);
                self.one((context, map.ioas_id), mapped, answer.iova, map.length);
                self.insert(&mapped[0], Source::File(map.fd), map.start);
            }
            abi::IoasCopy::COMMAND => {
                let (copy, answer): (abi::IoasCopy, abi::IoasCopy) = (read(before), read(after));
                assert!(copy.flags & abi::MAP_FIXED_IOVA == 0 || copy.dst_iova == answer.dst_iova);
                self.copy(context, &copy, answer.dst_iova, mapped);
            }
            abi::IoasUnmap::COMMAND => {
                let (unmap, answer): (abi::IoasUnmap, abi::IoasUnmap) = (read(before), read(after));
                assert_eq!(answer.length, removed);
                let last = unmap.iova.saturating_add(unmap.length.wrapping_sub(1));
                let left = self.content((context, unmap.ioas_id));
                assert!(left.is_none_or(|content| content.bytes(unmap.iova, last) == 0));
            }
            type1::IOMMU_MAP_DMA => {
                let map: type1::DmaMap = read(before);
                let compat = self.compat[context].expect("there is a compatibility IOAS");
                self.one((context, compat), mapped, map.iova, map.size);
                self.insert(&mapped[0], Source::Memory, map.vaddr);
            }
            type1::IOMMU_UNMAP_DMA => {
                let (unmap, answer): (type1::DmaUnmap, type1::DmaUnmap) =
                    (read(before), read(after));
                assert_eq!(answer.size, removed);
                let all = unmap.flags & type1::DMA_UNMAP_FLAG_ALL != 0;
                let last = if all { u64::MAX } else { unmap.iova + (unmap.size - 1) };
                let compat = self.compat[context].expect("there is a compatibility IOAS");
                let left = self.content((context, compat));
                assert!(left.is_none_or(|content| content.bytes(unmap.iova, last) == 0));
            }
            abi::HwptAlloc::COMMAND => {
                let (alloc, answer): (abi::HwptAlloc, abi::HwptAlloc) = (read(before), read(after));
                assert!(!self.known((context, answer.out_hwpt_id)));
                assert!(self.ioases.contains(&(context, alloc.pt_id)));
                self.hwpts.insert((context, answer.out_hwpt_id), alloc.pt_id);
            }
            abi::Destroy::COMMAND => {
                let destroy: abi::Destroy = read(before);
                self.destroy((context, destroy.id));
            }
            abi::VfioIoas::COMMAND => {
                let (ioas, answer): (abi::VfioIoas, abi::VfioIoas) = (read(before), read(after));
                match ioas.op {
                    abi::VFIO_IOAS_SET => self.compat[context] = Some(ioas.ioas_id),
                    abi::VFIO_IOAS_CLEAR => self.compat[context] = None,
                    _ => assert_eq!(Some(answer.ioas_id), self.compat[context]),
                }
            }
            _ => assert!(mapped.is_empty() && removed == 0, "{command:#x} changes nothing"),
        }
    }

    /// A call has made one area in an IOAS.
    fn one(&mut self, key: Key, mapped: &[Mapped], iova: u64, len: u64) {
        let [area] = mapped else { panic!("one area is made") };
        assert_eq!((area.iova, area.len), (iova, len));
        self.learn(key, area.serial);
    }

    /// The events of this IOAS have this number.
    fn learn(&mut self, key: Key, serial: u64) {
        assert!(self.ioases.contains(&key));
        assert_eq!(*self.serials.entry(key).or_insert(serial), serial);
        self.contents.entry(serial).or_default();
    }

    fn insert(&mut self, area: &Mapped, source: Source, offset: u64) {
        let last = area.iova + (area.len - 1);
        let piece = Piece { first: area.iova, last, source, offset, prot: area.prot };
        self.contents.get_mut(&area.serial).expect("it was learnt").insert(piece);
    }

    fn copy(&mut self, context: usize, copy: &abi::IoasCopy, iova: u64, mapped: &[Mapped]) {
        let source = self.content((context, copy.src_ioas_id)).expect("the source has content");
        let last = copy.src_iova + (copy.length - 1);
        assert_eq!(source.bytes(copy.src_iova, last), copy.length, "a hole was copied");
        let pieces = source.within(copy.src_iova, last);
        let mut at = iova;
        for area in mapped {
            assert_eq!(area.iova, at);
            self.learn((context, copy.dst_ioas_id), area.serial);
            at = at.wrapping_add(area.len);
        }
        assert_eq!(at, iova.wrapping_add(copy.length));
        let area = mapped.first().expect("at least one area is made");
        let content = self.contents.get_mut(&area.serial).expect("it was learnt");
        for piece in pieces {
            let move_to = |at: u64| at - copy.src_iova + iova;
            let (first, last) = (move_to(piece.first), move_to(piece.last));
            content.insert(Piece { first, last, prot: area.prot, ..piece });
        }
    }

    fn destroy(&mut self, key: Key) {
        if self.ioases.remove(&key) {
            assert!(!self.hwpts.iter().any(|((context, _), ioas)| (*context, *ioas) == key));
            assert!(!self.groups.contains(&Some(key)), "it is in use");
            if self.compat[key.0] == Some(key.1) {
                self.compat[key.0] = None;
            }
            if let Some(serial) = self.serials.remove(&key) {
                let content = self.contents.remove(&serial).expect("it was learnt");
                assert_eq!(content.pieces().count(), 0, "everything is unmapped");
            }
        } else {
            assert!(self.hwpts.remove(&key).is_some(), "what was destroyed was there");
        }
    }

    /// A context is gone with all that is in it.
    fn close(&mut self, context: usize) {
        let gone = |key: &Key| key.0 == context;
        for (_, serial) in self.serials.iter().filter(|(key, _)| gone(key)) {
            let content = self.contents.remove(serial).expect("it was learnt");
            assert_eq!(content.pieces().count(), 0, "everything is unmapped");
        }
        self.ioases.retain(|key| !gone(key));
        self.serials.retain(|key, _| !gone(key));
        self.hwpts.retain(|key, _| !gone(key));
        self.automatic.retain(|key, _| !gone(key));
        self.compat[context] = None;
        assert!(!self.groups.iter().flatten().any(gone));
    }

    fn content(&self, key: Key) -> Option<&Content> {
        self.contents.get(self.serials.get(&key)?)
    }

    /// Every page of an IOAS, with its frame and rights.
    fn pages(&self, key: Key) -> BTreeMap<u64, (u64, Prot)> {
        let pieces = self.content(key).into_iter().flat_map(Content::pieces);
        let mut pages = BTreeMap::new();
        for piece in pieces {
            let len = piece.last - piece.first + 1;
            assert!((piece.first | len | piece.offset).is_multiple_of(PAGE), "{piece:x?}");
            for offset in (0..len).step_by(PAGE as usize) {
                let at = piece.offset + offset;
                let frame = match piece.source {
                    Source::Memory => client::memory_frame(at),
                    Source::File(_) => client::file_frame(at),
                };
                pages.insert(piece.first + offset, (frame, piece.prot));
            }
        }
        pages
    }
}

/// Mostly right flags.
fn map_flags(flags: u8) -> u32 {
    if flags < 0xf0 { u32::from(flags & 7) } else { u32::from(flags) }
}

fn read<T: FromBytes>(bytes: &[u8]) -> T {
    let Ok((value, _)) = T::read_from_prefix(bytes) else { panic!("enough bytes were kept") };
    value
}

fuzz_target!(|input: Input| {
    let mut world = World::new(&input);
    for step in input.steps.iter().take(100) {
        world.step(step);
    }
    world.close(input.files_first);
});
