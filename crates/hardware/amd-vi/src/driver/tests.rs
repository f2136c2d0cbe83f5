//! The driver against registers that record: which commands it queues, in which order, and what
//! the tables hold when hardware gets to see each. What the commands achieve is for the model to
//! tell (`tests/driver_on_model.rs`).

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::vec::Vec;

use lychgate_iommu::{
    AllocError, AllocFlags, AttachError, Capability, Domain, Driver, FaultReason, FaultReport,
    FaultSink, MapError, PagingDomain, ProbeError, ReservedKind,
};
use lychgate_types::{
    HeapPages, Iova, Memory, Mmio, Pages, PhysAddr, PhysRun, Prot, RequesterId, StdLocks,
};

use super::{AmdVi, Config, HW_INFO_TYPE_AMD, InitError};
use crate::spec::command::{
    COMPLETION_WAIT, INVALIDATE_DEVTAB_ENTRY, INVALIDATE_INTERRUPT_TABLE, INVALIDATE_IOMMU_ALL,
    INVALIDATE_IOMMU_PAGES,
};
use crate::spec::registers::{
    COMMAND_BUFFER_BASE, COMMAND_HEAD, COMMAND_TAIL, CONTROL, DEVICE_TABLE_BASE, DeviceTableBase,
    EFR, EFR2, EVENT_HEAD, EVENT_LOG_BASE, EVENT_TAIL, RingBase, STATUS,
};
use crate::spec::{Command, Control, Dte, Efr, Efr2, Event, Status, event};

const RW: Prot = Prot::READ.union(Prot::WRITE);

/// Registers that execute commands at once, and remember them.
struct Recorder {
    memory: Arc<HeapPages>,
    state: Mutex<State>,
}

struct State {
    efr: Efr,
    efr2: Efr2,
    control: Control,
    status: Status,
    table: DeviceTableBase,
    commands: RingBase,
    head: u64,
    tail: u64,
    log: RingBase,
    log_head: u64,
    log_tail: u64,
    /// Commands in the order of execution, each invalidation of a device table entry with
    /// the entry.
    executed: Vec<(Command, Option<Dte>)>,
    /// Executions until one is refused and the ring halts.
    refuse: VecDeque<usize>,
    /// Nothing is fetched any more.
    dead: bool,
}

impl Recorder {
    fn new(memory: Arc<HeapPages>) -> Self {
        let efr = Efr::default().with_ia_sup(true).with_hats(2);
        Self {
            memory,
            state: Mutex::new(State {
                efr,
                efr2: Efr2::default(),
                control: Control::default(),
                status: Status::default(),
                table: DeviceTableBase::default(),
                commands: RingBase::default(),
                head: 0,
                tail: 0,
                log: RingBase::default(),
                log_head: 0,
                log_tail: 0,
                executed: Vec::new(),
                refuse: VecDeque::new(),
                dead: false,
            }),
        }
    }

    fn load(&self, at: u64) -> u64 {
        self.memory.load_u64(PhysAddr::new(at)).unwrap()
    }

    fn dte(&self, state: &State, id: u64) -> Dte {
        let at = state.table.base().get() + id * 32;
        Dte([0, 8, 16, 24].map(|offset| self.load(at + offset)))
    }

    fn execute(&self, state: &mut State) {
        let bytes = state.commands.bytes().expect("a legal ring length");
        while state.head != state.tail && state.status.cmd_buf_run() && !state.dead {
            let at = state.commands.base().get() + state.head;
            let command = Command([self.load(at), self.load(at + 8)]);
            if let Some(left) = state.refuse.front_mut() {
                if *left == 0 {
                    state.refuse.pop_front();
                    state.status = state.status.with_cmd_buf_run(false);
                    return;
                }
                *left -= 1;
            }
            let dte = (command.opcode() == INVALIDATE_DEVTAB_ENTRY)
                .then(|| self.dte(state, command.device_id()));
            if command.opcode() == COMPLETION_WAIT {
                assert!(command.wait_s());
                let data = command.store_data();
                self.memory.store_u64(command.store_address(), data).unwrap();
            }
            state.executed.push((command, dte));
            state.head = (state.head + 16) % bytes;
        }
    }

