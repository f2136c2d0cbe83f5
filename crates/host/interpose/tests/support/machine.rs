//! A machine with three nodes: `/dev/fake`, which counts; `/dev/vfio/probe`, which gives files out;
//! and attributes in `/sys`, of which `knob` can be written.

use std::any::Any;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use lychgate_iommufd::error::{Refusal, Result, refuse};
use lychgate_iommufd::{
    Accounting, Cap, Charged, Client, EventFd, MemFile, Mm, MmapRequest, NewFile, OpenFile,
    PinSource, Readiness, Reply,
};
use lychgate_machine::{AddressSpace, Call, Node, Span, System, Text};
use lychgate_types::{Errno, PhysAddr, PhysRun};

/// `_IO(';', nr)`.
pub(crate) const fn io(nr: u64) -> u64 {
    0x3b00 | nr
}

/// Counts and gives the count before.
pub(crate) const COUNT: u64 = io(0xe0);
/// Adds 1 to the `u32` at the argument.
pub(crate) const ADD: u64 = io(0xe1);
/// Gives a new file that can be mapped.
pub(crate) const NEW: u64 = io(0xe2);
/// Stores a new queue's descriptor at the argument.
pub(crate) const QUEUE: u64 = io(0xe3);
/// Makes something readable in the queue.
pub(crate) const PUSH: u64 = io(0xe4);
/// Signals the eventfd that the argument is.
pub(crate) const SIGNAL: u64 = io(0xe5);
/// Gives the number of releases so far.
pub(crate) const RELEASES: u64 = io(0xe6);
/// Keeps the caller's address space.
pub(crate) const KEEP: u64 = io(0xe7);
/// Writes 0x5a to the argument in the kept address space: `EFAULT` when it is not there.
pub(crate) const POKE: u64 = io(0xe8);
/// The identity of the caller's address space.
pub(crate) const SPACE: u64 = io(0xe9);
/// Bits: 1 `IpcLock`; 2 a limit of locked memory below the highest number.
pub(crate) const RIGHTS: u64 = io(0xea);
/// The argument is a memfd: gives its length.
pub(crate) const LENGTH: u64 = io(0xeb);
/// The identity of the file of ours that the argument is a descriptor of: `EBADF` for others.
pub(crate) const IDENTITY: u64 = io(0xec);
/// Sleeps as many microseconds as the argument says, and counts.
pub(crate) const SLEEP: u64 = io(0xed);

/// Panics, as a machine with a defect does.
pub(crate) const PANIC: u64 = io(0xee);

pub(crate) struct Machine {
    tree: tempfile::TempDir,
    state: Arc<State>,
    knob: Arc<Knob>,
    spaces: Mutex<Vec<Arc<Space>>>,
    calls: AtomicU64,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) count: AtomicU64,
    pub(crate) releases: AtomicU64,
    pub(crate) opens: AtomicU64,
    pub(crate) begun: AtomicU64,
    pub(crate) ended: AtomicU64,
    kept: Mutex<Option<Arc<dyn Mm>>>,
    queue: Mutex<Option<Arc<dyn Readiness>>>,
}

impl Machine {
    pub(crate) fn new() -> Arc<Self> {
        Self::with_tree(tempfile::tempdir().unwrap())
    }

    /// With its tree in a directory.
    pub(crate) fn new_in(place: &Path) -> Arc<Self> {
        Self::with_tree(tempfile::tempdir_in(place).unwrap())
    }

