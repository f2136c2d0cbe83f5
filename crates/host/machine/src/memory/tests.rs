//! Frames of a client that is this very process.

use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize};

use lychgate_iommufd::Accounting;
use lychgate_model::FileBytes;
use rustix::fs::{MemfdFlags, SealFlags};

use super::*;
use crate::client::{Span, Unreachable, Vma};
use crate::mapped::{self, Mapping, Window};

const PAGE: u64 = 4096;

/// This process, through `/proc/self/mem`. Shared mappings are those that a test names.
struct OwnSpace {
    memory: File,
    shared: Vec<(Vma, Option<OwnedFd>)>,
    calls: AtomicUsize,
}

impl OwnSpace {
    fn new() -> Self {
        let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
        Self { memory, shared: Vec::new(), calls: AtomicUsize::new(0) }
    }
}

impl AddressSpace for OwnSpace {
    fn process(&self) -> u32 {
        std::process::id()
    }

    fn read(&self, spans: &[Span], to: &mut [u8]) -> Result<(), Unreachable> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut rest = to;
        for span in spans {
            let (here, after) = rest.split_at_mut(span.len);
            self.memory.read_exact_at(here, span.start).map_err(|_| Unreachable)?;
            rest = after;
        }
        Ok(())
    }

    fn write(&self, spans: &[Span], from: &[u8]) -> Result<(), Unreachable> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let mut rest = from;
        for span in spans {
            let (here, after) = rest.split_at(span.len);
            self.memory.write_all_at(here, span.start).map_err(|_| Unreachable)?;
            rest = after;
        }
        Ok(())
    }

    fn vmas(&self, start: u64, len: u64) -> Result<Vec<Vma>, Unreachable> {
        let end = start + len;
        if let Some((vma, _)) =
            self.shared.iter().find(|(vma, _)| vma.start <= start && start < vma.end)
        {
            return Ok(vec![vma.clone()]);
        }
        let maps = fs::read_to_string("/proc/self/maps").map_err(|_| Unreachable)?;
        let vma = |line: &str| {
            let mut fields = line.split_whitespace();
            let (first, last) = fields.next()?.split_once('-')?;
            let rights = fields.next()?.as_bytes();
            Some(Vma {
                start: u64::from_str_radix(first, 16).ok()?,
                end: u64::from_str_radix(last, 16).ok()?,
                read: rights[0] == b'r',
                write: rights[1] == b'w',
                shared: false,
                offset: 0,
                file: None,
                name: fields.nth(3).unwrap_or("").to_owned(),
            })
        };
        Ok(maps.lines().filter_map(vma).filter(|vma| vma.start < end && vma.end > start).collect())
    }

    fn open_file(&self, vma: &Vma) -> Option<OwnedFd> {
        let (_, fd) = self.shared.iter().find(|(known, _)| known == vma)?;
        fd.as_ref()?.try_clone().ok()
    }

    fn user(&self) -> u32 {
        1000
    }
}

/// A process with one shared mapping and no descriptor of it, until it ends.
struct Mortal {
    own: OwnSpace,
    vma: Vma,
    ended: AtomicBool,
}

impl Mortal {
    fn start(vma: Vma) -> Arc<Self> {
        Arc::new(Self { own: OwnSpace::new(), vma, ended: AtomicBool::new(false) })
    }

    fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
    }

    fn lives(&self) -> Result<&OwnSpace, Unreachable> {
        if self.ended.load(Ordering::Relaxed) { Err(Unreachable) } else { Ok(&self.own) }
    }
}

impl AddressSpace for Mortal {
    fn process(&self) -> u32 {
        std::process::id()
    }

    fn read(&self, spans: &[Span], to: &mut [u8]) -> Result<(), Unreachable> {
        self.lives()?.read(spans, to)
    }

    fn write(&self, spans: &[Span], from: &[u8]) -> Result<(), Unreachable> {
        self.lives()?.write(spans, from)
    }

    fn vmas(&self, _: u64, _: u64) -> Result<Vec<Vma>, Unreachable> {
        self.lives().map(|_| vec![self.vma.clone()])
    }

    fn open_file(&self, _: &Vma) -> Option<OwnedFd> {
        None
    }

    fn user(&self) -> u32 {
        1000
    }
}

/// Another process, by its number too.
struct Child(std::process::Child);

impl Child {
    /// One that waits, and untouched memory at the low end of its stack.
    fn start() -> (Self, u64) {
        let child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let maps = fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
        let stack = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
        let start = u64::from_str_radix(stack.split('-').next().unwrap(), 16).unwrap();
        (Self(child), start)
    }

