use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use lychgate_model::FileBytes;
use proptest::prelude::*;

use super::driver::*;
use crate::nvme::spec::{admin, nvm};
use crate::nvme::{Namespace, NvmeConfig};
use crate::storage::{FileStorage, MemoryStorage, Storage};

const FUA: u32 = 1 << 30;
const DEALLOCATE: u32 = 1 << 25;

/// Storage that counts flushes and fails on demand.
#[derive(Debug)]
struct Watched {
    blocks: MemoryStorage,
    flushes: AtomicU32,
    broken: AtomicBool,
}

impl Watched {
    fn new(len: u64) -> Arc<Self> {
        let blocks = MemoryStorage::new(len).unwrap();
        Arc::new(Self { blocks, flushes: AtomicU32::new(0), broken: AtomicBool::new(false) })
    }

    fn check(&self) -> io::Result<()> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::Other.into());
        }
        Ok(())
    }

    fn take_flushes(&self) -> u32 {
        self.flushes.swap(0, Ordering::Relaxed)
    }
}

impl Storage for Watched {
    fn len(&self) -> u64 {
        self.blocks.len()
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.check()?;
        self.blocks.read_at(offset, to)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check()?;
        self.blocks.write_at(offset, from)
    }
    fn flush(&self) -> io::Result<()> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.check()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check()?;
        self.blocks.discard(offset, len)
    }
}

fn watched() -> (Arc<Watched>, Driver) {
    let storage = Watched::new(8 << 20);
    let mut driver = Driver::new(vec![storage.clone()]);
    driver.enable();
    driver.create_pair(1, 64);
    (storage, driver)
}

fn write(slba: u64, blocks: u32) -> Command {
    Command::range(nvm::WRITE, slba, blocks).prps(BUFFERS, BUFFERS + 0x1000)
}

fn read(slba: u64, blocks: u32) -> Command {
    Command::range(nvm::READ, slba, blocks).prps(BUFFERS, BUFFERS + 0x1000)
}

#[test]
fn blocks_read_back_as_written_whatever_the_size_and_offset() {
    for mut driver in [Driver::ready(8 << 20), watched().1] {
        for (i, blocks) in [1_u32, 7, 8, 9, 16, 17, 255, 2048, 4096].into_iter().enumerate() {
            let seed = u8::try_from(i).unwrap();
            let bytes = Driver::pattern(blocks as usize * 512, seed);
            for offset in [0_u64, 4, 512, 4092] {
                let at = BUFFERS + offset;
                driver.host.poke(at, &bytes);
                assert_eq!(driver.transfer(nvm::WRITE, 3, blocks, at).status, 0);
                driver.host.poke(at, &vec![0; bytes.len()]);
                assert_eq!(driver.transfer(nvm::READ, 3, blocks, at).status, 0);
                assert!(driver.host.peek(at, bytes.len()) == bytes, "{blocks} blocks at {offset}");
                assert_eq!(driver.transfer(nvm::COMPARE, 3, blocks, at).status, 0);
            }
        }
    }
}

#[test]
fn a_prp_list_may_start_at_the_last_slot_of_its_page_which_then_is_a_pointer() {
    let mut driver = Driver::ready(1 << 20);
    let bytes = Driver::pattern(4 * 4096, 9);
    driver.write_blocks(0, &bytes);
    let pages = [0x50_0000, 0x52_0000, 0x51_0000];
    // Three pages are left after PRP1: slot 0xff8 cannot hold them, so it points to a list.
    driver.poke_words(0x30_0ff8, &[0x31_0000]);
    driver.poke_words(0x31_0000, &pages);
    let read = Command::range(nvm::READ, 0, 32).prps(BUFFERS, 0x30_0ff8);
    assert_eq!(driver.io(read).status, 0);
    assert_eq!(driver.host.peek(BUFFERS, 4096), bytes[..4096]);
    for (page, bytes) in pages.into_iter().zip(bytes[4096..].chunks(4096)) {
        assert_eq!(driver.host.peek(page, 4096), bytes);
    }
    // Two are left and two slots: the last one is data.
    driver.poke_words(0x30_0ff0, &[0x52_0000, 0x50_0000]);
    let read = Command::range(nvm::READ, 0, 24).prps(BUFFERS, 0x30_0ff0);
    assert_eq!(driver.io(read).status, 0);
    assert_eq!(driver.host.peek(0x52_0000, 4096), bytes[4096..8192]);
    assert_eq!(driver.host.peek(0x50_0000, 4096), bytes[8192..12288]);
}

