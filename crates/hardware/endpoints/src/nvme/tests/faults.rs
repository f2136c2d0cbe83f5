use lychgate_model::PciFunction;

use super::driver::*;
use crate::nvme::spec::nvm;
use crate::testing::Act;

const HOLE: u64 = 0x70_0000;

fn received_master_abort(driver: &Driver) -> bool {
    let mut status = [0; 2];
    driver.nvme.config_read(6, &mut status);
    status[1] & 1 << 5 != 0
}

#[test]
fn a_data_transfer_that_aborts_fails_its_command_alone() {
    let mut driver = Driver::ready(8 << 20);
    driver.host.unmap(HOLE..HOLE + 0x1000);
    driver.poke_words(0x30_0000, &[BUFFERS, HOLE, BUFFERS + 0x1000]);
    assert!(!received_master_abort(&driver));
    for opcode in [nvm::READ, nvm::WRITE, nvm::COMPARE] {
        for (blocks, prp1, prp2) in [(1, HOLE, 0), (16, BUFFERS, HOLE), (32, BUFFERS, 0x30_0000)] {
            let done = driver.io(Command::range(opcode, 0, blocks).prps(prp1, prp2));
            assert_eq!((done.status, done.do_not_retry), (0x04, false), "{opcode} {blocks}");
        }
    }
    assert!(received_master_abort(&driver));
    let done = driver.io(Command::range(nvm::DSM, 0, 1).prps(HOLE, 0));
    assert_eq!(done.status, 0x04);
    assert_eq!(driver.read32(CSTS), 1);
    driver.host.map_all();
    assert_eq!(driver.io(Command::range(nvm::READ, 0, 1).prps(HOLE, 0)).status, 0);
}

#[test]
fn a_prp_list_that_cannot_be_read_is_a_data_transfer_error() {
    let mut driver = Driver::ready(8 << 20);
    driver.host.unmap(HOLE..HOLE + 0x1000);
    let done = driver.io(Command::range(nvm::READ, 0, 32).prps(BUFFERS, HOLE));
    assert_eq!(done.status, 0x04);
    driver.poke_words(0x30_0ff8, &[HOLE]);
    let done = driver.io(Command::range(nvm::READ, 0, 32).prps(BUFFERS, 0x30_0ff8));
    assert_eq!(done.status, 0x04, "nor its second page");
}

#[test]
fn a_write_to_a_read_only_mapping_fails_and_leaves_it_alone() {
    let mut driver = Driver::ready(8 << 20);
    driver.host.poke(HOLE, &[0x5a; 512]);
    driver.host.protect(HOLE..HOLE + 0x1000);
    assert_eq!(driver.io(Command::range(nvm::READ, 0, 1).prps(HOLE, 0)).status, 0x04);
    assert_eq!(driver.host.peek(HOLE, 512), [0x5a; 512]);
    assert_eq!(driver.io(Command::range(nvm::WRITE, 0, 1).prps(HOLE, 0)).status, 0);
}

#[test]
fn addresses_at_the_very_end_of_the_space_do_not_wrap() {
    let mut driver = Driver::ready(8 << 20);
    let last_page = u64::MAX - 0xfff;
    for (blocks, prp1, prp2) in [
        (8, last_page, 0),
        (1, u64::MAX - 3, 0),
        (2, u64::MAX - 3, 0),
        (16, last_page, 0),
        (16, BUFFERS, last_page),
        (32, BUFFERS, u64::MAX - 7),
        (32, BUFFERS, last_page),
    ] {
        let done = driver.io(Command::range(nvm::READ, 0, blocks).prps(prp1, prp2));
        assert_eq!(done.status, 0x04, "{blocks} {prp1:#x} {prp2:#x}");
    }
    assert_eq!(driver.host.peek(0, 4096), [0; 4096]);
}

#[test]
fn a_command_that_cannot_be_fetched_is_a_fatal_status() {
    let mut driver = Driver::ready(1 << 20);
    let base = driver.sqs[1].base;
    driver.host.unmap(base..base + 0x1000);
    driver.push(1, Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0));
    driver.ring(1);
    driver.run();
    assert_eq!(driver.read32(CSTS), 3);
    driver.host.map_all();
    driver.host.record();
    driver.run();
    assert_eq!(driver.host.recorded(), [], "it stays so until reset");
    driver.write32(CC, 0);
    assert_eq!(driver.read32(CSTS), 0);
    driver.enable();
    driver.create_pair(1, 8);
    assert_eq!(driver.io(Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0)).status, 0);
}

#[test]
fn a_completion_that_cannot_be_posted_is_a_fatal_status_without_an_interrupt() {
    let mut driver = Driver::ready(1 << 20);
    let base = driver.cqs[1].base;
    driver.host.unmap(base..base + 0x1000);
    driver.push(1, Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0));
    driver.ring(1);
    driver.host.record();
    driver.run();
    assert_eq!(driver.read32(CSTS), 3);
    assert!(!driver.host.recorded().iter().any(|act| matches!(act, Act::Msi { .. })));
}

#[test]
fn a_bad_command_in_the_middle_of_a_batch_spoils_no_other() {
    let mut driver = Driver::ready(1 << 20);
    driver.host.unmap(HOLE..HOLE + 0x1000);
    for prp1 in [BUFFERS, HOLE, BUFFERS, BUFFERS + 1, BUFFERS] {
        driver.push(1, Command::range(nvm::READ, 0, 1).prps(prp1, 0));
    }
    driver.ring(1);
    driver.run();
    let statuses: Vec<u32> =
        std::iter::from_fn(|| driver.reap(1)).map(|done| done.status).collect();
    assert_eq!(statuses, [0, 0x04, 0, 0x13, 0]);
}