    fn memory(&self) -> File {
        let path = format!("/proc/{}/mem", self.0.id());
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl AddressSpace for Child {
    fn process(&self) -> u32 {
        self.0.id()
    }

    fn read(&self, _: &[Span], _: &mut [u8]) -> Result<(), Unreachable> {
        Err(Unreachable)
    }

    fn write(&self, _: &[Span], _: &[u8]) -> Result<(), Unreachable> {
        Err(Unreachable)
    }

    fn number(&self) -> Option<u32> {
        Some(self.0.id())
    }

    fn vmas(&self, start: u64, len: u64) -> Result<Vec<Vma>, Unreachable> {
        let end = start + len;
        let (read, write, shared) = (true, true, false);
        let name = "[stack]".into();
        Ok(vec![Vma { start, end, read, write, shared, offset: 0, file: None, name }])
    }

    fn open_file(&self, _: &Vma) -> Option<OwnedFd> {
        None
    }

    fn user(&self) -> u32 {
        1000
    }
}

fn address(mapping: &Mapping) -> u64 {
    mapping.words64().as_ptr().addr() as u64
}

fn memfd(len: u64, seals: SealFlags) -> OwnedFd {
    let fd =
        rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&fd, len).unwrap();
    rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn shared(fd: &OwnedFd, start: u64, len: u64, offset: u64) -> Vma {
    let stat = rustix::fs::fstat(fd).unwrap();
    Vma {
        start,
        end: start + len,
        read: true,
        write: true,
        shared: true,
        offset,
        file: Some((stat.st_dev, stat.st_ino)),
        name: "/memfd:test (deleted)".into(),
    }
}

fn memory(order: FrameOrder) -> PhysicalMemory {
    PhysicalMemory::new(order, MemlockPolicy::Enforce).unwrap()
}

fn pages_of(runs: &[PhysRun]) -> Vec<u64> {
    runs.iter()
        .flat_map(|run| (0..run.len / PAGE).map(|page| run.start.get() + page * PAGE))
        .collect()
}

#[test]
fn private_memory_keeps_its_frames_and_its_alignment() {
    let memory = memory(FrameOrder::Contiguous);
    let mm = memory.mm(Arc::new(OwnSpace::new()));
    let mapping = Mapping::anonymous(16 << 20).unwrap();
    let start = address(&mapping);
    let whole = mm.pin(start, 16 << 20, true).unwrap();
    let part = mm.pin(start + 3 * PAGE, 2 * PAGE, true).unwrap();
    assert_eq!(pages_of(&part), pages_of(&whole)[3..5]);
    for (page, frame) in pages_of(&whole).iter().enumerate() {
        assert_eq!(frame % (1 << 30), (start + page as u64 * PAGE) % (1 << 30));
    }
    assert_eq!(memory.pin_count(part[0].start), 2);
    mm.unpin(&part);
    mm.unpin(&whole);
    assert_eq!(memory.total_pins(), 0);
    assert_eq!(mm.pin(start, PAGE, true).unwrap()[0].start, whole[0].start);
}

#[test]
fn a_transfer_to_private_memory_is_one_call_however_scattered() {
    let memory = memory(FrameOrder::Fragmented { seed: 7 });
    let space = Arc::new(OwnSpace::new());
    let mm = memory.mm(Arc::clone(&space) as _);
    let mapping = Mapping::anonymous(64 << 12).unwrap();
    let runs = mm.pin(address(&mapping), 64 << 12, true).unwrap();
    assert!(runs.len() > 60);
    let data: Vec<u8> =
        (0..64 << 12).map(|i: u32| i.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    memory.write_runs(&runs, &data).unwrap();
    assert_eq!(space.calls.load(Ordering::Relaxed), 1);
    let mut there = vec![0; data.len()];
    mapping.read(0, &mut there).unwrap();
    assert!(there == data);
    let mut back = vec![0; data.len()];
    memory.read_runs(&runs, &mut back).unwrap();
    assert!(back == data);
    assert_eq!(
        memory.load_u64(runs[0].start),
        Ok(u64::from_le_bytes(data[..8].try_into().unwrap()))
    );
    assert_eq!(
        memory.fetch_or_u64(runs[0].start, 1 << 63).unwrap() | 1 << 63,
        memory.load_u64(runs[0].start).unwrap()
    );
}

#[test]
fn holes_special_mappings_and_missing_rights_are_refused() {
    let memory = memory(FrameOrder::Contiguous);
    let mut space = OwnSpace::new();
    let read_only = Vma {
        write: false,
        file: None,
        shared: false,
        ..shared(&memfd(0, SealFlags::empty()), 0x10_0000, 0x4000, 0)
    };
    let named = |start, name: &str| Vma {
        start,
        end: start + 0x4000,
        write: true,
        name: name.into(),
        ..read_only.clone()
    };
    let device = named(0x20_0000, "/dev/dri/card0");
    let ours = named(0x30_0000, "/memfd:vfio-0000:01:00.0 (deleted)");
    space.shared = [read_only, device, ours].map(|vma| (vma, None)).into();
    let mm = memory.mm(Arc::new(space));
    assert_eq!(mm.pin(0x10_0000, 0x1000, true), Err(Errno::EFAULT));
    assert!(mm.pin(0x10_0000, 0x1000, false).is_ok());
    for start in [0x10_0000, 0x10_3000] {
        assert_eq!(mm.pin(start, 0x5000, false), Err(Errno::EFAULT), "past the end");
    }
    for start in [0x20_0000, 0x30_0000, 0x1000, u64::MAX - 0xfff] {
        assert_eq!(mm.pin(start, 0x1000, false), Err(Errno::EFAULT), "{start:#x}");
    }
    assert_eq!(memory.total_pins(), 1);
}

#[test]
fn a_page_of_a_file_is_one_frame_however_it_is_reached() {
    let memory = memory(FrameOrder::Contiguous);
    let fd = memfd(8 << 20, SealFlags::SHRINK);
    let mut space = OwnSpace::new();
    space
        .shared
        .push((shared(&fd, 0x7000_0000, 0x10_0000, 0x20_0000), Some(fd.try_clone().unwrap())));
    let mapping = Mapping::shared(fd.as_fd(), 0x20_0000, 0x10_0000).unwrap();
    let nameless = shared(&fd, address(&mapping), 0x10_0000, 0x20_0000);
    space.shared.push((nameless.clone(), None));
    let mm = memory.mm(Arc::new(space));
    let file = memory.mem_file(fd.try_clone().unwrap()).unwrap();
    let by_file = file.pin(0x20_3000, PAGE, true).unwrap();
    assert_eq!(mm.pin(0x7000_3000, PAGE, true).unwrap(), by_file);
    assert_eq!(mm.pin(nameless.start + 0x3000, PAGE, true).unwrap(), by_file);
    assert_eq!(memory.mem_file(fd).unwrap().pin(0x20_3000, PAGE, true).unwrap(), by_file);
    assert_eq!(memory.pin_count(by_file[0].start), 4);
    memory.write(by_file[0].start, b"through the frame").unwrap();
    let mut bytes = [0; 17];
    mapping.read(0x3000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"through the frame");
}

#[test]
fn a_file_without_any_descriptor_is_reached_through_the_client() {
    let memory = memory(FrameOrder::Contiguous);
    let fd = memfd(1 << 20, SealFlags::empty());
    let mapping = Mapping::shared(fd.as_fd(), 0, 1 << 20).unwrap();
    let mut space = OwnSpace::new();
    space.shared.push((shared(&fd, address(&mapping), 1 << 20, 0), None));
    let mm = memory.mm(Arc::new(space));
    let runs = mm.pin(address(&mapping) + PAGE, PAGE, true).unwrap();
    memory.store_u64(runs[0].start.wrapping_add(8), 0x1122_3344_5566_7788).unwrap();
    assert_eq!(mapping.words64()[513].load(Ordering::Relaxed).to_le(), 0x1122_3344_5566_7788);
}

#[test]
fn a_file_that_was_truncated_gives_errors() {
    for seals in [SealFlags::empty(), SealFlags::GROW] {
        let memory = memory(FrameOrder::Contiguous);
        let fd = memfd(1 << 20, seals);
        let file = memory.mem_file(fd.try_clone().unwrap()).unwrap();
        let runs = file.pin(0, 1 << 20, true).unwrap();
        memory.write(runs[0].start.wrapping_add(0x8_0000), &[1; 64]).unwrap();
        rustix::fs::ftruncate(&fd, 0x8_0000).unwrap();
        let gone = runs[0].start.wrapping_add(0x8_0000);
        assert_eq!(memory.write(gone, &[1; 64]), Err(BusError { at: gone }));
        assert_eq!(memory.read(gone, &mut [0; 64]), Err(BusError { at: gone }));
        assert_eq!(memory.load_u64(gone), Err(BusError { at: gone }));
        assert_eq!(rustix::fs::fstat(&fd).unwrap().st_size, 0x8_0000, "DMA makes no file longer");
        assert_eq!(file.pin(0x8_0000, PAGE, true), Err(Errno::EINVAL));
    }
}

#[test]
fn frames_beyond_the_end_of_a_sealed_file_do_not_answer() {
    let memory = memory(FrameOrder::Contiguous);
    let file = memory.mem_file(memfd(0x3000, SealFlags::SHRINK)).unwrap();
    let runs = file.pin(0, 0x3000, true).unwrap();
    let beyond = runs[0].start.wrapping_add(0x3000);
    assert!(memory.load_u64(beyond).is_err());
    assert!(memory.write(beyond, &[0; 16]).is_err());
    memory.store_u64(runs[0].start.wrapping_add(0x2ff8), 1).unwrap();
}

#[test]
fn a_file_on_disk_is_no_memory() {
    let memory = memory(FrameOrder::Contiguous);
    let file = File::open("/proc/self/exe").unwrap();
    assert_eq!(memory.mem_file(file.into()).err(), Some(Errno::EINVAL));
}

#[test]
fn limits_refuse_nothing_where_memory_is_only_counted() {
    let memory = PhysicalMemory::new(FrameOrder::Contiguous, MemlockPolicy::Count).unwrap();
    let mm = memory.mm(Arc::new(OwnSpace::new()));
    for mode in [Accounting::User, Accounting::Mm] {
        mm.charge(1 << 30, mode, PAGE).unwrap();
        mm.uncharge(1 << 30, mode);
    }
}

#[test]
fn limits_are_those_of_the_user_or_of_the_address_space() {
    let memory = memory(FrameOrder::Contiguous);
    let [a, b] = [0, 1].map(|_| memory.mm(Arc::new(OwnSpace::new())));
    let limit = 10 * PAGE + 100;
    assert_ne!(a.id(), b.id());
    a.charge(6, Accounting::User, limit).unwrap();
    assert_eq!(b.charge(5, Accounting::User, limit), Err(Errno::ENOMEM));
    b.charge(4, Accounting::User, limit).unwrap();
    a.uncharge(6, Accounting::User);
    b.charge(6, Accounting::User, limit).unwrap();
    a.charge(10, Accounting::Mm, limit).unwrap();
    assert_eq!(a.charge(1, Accounting::Mm, limit), Err(Errno::ENOMEM));
    b.charge(10, Accounting::Mm, limit).unwrap();
    a.charge(1 << 40, Accounting::None, 0).unwrap();
    b.charge(1 << 40, Accounting::User, u64::MAX).unwrap();
}

#[test]
fn chunks_that_nobody_pins_are_let_go_in_the_end() {
    let memory = memory(FrameOrder::Contiguous);
    let fd = memfd(40 << 30, SealFlags::SHRINK);
    let file = memory.mem_file(fd).unwrap();
    let first = file.pin(0, PAGE, true).unwrap();
    file.unpin(&first);
    assert!(memory.read(first[0].start, &mut [0; 8]).is_ok(), "kept a while");
    for chunk in 1..40 {
        let runs = file.pin(chunk << 30, PAGE, true).unwrap();
        file.unpin(&runs);
    }
    assert!(memory.read(first[0].start, &mut [0; 8]).is_err());
    let pinned = file.pin(0, 40 << 30, true).unwrap();
    assert_eq!(memory.total_pins(), (40 << 30) / PAGE);
    file.unpin(&pinned);
    assert_eq!(memory.total_pins(), 0);
}

/// A file on disk, a window on it, and what it holds.
fn image(len: u32) -> (File, Window, Vec<u8>) {
    let content: Vec<u8> =
        (0..len).map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&content, 0).unwrap();
    let window = Window::new(file.as_fd(), len.into()).unwrap();
    (file, window, content)
}

fn part<'a>(file: &'a File, window: &Window, offset: u64, len: usize) -> FileBytes<'a> {
    FileBytes { file: file.as_fd(), offset, len, mapped: window.address(offset, len).unwrap() }
}