    /// Logs an event as hardware does; gives whether there was room.
    fn log(&self, event: Event) -> bool {
        let mut state = self.state.lock().unwrap();
        let bytes = state.log.bytes().unwrap();
        let next = (state.log_tail + 16) % bytes;
        if !state.status.event_log_run() {
            return false;
        }
        state.status = state.status.with_event_log_int(true);
        if next == state.log_head {
            state.status = state.status.with_event_overflow(true).with_event_log_run(false);
            return false;
        }
        let at = state.log.base().get() + state.log_tail;
        for (offset, word) in [(8, event.0[1]), (0, event.0[0])] {
            self.memory.store_u64(PhysAddr::new(at + offset), word).unwrap();
        }
        state.log_tail = next;
        true
    }

    /// A ring that has halted runs again only when its enable bit rises.
    fn update_runs(state: &mut State, before: Control) {
        let commands = |control: Control| control.iommu_en() && control.cmd_buf_en();
        let events = |control: Control| control.iommu_en() && control.event_log_en();
        let run = |runs, was: bool, is: bool| is && (runs || !was);
        let (now, status) = (state.control, state.status);
        state.status = status
            .with_cmd_buf_run(run(status.cmd_buf_run(), commands(before), commands(now)))
            .with_event_log_run(run(status.event_log_run(), events(before), events(now)));
    }
}

impl Mmio for Recorder {
    fn read32(&self, _: u64) -> u32 {
        panic!("the driver reads 64 bits")
    }

    fn write32(&self, _: u64, _: u32) {
        panic!("the driver writes 64 bits")
    }

    fn read64(&self, offset: u64) -> u64 {
        let state = self.state.lock().unwrap();
        match offset {
            EFR => state.efr.0[0],
            EFR2 => state.efr2.0[0],
            CONTROL => state.control.0[0],
            STATUS => state.status.0[0],
            COMMAND_HEAD => state.head,
            EVENT_TAIL => state.log_tail,
            _ => panic!("read of {offset:#x}"),
        }
    }

    fn write64(&self, offset: u64, value: u64) {
        let mut state = self.state.lock().unwrap();
        let state = &mut *state;
        match offset {
            DEVICE_TABLE_BASE => {
                assert!(!state.control.iommu_en());
                state.table = DeviceTableBase([value]);
            }
            COMMAND_BUFFER_BASE => {
                assert!(!state.control.cmd_buf_en());
                state.commands = RingBase([value]);
                (state.head, state.tail) = (0, 0);
            }
            EVENT_LOG_BASE => {
                assert!(!state.status.event_log_run());
                state.log = RingBase([value]);
                (state.log_head, state.log_tail) = (0, 0);
            }
            CONTROL => {
                let before = std::mem::replace(&mut state.control, Control([value]));
                Self::update_runs(state, before);
            }
            STATUS => state.status.0[0] &= !(value & Status::W1C),
            COMMAND_TAIL => {
                state.tail = value;
                self.execute(state);
            }
            EVENT_HEAD => state.log_head = value,
            _ => panic!("write of {offset:#x}"),
        }
    }
}

#[derive(Default)]
struct Sink {
    faults: Mutex<Vec<FaultReport>>,
    lost: Mutex<usize>,
}

impl FaultSink for Sink {
    fn fault(&self, report: &FaultReport) {
        self.faults.lock().unwrap().push(*report);
    }

    fn faults_lost(&self) {
        *self.lost.lock().unwrap() += 1;
    }
}

struct Bench {
    memory: Arc<HeapPages>,
    hardware: Arc<Recorder>,
    sink: Arc<Sink>,
    driver: AmdVi<HeapPages, StdLocks>,
}

const DEVICE: RequesterId = RequesterId::new(0x0108);
const ALIAS: RequesterId = RequesterId::new(0x0100);
const OTHER: RequesterId = RequesterId::new(0x0110);

fn config() -> Config {
    Config {
        last_device: RequesterId::new(0x01ff),
        command_buffer_len: 8,
        event_log_len: 8,
        patience: 1 << 14,
        ..Config::default()
    }
}

impl Bench {
    fn new() -> Self {
        Self::with(config(), |_| ()).unwrap()
    }

    fn with(config: Config, prepare: impl FnOnce(&mut State)) -> Result<Self, InitError> {
        let memory = Arc::new(HeapPages::new());
        let hardware = Arc::new(Recorder::new(memory.clone()));
        prepare(&mut hardware.state.lock().unwrap());
        let sink = Arc::new(Sink::default());
        let driver = AmdVi::new(hardware.clone(), memory.clone(), sink.clone(), config)?;
        Ok(Self { memory, hardware, sink, driver })
    }

