//! The IOMMU itself: its registers, its structures in memory, and how it is started and stopped.

use alloc::sync::Arc;
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use lychgate_types::{Lock, Locks, Mmio, OutOfMemory, Pages, PhysAddr, RequesterId};

use super::command_queue::Queue;
use super::config::{Config, InitError};
use super::device_table::{self, Carriers};
use super::domain_ids::DomainIds;
use crate::spec::registers::{
    COMMAND_BUFFER_BASE, CONTROL, DEVICE_TABLE_BASE, DeviceTableBase, EFR, EFR2, EVENT_LOG_BASE,
    RING_ENTRY_BYTES, RING_LEN_MAX, RING_LEN_MIN, RingBase, STATUS,
};
use crate::spec::{Control, Efr, Efr2, Status, dte};

/// The hardware does not complete commands, and nothing will make it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Stalled;

/// What the driver, its domains and its event log share.
///
/// As [`Pages`] it is the memory of the page tables, which it keeps for ever once the hardware has
/// stalled: nobody knows then what is still walked.
pub(super) struct Hardware<P: Pages, L: Locks> {
    pub(super) mmio: Arc<dyn Mmio>,
    pub(super) pages: Arc<P>,
    pub(super) config: Config,
    efr: Efr,
    efr2: Efr2,
    pub(super) device_table: Region<P>,
    pub(super) carriers: L::Mutex<Carriers>,
    pub(super) command_buffer: Ring<P>,
    /// Where COMPLETION_WAIT stores, in its first word.
    pub(super) completed: Region<P>,
    pub(super) queue: L::Mutex<Queue>,
    pub(super) restarts: AtomicU64,
    pub(super) domain_ids: L::Mutex<DomainIds>,
    control: L::Mutex<Control>,
    stalled: AtomicBool,
    stopped: AtomicBool,
}

impl<P: Pages, L: Locks> Hardware<P, L> {
    /// Reads what the hardware can do and makes its structures. Nothing is written to registers.
    pub(super) fn new(
        mmio: Arc<dyn Mmio>,
        pages: Arc<P>,
        config: Config,
    ) -> Result<Self, InitError> {
        let efr = Efr([mmio.read64(EFR)]);
        let efr2 = Efr2([mmio.read64(EFR2)]);
        if efr.hats() == 3 {
            return Err(InitError::NoHostTranslation);
        }
        let entries = u64::from(config.last_device.get()) + 1;
        let table_bytes = (entries * dte::BYTES).next_power_of_two().max(4096);
        let hardware = Self {
            efr,
            efr2,
            device_table: Region::new(&pages, table_bytes)?,
            carriers: L::Mutex::new(Carriers::new()),
            command_buffer: Ring::new(&pages, config.command_buffer_len)?,
            completed: Region::new(&pages, 4096)?,
            queue: L::Mutex::new(Queue::new()),
            restarts: AtomicU64::new(0),
            domain_ids: L::Mutex::new(DomainIds::new()),
            control: L::Mutex::new(Control::default()),
            stalled: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            mmio,
            pages,
            config,
        };
        device_table::block_all(hardware.device_table.words());
        Ok(hardware)
    }

    /// Stops whatever ran before, programs the bases, enables, and empties every cache (AMD 48882
    /// 2.4.8, 3.4; Linux's order).
    pub(super) fn start(&self, event_log: RingBase) -> Result<(), InitError> {
        self.disable().map_err(|Stalled| InitError::Hardware)?;
        // The size field counts pages of 4 KiB less one; a table has at most 2 MiB.
        let table = DeviceTableBase::default()
            .with_base(self.device_table.at)
            .with_size(self.device_table.bytes / 4096 - 1);
        self.mmio.write64(DEVICE_TABLE_BASE, table.0[0]);
        self.mmio.write64(COMMAND_BUFFER_BASE, self.command_buffer.base().0[0]);
        self.mmio.write64(EVENT_LOG_BASE, event_log.0[0]);
        self.mmio.write64(STATUS, Status::W1C);
        // Hardware may walk the table from here on, whatever becomes of the driver.
        self.device_table.keep();
        self.change_control(|control| {
            control
                .with_coherent(true)
                .with_inv_time_out(INV_TIME_OUT_1_S)
                .with_cmd_buf_en(true)
                .with_event_log_en(true)
                .with_event_int_en(true)
        });
        self.change_control(|control| control.with_iommu_en(true));
        if !self.status().cmd_buf_run() {
            return Err(InitError::Hardware);
        }
        self.invalidate_everything().map_err(|Stalled| InitError::Hardware)
    }

