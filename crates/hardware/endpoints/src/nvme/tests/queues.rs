use lychgate_model::PciFunction;

use super::driver::*;
use crate::nvme::spec::{admin, nvm};
use crate::testing::Act;

fn read() -> Command {
    Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0)
}

#[test]
fn a_batch_is_fetched_at_once_and_completed_in_order() {
    let mut driver = Driver::ready(1 << 20);
    let cids: Vec<u32> = (0..20).map(|_| driver.push(1, read())).collect();
    driver.host.record();
    driver.ring(1);
    driver.run();
    let fetches =
        driver.host.recorded().into_iter().filter(
            |act| matches!(act, Act::Read { initiator, .. } if initiator.contains("fetch")),
        );
    assert_eq!(fetches.count(), 1);
    for (i, cid) in cids.into_iter().enumerate() {
        let done = driver.reap(1).unwrap();
        assert_eq!((done.cid, done.status, done.sq_head), (cid, 0, u32::try_from(i).unwrap() + 1));
    }
    assert_eq!(driver.reap(1), None);
}

#[test]
fn data_then_completion_then_phase_then_interrupt() {
    let mut driver = Driver::ready(1 << 20);
    driver.host.take_msis();
    driver.push(1, read());
    driver.push(1, read());
    driver.ring(1);
    let base = driver.cqs[1].base;
    driver.host.record();
    driver.run();
    let acts = driver.host.recorded();
    let [
        Act::Read { .. },
        Act::Write { initiator: first, .. },
        Act::Write { initiator: second, .. },
        Act::Write { start, bytes, .. },
        Act::Write { start: gate, bytes: phase, .. },
        Act::Msi { address, data: 1 },
    ] = &acts[..]
    else {
        panic!("{acts:#?}");
    };
    assert_eq!(first, "queue 1, command 0x19 READ lba 0+1");
    assert_eq!(second, "queue 1, command 0x1a READ lba 0+1");
    assert_eq!((*start, bytes.len()), (base, 32));
    assert_eq!(bytes[14] & 1, 0, "the first entry is not new yet");
    assert_eq!(bytes[30] & 1, 1);
    assert_eq!((*gate, phase.len()), (base + 12, 4));
    assert_eq!(phase[2] & 1, 1);
    assert_eq!(*address, MSI_ADDRESS);
}

#[test]
fn a_full_completion_queue_holds_commands_back_and_loses_none() {
    let mut driver = Driver::new(vec![]);
    driver.enable();
    driver.create_cq(1, 0x20_0000, 4);
    driver.create_sq(1, 1, 0x21_0000, 64);
    driver.create_sq(2, 1, 0x22_0000, 64);
    let mut expect = Vec::new();
    for _ in 0..40 {
        for queue in [1, 2] {
            expect.push(driver.push(queue, Command::new(nvm::FLUSH).nsid(ALL)));
        }
    }
    driver.ring(1);
    driver.ring(2);
    let mut seen = Vec::new();
    while seen.len() < expect.len() {
        driver.run();
        let before = seen.len();
        while let Some(done) = driver.reap(1) {
            assert_eq!(done.status, 0);
            seen.push(done.cid);
        }
        assert!((1..=3).contains(&(seen.len() - before)), "one slot stays free");
        driver.run();
        assert_eq!(driver.reap(1), None, "nothing is posted before the head moves");
        driver.ring_head(1);
    }
    seen.sort_unstable();
    assert_eq!(seen, expect);
}

const ALL: u32 = !0;

#[test]
fn phases_stay_right_over_many_wraps_of_odd_sizes() {
    let mut driver = Driver::new(vec![]);
    driver.enable();
    driver.create_cq(1, 0x20_0000, 7);
    driver.create_sq(1, 1, 0x21_0000, 5);
    for i in 0..100 {
        let count = i % 4 + 1;
        let cids: Vec<u32> =
            (0..count).map(|_| driver.push(1, Command::new(nvm::FLUSH).nsid(ALL))).collect();
        driver.ring(1);
        driver.run();
        for cid in cids {
            assert_eq!(driver.reap(1).map(|done| (done.cid, done.status)), Some((cid, 0)));
        }
        assert_eq!(driver.reap(1), None);
        driver.ring_head(1);
    }
}

