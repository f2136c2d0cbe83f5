//! A driver for the tests, as small as drivers get.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use lychgate_model::{PciFunction, RegisterFile, Service};

use crate::nvme::spec::{admin, nvm};
use crate::nvme::{Namespace, Nvme, NvmeConfig};
use crate::storage::{MemoryStorage, Storage};
use crate::testing::{Host, Words};

pub(crate) const CAP: u64 = 0x00;
pub(crate) const CC: u64 = 0x14;
pub(crate) const CSTS: u64 = 0x1c;
pub(crate) const AQA: u64 = 0x24;
pub(crate) const ASQ: u64 = 0x28;
pub(crate) const ACQ: u64 = 0x30;
pub(crate) const CC_ENABLE: u32 = 1 | 6 << 16 | 4 << 20;

pub(crate) const HOST_SIZE: usize = 16 << 20;
/// Where the driver keeps its queues; buffers start at [`BUFFERS`].
const ADMIN_SQ: u64 = 0x10_0000;
const ADMIN_CQ: u64 = 0x11_0000;
pub(crate) const BUFFERS: u64 = 0x40_0000;
pub(crate) const ADMIN_ENTRIES: u32 = 32;
pub(crate) const MSI_ADDRESS: u64 = 0xfee0_0000;

/// A submission queue entry in the making.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Command(pub(crate) [u32; 16]);

impl Command {
    pub(crate) fn new(opcode: u8) -> Self {
        let mut command = Self::default();
        command.0[0] = opcode.into();
        command
    }

    pub(crate) fn dword(mut self, at: usize, value: u32) -> Self {
        self.0[at] = value;
        self
    }

    pub(crate) fn nsid(self, nsid: u32) -> Self {
        self.dword(1, nsid)
    }

    pub(crate) fn prps(self, prp1: u64, prp2: u64) -> Self {
        let half = |value: u64, shift: u32| u32::try_from(value >> shift & 0xffff_ffff).unwrap();
        self.dword(6, half(prp1, 0))
            .dword(7, half(prp1, 32))
            .dword(8, half(prp2, 0))
            .dword(9, half(prp2, 32))
    }

    /// An I/O command on `blocks` from `slba`.
    pub(crate) fn range(opcode: u8, slba: u64, blocks: u32) -> Self {
        let mut command = Self::new(opcode).nsid(1).dword(12, blocks - 1);
        command.0[10] = u32::try_from(slba & 0xffff_ffff).unwrap();
        command.0[11] = u32::try_from(slba >> 32).unwrap();
        command
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|dword| dword.to_le_bytes()).collect()
    }
}

/// A completion as the driver finds it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Done {
    pub(crate) result: u32,
    pub(crate) sq_head: u32,
    pub(crate) sqid: u32,
    pub(crate) cid: u32,
    /// Status code type and code, without Do Not Retry.
    pub(crate) status: u32,
    pub(crate) do_not_retry: bool,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    pub(crate) base: u64,
    pub(crate) entries: u32,
    /// The driver's index: SQ tail or CQ head.
    pub(crate) at: u32,
    pub(crate) phase: u32,
}

impl Ring {
    pub(crate) fn new(base: u64, entries: u32) -> Self {
        Self { base, entries, at: 0, phase: 1 }
    }

    fn step(&mut self) {
        self.at += 1;
        if self.at == self.entries {
            self.at = 0;
            self.phase ^= 1;
        }
    }
}

pub(crate) struct Driver {
    pub(crate) host: Arc<Host>,
    pub(crate) nvme: Nvme,
    pub(crate) words: Arc<Words>,
    pub(crate) sqs: Vec<Ring>,
    pub(crate) cqs: Vec<Ring>,
    next_cid: u32,
}

impl Driver {
    /// A controller with these storages as namespaces 1.., bus mastering on, MSI-X programmed.
    pub(crate) fn new(storages: Vec<Arc<dyn Storage>>) -> Self {
        let namespaces = storages.into_iter().map(Namespace::new).collect();
        Self::with(&NvmeConfig::default(), namespaces)
    }

    pub(crate) fn with(config: &NvmeConfig, namespaces: Vec<Namespace>) -> Self {
        let host = Arc::new(Host::new(HOST_SIZE));
        let words = Arc::new(Words::new(2048));
        let nvme = Nvme::new(config, host.clone(), words.clone(), namespaces).unwrap();
        let driver = Self { host, nvme, words, sqs: Vec::new(), cqs: Vec::new(), next_cid: 0x17 };
        driver.set_up_function();
        driver
    }

    /// One namespace of `len` bytes in memory, enabled, with I/O queue pair 1.
    pub(crate) fn ready(len: u64) -> Self {
        let mut driver = Self::new(vec![Arc::new(MemoryStorage::new(len).unwrap())]);
        driver.enable();
        driver.create_pair(1, 64);
        driver
    }