#[test]
fn bytes_of_a_file_reach_every_kind_of_memory_in_one_copy() {
    let memory = memory(FrameOrder::Fragmented { seed: 3 });
    let (file, window, content) = image(0x1_0000);
    let from = part(&file, &window, 0x1800, 0x3000);
    let expected = &content[0x1800..0x4800];
    let mut seen = vec![0; 0x3000];

    let ram = memory.alloc(0x4000).unwrap();
    memory.write_runs_from(&[PhysRun { start: ram, len: 0x3000 }], &from).unwrap();
    memory.read(ram, &mut seen).unwrap();
    assert!(seen == expected, "RAM");

    for seals in [SealFlags::SHRINK, SealFlags::empty()] {
        let client = memfd(0x4000, seals);
        let runs = memory.mem_file(client.try_clone().unwrap()).unwrap().pin(0, 0x3000, true);
        memory.write_runs_from(&runs.unwrap(), &from).unwrap();
        rustix::io::pread(&client, &mut seen[..], 0).unwrap();
        assert!(seen == expected, "a file with {seals:?}");
    }

    let (child, stack) = Child::start();
    let theirs = child.memory();
    let runs = memory.mm(Arc::new(child)).pin(stack, 0x3000, true).unwrap();
    memory.write_runs_from(&runs, &from).unwrap();
    theirs.read_exact_at(&mut seen, stack).unwrap();
    assert!(seen == expected, "private memory");
}