    fn with_tree(tree: tempfile::TempDir) -> Arc<Self> {
        let at = |path: &str| tree.path().join(path);
        std::fs::create_dir_all(at("dev/vfio")).unwrap();
        std::fs::create_dir_all(at("sys/devices/fake0/sub")).unwrap();
        std::fs::create_dir_all(at("sys/bus/fake/devices")).unwrap();
        std::fs::write(at("dev/fake"), "").unwrap();
        std::fs::write(at("dev/vfio/probe"), "").unwrap();
        std::fs::write(at("sys/devices/fake0/vendor"), "0x1b36\n").unwrap();
        std::fs::write(at("sys/devices/fake0/knob"), "1\n").unwrap();
        std::fs::write(at("sys/devices/fake0/sub/dev"), "511:7\n").unwrap();
        std::os::unix::fs::symlink("../../../devices/fake0", at("sys/bus/fake/devices/fake0"))
            .unwrap();
        std::os::unix::fs::symlink("../../bus/fake", at("sys/devices/fake0/subsystem")).unwrap();
        Arc::new(Self {
            tree,
            state: Arc::default(),
            knob: Arc::new(Knob(AtomicU64::new(1))),
            spaces: Mutex::default(),
            calls: AtomicU64::new(0),
        })
    }

    pub(crate) fn state(&self) -> &State {
        &self.state
    }
}

/// A number.
struct Knob(AtomicU64);

impl Text for Knob {
    fn show(&self) -> Result<String> {
        Ok(format!("{}\n", self.0.load(Ordering::SeqCst)))
    }

    fn store(&self, text: &str) -> Result<()> {
        let number = text.parse().map_err(|_| Refusal::new(Errno::EINVAL, "this is no number"))?;
        self.0.store(number, Ordering::SeqCst);
        Ok(())
    }
}

impl System for Machine {
    fn attribute(&self, path: &Path) -> Option<Arc<dyn Text>> {
        let knob = path == Path::new("/sys/devices/fake0/knob");
        knob.then(|| Arc::clone(&self.knob) as _)
    }

    /// Shows the thread that it was asked for.
    fn fail_nth(&self, thread: u32) -> Option<Arc<dyn Text>> {
        Some(Arc::new(Knob(AtomicU64::new(thread.into()))))
    }

    fn tree(&self) -> &Path {
        self.tree.path()
    }

    fn node(&self, path: &Path) -> Option<Node> {
        match path.to_str()? {
            "/dev/fake" => Some(Node { major: 240, minor: 5, mode: 0o666 }),
            "/dev/vfio/probe" => Some(Node { major: 511, minor: 7, mode: 0o600 }),
            _ => None,
        }
    }

    fn open(&self, path: &Path, _: &dyn Client) -> Result<Arc<dyn OpenFile>> {
        let node = self.node(path).ok_or(Refusal::new(Errno::ENOENT, "no node"))?;
        self.state.opens.fetch_add(1, Ordering::SeqCst);
        Ok(Arc::new(Device {
            name: path.to_str().unwrap().to_owned(),
            number: Some((node.major, node.minor)),
            state: self.state.clone(),
        }))
    }

    fn mm(&self, space: Arc<dyn AddressSpace>) -> Arc<dyn Mm> {
        let mut spaces = self.spaces.lock().unwrap();
        let space = Arc::new(Space { id: spaces.len() as u64 + 1, space });
        spaces.push(space.clone());
        space
    }

    fn mem_file(&self, fd: OwnedFd) -> Result<Arc<dyn MemFile>, Errno> {
        Ok(Arc::new(Memory(std::fs::File::from(fd))))
    }

    fn call_begins(&self, call: Call) {
        assert_eq!(call.number, self.calls.fetch_add(1, Ordering::SeqCst) + 1);
        assert_eq!(
            self.state.begun.fetch_add(1, Ordering::SeqCst),
            self.state.ended.load(Ordering::SeqCst)
        );
    }

    fn call_ends(&self) {
        self.state.ended.fetch_add(1, Ordering::SeqCst);
    }
}

struct Device {
    name: String,
    number: Option<(u32, u32)>,
    state: Arc<State>,
}

