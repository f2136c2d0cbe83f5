//! This process as a client: its memory through `/proc/self/mem`, and a table of descriptors.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use lychgate_iommufd::{Cap, Client, EventFd, MemFile, Mm, OpenFile};
use lychgate_machine::{AddressSpace, Span, System, Unreachable, Vma};
use lychgate_types::Errno;

/// The address space of this process.
pub(crate) struct OwnSpace {
    memory: File,
}

impl OwnSpace {
    pub(crate) fn new() -> Arc<Self> {
        let memory = OpenOptions::new().read(true).write(true).open("/proc/self/mem").unwrap();
        Arc::new(Self { memory })
    }
}

impl AddressSpace for OwnSpace {
    fn process(&self) -> u32 {
        std::process::id()
    }

    fn read(&self, spans: &[Span], to: &mut [u8]) -> Result<(), Unreachable> {
        let mut rest = to;
        for span in spans {
            let (here, after) = rest.split_at_mut(span.len);
            self.memory.read_exact_at(here, span.start).map_err(|_| Unreachable)?;
            rest = after;
        }
        Ok(())
    }

    fn write(&self, spans: &[Span], from: &[u8]) -> Result<(), Unreachable> {
        let mut rest = from;
        for span in spans {
            let (here, after) = rest.split_at(span.len);
            self.memory.write_all_at(here, span.start).map_err(|_| Unreachable)?;
            rest = after;
        }
        Ok(())
    }

    fn vmas(&self, start: u64, len: u64) -> Result<Vec<Vma>, Unreachable> {
        let maps = fs::read_to_string("/proc/self/maps").map_err(|_| Unreachable)?;
        let touches = |vma: &Vma| vma.start < start + len && vma.end > start;
        Ok(maps.lines().filter_map(vma).filter(touches).collect())
    }

    fn open_file(&self, _: &Vma) -> Option<OwnedFd> {
        None
    }

    fn user(&self) -> u32 {
        1000
    }
}

fn vma(line: &str) -> Option<Vma> {
    let mut fields = line.split_whitespace();
    let (first, last) = fields.next()?.split_once('-')?;
    let rights = fields.next()?.as_bytes();
    Some(Vma {
        start: u64::from_str_radix(first, 16).ok()?,
        end: u64::from_str_radix(last, 16).ok()?,
        read: rights[0] == b'r',
        write: rights[1] == b'w',
        shared: rights[3] == b's',
        offset: 0,
        file: None,
        name: fields.nth(3).unwrap_or("").to_owned(),
    })
}

/// An eventfd that counts.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

impl EventFd for Counter {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }
}

/// The caller of every call.
pub(crate) struct Program {
    pub(crate) machine: Arc<dyn System>,
    mm: Arc<dyn Mm>,
    files: Mutex<HashMap<i32, Arc<dyn OpenFile>>>,
    memory: Mutex<HashMap<i32, OwnedFd>>,
    eventfds: Mutex<HashMap<i32, Arc<Counter>>>,
    space: Arc<OwnSpace>,
}

impl Program {
    pub(crate) fn new(machine: Arc<dyn System>) -> Self {
        let space = OwnSpace::new();
        Self {
            mm: machine.mm(Arc::clone(&space) as _),
            machine,
            files: Mutex::default(),
            memory: Mutex::default(),
            eventfds: Mutex::default(),
            space,
        }
    }

    /// Gives a file a descriptor.
    pub(crate) fn add(&self, file: Arc<dyn OpenFile>) -> i32 {
        let mut files = self.files.lock().unwrap();
        let fd = 768 + i32::try_from(files.len()).unwrap();
        files.insert(fd, file);
        fd
    }

    pub(crate) fn add_memory(&self, file: OwnedFd) -> i32 {
        self.memory.lock().unwrap().insert(100, file);
        100
    }