#[test]
fn a_file_that_is_truncated_under_its_window_is_an_error_and_not_a_signal() {
    let memory = memory(FrameOrder::Contiguous);
    let (file, window, _) = image(0x1_0000);
    let from = part(&file, &window, 0, 0x1_0000);
    file.set_len(0x800).unwrap();
    let ram = memory.alloc(0x1_0000).unwrap();
    let client = memory.mem_file(memfd(0x1_0000, SealFlags::empty())).unwrap();
    let client = client.pin(0, 0x1_0000, true).unwrap();
    let (child, stack) = Child::start();
    let theirs = memory.mm(Arc::new(child)).pin(stack, 0x1_0000, true).unwrap();
    for runs in [&[PhysRun { start: ram, len: 0x1_0000 }][..], &client, &theirs] {
        assert!(memory.write_runs_from(runs, &from).is_err());
    }
}

#[test]
fn a_transfer_from_a_file_never_makes_a_clients_file_longer_nor_reaches_this_process() {
    let memory = memory(FrameOrder::Contiguous);
    let (file, window, _) = image(0x1_0000);
    let from = part(&file, &window, 0, 0x4000);
    for seals in [SealFlags::GROW, SealFlags::SHRINK] {
        let client = memfd(0x4000, seals);
        let runs = memory.mem_file(client.try_clone().unwrap()).unwrap().pin(0, 0x4000, true);
        let past = PhysRun { start: runs.unwrap()[0].start.wrapping_add(0x1000), len: 0x4000 };
        assert!(memory.write_runs_from(&[past], &from).is_err());
        assert_eq!(rustix::fs::fstat(&client).unwrap().st_size, 0x4000);
    }
    assert_eq!(
        mapped::send(std::process::id(), from.mapped, &[Span { start: 0x1000, len: 1 }]),
        None
    );
    assert_eq!(window.address(0xf000, 0x1001), None);
    assert_eq!(window.address(u64::MAX, 2), None);
}