#[test]
fn prps_with_a_forbidden_offset_are_refused() {
    let mut driver = Driver::ready(1 << 20);
    driver.poke_words(0x30_0000, &[0x50_0000, 0x51_0010]);
    for (blocks, prp1, prp2) in [
        (1, BUFFERS + 2, 0),
        (16, BUFFERS, BUFFERS + 0x1004),
        (24, BUFFERS, 0x30_0004),
        (24, BUFFERS, 0x30_0000),
    ] {
        let done = driver.io(Command::range(nvm::READ, 0, blocks).prps(prp1, prp2));
        assert_eq!((done.status, done.do_not_retry), (0x13, true), "{blocks} {prp1:#x} {prp2:#x}");
    }
    let done = driver.io(Command::range(nvm::READ, 0, 8).prps(BUFFERS, 0x3));
    assert_eq!(done.status, 0, "PRP2 is ignored where it is not needed");
    driver.poke_words(0x30_0ff8, &[0x31_0008]);
    let done = driver.io(Command::range(nvm::READ, 0, 24).prps(BUFFERS, 0x30_0ff8));
    assert_eq!(done.status, 0x13, "a chain pointer has no offset either");
}

#[test]
fn block_ranges_end_at_the_size_of_the_namespace() {
    let mut driver = Driver::ready(1 << 20);
    assert_eq!(driver.io(read(2047, 1)).status, 0);
    for (slba, blocks) in [(2048, 1), (2047, 2), (u64::MAX, 1), (u64::MAX - 1, 4)] {
        for opcode in [nvm::READ, nvm::WRITE, nvm::COMPARE, nvm::WRITE_ZEROES] {
            let command = Command::range(opcode, slba, blocks).prps(BUFFERS, 0);
            let done = driver.io(command);
            assert_eq!((done.status, done.do_not_retry), (0x80, true), "{opcode} {slba}+{blocks}");
        }
    }
}

#[test]
fn transfers_are_limited_to_what_identify_says() {
    let mut driver = Driver::ready(64 << 20);
    assert_eq!(driver.transfer(nvm::READ, 0, 4096, BUFFERS).status, 0, "2 MiB");
    assert_eq!(driver.transfer(nvm::READ, 0, 4097, BUFFERS).status, 2);
    assert_eq!(driver.io(Command::range(nvm::WRITE_ZEROES, 0, 65536)).status, 0);
}

#[test]
fn namespaces_are_separate_and_others_do_not_exist() {
    let storages = [1_u64 << 20, 2 << 20]
        .map(|len| Arc::new(MemoryStorage::new(len).unwrap()) as Arc<dyn Storage>);
    let mut driver = Driver::new(storages.into());
    driver.enable();
    driver.create_pair(1, 8);
    driver.host.poke(BUFFERS, &[1; 512]);
    assert_eq!(driver.io(write(5, 1).nsid(2)).status, 0);
    assert_eq!(driver.io(read(5, 1).nsid(1)).status, 0);
    assert_eq!(driver.host.peek(BUFFERS, 512), [0; 512]);
    assert_eq!(driver.io(read(5, 1).nsid(2)).status, 0);
    assert_eq!(driver.host.peek(BUFFERS, 512), [1; 512]);
    assert_eq!(driver.io(read(4095, 1).nsid(2)).status, 0);
    for nsid in [0, 3, !0] {
        assert_eq!(driver.io(read(0, 1).nsid(nsid)).status, 0x0b);
    }
    for (nsid, status) in [(1, 0), (2, 0), (!0, 0), (0, 0x0b), (3, 0x0b)] {
        assert_eq!(driver.io(Command::new(nvm::FLUSH).nsid(nsid)).status, status);
    }
}

#[test]
fn blocks_of_4096_bytes_count_as_such() {
    let storage = Arc::new(MemoryStorage::new((1 << 20) + 100).unwrap());
    let namespace = Namespace { lba_shift: 12, ..Namespace::new(storage) };
    let mut driver = Driver::with(&NvmeConfig::default(), vec![namespace]);
    driver.enable();
    driver.create_pair(1, 8);
    let bytes = Driver::pattern(8192, 4);
    driver.host.poke(BUFFERS, &bytes);
    assert_eq!(driver.io(write(254, 2)).status, 0);
    driver.host.poke(BUFFERS, &[0; 8192]);
    assert_eq!(driver.io(read(254, 2)).status, 0);
    assert!(driver.host.peek(BUFFERS, 8192) == bytes);
    assert_eq!(driver.io(read(256, 1)).status, 0x80, "the part of a block is out of reach");
}

