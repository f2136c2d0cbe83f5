use std::sync::Arc;

use lychgate_model::{PciFunction, Service};

use super::driver::*;
use crate::nvme::spec::nvm;
use crate::nvme::{Nvme, NvmeConfig, NvmeError};
use crate::storage::MemoryStorage;
use crate::testing::{Host, Words};

const SHUTDOWN_NORMAL: u32 = 1 << 14;

#[test]
fn capabilities_are_what_drivers_insist_on() {
    let driver = Driver::new(Vec::new());
    let (low, high) = (driver.read32(CAP), driver.read32(CAP + 4));
    assert_eq!(low & 0xffff, 0xffff, "MQES");
    assert_ne!(low & 1 << 16, 0, "CQR");
    assert_ne!(low >> 24, 0, "TO");
    assert_eq!(high & 0xf, 0, "DSTRD");
    assert_ne!(high & 1 << 5, 0, "the NVM command set");
    assert_eq!(high >> 16 & 0xf, 0, "MPSMIN");
    assert_eq!(driver.read32(8), 0x0001_0400);
    let mut whole = [0; 8];
    driver.nvme.bar_read(0, CAP, &mut whole);
    assert_eq!(whole, (u64::from(high) << 32 | u64::from(low)).to_le_bytes());
}

#[test]
fn configurations_out_of_range_are_refused() {
    let new = |config: NvmeConfig, words| {
        let host = Arc::new(Host::new(4096));
        Nvme::new(&config, host, Arc::new(Words::new(words)), Vec::new()).err()
    };
    let default = NvmeConfig::default;
    assert_eq!(new(default(), 2048), None);
    assert_eq!(new(default(), 2047), Some(NvmeError::RegisterFile(2047)));
    let config = NvmeConfig { io_queue_pairs: 512, ..default() };
    assert_eq!(new(config, 2048), Some(NvmeError::QueuePairs(512)));
    let config = NvmeConfig { max_queue_entries: 1, ..default() };
    assert_eq!(new(config, 2048), Some(NvmeError::QueueEntries(1)));
    let config = NvmeConfig { max_transfer_log2: 0, ..default() };
    assert_eq!(new(config, 2048), Some(NvmeError::Transfer(0)));
}

#[test]
fn stores_to_read_only_registers_are_undone() {
    let driver = Driver::ready(1 << 20);
    let before: Vec<u32> = (0..0x80).step_by(4).map(|at| driver.load(at)).collect();
    for at in [0x00, 0x04, 0x08, 0x0c, 0x10, 0x1c, 0x20, 0x38, 0x3c] {
        driver.store(at, !0);
        driver.write32(at, 0x5555_5555);
    }
    driver.run();
    let after: Vec<u32> = (0..0x80).step_by(4).map(|at| driver.load(at)).collect();
    assert_eq!(before, after);
    assert_eq!(driver.read32(CSTS), 1);
}

#[test]
fn a_stored_enable_is_noticed_by_service_and_a_trapped_one_at_once() {
    let mut driver = Driver::new(Vec::new());
    driver.set_admin_queues();
    driver.store(CC, CC_ENABLE);
    assert_eq!(driver.load(CSTS), 0);
    assert_eq!(driver.nvme.service(), Service::Busy);
    assert_eq!(driver.load(CSTS), 1);
    driver.write32(CC, CC_ENABLE & !1);
    assert_eq!(driver.load(CSTS), 0);
    driver.write32(CC, CC_ENABLE);
    assert_eq!(driver.load(CSTS), 1);
}

#[test]
fn admin_queue_addresses_are_taken_at_the_first_doorbell() {
    let mut driver = Driver::new(Vec::new());
    driver.set_admin_queues();
    let acq = driver.load(ACQ);
    driver.store(ACQ, 0);
    driver.store(CC, CC_ENABLE);
    driver.run();
    driver.store(ACQ, acq);
    assert_eq!(driver.identify(1, 0).0.status, 0);
    driver.store(ACQ, 0);
    assert_eq!(driver.identify(1, 0).0.status, 0, "later stores have no effect");
}