    fn probe(&self) {
        self.driver.probe(DEVICE, &[ALIAS]).unwrap();
        self.driver.probe(OTHER, &[]).unwrap();
        self.take();
    }

    fn paging(&self) -> Arc<dyn PagingDomain> {
        let flags = AllocFlags::default();
        self.driver.alloc_paging(DEVICE, flags, None).unwrap()
    }

    fn attach(&self, device: RequesterId, domain: &Arc<dyn PagingDomain>) {
        let domain = Domain::Paging(domain.clone());
        self.driver.attach(device, &domain, &Domain::Blocked).unwrap();
    }

    /// The commands that were executed since the last call.
    fn take(&self) -> Vec<(Command, Option<Dte>)> {
        std::mem::take(&mut self.hardware.state.lock().unwrap().executed)
    }

    /// Their opcodes.
    fn take_opcodes(&self) -> Vec<u64> {
        self.take().iter().map(|(command, _)| command.opcode()).collect()
    }

    fn dte(&self, id: RequesterId) -> Dte {
        let state = self.hardware.state.lock().unwrap();
        self.hardware.dte(&state, id.get().into())
    }

    fn refuse(&self, after: &[usize]) {
        let mut state = self.hardware.state.lock().unwrap();
        state.refuse = after.iter().copied().collect();
    }
}

fn frames(at: u64, len: u64) -> [PhysRun; 1] {
    [PhysRun { start: PhysAddr::new(at), len }]
}

#[test]
fn the_start_blocks_every_requester_id_and_drops_every_cache() {
    let bench = Bench::new();
    let state = bench.hardware.state.lock().unwrap();
    assert_eq!(state.table.size(), 3, "512 entries of 32 bytes");
    assert!(state.control.iommu_en() && state.control.coherent());
    assert!(state.control.event_int_en());
    for id in 0..512 {
        let dte = bench.hardware.dte(&state, id);
        assert_eq!(dte, Dte::default().with_v(true));
    }
    let opcodes: Vec<u64> = state.executed.iter().map(|(c, _)| c.opcode()).collect();
    assert_eq!(opcodes, [INVALIDATE_IOMMU_ALL, COMPLETION_WAIT]);
}

#[test]
fn a_previous_owner_is_stopped_before_anything_changes() {
    let busy = Control::default()
        .with_iommu_en(true)
        .with_cmd_buf_en(true)
        .with_event_log_en(true)
        .with_gt_en(true)
        .with_ht_tun_en(true);
    // The recorder asserts the order.
    let bench = Bench::with(config(), |state| {
        state.control = busy;
        state.status = Status::default().with_event_overflow(true).with_cmd_buf_run(true);
    })
    .unwrap();
    let state = bench.hardware.state.lock().unwrap();
    assert!(state.control.ht_tun_en() && !state.control.gt_en());
    assert!(!state.status.event_overflow());
}

#[test]
fn without_ia_sup_the_start_names_every_device_and_every_domain_id() {
    let bench = Bench::with(config(), |state| state.efr = state.efr.with_ia_sup(false)).unwrap();
    let executed = bench.take();
    let count = |opcode| executed.iter().filter(|(c, _)| c.opcode() == opcode).count();
    assert_eq!(count(INVALIDATE_DEVTAB_ENTRY), 512);
    assert_eq!(count(INVALIDATE_INTERRUPT_TABLE), 512);
    assert_eq!(count(INVALIDATE_IOMMU_PAGES), 65536);
    assert_eq!(count(COMPLETION_WAIT), 2);
    assert_eq!(executed.last().unwrap().0.opcode(), COMPLETION_WAIT);
}

#[test]
fn hardware_that_cannot_be_driven_is_refused() {
    let refused = Bench::with(config(), |state| state.efr = state.efr.with_hats(3));
    assert_eq!(refused.err(), Some(InitError::NoHostTranslation));
    let refused = Bench::with(config(), |state| state.dead = true);
    assert_eq!(refused.err(), Some(InitError::Hardware));

    let memory = Arc::new(HeapPages::new());
    for allocations in 0..4 {
        memory.fail_after(allocations);
        let hardware = Arc::new(Recorder::new(memory.clone()));
        let driver: Result<AmdVi<_, StdLocks>, _> =
            AmdVi::new(hardware, memory.clone(), Arc::new(Sink::default()), config());
        assert_eq!(driver.err(), Some(InitError::OutOfMemory));
        assert_eq!(memory.live(), 0);
    }
}

