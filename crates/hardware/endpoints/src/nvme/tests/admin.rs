use std::sync::Arc;

use super::driver::*;
use crate::nvme::spec::{admin, nvm};
use crate::nvme::{Namespace, NvmeConfig};
use crate::storage::{MemoryStorage, Storage};

fn get(feature: u32, select: u32) -> Command {
    Command::new(admin::GET_FEATURES).prps(BUFFERS, 0).dword(10, feature | select << 8)
}

fn set(feature: u32, value: u32) -> Command {
    Command::new(admin::SET_FEATURES).prps(BUFFERS, 0).dword(10, feature).dword(11, value)
}

fn memory(len: u64) -> Arc<dyn Storage> {
    Arc::new(MemoryStorage::new(len).unwrap())
}

#[test]
fn identify_tells_what_every_driver_asks_first() {
    let mut driver = Driver::ready(1 << 20);
    let (done, data) = driver.identify(1, 0);
    assert_eq!(done.status, 0);
    assert_eq!(data[..4], [0x36, 0x1b, 0xf4, 0x1a]);
    assert_eq!(&data[4..24], b"lychgate-0          ");
    assert_eq!(data[77], 9);
    assert_eq!(data[80..84], 0x0001_0400_u32.to_le_bytes());
    assert_eq!(data[512..514], [0x66, 0x44]);
    assert_eq!(data[516..520], [1, 0, 0, 0]);
    assert_eq!(data[536..540], [0; 4], "no SGLs");
    assert_eq!(&data[768..800], b"nqn.2014-08.org.nvmexpress:uuid:");
    let (done, data) = driver.identify(0, 1);
    assert_eq!(done.status, 0);
    for at in [0, 8, 16] {
        assert_eq!(data[at..at + 8], 2048_u64.to_le_bytes());
    }
    assert_eq!(data[128..132], [0, 0, 9, 0]);
}