#[test]
fn registers_take_one_eight_byte_access_or_two_of_four_in_either_order() {
    let driver = Driver::new(Vec::new());
    driver.write64(ASQ, 0x1_2345_6000);
    driver.write32(ACQ + 4, 2);
    driver.write32(ACQ, 0x3456_7000);
    assert_eq!([driver.read32(ASQ), driver.read32(ASQ + 4)], [0x2345_6000, 1]);
    assert_eq!([driver.read32(ACQ), driver.read32(ACQ + 4)], [0x3456_7000, 2]);
    driver.nvme.bar_write(0, ASQ, &[0xff]);
    assert_eq!(driver.read32(ASQ), 0x2345_6000, "narrow stores are dropped");
}

#[test]
fn an_impossible_configuration_is_a_fatal_status_until_reset() {
    let command_set = 6 << 4;
    let page_size = 5 << 7;
    let arbitration = 1 << 11;
    for bits in [command_set, page_size, arbitration] {
        let mut driver = Driver::new(Vec::new());
        driver.set_admin_queues();
        driver.write32(CC, CC_ENABLE | bits);
        assert_eq!(driver.read32(CSTS), 2, "{bits:#x}");
        driver.write32(CC, 0);
        assert_eq!(driver.read32(CSTS), 0);
        driver.enable();
    }
    let mut driver = Driver::new(Vec::new());
    driver.set_admin_queues();
    driver.write64(ASQ, 0x10_0100);
    driver.write32(CC, CC_ENABLE);
    assert_eq!(driver.read32(CSTS), 2);
}

#[test]
fn entry_sizes_matter_only_when_an_io_queue_is_created() {
    let mut driver = Driver::new(Vec::new());
    driver.set_admin_queues();
    driver.write32(CC, 1);
    assert_eq!(driver.read32(CSTS), 1);
    assert_eq!(driver.identify(1, 0).0.status, 0);
    let create = Command::new(5).prps(0x20_0000, 0).dword(10, 1 | 7 << 16).dword(11, 1);
    assert_eq!(driver.admin(create).status, 2);
    driver.write32(CC, CC_ENABLE);
    assert_eq!(driver.admin(create).status, 0);
}

#[test]
fn controller_reset_forgets_queues_and_keeps_the_admin_registers() {
    let mut driver = Driver::ready(1 << 20);
    let registers = [driver.read32(AQA), driver.read32(ASQ), driver.read32(ACQ)];
    driver.push(1, Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0));
    driver.ring(1);
    driver.write32(CC, CC_ENABLE & !1);
    driver.host.record();
    driver.run();
    assert_eq!(driver.host.recorded(), [], "no DMA and no interrupt after RDY = 0");
    assert_eq!([driver.read32(AQA), driver.read32(ASQ), driver.read32(ACQ)], registers);
    assert_eq!(driver.load(0x1008), 0, "doorbells start over");
    driver.enable();
    driver.create_pair(1, 16);
    assert_eq!(driver.io(Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0)).status, 0);
}

#[test]
fn phases_start_over_after_a_reset_in_mid_pass() {
    let mut driver = Driver::new(Vec::new());
    for _ in 0..3 {
        driver.enable();
        for _ in 0..ADMIN_ENTRIES + 5 {
            assert_eq!(driver.identify(1, 0).0.status, 0);
        }
        driver.write32(CC, 0);
    }
}

#[test]
fn shutdown_completes_and_only_a_reset_revives() {
    for kind in [SHUTDOWN_NORMAL, 2 * SHUTDOWN_NORMAL] {
        let mut driver = Driver::ready(1 << 20);
        driver.write32(CC, CC_ENABLE | kind);
        assert_eq!(driver.read32(CSTS), 1 | 2 << 2);
        driver.push(1, Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0));
        driver.ring(1);
        driver.run();
        assert_eq!(driver.reap(1), None);
        driver.write32(CC, 0);
        assert_eq!(driver.read32(CSTS), 0);
        driver.enable();
    }
}