#[test]
fn attaching_writes_the_domain_id_before_the_root_and_waits() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(DEVICE, &domain);
    let dte = bench.dte(DEVICE);
    assert!(dte.v() && dte.tv() && dte.ir() && dte.iw());
    assert_eq!(dte.mode(), 3);
    assert_ne!(dte.domain_id(), 0);
    assert_eq!(bench.dte(ALIAS), dte);
    assert_eq!(bench.dte(OTHER), Dte::default().with_v(true));
    let executed = bench.take();
    let devices: Vec<u64> = executed.iter().map(|(c, _)| c.device_id()).collect();
    assert_eq!(devices[..2], [DEVICE.get().into(), ALIAS.get().into()]);
    assert!(executed[..2].iter().all(|(_, seen)| *seen == Some(dte)));
    assert_eq!(executed[2].0.opcode(), COMPLETION_WAIT);
    assert_eq!(executed.len(), 3);
}

#[test]
fn changing_domains_blocks_waits_and_drops_the_old_domain_id() {
    let bench = Bench::new();
    bench.probe();
    let (one, two) = (bench.paging(), bench.paging());
    bench.attach(OTHER, &one);
    let old = bench.dte(OTHER);
    bench.take();
    bench.attach(OTHER, &two);
    let new = bench.dte(OTHER);
    assert_ne!(old.domain_id(), new.domain_id());
    let executed = bench.take();
    let opcodes: Vec<u64> = executed.iter().map(|(c, _)| c.opcode()).collect();
    assert_eq!(
        opcodes,
        [
            INVALIDATE_DEVTAB_ENTRY,
            COMPLETION_WAIT,
            INVALIDATE_IOMMU_PAGES,
            INVALIDATE_DEVTAB_ENTRY,
            COMPLETION_WAIT,
        ]
    );
    let between = executed[0].1.unwrap();
    assert!(between.v() && !between.tv());
    let pages = executed[2].0;
    assert_eq!(pages.domain_id(), old.domain_id());
    assert!(pages.pde() && !pages.gn());
    assert_eq!(pages.block(), crate::spec::size::Block::ALL);
    assert_eq!(executed[3].1, Some(new));

    bench.driver.attach(OTHER, &Domain::Identity, &Domain::Paging(two)).unwrap();
    let identity = bench.dte(OTHER);
    assert!(identity.tv() && identity.ir() && identity.iw());
    assert_eq!(identity.mode(), 0);
    bench.driver.attach(OTHER, &Domain::Blocked, &Domain::Identity).unwrap();
    assert_eq!(bench.dte(OTHER), Dte::default().with_v(true));
}

#[test]
fn the_interrupt_half_of_an_entry_stays_as_it_is() {
    let bench = Bench::new();
    bench.probe();
    let at = bench.hardware.state.lock().unwrap().table.base();
    let words = bench.memory.words(at.wrapping_add(u64::from(OTHER.get()) * 32), 4);
    words[2].store(0x55, Ordering::Relaxed);
    words[3].store(0x66, Ordering::Relaxed);
    bench.attach(OTHER, &bench.paging());
    bench.driver.release(OTHER);
    assert_eq!(bench.dte(OTHER).0, [1, 0, 0x55, 0x66]);
}

#[test]
fn mapping_needs_no_command_and_unmapping_one_for_its_very_block() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(OTHER, &domain);
    bench.take();
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x1000), RW).unwrap();
    assert_eq!(bench.take_opcodes(), []);
    assert_eq!(domain.iova_to_phys(Iova::new(0x4123)), Some(PhysAddr::new(0x9123)));
    assert_eq!(domain.unmap(Iova::new(0x4000), 0x1000), 0x1000);
    let executed = bench.take();
    assert_eq!(executed.len(), 2);
    let pages = executed[0].0;
    assert_eq!(pages.domain_id(), bench.dte(OTHER).domain_id());
    assert_eq!(pages.block().range(), 0x4000..=0x4fff);
    assert!(!pages.pde());
    assert_eq!(executed[1].0.opcode(), COMPLETION_WAIT);
}