#[test]
fn shared_memory_of_a_process_that_ended_is_reached_through_another_one() {
    let memory = memory(FrameOrder::Contiguous);
    let fd = memfd(1 << 20, SealFlags::empty());
    let mapping = Mapping::shared(fd.as_fd(), 0, 1 << 20).unwrap();
    let vma = shared(&fd, address(&mapping), 1 << 20, 0);
    let (child, parent) = (Mortal::start(vma.clone()), Mortal::start(vma));
    let (child_mm, parent_mm) =
        (memory.mm(Arc::clone(&child) as _), memory.mm(Arc::clone(&parent) as _));
    let runs = child_mm.pin(address(&mapping) + PAGE, 2 * PAGE, true).unwrap();
    child.end();
    assert_eq!(child_mm.pin(address(&mapping), PAGE, true), Err(Errno::EFAULT));
    let bytes: Vec<u8> = (0..2 * PAGE).map(|n| n.to_le_bytes()[0]).collect();
    child_mm.write_frames(&runs, &bytes).unwrap();
    let mut there = vec![0; bytes.len()];
    mapping.read(4096, &mut there).unwrap();
    assert!(there == bytes);
    there.fill(0);
    parent_mm.read_frames(&runs, &mut there).unwrap();
    assert!(there == bytes);
    let beyond = [PhysRun { start: runs[0].start, len: 1 << 20 }];
    assert_eq!(child_mm.read_frames(&beyond, &mut vec![0; 1 << 20]), Err(Errno::EFAULT));
    parent.end();
    assert_eq!(child_mm.read_frames(&runs, &mut there), Err(Errno::EFAULT), "nobody has it");
    child_mm.unpin(&runs);
    assert_eq!(memory.total_pins(), 0);
}
