//! An NVMe driver with one I/O queue (NVM Express Base 1.4).

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::time::Timespec;
use vfio_bindings::bindings::vfio::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::{DmaBuffer, Registers};
use crate::way::Opened;

const PAGE: u64 = 4096;
const ENTRIES: u16 = 64;
const TIMEOUT: Duration = Duration::from_secs(10);

mod reg {
    pub(super) const CAP: u64 = 0x00;
    pub(super) const CC: u64 = 0x14;
    pub(super) const CSTS: u64 = 0x1c;
    pub(super) const AQA: u64 = 0x24;
    pub(super) const ASQ: u64 = 0x28;
    pub(super) const ACQ: u64 = 0x30;
    pub(super) const DOORBELLS: u64 = 0x1000;
}

/// A completion's status code type and status code (NVM Express Base 1.4 4.6.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Status(u16);

impl Status {
    /// The command completed.
    pub const SUCCESS: Self = Self(0);
    /// The data could not be moved.
    pub const DATA_TRANSFER_ERROR: Self = Self(0x04);
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SUCCESS => f.write_str("success"),
            Self::DATA_TRANSFER_ERROR => f.write_str("NVMe status 0x4, Data Transfer Error"),
            Self(code) => write!(f, "NVMe status {code:#x}"),
        }
    }
}

/// A namespace of a controller.
pub struct Namespace {
    id: u32,
    blocks: u64,
    block_shift: u32,
}

impl Namespace {
    /// Its size in bytes.
    pub fn bytes(&self) -> u64 {
        self.blocks << self.block_shift
    }
}

/// A controller with its admin queue and one I/O queue, driven by interrupts.
pub struct Controller<'a> {
    opened: &'a Opened,
    registers: Registers,
    admin: Queue,
    io: Queue,
    lists: DmaBuffer,
    max_transfer: u64,
}

impl<'a> Controller<'a> {
    /// Resets the controller and brings it up.
    pub fn start(opened: &'a Opened) -> Result<Self> {
        let device = &opened.device;
        device.reset();
        let mut command = [0; 2];
        device.region_read(VFIO_PCI_CONFIG_REGION_INDEX, &mut command, 4);
        let memory_and_bus_master = u16::from_le_bytes(command) | 0b110;
        device.region_write(VFIO_PCI_CONFIG_REGION_INDEX, &memory_and_bus_master.to_le_bytes(), 4);

        let bar0 = device.get_region_offset(VFIO_PCI_BAR0_REGION_INDEX);
        let registers = Registers::new(opened, bar0, 0x2000)?;
        let stride = 4 << (registers.read64(reg::CAP) >> 32 & 0xf);
        let mut admin = Queue::new(opened, 0, stride)?;
        let io = Queue::new(opened, 1, stride)?;
        device.enable_msix(vec![&admin.event, &io.event]).context("enabling MSI-X")?;

        registers.write32(reg::CC, 0);
        wait(|| registers.read32(reg::CSTS) & 1 == 0).context("the controller stays enabled")?;
        registers.write32(reg::AQA, u32::from(ENTRIES - 1) << 16 | u32::from(ENTRIES - 1));
        registers.write64(reg::ASQ, admin.submissions.iova(0));
        registers.write64(reg::ACQ, admin.completions.iova(0));
        registers.write32(reg::CC, 4 << 20 | 6 << 16 | 1);
        wait(|| registers.read32(reg::CSTS) & 0b11 != 0)
            .context("the controller does not start")?;
        ensure!(registers.read32(reg::CSTS) & 0b11 == 1, "the controller reports a fatal status");

        let identify = DmaBuffer::new(opened, PAGE)?;
        admin.run(&registers, Entry::new(0x06).data(identify.iova(0)).dw(10, 1))?;
        let mdts = identify.load_u32(76).to_le_bytes()[1];
        let max_transfer = if mdts == 0 { 1 << 20 } else { PAGE << mdts.min(8) };

        let size_and_id = u32::from(ENTRIES - 1) << 16 | 1;
        let create = Entry::new(0x05).data(io.completions.iova(0)).dw(10, size_and_id);
        admin.run(&registers, create.dw(11, 1 << 16 | 0b11)).context("creating the I/O queue")?;
        let create = Entry::new(0x01).data(io.submissions.iova(0)).dw(10, size_and_id);
        admin.run(&registers, create.dw(11, 1 << 16 | 1)).context("creating the I/O queue")?;
        let lists = DmaBuffer::new(opened, PAGE * u64::from(ENTRIES))?;
        Ok(Self { opened, registers, admin, io, lists, max_transfer })
    }

    /// The most bytes that one command may move.
    pub fn max_transfer(&self) -> u64 {
        self.max_transfer
    }

    /// Identifies a namespace.
    pub fn namespace(&mut self, id: u32) -> Result<Namespace> {
        let identify = DmaBuffer::new(self.opened, PAGE)?;
        let entry = Entry::new(0x06).dw(1, id).data(identify.iova(0));
        self.admin.run(&self.registers, entry).context("identifying the namespace")?;
        let format = u64::from(identify.load_u32(24).to_le_bytes()[2] & 0xf);
        let block_shift = u32::from(identify.load_u32(128 + 4 * format).to_le_bytes()[2]);
        ensure!((9..=12).contains(&block_shift), "blocks of 2^{block_shift} bytes");
        Ok(Namespace { id, blocks: identify.load_u64(0), block_shift })
    }