#[test]
fn a_table_that_goes_is_invalidated_with_pde_and_freed_after_the_wait() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(OTHER, &domain);
    let before = bench.memory.live();
    let scattered: Vec<PhysRun> =
        (0..512).map(|page| frames(0x100_0000 + page * 0x2000, 0x1000)[0]).collect();
    domain.map(Iova::new(0x20_0000), &scattered, RW).unwrap();
    assert!(bench.memory.live() > before);
    let with_tables = bench.memory.live();
    bench.take();
    assert_eq!(domain.unmap(Iova::new(0x20_0000), 0x20_0000), 0x20_0000);
    let pages = bench.take()[0].0;
    assert!(pages.pde());
    assert_eq!(pages.block().range(), 0x20_0000..=0x3f_ffff);
    assert_eq!(bench.memory.live(), with_tables - 1);
}

#[test]
fn a_domain_without_devices_needs_no_commands_at_all() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x3000), RW).unwrap();
    assert_eq!(domain.unmap(Iova::new(0x4000), 0x3000), 0x3000);
    drop(domain);
    assert_eq!(bench.take_opcodes(), []);
}

#[test]
fn with_np_cache_mapping_invalidates_what_it_has_mapped() {
    let np_cache = Config { np_cache: true, ..config() };
    let bench = Bench::with(np_cache, |_| ()).unwrap();
    bench.probe();
    let domain = bench.paging();
    bench.attach(OTHER, &domain);
    bench.take();
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x2000), RW).unwrap();
    let pages = bench.take()[0].0;
    assert!(pages.pde());
    assert_eq!(pages.block().range(), 0x4000..=0x5fff);
}

#[test]
fn growth_changes_root_and_mode_together_and_every_alias() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(DEVICE, &domain);
    bench.attach(OTHER, &domain);
    domain.map(Iova::new(0x1000), &frames(0x9000, 0x1000), RW).unwrap();
    let before = bench.dte(DEVICE);
    bench.take();
    domain.map(Iova::new(1 << 40), &frames(0xa000, 0x1000), RW).unwrap();
    let after = bench.dte(DEVICE);
    assert_eq!(after.mode(), 4);
    assert_ne!(after.host_root(), before.host_root());
    assert_eq!(after.domain_id(), before.domain_id());
    let executed = bench.take();
    let mut told: Vec<u64> = executed[..3].iter().map(|(c, _)| c.device_id()).collect();
    told.sort_unstable();
    assert_eq!(told, [ALIAS, DEVICE, OTHER].map(|id| u64::from(id.get())));
    assert!(executed[..3].iter().all(|(_, seen)| *seen == Some(after)));
    assert_eq!(executed[3].0.opcode(), COMPLETION_WAIT);
    assert_eq!(domain.iova_to_phys(Iova::new(0x1000)), Some(PhysAddr::new(0x9000)));
    // To the top, and for a device that comes later.
    domain.map(Iova::new(u64::MAX - 0xfff), &frames(0xb000, 0x1000), RW).unwrap();
    assert_eq!(bench.dte(OTHER).mode(), 6);
    assert_eq!(domain.unmap(Iova::new(1 << 40), 0x1000), 0x1000);
}

#[test]
fn what_cannot_be_mapped_is_refused_by_its_cause() {
    let narrow = Config { iova_bits: 40, output_bits: 44, ..config() };
    let bench = Bench::with(narrow, |_| ()).unwrap();
    bench.probe();
    let domain = bench.paging();
    let geometry = domain.geometry();
    assert_eq!(geometry.last, Iova::new((1 << 40) - 1));
    assert_eq!(geometry.granule(), 0x1000);
    let map = |iova, phys, len| domain.map(Iova::new(iova), &frames(phys, len), RW);
    assert_eq!(map(0x800, 0x1000, 0x1000), Err(MapError::Misaligned));
    assert_eq!(map(0x1000, 0x1000, 0), Err(MapError::Misaligned));
    assert_eq!(map(1 << 40, 0x1000, 0x1000), Err(MapError::OutOfRange));
    assert_eq!(map(0x1000, 1 << 44, 0x1000), Err(MapError::OutOfRange));
    assert_eq!(map(0x1000, 0x1000, 0x1000), Ok(()));
    let at = Iova::new(0x1000);
    assert_eq!(map(0, 0x1000, 0x3000), Err(MapError::AlreadyMapped { at }));
    assert_eq!(domain.iova_to_phys(Iova::new(0)), None);
    bench.memory.fail_after(0);
    assert_eq!(map(1 << 39, 0x1000, 0x1000), Err(MapError::OutOfMemory));
}