#[test]
fn a_flush_reaches_the_storage_and_so_do_fua_and_a_disabled_cache() {
    let (storage, mut driver) = watched();
    driver.io(write(0, 1));
    assert_eq!(storage.take_flushes(), 0);
    driver.io(Command::new(nvm::FLUSH).nsid(1));
    assert_eq!(storage.take_flushes(), 1);
    driver.io(Command::new(nvm::FLUSH).nsid(!0));
    assert_eq!(storage.take_flushes(), 1);
    driver.io(write(0, 1).dword(12, FUA));
    assert_eq!(storage.take_flushes(), 1);
    driver.io(Command::range(nvm::WRITE_ZEROES, 0, 1).dword(12, FUA | DEALLOCATE));
    assert_eq!(storage.take_flushes(), 1);
    driver.admin(Command::new(admin::SET_FEATURES).dword(10, 6));
    driver.io(write(0, 1));
    driver.io(Command::range(nvm::WRITE_ZEROES, 0, 1));
    assert_eq!(storage.take_flushes(), 2);
    driver.write32(CC, CC_ENABLE | 1 << 14);
    assert_eq!(storage.take_flushes(), 1, "shutdown");
}

#[test]
fn a_shutdown_that_cannot_flush_is_a_fatal_status() {
    let (storage, driver) = watched();
    storage.broken.store(true, Ordering::Relaxed);
    driver.write32(CC, CC_ENABLE | 1 << 14);
    assert_eq!(driver.read32(CSTS), 1 | 1 << 1 | 2 << 2);
}

#[test]
fn write_zeroes_zeroes_exactly_its_blocks() {
    for flags in [0, DEALLOCATE] {
        let mut driver = Driver::ready(1 << 20);
        driver.write_blocks(0, &[7; 512 * 300]);
        let zeroes = Command::range(nvm::WRITE_ZEROES, 3, 200);
        assert_eq!(driver.io(zeroes.dword(12, zeroes.0[12] | flags)).status, 0);
        let bytes = driver.read_blocks(0, 300);
        assert_eq!(bytes[..3 * 512], [7; 3 * 512]);
        assert_eq!(bytes[3 * 512..203 * 512], vec![0; 200 * 512]);
        assert_eq!(bytes[203 * 512..], vec![7; 97 * 512]);
    }
}

#[test]
fn deallocated_ranges_read_as_zeros_and_a_bad_one_changes_nothing() {
    let mut driver = Driver::ready(1 << 20);
    driver.write_blocks(0, &[7; 512 * 20]);
    let range = |blocks: u64, slba: u64| [blocks << 32, slba];
    let dsm = |count: u32, flags: u32| {
        // The buffer crosses a page.
        let prps = Command::new(nvm::DSM).nsid(1).prps(0x50_0ff0, 0x52_0000);
        prps.dword(10, count - 1).dword(11, flags)
    };
    driver.poke_words(0x50_0ff0, &range(2, 1));
    driver.poke_words(0x52_0000, &range(3, 2047));
    assert_eq!(driver.io(dsm(2, 4)).status, 0x80);
    driver.poke_words(0x52_0000, &range(3, 10));
    assert_eq!(driver.io(dsm(2, 3)).status, 0, "hints");
    assert_eq!(driver.read_blocks(0, 20), [7; 512 * 20]);
    assert_eq!(driver.io(dsm(2, 4)).status, 0);
    let blocks: Vec<u8> = driver.read_blocks(0, 20).chunks(512).map(|block| block[511]).collect();
    assert_eq!(blocks, [7, 0, 0, 7, 7, 7, 7, 7, 7, 7, 0, 0, 0, 7, 7, 7, 7, 7, 7, 7]);
    assert_eq!(driver.io(dsm(256, 0)).status, 0, "256 ranges are one page");
}

#[test]
fn compare_tells_a_difference_in_the_last_byte() {
    let mut driver = Driver::ready(1 << 20);
    let mut bytes = Driver::pattern(600 << 10, 2);
    driver.write_blocks(0, &bytes);
    assert_eq!(driver.transfer(nvm::COMPARE, 0, 1200, BUFFERS).status, 0);
    *bytes.last_mut().unwrap() ^= 1;
    driver.host.poke(BUFFERS, &bytes);
    assert_eq!(driver.transfer(nvm::COMPARE, 0, 1200, BUFFERS).status, 0x285);
    assert_eq!(driver.transfer(nvm::COMPARE, 0, 1199, BUFFERS).status, 0);
}