    pub(crate) fn add_eventfd(&self) -> (i32, Arc<Counter>) {
        let counter = Arc::new(Counter::default());
        let mut eventfds = self.eventfds.lock().unwrap();
        let fd = 200 + i32::try_from(eventfds.len()).unwrap();
        eventfds.insert(fd, Arc::clone(&counter));
        (fd, counter)
    }
}

impl Client for Program {
    fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Errno> {
        let span = Span { start: from, len: to.len() };
        self.space.read(&[span], to).map_err(|_| Errno::EFAULT)
    }

    fn write(&self, to: u64, from: &[u8]) -> Result<(), Errno> {
        let span = Span { start: to, len: from.len() };
        self.space.write(&[span], from).map_err(|_| Errno::EFAULT)
    }

    fn capable(&self, _: Cap) -> bool {
        false
    }

    fn memlock_limit(&self) -> u64 {
        64 << 20
    }

    fn mm(&self) -> Arc<dyn Mm> {
        Arc::clone(&self.mm)
    }

    fn file(&self, fd: i32) -> Option<Arc<dyn OpenFile>> {
        self.files.lock().unwrap().get(&fd).cloned()
    }

    fn mem_file(&self, fd: i32) -> Result<Arc<dyn MemFile>, Errno> {
        let memory = self.memory.lock().unwrap();
        let file = memory.get(&fd).ok_or(Errno::EBADF)?;
        self.machine.mem_file(file.try_clone().unwrap())
    }

    fn eventfd(&self, fd: i32) -> Result<Arc<dyn EventFd>, Errno> {
        let eventfds = self.eventfds.lock().unwrap();
        eventfds.get(&fd).map(|counter| Arc::clone(counter) as _).ok_or(Errno::EBADF)
    }
}

/// Bytes that the machine reads and writes by their address.
pub(crate) struct UserBytes(Vec<AtomicU8>);

impl UserBytes {
    pub(crate) fn new(bytes: &[u8]) -> Self {
        Self(bytes.iter().map(|byte| AtomicU8::new(*byte)).collect())
    }

    pub(crate) fn address(&self) -> u64 {
        self.0.as_ptr().addr() as u64
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.iter().map(|byte| byte.load(Ordering::Acquire)).collect()
    }
}

/// Memory for DMA, as the program reaches it.
pub(crate) trait DmaMemory {
    fn store(&self, offset: usize, bytes: &[u8]);
    fn load(&self, offset: usize, len: usize) -> Vec<u8>;
}

/// Private memory, page-aligned.
pub(crate) struct PrivateMemory {
    words: Vec<AtomicU64>,
    skip: usize,
}

impl PrivateMemory {
    pub(crate) fn new(len: usize) -> Self {
        let words: Vec<_> = (0..len / 8 + 512).map(|_| AtomicU64::new(0)).collect();
        let skip = words.as_ptr().addr().next_multiple_of(4096) - words.as_ptr().addr();
        Self { skip: skip / 8, words }
    }

    pub(crate) fn address(&self) -> u64 {
        self.words[self.skip..].as_ptr().addr() as u64
    }
}

impl DmaMemory for PrivateMemory {
    fn store(&self, offset: usize, bytes: &[u8]) {
        for (word, bytes) in
            self.words[self.skip + offset / 8..].iter().zip(bytes.as_chunks::<8>().0)
        {
            word.store(u64::from_le_bytes(*bytes).to_le(), Ordering::Release);
        }
    }

    fn load(&self, offset: usize, len: usize) -> Vec<u8> {
        let words = &self.words[self.skip + offset / 8..][..len / 8];
        words
            .iter()
            .flat_map(|word| u64::from_le(word.load(Ordering::Acquire)).to_le_bytes())
            .collect()
    }
}

/// A file in memory.
pub(crate) struct FileMemory(pub(crate) File);

impl DmaMemory for FileMemory {
    fn store(&self, offset: usize, bytes: &[u8]) {
        self.0.write_all_at(bytes, offset as u64).unwrap();
    }

    fn load(&self, offset: usize, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, offset as u64).unwrap();
        bytes
    }
}