#[test]
fn a_requester_id_that_devices_share_follows_the_one_that_moved_last() {
    let bench = Bench::new();
    bench.driver.probe(DEVICE, &[ALIAS]).unwrap();
    bench.driver.probe(OTHER, &[ALIAS]).unwrap();
    let (one, two) = (bench.paging(), bench.paging());
    bench.attach(DEVICE, &one);
    bench.attach(OTHER, &one);
    bench.attach(DEVICE, &two);
    assert_eq!(bench.dte(ALIAS), bench.dte(DEVICE));
    // When that one goes, the id is the other's again.
    bench.driver.release(DEVICE);
    assert_eq!(bench.dte(DEVICE), Dte::default().with_v(true));
    assert_eq!(bench.dte(ALIAS), bench.dte(OTHER));
    bench.driver.release(OTHER);
    assert_eq!(bench.dte(ALIAS), Dte::default().with_v(true));
}

#[test]
fn a_domain_id_is_used_again_only_after_it_was_dropped() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(OTHER, &domain);
    let id = bench.dte(OTHER).domain_id();
    drop(domain);
    bench.take();
    bench.driver.attach(OTHER, &Domain::Blocked, &Domain::Blocked).unwrap();
    let executed = bench.take();
    let dropped = |c: &Command| c.opcode() == INVALIDATE_IOMMU_PAGES && c.domain_id() == id;
    let last = executed.iter().rposition(|(c, _)| dropped(c)).unwrap();
    let entry = executed.iter().rposition(|(c, _)| c.opcode() == INVALIDATE_DEVTAB_ENTRY).unwrap();
    assert!(last > entry);
    assert_eq!(executed[last + 1].0.opcode(), COMPLETION_WAIT);
}

#[test]
fn a_refused_command_is_made_up_for_by_dropping_everything() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(OTHER, &domain);
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x1000), RW).unwrap();
    bench.take();
    bench.refuse(&[0]);
    assert_eq!(domain.unmap(Iova::new(0x4000), 0x1000), 0x1000);
    assert_eq!(bench.take_opcodes(), [INVALIDATE_IOMMU_ALL, COMPLETION_WAIT]);
    assert_eq!(bench.driver.command_queue_restarts(), 1);
    // The ring works again.
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x1000), RW).unwrap();
    assert_eq!(domain.unmap(Iova::new(0x4000), 0x1000), 0x1000);
    assert_eq!(bench.take_opcodes(), [INVALIDATE_IOMMU_PAGES, COMPLETION_WAIT]);
}

#[test]
fn a_refused_command_is_made_up_for_without_ia_sup_too() {
    let bench = Bench::with(config(), |state| state.efr = state.efr.with_ia_sup(false)).unwrap();
    bench.probe();
    let domain = bench.paging();
    bench.attach(OTHER, &domain);
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x1000), RW).unwrap();
    bench.take();
    bench.refuse(&[0]);
    assert_eq!(domain.unmap(Iova::new(0x4000), 0x1000), 0x1000);
    assert!(bench.take().len() > 65536);
    assert!(!bench.driver.stalled());
}

#[test]
fn hardware_that_keeps_refusing_has_stalled_and_nothing_of_it_is_freed() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(OTHER, &domain);
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x1000), RW).unwrap();
    let live = bench.memory.live();
    bench.refuse(&[0; 16]);
    assert_eq!(domain.unmap(Iova::new(0x4000), 0x1000), 0, "nobody knows");
    assert!(bench.driver.stalled());
    let again = domain.map(Iova::new(0x8000), &frames(0x9000, 0x1000), RW);
    assert_eq!(again, Err(MapError::Hardware));
    let moved = bench.driver.attach(OTHER, &Domain::Identity, &Domain::Blocked);
    assert_eq!(moved, Err(AttachError::Hardware));
    assert!(bench.dte(OTHER).mode() != 0, "still attached to the old domain");
    assert_eq!(bench.driver.probe(RequesterId::new(1), &[]), Err(ProbeError::Hardware));
    assert_eq!(bench.driver.attach(OTHER, &Domain::Blocked, &Domain::Blocked), Ok(()));
    assert_eq!(bench.dte(OTHER), Dte::default().with_v(true));
    drop(domain);
    assert_eq!(bench.memory.live(), live);
}