#[test]
fn a_read_only_namespace_refuses_every_change() {
    let storage = Arc::new(MemoryStorage::read_only(&[9; 8192]).unwrap());
    let mut driver = Driver::new(vec![storage]);
    driver.enable();
    driver.create_pair(1, 8);
    for opcode in [nvm::WRITE, nvm::WRITE_ZEROES, nvm::DSM] {
        let done = driver.io(Command::range(opcode, 0, 1).prps(BUFFERS, 0));
        assert_eq!((done.status, done.do_not_retry), (0x182, true));
    }
    assert_eq!(driver.io(Command::new(nvm::FLUSH).nsid(1)).status, 0);
    assert_eq!(driver.read_blocks(0, 16), [9; 8192]);
}

#[test]
fn a_failing_medium_has_its_own_status_and_the_queue_goes_on() {
    let (storage, mut driver) = watched();
    storage.broken.store(true, Ordering::Relaxed);
    assert_eq!(driver.io(read(0, 1)).status, 0x281);
    assert_eq!(driver.io(write(0, 1)).status, 0x280);
    assert_eq!(driver.io(Command::range(nvm::COMPARE, 0, 1).prps(BUFFERS, 0)).status, 0x281);
    assert_eq!(driver.io(Command::range(nvm::WRITE_ZEROES, 0, 1)).status, 0x280);
    assert_eq!(driver.io(Command::new(nvm::FLUSH).nsid(1)).status, 0x280);
    let done = driver.io(write(0, 1).dword(12, FUA));
    assert_eq!((done.status, done.do_not_retry), (0x280, false));
    storage.broken.store(false, Ordering::Relaxed);
    assert_eq!(driver.io(read(0, 1)).status, 0);
}

#[test]
fn a_file_cut_short_under_us_gives_read_errors() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 20).unwrap();
    let storage = FileStorage::new(file.try_clone().unwrap(), false).unwrap();
    let mut driver = Driver::new(vec![Arc::new(storage)]);
    driver.enable();
    driver.create_pair(1, 8);
    driver.write_blocks(100, &[5; 512]);
    file.set_len(4096).unwrap();
    assert_eq!(driver.io(read(100, 1)).status, 0x281);
    assert_eq!(driver.io(read(0, 8)).status, 0);
}

/// A file whose bytes system calls may take.
struct Lent(FileStorage);

impl Storage for Lent {
    fn len(&self) -> u64 {
        self.0.len()
    }
    fn read_only(&self) -> bool {
        self.0.read_only()
    }
    fn read_at(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        self.0.read_at(offset, to)
    }
    fn write_at(&self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, from)
    }
    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }
    fn file_bytes(&self, offset: u64, len: usize) -> Option<FileBytes<'_>> {
        Some(FileBytes { file: self.0.as_fd(), offset, len, mapped: 0 })
    }
}

#[test]
fn large_reads_come_straight_from_a_file_where_that_works() {
    const BLOCKS: u32 = 2048;
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    let storage = FileStorage::new(file.try_clone().unwrap(), false).unwrap();
    let mut driver = Driver::new(vec![Arc::new(Lent(storage))]);
    driver.enable();
    driver.create_pair(1, 8);
    let len = BLOCKS as usize * 512;
    let bytes = Driver::pattern(len, 3);
    let at = BUFFERS + 0x204;
    driver.host.poke(at, &bytes);
    assert_eq!(driver.transfer(nvm::WRITE, 7, BLOCKS, at).status, 0);
    for takes_files in [false, true] {
        driver.host.takes_files.store(takes_files, Ordering::Relaxed);
        for (blocks, large) in [(8, false), (BLOCKS, true)] {
            driver.host.poke(at, &vec![0; len]);
            assert_eq!(driver.transfer(nvm::READ, 7, blocks, at).status, 0);
            let end = blocks as usize * 512;
            assert!(driver.host.peek(at, end) == bytes[..end], "{blocks} blocks");
            let taken = driver.host.files_taken.swap(0, Ordering::Relaxed);
            assert_eq!(taken == 1, large && takes_files, "{blocks} blocks, {takes_files}");
        }
    }
    driver.host.unmap(at + 0x8000..at + 0x8001);
    assert_eq!(driver.transfer(nvm::READ, 7, BLOCKS, at).status, 0x04, "data transfer error");
    assert_eq!(driver.host.files_taken.load(Ordering::Relaxed), 1, "aborted, and not tried again");
    driver.host.map_all();
    file.set_len(4096).unwrap();
    assert_eq!(driver.transfer(nvm::READ, 7, BLOCKS, at).status, 0x281, "unrecovered read error");
}