#[test]
fn identify_answers_each_structure_and_refuses_the_rest() {
    let read_only: Arc<dyn Storage> = Arc::new(MemoryStorage::read_only(&[1; 8192]).unwrap());
    let namespaces = vec![
        Namespace::new(memory(1 << 20)),
        Namespace { lba_shift: 12, nguid: [7; 16], ..Namespace::new(read_only) },
    ];
    let mut driver = Driver::with(&NvmeConfig::default(), namespaces);
    driver.enable();
    let (_, data) = driver.identify(0, 2);
    assert_eq!((data[0], data[130], data[99], &data[104..120]), (2, 12, 1, &[7; 16][..]));
    let (_, data) = driver.identify(2, 0);
    assert_eq!(data[..12], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let (_, data) = driver.identify(2, 1);
    assert_eq!(data[..8], [2, 0, 0, 0, 0, 0, 0, 0]);
    let (_, data) = driver.identify(3, 2);
    assert_eq!(data[..4], [2, 16, 0, 0]);
    assert_eq!(data[4..24], [[7; 16].as_slice(), &[0; 4]].concat());
    for (cns, nsid) in [(3, 1), (5, 1), (6, 0)] {
        let (done, data) = driver.identify(cns, nsid);
        assert_eq!((done.status, data), (0, vec![0; 4096]), "CNS {cns}");
    }
    for (cns, nsid, status) in [
        (0, 0, 0x0b),
        (0, 3, 0x0b),
        (0, !0, 0x0b),
        (3, 0, 0x0b),
        (5, 3, 0x0b),
        (2, !1, 0x0b),
        (0x13, 1, 0x02),
        (0xff, 1, 0x02),
    ] {
        let (done, data) = driver.identify(cns, nsid);
        assert_eq!((done.status, done.do_not_retry), (status, true), "CNS {cns} NSID {nsid}");
        assert_eq!(data, vec![0xaa; 4096], "nothing is written on error");
    }
}

#[test]
fn data_of_admin_commands_may_cross_pages() {
    let mut driver = Driver::ready(1 << 20);
    let at = BUFFERS + 0xf00;
    let command = Command::new(admin::IDENTIFY).prps(at, BUFFERS + 0x5000).dword(10, 1);
    assert_eq!(driver.admin(command).status, 0);
    assert_eq!(driver.host.peek(at, 2), [0x36, 0x1b]);
    assert_eq!(driver.host.peek(BUFFERS + 0x5000 + 512 - 0x100, 2), [0x66, 0x44]);
}

#[test]
fn the_number_of_queues_is_zero_based_and_fixed_once_a_queue_exists() {
    let mut driver = Driver::new(vec![]);
    driver.enable();
    assert_eq!(driver.admin(set(7, 0x000f_000f)).result, 0x003f_003f);
    assert_eq!(driver.admin(set(7, 0xffff)).status, 0x02);
    assert_eq!(driver.admin(set(7, 0xffff_0000)).status, 0x02);
    driver.create_cq(64, 0x20_0000, 8);
    assert_eq!(driver.admin(set(7, 1)).status, 0x0c);
    assert_eq!(driver.admin(get(7, 0)).result, 0x003f_003f);
}

#[test]
fn features_keep_their_value_until_reset() {
    let mut driver = Driver::ready(1 << 20);
    for (feature, value) in
        [(1, 0x0102_0307), (4, 0x0150), (4, 0x0010_0140), (6, 0), (8, 0x0a03), (10, 1), (11, 0x1ff)]
    {
        let before = driver.admin(get(feature, 0).dword(11, value)).result;
        assert_eq!(driver.admin(set(feature, value)).status, 0);
        let kept = if feature == 4 { value & 0xffff } else { value };
        assert_eq!(driver.admin(get(feature, 0).dword(11, value)).result, kept);
        assert_eq!(driver.admin(get(feature, 1).dword(11, value)).result, before, "default");
        assert_eq!(driver.admin(get(feature, 2).dword(11, value)).result, before, "saved");
        assert_eq!(driver.admin(get(feature, 3)).result, 4, "changeable");
    }
    assert_eq!(driver.admin(set(9, 1 << 16 | 3)).status, 0);
    assert_eq!(driver.admin(get(9, 0).dword(11, 3)).result, 1 << 16 | 3);
    assert_eq!(driver.admin(set(5, 9).nsid(1)).status, 0);
    assert_eq!(driver.admin(get(5, 0).nsid(1)).result, 9);
    driver.write32(CC, 0);
    driver.enable();
    assert_eq!(driver.admin(get(6, 0)).result, 1);
    assert_eq!(driver.admin(get(5, 0).nsid(1)).result, 0);
    assert_eq!(driver.admin(get(4, 0)).result, 343);
}

#[test]
fn features_refuse_what_they_cannot_hold() {
    let mut driver = Driver::ready(1 << 20);
    for (command, status) in [
        (get(0x0c, 0), 0x02),
        (set(0x0c, 0), 0x02),
        (get(1, 4), 0x02),
        (set(1, 0).dword(10, 1 | 1 << 31), 0x10d),
        (set(2, 1), 0x02),
        (set(4, 3 << 20), 0x02),
        (get(4, 0).dword(11, 1 << 16), 0x02),
        (set(5, 1).nsid(2), 0x0b),
        (set(5, 1 << 16).nsid(1), 0x02),
        (get(5, 0).nsid(!0), 0x0b),
        (set(9, 65), 0x02),
    ] {
        assert_eq!(driver.admin(command).status, status, "{command:x?}");
    }
    assert_eq!(driver.admin(set(4, 1 << 16)).status, 0, "a sensor that is not there: no effect");
}

#[test]
fn the_timestamp_counts_from_what_the_host_set() {
    let mut driver = Driver::ready(1 << 20);
    driver.host.poke(BUFFERS, &0xffff_0000_1234_5678_u64.to_le_bytes());
    assert_eq!(driver.admin(set(0x0e, 0)).status, 0);
    assert_eq!(driver.admin(get(0x0e, 0)).status, 0);
    let now = u64::from_le_bytes(driver.host.peek(BUFFERS, 8).try_into().unwrap());
    assert_eq!(now >> 48, 2, "set by the host");
    assert!((0x1234_5678..0x1234_5678 + 600_000).contains(&(now & 0xffff_ffff_ffff)));
}

#[test]
fn log_pages_are_cut_and_padded_to_what_the_host_asks() {
    let mut driver = Driver::ready(1 << 20);
    let bytes = Driver::pattern(512 * 3, 1);
    driver.write_blocks(0, &bytes);
    let log = |page: u32, dwords: u32, offset: u32| {
        Command::new(admin::GET_LOG_PAGE)
            .prps(BUFFERS, BUFFERS + 0x1000)
            .dword(10, page | (dwords - 1) << 16)
            .dword(12, offset)
    };
    driver.host.poke(BUFFERS, &[0xaa; 0x2000]);
    assert_eq!(driver.admin(log(2, 128 + 16, 0)).status, 0);
    let page = driver.host.peek(BUFFERS, 0x280);
    assert_eq!((page[1], page[2], page[3]), (54, 1, 100));
    assert_eq!((page[48], page[80]), (1, 1), "one data unit, one command written");
    assert_eq!(page[512..576], [0; 64], "zeros beyond the end");
    assert_eq!(page[576..], [0xaa; 64], "and nothing more");
    assert_eq!(driver.admin(log(2, 4, 80)).status, 0);
    assert_eq!(driver.host.peek(BUFFERS, 16)[0], 1);
    for page in [3, 4, 5] {
        assert_eq!(driver.admin(log(page, 1024, 0)).status, 0);
    }
    assert_eq!(driver.host.peek(BUFFERS + 1024, 4)[0] & 1, 1, "effects: Flush is supported");
    for (command, status) in [
        (log(0x80, 1, 0), 0x109),
        (log(2, 1, 516), 0x02),
        (log(2, 1, 2), 0x02),
        (log(2, 1, 0).dword(13, 1), 0x02),
        (log(2, 1, 0).dword(11, 0xffff), 0x02),
        (log(2, 1, 0).nsid(1), 0x02),
    ] {
        assert_eq!(driver.admin(command).status, status, "{command:x?}");
    }
}

#[test]
fn the_error_log_has_the_newest_failure_first() {
    let mut driver = Driver::ready(1 << 20);
    driver.io(Command::range(nvm::READ, 5000, 1).prps(BUFFERS, 0));
    driver.io(Command::range(nvm::READ, 6000, 1).prps(BUFFERS, 0));
    let log = Command::new(admin::GET_LOG_PAGE).prps(BUFFERS, 0).dword(10, 1 | 31 << 16);
    driver.admin(log);
    let page = driver.host.peek(BUFFERS, 128);
    assert_eq!(page[..8], 2_u64.to_le_bytes());
    assert_eq!(page[8..10], [1, 0], "queue");
    assert_eq!(page[16..24], 6000_u64.to_le_bytes());
    assert_eq!(page[24..28], [1, 0, 0, 0]);
    assert_eq!(page[64..72], 1_u64.to_le_bytes());
    assert_eq!(page[80..88], 5000_u64.to_le_bytes());
}

#[test]
fn event_requests_stay_until_aborted_and_are_limited() {
    let mut driver = Driver::ready(1 << 20);
    let requests: Vec<u32> =
        (0..4).map(|_| driver.push(0, Command::new(admin::ASYNC_EVENT))).collect();
    let fifth = driver.push(0, Command::new(admin::ASYNC_EVENT));
    driver.ring(0);
    driver.run();
    let refused = driver.reap(0).unwrap();
    assert_eq!((refused.cid, refused.status), (fifth, 0x105));
    driver.ring_head(0);

    let abort = |cid: u32| Command::new(admin::ABORT).dword(10, cid << 16);
    let cid = driver.push(0, abort(requests[1]));
    driver.ring(0);
    driver.run();
    let victim = driver.reap(0).unwrap();
    assert_eq!((victim.cid, victim.status), (requests[1], 0x07));
    let done = driver.reap(0).unwrap();
    assert_eq!((done.cid, done.status, done.result), (cid, 0, 0));
    driver.ring_head(0);

    let done = driver.admin(abort(requests[1]));
    assert_eq!((done.status, done.result), (0, 1), "not found is not an error");
    let done = driver.admin(Command::new(admin::ABORT).dword(10, 1 | 5 << 16));
    assert_eq!((done.status, done.result), (0, 1));
}

#[test]
fn a_command_id_that_is_outstanding_is_refused() {
    let mut driver = Driver::ready(1 << 20);
    let cid = driver.push(0, Command::new(admin::ASYNC_EVENT));
    let ring = driver.sqs[0];
    let twin = Command::new(admin::IDENTIFY).prps(BUFFERS, 0).dword(10, 1);
    let twin = twin.dword(0, twin.0[0] | cid << 16);
    driver.host.poke(ring.base + u64::from(ring.at) * 64, &twin.bytes());
    driver.sqs[0].at += 1;
    driver.ring(0);
    driver.run();
    assert_eq!(driver.reap(0).map(|done| (done.cid, done.status)), Some((cid, 0x03)));
}

#[test]
fn a_reset_drops_event_requests_silently() {
    let mut driver = Driver::ready(1 << 20);
    driver.push(0, Command::new(admin::ASYNC_EVENT));
    driver.ring(0);
    driver.run();
    driver.write32(CC, 0);
    driver.host.record();
    driver.run();
    assert_eq!(driver.host.recorded(), []);
    driver.enable();
    driver.create_pair(1, 8);
    driver.store(0x1008, 100);
    driver.run();
    assert_eq!(driver.reap(0), None, "an event without a request waits");
    let cid = driver.push(0, Command::new(admin::ASYNC_EVENT));
    driver.ring(0);
    driver.run();
    assert_eq!(driver.reap(0).map(|done| done.cid), Some(cid));
}

#[test]
fn unknown_admin_opcodes_sgls_and_fused_commands_are_refused() {
    let mut driver = Driver::ready(1 << 20);
    for opcode in [0x03, 0x0d, 0x10, 0x7c, 0x80, 0xc0, 0xff] {
        let done = driver.admin(Command::new(opcode));
        assert_eq!((done.status, done.do_not_retry), (0x01, true));
    }
    for bits in [1 << 8, 1 << 14, 2 << 14] {
        let command = Command::new(admin::IDENTIFY).prps(BUFFERS, 0).dword(10, 1);
        assert_eq!(driver.admin(command.dword(0, command.0[0] | bits)).status, 0x02);
        let command = Command::range(nvm::READ, 0, 1).prps(BUFFERS, 0);
        assert_eq!(driver.io(command.dword(0, command.0[0] | bits)).status, 0x02);
    }
}