#[test]
fn a_long_list_of_aliases_passes_through_a_short_ring() {
    let bench = Bench::new();
    let aliases: Vec<RequesterId> = (1..0x100).map(RequesterId::new).collect();
    bench.driver.probe(RequesterId::new(0), &aliases).unwrap();
    let domain = bench.paging_for(RequesterId::new(0));
    bench.take();
    bench.attach(RequesterId::new(0), &domain);
    let opcodes = bench.take_opcodes();
    let devtabs = opcodes.iter().filter(|op| **op == INVALIDATE_DEVTAB_ENTRY);
    assert_eq!(devtabs.count(), 0x100);
    for id in 0..0x100 {
        assert!(bench.dte(RequesterId::new(id)).tv());
    }
}

impl Bench {
    fn paging_for(&self, device: RequesterId) -> Arc<dyn PagingDomain> {
        self.driver.alloc_paging(device, AllocFlags::default(), None).unwrap()
    }
}

#[test]
fn devices_are_checked() {
    let bench = Bench::new();
    bench.probe();
    let beyond = RequesterId::new(0x200);
    assert_eq!(bench.driver.probe(beyond, &[]), Err(ProbeError::NoIommu));
    assert_eq!(bench.driver.probe(RequesterId::new(1), &[beyond]), Err(ProbeError::NoIommu));
    assert_eq!(bench.driver.probe(DEVICE, &[]), Err(ProbeError::Exists));
    let stranger = RequesterId::new(3);
    let attached = bench.driver.attach(stranger, &Domain::Identity, &Domain::Blocked);
    assert_eq!(attached, Err(AttachError::NoDevice));
    let domain = bench.driver.alloc_paging(stranger, AllocFlags::default(), None);
    assert_eq!(domain.err(), Some(AllocError::NoDevice));
}

#[test]
fn a_domain_of_another_iommu_does_not_fit() {
    let (bench, other) = (Bench::new(), Bench::new());
    bench.probe();
    other.probe();
    let foreign = Domain::Paging(other.paging());
    let attached = bench.driver.attach(OTHER, &foreign, &Domain::Blocked);
    assert_eq!(attached, Err(AttachError::Incompatible));
    assert_eq!(bench.dte(OTHER), Dte::default().with_v(true));
}

#[test]
fn what_the_driver_does_not_do_is_unsupported() {
    let bench = Bench::new();
    bench.probe();
    for flags in [
        AllocFlags { pasid: true, ..AllocFlags::default() },
        AllocFlags { nest_parent: true, ..AllocFlags::default() },
        AllocFlags { dirty: true, ..AllocFlags::default() },
    ] {
        let refused = bench.driver.alloc_paging(DEVICE, flags, None).err();
        assert_eq!(refused, Some(AllocError::Unsupported));
    }
    assert!(bench.driver.capable(DEVICE, Capability::CacheCoherency));
    assert!(bench.driver.capable(DEVICE, Capability::EnforceCacheCoherency));
    for capability in
        [Capability::DirtyTracking, Capability::IsolatedMsi, Capability::NoExec, Capability::PciAts]
    {
        assert!(!bench.driver.capable(DEVICE, capability));
    }
}

#[test]
fn hardware_is_described_by_its_feature_registers() {
    let ignore = Efr2::default().with_ht_range_ignore(true);
    for efr2 in [Efr2::default(), ignore] {
        let bench = Bench::with(config(), |state| state.efr2 = efr2).unwrap();
        bench.probe();
        let info = bench.driver.hw_info(DEVICE, 0).unwrap();
        assert_eq!(info.kind, HW_INFO_TYPE_AMD);
        assert_eq!(info.bytes[..8], 0x840_u64.to_le_bytes());
        assert_eq!(info.bytes[8..], efr2.0[0].to_le_bytes());
        assert_eq!(bench.driver.hw_info(DEVICE, HW_INFO_TYPE_AMD), Some(info));
        assert_eq!(bench.driver.hw_info(DEVICE, 1), None);
        let kinds: Vec<ReservedKind> =
            bench.driver.reserved_regions(DEVICE).iter().map(|region| region.kind).collect();
        if efr2 == ignore {
            assert_eq!(kinds, [ReservedKind::Msi]);
        } else {
            assert_eq!(kinds, [ReservedKind::Msi, ReservedKind::Reserved]);
        }
    }
}