#[test]
fn unknown_io_opcodes_are_refused() {
    let mut driver = Driver::ready(1 << 20);
    for opcode in [0x04, 0x0c, 0x0d, 0x19, 0x7f, 0x80, 0xff] {
        let done = driver.io(Command::range(opcode, 0, 1));
        assert_eq!((done.status, done.do_not_retry), (0x01, true));
    }
}

/// One step of a random run.
#[derive(Clone, Debug)]
enum Step {
    Write { slba: u16, blocks: u8, offset: u16, seed: u8 },
    Read { slba: u16, blocks: u8, offset: u16 },
    Zero { slba: u16, blocks: u8, deallocate: bool },
}

fn step() -> impl Strategy<Value = Step> {
    let offset = (0_u16..1024).prop_map(|dword| dword * 4);
    prop_oneof![
        (0_u16..800, any::<u8>(), offset.clone(), any::<u8>())
            .prop_map(|(slba, blocks, offset, seed)| Step::Write { slba, blocks, offset, seed }),
        (0_u16..800, any::<u8>(), offset).prop_map(|(slba, blocks, offset)| Step::Read {
            slba,
            blocks,
            offset
        }),
        (0_u16..800, any::<u8>(), any::<bool>())
            .prop_map(|(slba, blocks, deallocate)| Step::Zero { slba, blocks, deallocate }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Random I/O against a plain array; and a read changes no byte but those it names.
    #[test]
    fn random_io_matches_a_plain_array(steps in prop::collection::vec(step(), 1..24)) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1024 * 512).unwrap();
        let file: Arc<dyn Storage> = Arc::new(FileStorage::new(file, false).unwrap());
        let memory: Arc<dyn Storage> = Arc::new(MemoryStorage::new(1024 * 512).unwrap());
        let mut driver = Driver::new(vec![file, memory]);
        driver.enable();
        driver.create_pair(1, 8);
        let mut reference = vec![0_u8; 1024 * 512];
        for step in steps {
            for nsid in [1, 2] {
                let last = nsid == 2;
                run_step(&mut driver, &step, nsid, &mut reference, last);
            }
        }
        for nsid in [1, 2] {
            let (prp1, prp2) = driver.prps(BUFFERS, 1024 * 512);
            let read = Command::range(nvm::READ, 0, 1024).nsid(nsid).prps(prp1, prp2);
            prop_assert_eq!(driver.io(read).status, 0);
            prop_assert!(driver.host.peek(BUFFERS, reference.len()) == reference);
        }
    }
}

/// Executes `step` on namespace `nsid`; the reference follows after the `last` namespace.
fn run_step(driver: &mut Driver, step: &Step, nsid: u32, reference: &mut [u8], last: bool) {
    match *step {
        Step::Write { slba, blocks, offset, seed } => {
            let count = u32::from(blocks % 224) + 1;
            let bytes = Driver::pattern(count as usize * 512, seed);
            let at = BUFFERS + u64::from(offset);
            driver.host.poke(at, &bytes);
            let (prp1, prp2) = driver.prps(at, bytes.len() as u64);
            let write = Command::range(nvm::WRITE, slba.into(), count).nsid(nsid);
            assert_eq!(driver.io(write.prps(prp1, prp2)).status, 0);
            if last {
                let start = usize::from(slba) * 512;
                reference[start..start + bytes.len()].copy_from_slice(&bytes);
            }
        }
        Step::Read { slba, blocks, offset } => {
            let count = u32::from(blocks % 224) + 1;
            let len = count as usize * 512;
            let at = usize::from(offset) + 4096;
            driver.host.poke(BUFFERS, &vec![0xee; 64 * 4096]);
            let (prp1, prp2) = driver.prps(BUFFERS + at as u64, len as u64);
            let read = Command::range(nvm::READ, slba.into(), count).nsid(nsid);
            assert_eq!(driver.io(read.prps(prp1, prp2)).status, 0);
            let around = driver.host.peek(BUFFERS, 64 * 4096);
            let start = usize::from(slba) * 512;
            assert!(around[at..at + len] == reference[start..start + len]);
            assert!(around[..at].iter().chain(&around[at + len..]).all(|byte| *byte == 0xee));
        }
        Step::Zero { slba, blocks, deallocate } => {
            let count = u32::from(blocks % 224) + 1;
            let zero = Command::range(nvm::WRITE_ZEROES, slba.into(), count).nsid(nsid);
            let flags = if deallocate { DEALLOCATE } else { 0 };
            assert_eq!(driver.io(zero.dword(12, zero.0[12] | flags)).status, 0);
            if last {
                let start = usize::from(slba) * 512;
                reference[start..start + count as usize * 512].fill(0);
            }
        }
    }
}
