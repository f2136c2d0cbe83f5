//! The model from outside: registers, memory and requests, never its insides.

mod auditing;
mod caching;
mod commands;
mod device_table;
mod events;
mod function;
mod fuzz;
mod in_flight;
mod interrupts;
mod page_tables;
mod registers;

use std::sync::{Arc, Mutex};

use lychgate_model::{
    Access, Checking, FaultObserver, FaultRecord, IommuPort, Msi, Policy, Translation,
};
use lychgate_types::{HeapPages, Iova, Memory, Mmio, Pages, Pasid, PhysAddr, PhysRun, RequesterId};

use super::{AmdVi, Config};
use crate::spec::host_page_table::level_shift;
use crate::spec::registers as regs;
use crate::spec::registers::{DeviceTableBase, RingBase};
use crate::spec::{Command, Control, Dte, Entry, Event, Status};

const DEVICE: RequesterId = RequesterId::new(0x0108);
const OTHER: RequesterId = RequesterId::new(0x0210);
const DOMAIN: u64 = 7;
const RING_BYTES: u64 = 4096;
/// No memory answers here.
const NOWHERE: PhysAddr = PhysAddr::new(0x10_0000);

/// An IOMMU with memory, set up as a driver would: full device table, 256 commands, 256 events.
struct Rig {
    pages: Arc<HeapPages>,
    iommu: Arc<AmdVi>,
    msis: Arc<Mutex<Vec<Msi>>>,
    faults: Arc<Faults>,
    device_table: PhysAddr,
    commands: PhysAddr,
    events: PhysAddr,
    wait: PhysAddr,
    waits: Mutex<u64>,
}

#[derive(Default)]
struct Faults(Mutex<Vec<FaultRecord>>);

impl FaultObserver for Faults {
    fn fault(&self, record: &FaultRecord) {
        self.0.lock().unwrap().push(*record);
    }
}

impl Rig {
    fn new() -> Self {
        Self::with(Config::default())
    }

    fn adversarial() -> Self {
        Self::with(Config { policy: Policy::Adversarial, ..Config::default() })
    }

    /// One that checks its driver, at its own pace.
    fn checking() -> Self {
        let checking = Checking { fetch_ahead: false, late_commands: false };
        Self::with(Config {
            policy: Policy::Adversarial,
            checking: Some(checking),
            ..Config::default()
        })
    }