fn page_fault(device: RequesterId, iova: u64) -> Event {
    Event::default()
        .with_code(event::IO_PAGE_FAULT)
        .with_device_id(device.get().into())
        .with_address(iova)
}

#[test]
fn events_are_reported_by_their_cause() {
    let bench = Bench::new();
    bench.probe();
    bench.attach(DEVICE, &bench.paging());
    let fault = page_fault(DEVICE, 0x4000);
    let events = [
        (fault, FaultReason::NotPresent),
        (fault.with_pr(true).with_pe(true).with_rw(true), FaultReason::Permission),
        (fault.with_pr(true).with_rz(true), FaultReason::Malformed),
        (fault.with_i(true), FaultReason::InvalidRequest),
        (page_fault(OTHER, 0x4000), FaultReason::Blocked),
        (fault.with_code(event::ILLEGAL_DEV_TABLE_ENTRY), FaultReason::Malformed),
        (fault.with_code(event::PAGE_TAB_HARDWARE_ERROR), FaultReason::Hardware),
        (fault.with_code(event::INVALID_DEVICE_REQUEST), FaultReason::InvalidRequest),
    ];
    for (event, _) in events {
        assert!(bench.hardware.log(event));
    }
    assert!(bench.hardware.log(fault.with_code(event::ILLEGAL_COMMAND_ERROR)));
    assert!(!bench.driver.handle_interrupt());
    let faults = bench.sink.faults.lock().unwrap();
    let reasons: Vec<FaultReason> = faults.iter().map(|report| report.reason).collect();
    let expected: Vec<FaultReason> = events.iter().map(|(_, reason)| *reason).collect();
    assert_eq!(reasons, expected);
    assert_eq!(faults[0].requester, DEVICE);
    assert_eq!(faults[0].iova, Iova::new(0x4000));
    assert_eq!(faults[0].raw[..2], events[0].0.0);
    assert_eq!(faults.iter().map(|f| f.write).filter(|write| *write).count(), 1);
    let guest = fault.with_gn(true).with_domain_or_pasid(0x2345).with_pasid_high(1);
    drop(faults);
    bench.hardware.log(guest);
    bench.driver.handle_interrupt();
    let pasid = bench.sink.faults.lock().unwrap().last().unwrap().pasid;
    assert_eq!(pasid.unwrap().get(), 0x1_2345);
}

#[test]
fn a_log_that_overflows_says_so_and_runs_again() {
    let bench = Bench::new();
    bench.probe();
    for round in 1..=3 {
        let mut logged = 0;
        while bench.hardware.log(page_fault(OTHER, logged * 0x1000)) {
            logged += 1;
        }
        assert_eq!(logged, 255);
        assert!(!bench.driver.handle_interrupt());
        let faults = std::mem::take(&mut *bench.sink.faults.lock().unwrap());
        let expected: Vec<Iova> = (0..255).map(|page| Iova::new(page * 0x1000)).collect();
        let iovas: Vec<Iova> = faults.iter().map(|report| report.iova).collect();
        assert_eq!(iovas, expected);
        assert_eq!(*bench.sink.lost.lock().unwrap(), round);
    }
}

#[test]
fn dropping_the_driver_leaves_the_device_table_and_blocked_devices_alone() {
    let bench = Bench::new();
    bench.probe();
    let domain = bench.paging();
    bench.attach(DEVICE, &domain);
    domain.map(Iova::new(0x4000), &frames(0x9000, 0x1000), RW).unwrap();
    let Bench { memory, hardware, driver, .. } = bench;
    drop(driver);
    let state = hardware.state.lock().unwrap();
    assert!(state.control.iommu_en() && !state.control.cmd_buf_en());
    let dte = hardware.dte(&state, DEVICE.get().into());
    assert_eq!(dte, Dte::default().with_v(true));
    drop(state);
    domain.map(Iova::new(0x8000), &frames(0x9000, 0x1000), RW).unwrap();
    assert_eq!(domain.unmap(Iova::new(0x4000), 0x1000), 0x1000);
    drop(domain);
    assert!(!hardware.state.lock().unwrap().control.cmd_buf_en());
    assert_eq!(memory.live(), 1, "the device table");
}