    /// Stops commands and events for good, when every device is blocked and nothing of any domain
    /// is cached. The device table goes on blocking.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Relaxed);
        self.change_control(|control| {
            control.with_cmd_buf_en(false).with_event_log_en(false).with_event_int_en(false)
        });
        let stopped = self.await_status(|status| !status.cmd_buf_run() && !status.event_log_run());
        if stopped.is_err() {
            self.stall();
        }
    }

    /// Disables everything that a previous owner may have left enabled, the rings before
    /// translation, so that nothing is fetched or logged through bases that are about to change.
    fn disable(&self) -> Result<(), Stalled> {
        let before = Control([self.mmio.read64(CONTROL)]);
        // How the IOMMU sits on its bus is the firmware's to say.
        let kept = Control::default()
            .with_ht_tun_en(before.ht_tun_en())
            .with_pass_pw(before.pass_pw())
            .with_res_pass_pw(before.res_pass_pw())
            .with_isoc(before.isoc());
        self.change_control(|_| kept.with_iommu_en(before.iommu_en()));
        self.change_control(|_| kept);
        self.await_status(|status| !status.cmd_buf_run() && !status.event_log_run())
    }

    /// Changes the control register, alone.
    pub(super) fn change_control(&self, change: impl FnOnce(Control) -> Control) {
        self.control.with(|control| {
            *control = change(*control);
            self.mmio.write64(CONTROL, control.0[0]);
        });
    }

    pub(super) fn status(&self) -> Status {
        Status([self.mmio.read64(STATUS)])
    }

    /// Waits, with a bound, until the status register is as wanted.
    pub(super) fn await_status(&self, wanted: impl Fn(Status) -> bool) -> Result<(), Stalled> {
        for _ in 0..self.config.patience.max(1) {
            if wanted(self.status()) {
                return Ok(());
            }
            spin_loop();
        }
        Err(Stalled)
    }

    pub(super) fn efr(&self) -> Efr {
        self.efr
    }

    pub(super) fn efr2(&self) -> Efr2 {
        self.efr2
    }

    /// Whether the device table has an entry for the requester id.
    pub(super) fn has(&self, id: RequesterId) -> bool {
        u64::from(id.get()) < self.device_table.bytes / dte::BYTES
    }

    /// Width of the IOVAs that host page tables can translate, in bits: six levels have 64.
    pub(super) fn iova_bits(&self) -> u32 {
        let levels = match self.efr.hats() {
            0 => 48,
            1 => 57,
            _ => 64,
        };
        self.config.iova_bits.clamp(12, levels)
    }

    pub(super) fn stalled(&self) -> bool {
        self.stalled.load(Ordering::Relaxed)
    }

    /// Whether commands can still be given.
    pub(super) fn running(&self) -> bool {
        !self.stalled() && !self.stopped.load(Ordering::Relaxed)
    }

    pub(super) fn restarts(&self) -> u64 {
        self.restarts.load(Ordering::Relaxed)
    }

    /// The hardware has ceased to answer: what it might still use is kept.
    pub(super) fn stall(&self) {
        self.stalled.store(true, Ordering::Relaxed);
        self.command_buffer.region.keep();
        self.completed.keep();
    }
}

const INV_TIME_OUT_1_S: u64 = 4;

impl<P: Pages, L: Locks> Pages for Hardware<P, L> {
    fn alloc(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.pages.alloc(bytes)
    }

    fn alloc_uninit(&self, bytes: u64) -> Result<PhysAddr, OutOfMemory> {
        self.pages.alloc_uninit(bytes)
    }

    fn free(&self, at: PhysAddr, bytes: u64) {
        if !self.stalled() {
            self.pages.free(at, bytes);
        }
    }

    fn words(&self, at: PhysAddr, count: usize) -> &[AtomicU64] {
        self.pages.words(at, count)
    }
}

/// A piece of memory that hardware reads or writes, freed with its owner unless it must be kept.
pub(super) struct Region<P: Pages> {
    pages: Arc<P>,
    pub(super) at: PhysAddr,
    pub(super) bytes: u64,
    kept: AtomicBool,
}

impl<P: Pages> Region<P> {
    /// `bytes` of zeroes, a power of two of at least 4096.
    pub(super) fn new(pages: &Arc<P>, bytes: u64) -> Result<Self, OutOfMemory> {
        let at = pages.alloc(bytes)?;
        Ok(Self { pages: Arc::clone(pages), at, bytes, kept: AtomicBool::new(false) })
    }

    pub(super) fn words(&self) -> &[AtomicU64] {
        let count = usize::try_from(self.bytes / 8).unwrap_or(0);
        self.pages.words(self.at, count)
    }

    /// Never frees the memory.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Relaxed);
    }
}

impl<P: Pages> Drop for Region<P> {
    fn drop(&mut self) {
        if !self.kept.load(Ordering::Relaxed) {
            self.pages.free(self.at, self.bytes);
        }
    }
}

/// A ring of 16-byte entries.
pub(super) struct Ring<P: Pages> {
    pub(super) region: Region<P>,
    len: u64,
}

impl<P: Pages> Ring<P> {
    /// A ring of 2^`len` zero entries; `len` is taken into what hardware allows.
    pub(super) fn new(pages: &Arc<P>, len: u32) -> Result<Self, OutOfMemory> {
        let len = u64::from(len).clamp(RING_LEN_MIN, RING_LEN_MAX);
        let region = Region::new(pages, RING_ENTRY_BYTES << len)?;
        Ok(Self { region, len })
    }

    /// What the ring's base register holds.
    pub(super) fn base(&self) -> RingBase {
        RingBase::default().with_base(self.region.at).with_ring_len(self.len)
    }

    pub(super) const fn entries(&self) -> u64 {
        1 << self.len
    }

    /// The index that follows `index` by `by`.
    pub(super) const fn advance(&self, index: u64, by: u64) -> u64 {
        (index + by) & (self.entries() - 1)
    }

    /// The two words of the entry `index`.
    pub(super) fn entry(&self, index: u64) -> Option<&[AtomicU64; 2]> {
        let at = usize::try_from(index & (self.entries() - 1)).ok()? * 2;
        self.region.words().get(at..)?.first_chunk()
    }
}