    /// Registers programmed, nothing enabled.
    fn stopped(config: Config) -> Self {
        let pages = Arc::new(HeapPages::new());
        let msis = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&msis);
        let faults = Arc::new(Faults::default());
        let iommu = AmdVi::new(
            config,
            Arc::clone(&pages) as Arc<dyn Memory>,
            Arc::new(move |msi| sink.lock().unwrap().push(msi)),
        )
        .observed_by(Arc::clone(&faults) as Arc<dyn FaultObserver>);
        let rig = Self {
            device_table: pages.alloc(2 << 20).unwrap(),
            commands: pages.alloc(RING_BYTES).unwrap(),
            events: pages.alloc(RING_BYTES).unwrap(),
            wait: pages.alloc(4096).unwrap(),
            iommu: Arc::new(iommu),
            pages,
            msis,
            faults,
            waits: Mutex::new(0),
        };
        let table = DeviceTableBase::default().with_base(rig.device_table).with_size(0x1ff);
        rig.write(regs::DEVICE_TABLE_BASE, table.0[0]);
        let ring = RingBase::default().with_ring_len(8);
        rig.write(regs::COMMAND_BUFFER_BASE, ring.with_base(rig.commands).0[0]);
        rig.write(regs::EVENT_LOG_BASE, ring.with_base(rig.events).0[0]);
        rig
    }

    fn with(config: Config) -> Self {
        let rig = Self::stopped(config);
        rig.write(regs::CONTROL, enabled().0[0]);
        rig
    }

    fn read(&self, offset: u64) -> u64 {
        self.iommu.read64(offset)
    }

    fn write(&self, offset: u64, value: u64) {
        self.iommu.write64(offset, value);
    }

    fn status(&self) -> Status {
        Status([self.read(regs::STATUS)])
    }

    fn store(&self, at: PhysAddr, word: u64) {
        self.pages.store_u64(at, word).unwrap();
    }

    fn load(&self, at: PhysAddr) -> u64 {
        self.pages.load_u64(at).unwrap()
    }

    fn table(&self) -> PhysAddr {
        self.pages.alloc(4096).unwrap()
    }

    fn set_entry(&self, device: RequesterId, dte: Dte) {
        let at = self.device_table.wrapping_add(u64::from(device.get()) * 32);
        for (word, offset) in dte.0.iter().zip([0, 8, 16, 24]) {
            self.store(at.wrapping_add(offset), *word);
        }
    }

    /// Writes a command behind the others and rings the doorbell.
    fn command(&self, command: Command) {
        let tail = self.read(regs::COMMAND_TAIL);
        let at = self.commands.wrapping_add(tail);
        self.store(at, command.0[0]);
        self.store(at.wrapping_add(8), command.0[1]);
        self.write(regs::COMMAND_TAIL, (tail + 16) % RING_BYTES);
    }

    /// Runs commands and waits for them.
    fn run(&self, commands: &[Command]) {
        for &command in commands {
            self.command(command);
        }
        let mut waits = self.waits.lock().unwrap();
        *waits += 1;
        self.command(Command::completion_wait(self.wait, *waits, false));
        assert_eq!(self.load(self.wait), *waits);
    }

    /// Takes every event out of the log.
    fn take_events(&self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut head = self.read(regs::EVENT_HEAD);
        while head != self.read(regs::EVENT_TAIL) {
            let at = self.events.wrapping_add(head);
            events.push(Event([self.load(at), self.load(at.wrapping_add(8))]));
            head = (head + 16) % RING_BYTES;
        }
        self.write(regs::EVENT_HEAD, head);
        events
    }

    fn take_event(&self) -> Event {
        let events = self.take_events();
        assert_eq!(events.len(), 1, "{events:x?}");
        events[0]
    }

    fn take_msis(&self) -> usize {
        self.msis.lock().unwrap().drain(..).count()
    }

    fn request(
        &self,
        requester: RequesterId,
        pasid: Option<Pasid>,
        start: u64,
        len: u64,
        access: Access,
    ) -> Result<Vec<PhysRun>, u64> {
        let mut seen = None;
        let request = Translation { requester, pasid, start: Iova::new(start), len, access };
        self.iommu
            .with_translation(&[request], &mut |runs| {
                assert!(seen.is_none());
                seen = Some(runs.to_vec());
                Ok(())
            })
            .map_err(|aborted| aborted.at.get())?;
        Ok(seen.unwrap())
    }

    /// A one-byte read: where it goes.
    fn read_at(&self, requester: RequesterId, at: u64) -> Result<u64, u64> {
        let runs = self.request(requester, None, at, 1, Access::Read)?;
        Ok(runs[0].start.get())
    }

    /// A one-byte write: where it goes.
    fn write_at(&self, requester: RequesterId, at: u64) -> Result<u64, u64> {
        let runs = self.request(requester, None, at, 1, Access::Write)?;
        Ok(runs[0].start.get())
    }

    /// Where the entry of `level` for `at` lies, with tables made and linked down to it.
    fn entry_of(&self, root: PhysAddr, mode: u32, level: u32, at: u64) -> PhysAddr {
        let mut table = root;
        let mut here = mode;
        loop {
            let slot = table.wrapping_add((at >> level_shift(here) & 511) * 8);
            if here == level {
                return slot;
            }
            let entry = Entry([self.load(slot)]);
            here -= 1;
            if entry.pr() {
                table = entry.address();
            } else {
                table = self.table();
                self.store(slot, directory(table, u64::from(here)).0[0]);
            }
        }
    }

    fn map(&self, root: PhysAddr, mode: u32, at: u64, entry: Entry) {
        let slot = self.entry_of(root, mode, 1, at);
        self.store(slot, entry.0[0]);
    }
}

/// Everything that a driver enables.
fn enabled() -> Control {
    Control::default()
        .with_iommu_en(true)
        .with_cmd_buf_en(true)
        .with_event_log_en(true)
        .with_event_int_en(true)
        .with_com_wait_int_en(true)
        .with_ga_en(true)
}

fn translated(root: PhysAddr, mode: u32) -> Dte {
    Dte::default()
        .with_v(true)
        .with_tv(true)
        .with_ir(true)
        .with_iw(true)
        .with_mode(u64::from(mode))
        .with_host_root(root)
        .with_domain_id(DOMAIN)
}

fn directory(table: PhysAddr, level: u64) -> Entry {
    page(table).with_next_level(level)
}

fn page(at: PhysAddr) -> Entry {
    Entry::default().with_pr(true).with_ir(true).with_iw(true).with_address(at)
}