#[test]
fn completions_that_the_driver_scribbled_over_are_never_read_back() {
    let mut driver = Driver::new(vec![]);
    driver.enable();
    driver.create_cq(1, 0x20_0000, 4);
    driver.create_sq(1, 1, 0x21_0000, 4);
    for _ in 0..20 {
        let at = driver.cqs[1].base + u64::from(driver.cqs[1].at) * 16;
        assert_eq!(driver.io(Command::new(nvm::FLUSH).nsid(ALL)).status, 0);
        let phase = driver.host.peek(at + 14, 1)[0];
        driver.host.poke(at, &[0xee; 14]);
        driver.host.poke(at + 14, &[phase]);
    }
}

#[test]
fn an_invalid_doorbell_is_ignored_and_reported_once_until_the_log_is_read() {
    let mut driver = Driver::ready(1 << 20);
    let event = driver.push(0, Command::new(admin::ASYNC_EVENT));
    driver.ring(0);
    driver.run();
    assert_eq!(driver.reap(0), None, "outstanding until something happens");
    driver.store(0x1008, 64);
    driver.run();
    let done = driver.reap(0).unwrap();
    assert_eq!((done.cid, done.result, done.status), (event, 0x0001_0100, 0));
    driver.ring_head(0);

    let event = driver.push(0, Command::new(admin::ASYNC_EVENT));
    driver.ring(0);
    driver.store(0x100c, 5);
    driver.run();
    assert_eq!(driver.reap(0), None, "masked until the error log is read");
    let log = |retain: u32| {
        Command::new(admin::GET_LOG_PAGE).prps(BUFFERS, 0).dword(10, 1 | retain << 15 | 15 << 16)
    };
    assert_eq!(driver.admin(log(1)).status, 0);
    driver.write32(0x1000 + 8 * 40, 1);
    driver.run();
    assert_eq!(driver.reap(0), None, "a retaining read does not unmask");
    assert_eq!(driver.admin(log(0)).status, 0);
    driver.write32(0x1000 + 8 * 40, 1);
    driver.run();
    let done = driver.reap(0).unwrap();
    assert_eq!((done.cid, done.result), (event, 0x0001_0000), "no such queue");
    driver.ring_head(0);
    assert_eq!(driver.io(read()).status, 0, "queue 1 still works");
}

#[test]
fn a_masked_vector_is_pending_and_sent_when_unmasked() {
    let mut driver = Driver::ready(1 << 20);
    driver.host.take_msis();
    driver.write32(0x2000 + 16 + 12, 1);
    driver.io(read());
    driver.io(read());
    assert_eq!(driver.host.take_msis(), []);
    assert_eq!(driver.read32(0x3000), 0b10);
    driver.write32(0x2000 + 16 + 12, 0);
    assert_eq!(driver.host.take_msis(), [(MSI_ADDRESS, 1)]);
    assert_eq!(driver.read32(0x3000), 0);
    let control = driver.msix_capability() + 2;
    driver.nvme.config_write(control, &[0, 0xc0]);
    driver.io(read());
    assert_eq!(driver.host.take_msis(), []);
    driver.nvme.config_write(control, &[0, 0x80]);
    assert_eq!(driver.host.take_msis(), [(MSI_ADDRESS, 1)]);
}

#[test]
fn every_batch_of_completions_raises_its_interrupt() {
    let mut driver = Driver::ready(1 << 20);
    driver.host.take_msis();
    for _ in 0..5 {
        driver.push(1, read());
        driver.ring(1);
        driver.run();
    }
    assert_eq!(driver.host.take_msis(), [(MSI_ADDRESS, 1); 5]);
}

