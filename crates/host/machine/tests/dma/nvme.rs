//! The smallest NVMe driver: one admin and one I/O queue pair of 16 entries, polled.

use std::thread;
use std::time::{Duration, Instant};

use crate::process::DmaMemory;
use crate::vfio::Opened;

/// Offsets into the DMA memory.
const ADMIN_SQ: usize = 0;
const ADMIN_CQ: usize = 0x1000;
const IO_SQ: usize = 0x2000;
const IO_CQ: usize = 0x3000;
pub(crate) const DATA: usize = 0x4000;

const ENTRIES: u16 = 16;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;

struct Pair {
    id: u16,
    tail: u16,
    head: u16,
    phase: bool,
}

pub(crate) struct Driver<'a> {
    device: &'a Opened,
    memory: &'a dyn DmaMemory,
    iova: u64,
    admin: Pair,
    io: Pair,
    next_id: u16,
}

impl<'a> Driver<'a> {
    /// Enables the controller; `memory` is mapped at `iova`.
    pub(crate) fn start(device: &'a Opened, memory: &'a dyn DmaMemory, iova: u64) -> Self {
        let pair = |id| Pair { id, tail: 0, head: 0, phase: true };
        let driver = Self { device, memory, iova, admin: pair(0), io: pair(1), next_id: 1 };
        memory.store(ADMIN_SQ, &vec![0; DATA]);
        device.set_register(CC, 0);
        driver.wait_ready(0);
        let entries = u32::from(ENTRIES) - 1;
        device.set_register(0x24, entries << 16 | entries);
        for (at, offset) in [(0x28, ADMIN_SQ), (0x30, ADMIN_CQ)] {
            let [low, high] = crate::vfio::halves(iova + offset as u64);
            device.set_register(at, low);
            device.set_register(at + 4, high);
        }
        device.set_register(CC, 4 << 20 | 6 << 16 | 1);
        driver.wait_ready(1);
        driver
    }

    fn wait_ready(&self, ready: u32) {
        wait("the controller", || self.device.register(CSTS) & 1 == ready);
    }

    /// Creates the I/O queue pair, on interrupt vector 1.
    pub(crate) fn create_io_queues(&mut self) {
        let size = u32::from(ENTRIES - 1) << 16 | 1;
        let status = self.admin(0x05, IO_CQ, [size, 1 << 16 | 3, 0]);
        assert_eq!(status, Some(0));
        let status = self.admin(0x01, IO_SQ, [size, 1 << 16 | 1, 0]);
        assert_eq!(status, Some(0));
    }

    /// An admin command with one page of data at `offset`; gives its status.
    pub(crate) fn admin(&mut self, opcode: u8, offset: usize, dwords: [u32; 3]) -> Option<u16> {
        let command = self.command(opcode, 0, offset, dwords);
        submit(self.device, self.memory, &mut self.admin, [ADMIN_SQ, ADMIN_CQ], &command)
    }

    /// Reads (2) or writes (1) one page of 8 blocks; gives the status, `None` if no answer comes.
    pub(crate) fn io(&mut self, opcode: u8, offset: usize, block: u32) -> Option<u16> {
        let command = self.command(opcode, 1, offset, [block, 0, 7]);
        submit(self.device, self.memory, &mut self.io, [IO_SQ, IO_CQ], &command)
    }

    fn command(&mut self, opcode: u8, nsid: u32, offset: usize, dwords: [u32; 3]) -> [u8; 64] {
        let mut command = [0; 64];
        command[0] = opcode;
        command[2..4].copy_from_slice(&self.next_id.to_le_bytes());
        self.next_id += 1;
        command[4..8].copy_from_slice(&nsid.to_le_bytes());
        command[24..32].copy_from_slice(&(self.iova + offset as u64).to_le_bytes());
        for (at, dword) in (40..).step_by(4).zip(dwords) {
            command[at..at + 4].copy_from_slice(&dword.to_le_bytes());
        }
        command
    }
}

fn submit(
    device: &Opened,
    memory: &dyn DmaMemory,
    pair: &mut Pair,
    [sq, cq]: [usize; 2],
    command: &[u8; 64],
) -> Option<u16> {
    memory.store(sq + usize::from(pair.tail) * 64, command);
    pair.tail = (pair.tail + 1) % ENTRIES;
    device.set_register(0x1000 + u64::from(pair.id) * 8, pair.tail.into());
    let slot = cq + usize::from(pair.head) * 16;
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        let entry = memory.load(slot + 8, 8);
        let status = u16::from_le_bytes([entry[6], entry[7]]);
        if (status & 1 == 1) == pair.phase {
            pair.head = (pair.head + 1) % ENTRIES;
            pair.phase ^= pair.head == 0;
            device.set_register(0x1004 + u64::from(pair.id) * 8, pair.head.into());
            return Some(status >> 1);
        }
        if Instant::now() > until || device.register(CSTS) & 2 != 0 {
            return None;
        }
        thread::yield_now();
    }
}

pub(crate) fn wait(what: &str, done: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < until, "{what} does not answer");
        thread::yield_now();
    }
}
