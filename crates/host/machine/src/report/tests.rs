use std::sync::Arc;

use super::*;
use crate::system::Call;
use lychgate_origins::Stack;

fn cause(now: Instant, before: Duration, number: u64, name: &str) -> Cause {
    let call = Call {
        number,
        process: 4711,
        thread: 4712,
        instruction: 0x55d0_0040_1a2c,
        name: name.into(),
    };
    Cause {
        time: now.checked_sub(before).unwrap(),
        call: Some(Arc::new(call)),
        stack: Stack::default(),
        place: None,
    }
}

fn mapping(now: Instant, iova: u64, len: u64) -> Mapping {
    Mapping {
        iova: Iova::new(iova),
        len,
        prot: Prot::READ | Prot::WRITE,
        mapped: cause(now, Duration::from_micros(3_210), 41, "IOMMU_IOAS_MAP"),
        unmapped: None,
    }
}

fn story(now: Instant, history: History) -> FaultStory {
    FaultStory {
        device: "0000:01:00.0".parse().unwrap(),
        name: "nvme".into(),
        initiator: Some("queue 1, command 0x17 READ lba 2048+8".into()),
        access: Access::Write,
        iova: Iova::new(0x7f000),
        pasid: None,
        reason: Reason::Iommu(FaultReason::NotPresent),
        time: now,
        history,
        raw: Some([0x2020_0001_0000_0100, 0x7f000, 0, 0]),
    }
}

#[test]
fn use_after_unmap_names_the_call_that_unmapped() {
    let now = Instant::now();
    let mut gone = mapping(now, 0x7e000, 0x2000);
    gone.unmapped = Some(cause(now, Duration::from_nanos(1_250), 57, "IOMMU_IOAS_UNMAP"));
    let history = History { attached: true, mapping: Some(gone), ..History::default() };
    insta::assert_snapshot!(story(now, history).render(false), @r"
    DMA fault: 0000:01:00.0 (nvme) could not write 0x7f000: not mapped
      device did    queue 1, command 0x17 READ lba 2048+8
      was mapped    0x7e000-0x7ffff read-write, 3.2 ms before by IOMMU_IOAS_MAP (call 41, process 4711, thread 4712, at 0x55d000401a2c)
      unmapped      1.2 us before by IOMMU_IOAS_UNMAP (call 57, process 4711, thread 4712, at 0x55d000401a2c)
      event         0x2020000100000100 0x000000000007f000
    ");
}

#[test]
fn a_write_to_a_read_only_mapping_shows_the_mapping() {
    let now = Instant::now();
    let live = Mapping { prot: Prot::READ, ..mapping(now, 0x7f000, 0x1000) };
    let history = History { attached: true, mapping: Some(live), ..History::default() };
    let story =
        FaultStory { reason: Reason::Iommu(FaultReason::Permission), ..story(now, history) };
    insta::assert_snapshot!(story.render(false), @r"
    DMA fault: 0000:01:00.0 (nvme) could not write 0x7f000: not permitted
      device did    queue 1, command 0x17 READ lba 2048+8
      is mapped     0x7f000-0x7ffff read-only, 3.2 ms before by IOMMU_IOAS_MAP (call 41, process 4711, thread 4712, at 0x55d000401a2c)
      event         0x2020000100000100 0x000000000007f000
    ");
}

#[test]
fn an_address_that_never_was_mapped_shows_its_neighbours() {
    let now = Instant::now();
    let history = History {
        attached: true,
        mapping: None,
        below: Some(mapping(now, 0x7e000, 0x1000)),
        above: Some(mapping(now, 0x90000, 0x1000)),
    };
    insta::assert_snapshot!(story(now, history).render(false), @r"
    DMA fault: 0000:01:00.0 (nvme) could not write 0x7f000: not mapped
      device did    queue 1, command 0x17 READ lba 2048+8
      next below    0x7e000-0x7efff ends just before, 3.2 ms before by IOMMU_IOAS_MAP (call 41, process 4711, thread 4712, at 0x55d000401a2c)
      next above    0x90000-0x90fff starts 0x11000 bytes behind, 3.2 ms before by IOMMU_IOAS_MAP (call 41, process 4711, thread 4712, at 0x55d000401a2c)
      event         0x2020000100000100 0x000000000007f000
    ");
}

#[test]
fn what_only_the_log_tells_of_is_told_without_the_rest() {
    let now = Instant::now();
    let story = FaultStory {
        initiator: None,
        access: Access::Read,
        pasid: Pasid::new(5),
        reason: Reason::Iommu(FaultReason::Blocked),
        ..story(now, History::default())
    };
    insta::assert_snapshot!(story.render(false), @r"
    DMA fault: 0000:01:00.0 (nvme) could not read 0x7f000: device is blocked
      PASID         0x5
      attached to   nothing
      event         0x2020000100000100 0x000000000007f000
    ");
}

#[test]
fn memory_that_is_gone_has_no_event() {
    let now = Instant::now();
    let never = cause(now, Duration::ZERO, 1, "none");
    let by_nobody = Cause { time: now, call: None, ..never };
    let live = Mapping { mapped: by_nobody, ..mapping(now, 0x7f000, 0x1000) };
    let history = History { attached: true, mapping: Some(live), ..History::default() };
    let story = FaultStory { reason: Reason::MemoryGone, raw: None, ..story(now, history) };
    insta::assert_snapshot!(story.render(false), @r"
    DMA fault: 0000:01:00.0 (nvme) could not write 0x7f000: mapped, but its memory is gone
      device did    queue 1, command 0x17 READ lba 2048+8
      is mapped     0x7f000-0x7ffff read-write, 0 ns before, by no call
    ");
}

#[test]
fn colour_changes_nothing_but_escapes() {
    let story = story(Instant::now(), History::default());
    let coloured = story.render(true);
    let mut plain = String::new();
    let mut rest = coloured.as_str();
    while let Some((before, after)) = rest.split_once('\x1b') {
        plain += before;
        rest = after.split_once('m').unwrap().1;
    }
    assert_eq!(plain + rest, story.render(false));
}