    /// What a PCI driver does: decode, bus mastering, MSI-X with vector n sending data n.
    pub(crate) fn set_up_function(&self) {
        self.nvme.config_write(4, &[6, 0]);
        for vector in 0..64_u32 {
            let at = 0x2000 + u64::from(vector) * 16;
            self.nvme.bar_write(0, at, &MSI_ADDRESS.to_le_bytes());
            self.nvme.bar_write(0, at + 8, &u64::from(vector).to_le_bytes());
        }
        self.nvme.config_write(self.msix_capability() + 2, &[0, 0x80]);
    }

    pub(crate) fn msix_capability(&self) -> u16 {
        let mut byte = [0];
        self.nvme.config_read(0x34, &mut byte);
        loop {
            let at = u16::from(byte[0]);
            let mut id = [0; 2];
            self.nvme.config_read(at, &mut id);
            if id[0] == 0x11 {
                return at;
            }
            byte[0] = id[1];
            assert_ne!(byte[0], 0);
        }
    }

    pub(crate) fn read32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.nvme.bar_read(0, at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    pub(crate) fn write32(&self, at: u64, value: u32) {
        self.nvme.bar_write(0, at, &value.to_le_bytes());
    }

    pub(crate) fn write64(&self, at: u64, value: u64) {
        self.nvme.bar_write(0, at, &value.to_le_bytes());
    }

    /// A store through a mapping.
    pub(crate) fn store(&self, at: u64, value: u32) {
        let word = &self.words.words()[usize::try_from(at / 4).unwrap()];
        word.store(value.to_le(), Ordering::Release);
    }

    pub(crate) fn load(&self, at: u64) -> u32 {
        u32::from_le(self.words.words()[usize::try_from(at / 4).unwrap()].load(Ordering::Acquire))
    }

    /// Lets the controller work until it has nothing to do.
    pub(crate) fn run(&self) {
        for _ in 0..100_000 {
            if self.nvme.service() == Service::Idle {
                return;
            }
        }
        panic!("the controller never comes to rest");
    }

    pub(crate) fn set_admin_queues(&mut self) {
        self.write32(AQA, (ADMIN_ENTRIES - 1) | (ADMIN_ENTRIES - 1) << 16);
        self.write64(ASQ, ADMIN_SQ);
        self.write64(ACQ, ADMIN_CQ);
        self.host.poke(ADMIN_CQ, &vec![0; ADMIN_ENTRIES as usize * 16]);
        self.sqs = vec![Ring::new(ADMIN_SQ, ADMIN_ENTRIES); 65];
        self.cqs = vec![Ring::new(ADMIN_CQ, ADMIN_ENTRIES); 65];
    }

    pub(crate) fn enable(&mut self) {
        self.set_admin_queues();
        self.write32(CC, CC_ENABLE);
        assert_eq!(self.read32(CSTS), 1);
    }

    /// Completion and submission queue `id`, interrupts on vector `id`.
    pub(crate) fn create_pair(&mut self, id: u16, entries: u32) {
        let base = 0x20_0000 + u64::from(id) * 0x4000;
        self.create_cq(id, base, entries);
        self.create_sq(id, id, base + 0x2000, entries);
    }

    pub(crate) fn create_cq(&mut self, id: u16, base: u64, entries: u32) {
        self.host.poke(base, &vec![0; entries as usize * 16]);
        let command = Command::new(admin::CREATE_CQ)
            .prps(base, 0)
            .dword(10, u32::from(id) | (entries - 1) << 16)
            .dword(11, 3 | u32::from(id) << 16);
        assert_eq!(self.admin(command).status, 0);
        self.cqs[usize::from(id)] = Ring::new(base, entries);
    }

    pub(crate) fn create_sq(&mut self, id: u16, cqid: u16, base: u64, entries: u32) {
        let command = Command::new(admin::CREATE_SQ)
            .prps(base, 0)
            .dword(10, u32::from(id) | (entries - 1) << 16)
            .dword(11, 1 | u32::from(cqid) << 16);
        assert_eq!(self.admin(command).status, 0);
        self.sqs[usize::from(id)] = Ring::new(base, entries);
    }

    /// Puts a command into the queue without ringing; gives its id.
    pub(crate) fn push(&mut self, queue: u16, command: Command) -> u32 {
        let cid = self.next_cid;
        self.next_cid = (cid + 1) & 0x7fff;
        let command = command.dword(0, command.0[0] & 0xffff | cid << 16);
        let ring = &mut self.sqs[usize::from(queue)];
        self.host.poke(ring.base + u64::from(ring.at) * 64, &command.bytes());
        ring.step();
        cid
    }

    pub(crate) fn ring(&self, queue: u16) {
        let tail = self.sqs[usize::from(queue)].at;
        self.store(0x1000 + u64::from(queue) * 8, tail);
    }

    /// The next completion, without ringing the head doorbell.
    pub(crate) fn reap(&mut self, queue: u16) -> Option<Done> {
        let ring = &mut self.cqs[usize::from(queue)];
        let entry = self.host.peek(ring.base + u64::from(ring.at) * 16, 16);
        let dword = |i: usize| u32::from_le_bytes(entry[i * 4..i * 4 + 4].try_into().unwrap());
        if dword(3) >> 16 & 1 != ring.phase {
            return None;
        }
        ring.step();
        assert_eq!(dword(1), 0);
        Some(Done {
            result: dword(0),
            sq_head: dword(2) & 0xffff,
            sqid: dword(2) >> 16,
            cid: dword(3) & 0xffff,
            status: dword(3) >> 17 & 0x7ff,
            do_not_retry: dword(3) >> 31 != 0,
        })
    }

    pub(crate) fn ring_head(&self, queue: u16) {
        let head = self.cqs[usize::from(queue)].at;
        self.store(0x1004 + u64::from(queue) * 8, head);
    }

    /// Submits one command and waits for its completion.
    pub(crate) fn submit(&mut self, queue: u16, command: Command) -> Done {
        let cid = self.push(queue, command);
        self.ring(queue);
        self.run();
        let done = self.reap(queue).expect("no completion");
        assert_eq!((done.cid, done.sqid), (cid, u32::from(queue)));
        assert_eq!(done.sq_head, self.sqs[usize::from(queue)].at);
        self.ring_head(queue);
        done
    }

    pub(crate) fn admin(&mut self, command: Command) -> Done {
        self.submit(0, command)
    }

    pub(crate) fn io(&mut self, command: Command) -> Done {
        self.submit(1, command)
    }

    /// Writes or reads with PRPs for a buffer that is contiguous at `at`, list at 0x30_0000.
    pub(crate) fn transfer(&mut self, opcode: u8, slba: u64, blocks: u32, at: u64) -> Done {
        let command = Command::range(opcode, slba, blocks);
        let (prp1, prp2) = self.prps(at, u64::from(blocks) * 512);
        self.io(command.prps(prp1, prp2))
    }

    /// PRP1 and PRP2 for `len` contiguous bytes; a list goes to 0x30_0000, chained as needed.
    pub(crate) fn prps(&self, at: u64, len: u64) -> (u64, u64) {
        let first = (at | 0xfff) + 1;
        let rest = (at + len).saturating_sub(first);
        if rest <= 4096 {
            return (at, if rest == 0 { 0 } else { first });
        }
        let mut entries: Vec<u64> = (0..rest.div_ceil(4096)).map(|i| first + i * 4096).collect();
        let mut list = 0x30_0000_u64;
        while entries.len() > 512 {
            let tail = entries.split_off(511);
            entries.push(list + 4096);
            self.poke_words(list, &entries);
            entries = tail;
            list += 4096;
        }
        self.poke_words(list, &entries);
        (at, 0x30_0000)
    }

    pub(crate) fn poke_words(&self, at: u64, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.host.poke(at, &bytes);
    }

    pub(crate) fn identify(&mut self, cns: u32, nsid: u32) -> (Done, Vec<u8>) {
        self.host.poke(BUFFERS, &[0xaa; 4096]);
        let command = Command::new(admin::IDENTIFY).nsid(nsid).prps(BUFFERS, 0).dword(10, cns);
        let done = self.admin(command);
        (done, self.host.peek(BUFFERS, 4096))
    }

    /// Bytes that differ from place to place and from seed to seed.
    pub(crate) fn pattern(len: usize, seed: u8) -> Vec<u8> {
        (0..len).map(|i| u8::try_from((i % 251) ^ (i / 251 % 251)).unwrap() ^ seed).collect()
    }

    pub(crate) fn write_blocks(&mut self, slba: u64, bytes: &[u8]) {
        self.host.poke(BUFFERS, bytes);
        let blocks = u32::try_from(bytes.len() / 512).unwrap();
        assert_eq!(self.transfer(nvm::WRITE, slba, blocks, BUFFERS).status, 0);
    }

    pub(crate) fn read_blocks(&mut self, slba: u64, blocks: u32) -> Vec<u8> {
        let len = blocks as usize * 512;
        self.host.poke(BUFFERS, &vec![0xee; len]);
        assert_eq!(self.transfer(nvm::READ, slba, blocks, BUFFERS).status, 0);
        self.host.peek(BUFFERS, len)
    }
}