#[test]
fn a_queue_without_interrupts_raises_none() {
    let mut driver = Driver::new(vec![]);
    driver.enable();
    let create = Command::new(admin::CREATE_CQ).prps(0x20_0000, 0).dword(10, 1 | 7 << 16);
    assert_eq!(driver.admin(create.dword(11, 1)).status, 0);
    driver.cqs[1] = Ring::new(0x20_0000, 8);
    driver.create_sq(1, 1, 0x21_0000, 8);
    driver.host.take_msis();
    assert_eq!(driver.io(Command::new(nvm::FLUSH).nsid(ALL)).status, 0);
    assert_eq!(driver.host.take_msis(), []);
}

#[test]
fn creation_checks_its_arguments() {
    let mut driver = Driver::new(vec![]);
    driver.enable();
    let cq = |qid: u32, size: u32, flags: u32, prp: u64| {
        Command::new(admin::CREATE_CQ).prps(prp, 0).dword(10, qid | size << 16).dword(11, flags)
    };
    let sq = |qid: u32, size: u32, flags: u32, prp: u64| {
        Command::new(admin::CREATE_SQ).prps(prp, 0).dword(10, qid | size << 16).dword(11, flags)
    };
    let base = 0x20_0000;
    for (command, status) in [
        (cq(0, 7, 1, base), 0x101),
        (cq(65, 7, 1, base), 0x101),
        (cq(1, 0, 1, base), 0x102),
        (cq(1, 7, 0, base), 0x02),
        (cq(1, 7, 1, base + 16), 0x13),
        (cq(1, 7, 3 | 65 << 16, base), 0x108),
        (cq(1, 7, 1, u64::MAX - 0xfff), 0),
        (cq(1, 7, 1, base), 0x101),
        (sq(1, 7, 1 | 2 << 16, base), 0x100),
        (sq(1, 7, 1, base), 0x100),
        (sq(0, 7, 1 | 1 << 16, base), 0x101),
        (sq(1, 0, 1 | 1 << 16, base), 0x102),
        (sq(1, 7, 1 << 16, base), 0x02),
        (sq(1, 7, 1 | 1 << 16, base + 1), 0x13),
        (sq(1, 7, 1 | 1 << 16, base), 0),
        (sq(1, 7, 1 | 1 << 16, base), 0x101),
        (Command::new(admin::DELETE_CQ).dword(10, 1), 0x10c),
        (Command::new(admin::DELETE_SQ).dword(10, 2), 0x101),
        (Command::new(admin::DELETE_SQ).dword(10, 0), 0x101),
        (Command::new(admin::DELETE_SQ).dword(10, 1), 0),
        (Command::new(admin::DELETE_CQ).dword(10, 1), 0),
        (Command::new(admin::DELETE_CQ).dword(10, 1), 0x101),
    ] {
        let done = driver.admin(command);
        assert_eq!(done.status, status, "{command:x?}");
        assert_eq!(done.do_not_retry, status != 0);
    }
}

#[test]
fn a_deleted_queue_starts_over_when_created_again() {
    let mut driver = Driver::ready(1 << 20);
    for _ in 0..3 {
        for _ in 0..10 {
            assert_eq!(driver.io(read()).status, 0);
        }
        driver.push(1, read());
        assert_eq!(driver.admin(Command::new(admin::DELETE_SQ).dword(10, 1)).status, 0);
        driver.ring(1);
        driver.run();
        assert_eq!(driver.reap(1), None, "the queue is gone");
        assert_eq!(driver.admin(Command::new(admin::DELETE_CQ).dword(10, 1)).status, 0);
        driver.create_pair(1, 64);
    }
}

#[test]
fn queues_of_65536_entries_work() {
    let mut driver = Driver::new(vec![]);
    driver.enable();
    driver.create_cq(1, 0x80_0000, 65536);
    driver.create_sq(1, 1, 0xa0_0000, 65536);
    for _ in 0..70_000 / 20 {
        for _ in 0..20 {
            driver.push(1, Command::new(nvm::FLUSH).nsid(ALL));
        }
        driver.ring(1);
        driver.run();
        for _ in 0..20 {
            assert_eq!(driver.reap(1).map(|done| done.status), Some(0));
        }
        driver.ring_head(1);
    }
}