impl OpenFile for Device {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        self.number
    }

    fn ioctl(&self, client: &dyn Client, command: u32, argument: u64) -> Result<Reply> {
        let errno = |errno| Refusal::new(errno, "as the test wants it");
        let value = match u64::from(command) {
            COUNT => self.state.count.fetch_add(1, Ordering::SeqCst),
            ADD => {
                let mut word = [0; 4];
                client.read(argument, &mut word).map_err(errno)?;
                let sum = u32::from_le_bytes(word) + 1;
                client.write(argument, &sum.to_le_bytes()).map_err(errno)?;
                0
            }
            NEW => {
                let memory = rustix_memfd();
                let file = Arc::new(Mappable { memory, state: self.state.clone() });
                return Ok(Reply::File(NewFile { file, cloexec: argument != 0 }));
            }
            QUEUE => {
                let file = Arc::new(Queue { state: self.state.clone(), records: Mutex::default() });
                return Ok(Reply::FileAt { file: NewFile { file, cloexec: true }, at: argument });
            }
            PUSH => {
                let queue = self.state.queue.lock().unwrap();
                queue.as_ref().ok_or(errno(Errno::ENODEV))?.set_readable(true);
                0
            }
            SIGNAL => {
                let fd = i32::try_from(argument).map_err(|_| errno(Errno::EBADF))?;
                client.eventfd(fd).map_err(errno)?.signal();
                0
            }
            RELEASES => self.state.releases.load(Ordering::SeqCst),
            KEEP => {
                *self.state.kept.lock().unwrap() = Some(client.mm());
                0
            }
            POKE => {
                let kept = self.state.kept.lock().unwrap();
                let kept = kept.as_ref().ok_or(errno(Errno::ENODEV))?;
                kept.write(argument, &[0x5a]).map_err(errno)?;
                0
            }
            SPACE => client.mm().id(),
            RIGHTS => {
                let lock = u64::from(client.capable(Cap::IpcLock));
                lock | u64::from(client.memlock_limit() < u64::MAX) << 1
            }
            LENGTH => {
                let fd = i32::try_from(argument).map_err(|_| errno(Errno::EBADF))?;
                client.mem_file(fd).map_err(errno)?.len().map_err(errno)?
            }
            IDENTITY => {
                let fd = i32::try_from(argument).map_err(|_| errno(Errno::EBADF))?;
                let file = client.file(fd).ok_or(errno(Errno::EBADF))?;
                u64::from(file.as_any().is::<Mappable>())
            }
            SLEEP => {
                std::thread::sleep(std::time::Duration::from_micros(argument));
                self.state.count.fetch_add(1, Ordering::SeqCst)
            }
            PANIC => panic!("as the test wants it"),
            _ => return refuse(Errno::ENOTTY, "unknown"),
        };
        Ok(Reply::Value(i32::try_from(value).unwrap()))
    }

    fn read_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        let bytes: Vec<u8> = (offset..offset + count.min(64)).map(|at| at as u8).collect();
        client.write(buffer, &bytes).map_err(|errno| Refusal::new(errno, "buffer"))?;
        Ok(bytes.len() as u64)
    }

    fn release(&self) {
        self.state.releases.fetch_add(1, Ordering::SeqCst);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A file whose memory both sides map.
struct Mappable {
    memory: OwnedFd,
    state: Arc<State>,
}

fn rustix_memfd() -> OwnedFd {
    let memory = rustix::fs::memfd_create("mappable", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&memory, 8 << 40).unwrap();
    memory
}

impl OpenFile for Mappable {
    fn name(&self) -> String {
        "mappable".to_owned()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        None
    }

    fn ioctl(&self, client: &dyn Client, command: u32, argument: u64) -> Result<Reply> {
        let _ = client;
        match u64::from(command) {
            // Another description of the same memory.
            NEW => {
                let memory = self.memory.try_clone().unwrap();
                let file = Arc::new(Self { memory, state: self.state.clone() });
                Ok(Reply::File(NewFile { file, cloexec: false }))
            }
            COUNT => Ok(Reply::Value(
                i32::try_from(std::ptr::from_ref(self) as u64 >> 4 & 0xfff_ffff).unwrap(),
            )),
            // What the client wrote through its mapping.
            ADD => {
                let mut byte = [0];
                rustix::io::pread(&self.memory, &mut byte, argument).unwrap();
                Ok(Reply::Value(i32::from(byte[0])))
            }
            _ => refuse(Errno::ENOTTY, "unknown"),
        }
    }

    fn mmap(&self, request: &MmapRequest) -> Result<()> {
        if request.offset >> 40 > 0 {
            return refuse(Errno::EINVAL, "no such region");
        }
        Ok(())
    }

    fn backing(&self) -> Option<BorrowedFd<'_>> {
        Some(self.memory.as_fd())
    }

    fn write_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        let mut byte = [0];
        client.read(buffer, &mut byte).map_err(|errno| Refusal::new(errno, "buffer"))?;
        // Recognisable: region in the high nibble.
        rustix::io::pwrite(&self.memory, &[byte[0] | (offset >> 40 << 4) as u8], 0).unwrap();
        Ok(count)
    }

    fn release(&self) {
        self.state.releases.fetch_add(1, Ordering::SeqCst);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// A file that can be waited for.
struct Queue {
    state: Arc<State>,
    records: Mutex<u32>,
}

impl OpenFile for Queue {
    fn name(&self) -> String {
        "queue".to_owned()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        None
    }

    fn ioctl(&self, _: &dyn Client, _: u32, _: u64) -> Result<Reply> {
        refuse(Errno::ENOTTY, "a queue")
    }

    fn wait_with(&self, readiness: Arc<dyn Readiness>) -> bool {
        *self.state.queue.lock().unwrap() = Some(readiness);
        true
    }

    fn read_at(&self, client: &dyn Client, buffer: u64, _: u64, _: u64) -> Result<u64> {
        *self.records.lock().unwrap() += 1;
        client.write(buffer, b"record").map_err(|errno| Refusal::new(errno, "buffer"))?;
        self.state.queue.lock().unwrap().as_ref().unwrap().set_readable(false);
        Ok(6)
    }

    fn release(&self) {
        self.state.releases.fetch_add(1, Ordering::SeqCst);
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

struct Space {
    id: u64,
    space: Arc<dyn AddressSpace>,
}

impl PinSource for Space {
    fn pin(&self, _: u64, _: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        Err(Errno::EFAULT)
    }

    fn unpin(&self, _: &[PhysRun]) {}
}

impl Mm for Space {
    fn id(&self) -> u64 {
        self.id
    }

    fn charge(&self, _: u64, _: Accounting, _: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn uncharge(&self, _: u64, _: Accounting) {}

    fn charged(&self) -> Charged {
        Charged { pinned: 3, locked: 1 }
    }

    fn pin_count(&self, _: PhysAddr) -> u32 {
        0
    }

    fn read(&self, at: u64, to: &mut [u8]) -> Result<(), Errno> {
        let span = Span { start: at, len: to.len() };
        self.space.read(&[span], to).map_err(|_| Errno::EFAULT)
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Errno> {
        let span = Span { start: at, len: from.len() };
        self.space.write(&[span], from).map_err(|_| Errno::EFAULT)
    }
}

struct Memory(std::fs::File);

impl PinSource for Memory {
    fn pin(&self, _: u64, _: u64, _: bool) -> Result<Vec<PhysRun>, Errno> {
        Err(Errno::EFAULT)
    }

    fn unpin(&self, _: &[PhysRun]) {}
}

impl MemFile for Memory {
    fn len(&self) -> Result<u64, Errno> {
        Ok(self.0.metadata().map_err(|_| Errno::EIO)?.len())
    }
}

/// Nothing else can be signalled.
const _: fn(&dyn EventFd) = |event| event.signal();