#[test]
fn function_level_reset_returns_everything_to_power_on() {
    let driver = Driver::ready(1 << 20);
    let express = 0x40;
    driver.push_read_and_ring();
    driver.nvme.config_write(express + 8, &[0x10, 0xa8]);
    driver.host.record();
    driver.run();
    assert_eq!(driver.host.recorded(), []);
    assert_eq!(driver.read32(CSTS), !0, "memory decoding is off");
    let mut command = [0xff; 2];
    driver.nvme.config_read(4, &mut command);
    assert_eq!(command, [0, 0]);
    driver.nvme.config_write(4, &[6, 0]);
    for at in [CC, CSTS, AQA, ASQ, ACQ, 0x1000, 0x1008] {
        assert_eq!(driver.read32(at), 0, "{at:#x}");
    }
    assert_eq!(driver.read32(0x2000 + 12), 1, "vectors are masked");
}

#[test]
fn without_bus_mastering_nothing_moves_until_it_is_back() {
    let mut driver = Driver::ready(1 << 20);
    driver.nvme.config_write(4, &[2, 0]);
    driver.push(1, Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0));
    driver.ring(1);
    driver.host.record();
    driver.run();
    assert_eq!(driver.host.recorded(), []);
    driver.nvme.config_write(4, &[6, 0]);
    driver.run();
    assert_eq!(driver.reap(1).map(|done| done.status), Some(0));
}

#[test]
fn without_memory_decoding_the_bar_does_not_answer() {
    let driver = Driver::new(Vec::new());
    driver.nvme.config_write(4, &[4, 0]);
    driver.write32(AQA, 0x1234);
    assert_eq!(driver.read32(AQA), !0);
    driver.nvme.config_write(4, &[6, 0]);
    assert_eq!(driver.read32(AQA), 0);
    let mut bytes = [0; 4];
    driver.nvme.bar_read(2, 0, &mut bytes);
    assert_eq!(bytes, [0xff; 4]);
}

#[test]
fn large_memory_pages_change_what_a_prp_covers() {
    let mut driver = Driver::new(vec![Arc::new(MemoryStorage::new(8 << 20).unwrap())]);
    driver.set_admin_queues();
    driver.write32(CC, CC_ENABLE | 4 << 7);
    assert_eq!(driver.read32(CSTS), 1);
    driver.create_pair_at(1, 16, 0x20_0000, 0x21_0000);
    let bytes = Driver::pattern(0x1_0000, 3);
    driver.host.poke(BUFFERS, &bytes);
    let done = driver.io(Command::range(nvm::WRITE, 0, 128).prps(BUFFERS, 0));
    assert_eq!(done.status, 0, "64 KiB in one page, no PRP2");
    driver.poke_words(0x30_0000, &[BUFFERS + 0x3_0000, BUFFERS + 0x5_0000]);
    let read = Command::range(nvm::READ, 0, 128 * 2 + 1);
    assert_eq!(driver.io(read.prps(BUFFERS + 0x1_0000, 0x30_0000)).status, 0);
    assert!(driver.host.peek(BUFFERS + 0x1_0000, 0x1_0000) == bytes);
    assert_eq!(driver.host.peek(BUFFERS + 0x3_0000, 0x1_0000), vec![0; 0x1_0000]);
}

impl Driver {
    fn push_read_and_ring(&self) {
        let ring = self.sqs[1];
        let read = Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0);
        self.host.poke(ring.base + u64::from(ring.at) * 64, &read.bytes());
        self.store(0x1008, ring.at + 1);
    }

    fn create_pair_at(&mut self, id: u16, entries: u32, cq: u64, sq: u64) {
        self.create_cq(id, cq, entries);
        self.create_sq(id, id, sq, entries);
    }
}