    /// Submits a transfer of `len` bytes between byte `offset` of the namespace and byte `at` of a
    /// buffer; all are multiples of the page size.
    pub fn submit(
        &mut self,
        namespace: &Namespace,
        write: bool,
        offset: u64,
        buffer: &DmaBuffer,
        at: u64,
        len: u64,
    ) -> Result<()> {
        let list = u64::from(self.io.tail) * PAGE;
        let second = match len / PAGE {
            0 | 1 => 0,
            2 => buffer.iova(at + PAGE),
            pages => {
                for page in 1..pages {
                    self.lists.store_u64(list + (page - 1) * 8, buffer.iova(at + page * PAGE));
                }
                self.lists.iova(list)
            }
        };
        let [lba_low, lba_high] = halves(offset >> namespace.block_shift);
        let blocks = u32::try_from(len >> namespace.block_shift)?;
        let entry = Entry::new(if write { 0x01 } else { 0x02 })
            .dw(1, namespace.id)
            .data(buffer.iova(at))
            .qw(8, second)
            .dw(10, lba_low)
            .dw(11, lba_high)
            .dw(12, blocks - 1);
        self.io.submit(&self.registers, entry)
    }

    /// Waits for everything that was submitted; gives each command's identifier and status.
    pub fn finish(&mut self) -> Result<Vec<(u16, Status)>> {
        self.io.finish(&self.registers)
    }
}

impl Drop for Controller<'_> {
    fn drop(&mut self) {
        self.registers.write32(reg::CC, 0);
        if let Err(error) = wait(|| self.registers.read32(reg::CSTS) & 1 == 0) {
            eprintln!("demo-client: stopping the controller: {error:#}");
        }
        if let Err(error) = self.opened.device.disable_msix() {
            eprintln!("demo-client: disabling MSI-X: {error}");
        }
    }
}

/// A submission queue and its completion queue.
struct Queue {
    id: u16,
    stride: u64,
    submissions: DmaBuffer,
    completions: DmaBuffer,
    event: EventFd,
    tail: u16,
    head: u16,
    phase: bool,
    pending: u16,
}

impl Queue {
    fn new(opened: &Opened, id: u16, stride: u64) -> Result<Self> {
        Ok(Self {
            id,
            stride,
            submissions: DmaBuffer::new(opened, PAGE)?,
            completions: DmaBuffer::new(opened, PAGE)?,
            event: EventFd::new(0).context("creating an eventfd")?,
            tail: 0,
            head: 0,
            phase: true,
            pending: 0,
        })
    }

    fn submit(&mut self, registers: &Registers, entry: Entry) -> Result<()> {
        ensure!(self.pending < ENTRIES - 1, "the queue is full");
        for (index, word) in (0..).step_by(4).zip(entry.with_id(self.tail).0) {
            self.submissions.store_u32(u64::from(self.tail) * 64 + index, word);
        }
        self.tail = (self.tail + 1) % ENTRIES;
        self.pending += 1;
        registers.write32(self.doorbell(0), self.tail.into());
        Ok(())
    }

    fn finish(&mut self, registers: &Registers) -> Result<Vec<(u16, Status)>> {
        let mut done = Vec::with_capacity(self.pending.into());
        while self.pending > 0 {
            let at = u64::from(self.head) * 16;
            let last = self.completions.load_u32(at + 12);
            let [status, id] = [(last >> 16) as u16, (last & 0xffff) as u16];
            if (status & 1 == 1) != self.phase {
                self.wait_for_interrupt()?;
                continue;
            }
            done.push((id, Status(status >> 1 & 0x7ff)));
            self.pending -= 1;
            self.head = (self.head + 1) % ENTRIES;
            if self.head == 0 {
                self.phase = !self.phase;
            }
            registers.write32(self.doorbell(1), self.head.into());
        }
        Ok(done)
    }

    fn run(&mut self, registers: &Registers, entry: Entry) -> Result<()> {
        self.submit(registers, entry)?;
        for (id, status) in self.finish(registers)? {
            ensure!(status == Status::SUCCESS, "admin command {id:#x}: {status}");
        }
        Ok(())
    }

    fn wait_for_interrupt(&self) -> Result<()> {
        let timeout = Timespec { tv_sec: 10, tv_nsec: 0 };
        // SAFETY: `self.event` keeps its descriptor open for as long as it is borrowed.
        let fd = unsafe { BorrowedFd::borrow_raw(self.event.as_raw_fd()) };
        if poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout))? == 0 {
            bail!("queue {}: no interrupt in 10 s with {} commands pending", self.id, self.pending);
        }
        self.event.read().context("reading the eventfd")?;
        Ok(())
    }

    fn doorbell(&self, completion: u64) -> u64 {
        reg::DOORBELLS + (2 * u64::from(self.id) + completion) * self.stride
    }
}

/// A submission queue entry.
struct Entry([u32; 16]);

impl Entry {
    fn new(opcode: u32) -> Self {
        let mut words = [0; 16];
        words[0] = opcode;
        Self(words)
    }

    fn with_id(mut self, id: u16) -> Self {
        self.0[0] |= u32::from(id) << 16;
        self
    }

    fn dw(mut self, index: usize, value: u32) -> Self {
        self.0[index] = value;
        self
    }

    fn qw(self, index: usize, value: u64) -> Self {
        let [low, high] = halves(value);
        self.dw(index, low).dw(index + 1, high)
    }

    fn data(self, iova: u64) -> Self {
        self.qw(6, iova)
    }
}

fn halves(value: u64) -> [u32; 2] {
    [(value & 0xffff_ffff) as u32, (value >> 32) as u32]
}

fn wait(condition: impl Fn() -> bool) -> Result<()> {
    let start = Instant::now();
    while !condition() {
        ensure!(start.elapsed() < TIMEOUT, "timed out after {} s", TIMEOUT.as_secs());
        thread::sleep(Duration::from_micros(50));
    }
    Ok(())
}
