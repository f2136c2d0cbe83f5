//! The controller: registers, queues, and the loop that serves them (3.1, 7.2, 7.3, 7.6).
//!
//! Software may store to registers and doorbells without the controller seeing each store, so
//! everything is a level: the loop compares what it finds with what it acted on. The order in which
//! two registers were stored cannot be seen.
//!
//! *Lenient latch*: hardware takes AQA, ASQ and ACQ when CC.EN turns 1 (7.6.1). Here they are taken
//! at the first admin doorbell after it, which no driver rings before it has seen CSTS.RDY. So a
//! driver whose compiler moved the store of ACQ below that of CC.EN (qemu-img 11.1.3) works.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lychgate_model::{ConfigSpace, Msix, RegisterFile, Upstream};

use super::features::Features;
use super::identify::Names;
use super::initiator::Entries;
use super::log::{Event, Events, Logs};
use super::mover::{Bus, Mover};
use super::namespace::Namespace;
use super::queue::{CompletionQueue, SubmissionQueue};
use super::spec::{
    self, CQE_SIZE, Completion, Configuration, MAX_MPS, SQE_SIZE, Sqe, VERSION, low, register,
    status_register,
};
use super::{Limits, NvmeConfig, pci};

/// Commands fetched from one queue before the next queue has its turn.
const BATCH: u32 = 32;

/// Bytes moved for a queue before the completions so far are posted.
const POST_AFTER: u64 = 256 << 10;

/// A queue entry could not be read or written: no status can tell the driver, so CSTS.CFS does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Fatal;

pub(crate) struct Controller {
    pub(crate) space: ConfigSpace,
    pub(crate) msix: Msix,
    pub(super) bus: Bus,
    pub(super) limits: Limits,
    pub(super) names: Names,
    pub(super) namespaces: Vec<Namespace>,
    pub(super) mover: Mover,
    pub(super) features: Features,
    pub(super) logs: Logs,
    pub(super) events: Events,
    /// By queue id; 0 is the admin queue.
    pub(super) sqs: Vec<Option<SubmissionQueue>>,
    pub(super) cqs: Vec<Option<CompletionQueue>>,
    /// CC as last acted on.
    pub(super) configuration: Configuration,
    /// Bytes of a memory page: 4096 << CC.MPS.
    pub(super) page_size: u64,
    /// Completions that wait to be posted to one queue.
    pub(super) completions: Vec<Completion>,
    registers: Arc<dyn RegisterFile>,
    /// CSTS as it shall read.
    status: u32,
    /// I/O submission queues, and all completion queues but the admin's, that exist.
    live_sqs: Vec<u16>,
    live_cqs: Vec<u16>,
    /// Which of `live_sqs` is served first.
    turn: usize,
    fetched: Vec<u8>,
    posted: Vec<u8>,
}

impl Controller {
    pub(crate) fn new(
        config: &NvmeConfig,
        limits: Limits,
        upstream: Arc<dyn Upstream>,
        registers: Arc<dyn RegisterFile>,
        namespaces: Vec<Namespace>,
    ) -> Self {
        let queues = usize::from(limits.io_queue_pairs) + 1;
        let capabilities = pci::capabilities(limits.vectors);
        let mut controller = Self {
            space: ConfigSpace::new(&pci::HEADER, &pci::BARS, &capabilities),
            msix: Msix::new(limits.vectors),
            bus: Bus::new(upstream, config.requester),
            names: Names { serial: config.serial.clone(), model: config.model.clone() },
            mover: Mover::default(),
            features: Features::new(namespaces.len(), limits.vectors, limits.io_queue_pairs),
            namespaces,
            limits,
            logs: Logs::default(),
            events: Events::default(),
            sqs: vec![None; queues],
            cqs: vec![None; queues],
            configuration: Configuration::default(),
            page_size: 4096,
            completions: Vec::new(),
            registers,
            status: 0,
            live_sqs: Vec::new(),
            live_cqs: Vec::new(),
            turn: 0,
            fetched: vec![0; BATCH as usize * SQE_SIZE],
            posted: Vec::new(),
        };
        controller.reset();
        controller
    }

    /// Conventional and function level reset: everything as at power-on, but for the logs.
    pub(crate) fn reset(&mut self) {
        self.space.reset();
        self.msix.reset();
        self.forget_queues();
        self.configuration = Configuration::default();
        self.status = 0;
        for word in self.registers.words().iter().take(register::DOORBELLS) {
            word.store(0, Ordering::Relaxed);
        }
        self.repair_registers();
    }

    /// Acts on what software left in the registers; touches no memory but the storage's, which a
    /// shutdown flushes. Says whether there was something to act on.
    pub(crate) fn look(&mut self) -> bool {
        let configuration = Configuration(self.load(register::CC));
        let before = std::mem::replace(&mut self.configuration, configuration);
        let changed = before != configuration;
        if changed {
            match (before.enabled(), configuration.enabled()) {
                (false, true) => self.enable(),
                (true, false) => self.disable(),
                _ => {}
            }
            if self.is_running() && configuration.shutdown() != 0 {
                self.shut_down();
            }
        }
        if self.is_running() {
            self.look_at_doorbells();
        }
        changed
    }

    /// Fetches, executes and completes commands; says whether there were any.
    pub(crate) fn serve(&mut self) -> bool {
        let mut did = self.look();
        // Without Bus Master Enable the function issues no request: commands wait.
        if self.is_running() && self.space.bus_master() {
            match self.run() {
                Ok(ran) => did |= ran,
                Err(Fatal) => {
                    self.set_status(self.status | status_register::FATAL);
                    did = true;
                }
            }
            if self.bus.take_aborted() {
                self.space.set_received_master_abort();
            }
        }
        if !did {
            self.repair_registers();
        }
        did
    }

    /// A trapped read of a mappable word.
    pub(crate) fn read_register(&self, word: usize) -> u32 {
        match word {
            register::CSTS => self.status,
            _ if word >= register::DOORBELLS || register::is_writable(word) => self.load(word),
            _ => self.read_only_value(word),
        }
    }

    /// A trapped write of a mappable word; [`Controller::look`] acts on it.
    pub(crate) fn write_register(&mut self, word: usize, value: u32) {
        if word >= register::DOORBELLS {
            self.check_doorbell_exists(word);
        } else if !register::is_writable(word) {
            return;
        }
        self.store(word, value);
    }

    /// Sends the interrupts that were held back and may leave now.
    pub(crate) fn release_interrupts(&mut self) {
        while let Some(msi) = self.msix.release(self.space.msix_gate()) {
            self.bus.msi(msi);
        }
    }

    pub(super) fn submission_queue(&self, id: u16) -> Option<&SubmissionQueue> {
        self.sqs.get(usize::from(id))?.as_ref()
    }

    pub(super) fn completion_queue(&self, id: u16) -> Option<&CompletionQueue> {
        self.cqs.get(usize::from(id))?.as_ref()
    }

    /// Makes `queue` exist, in place of any of its id. Its doorbell starts at 0.
    pub(super) fn add_submission_queue(&mut self, queue: SubmissionQueue) {
        let id = queue.id;
        if let Some(slot) = self.sqs.get_mut(usize::from(id)) {
            *slot = Some(queue);
            self.store(tail_doorbell(id), 0);
            self.live_sqs.push(id);
        }
    }

    pub(super) fn remove_submission_queue(&mut self, id: u16) {
        if let Some(slot) = self.sqs.get_mut(usize::from(id)) {
            *slot = None;
        }
        self.live_sqs.retain(|live| *live != id);
        self.store(tail_doorbell(id), 0);
    }

    /// Makes `queue` exist, in place of any of its id. Its doorbell starts at 0.
    pub(super) fn add_completion_queue(&mut self, queue: CompletionQueue) {
        let id = queue.id;
        if let Some(slot) = self.cqs.get_mut(usize::from(id)) {
            *slot = Some(queue);
            self.store(head_doorbell(id), 0);
            self.live_cqs.push(id);
        }
    }

    pub(super) fn remove_completion_queue(&mut self, id: u16) {
        if let Some(slot) = self.cqs.get_mut(usize::from(id)) {
            *slot = None;
        }
        self.live_cqs.retain(|live| *live != id);
        self.store(head_doorbell(id), 0);
    }

    /// Ready, not failed and not shut down.
    fn is_running(&self) -> bool {
        use status_register::{FATAL, READY, SHUTDOWN_COMPLETE};
        self.status & (READY | FATAL | SHUTDOWN_COMPLETE) == READY
    }

    /// CC.EN 0 to 1 (7.6.1). Entry sizes are checked when an I/O queue is created: drivers may
    /// set them later.
    fn enable(&mut self) {
        let cc = self.configuration;
        let page_size = 4096_u64 << cc.memory_page_size().min(MAX_MPS);
        let aligned = |word| self.load_pair(word).is_multiple_of(page_size);
        let valid = cc.command_set() == 0
            && cc.arbitration() == 0
            && cc.memory_page_size() <= MAX_MPS
            && aligned(register::ASQ)
            && aligned(register::ACQ);
        self.page_size = page_size;
        self.forget_queues();
        let status = if valid { status_register::READY } else { status_register::FATAL };
        self.set_status(status);
    }

    /// CC.EN 1 to 0, controller reset (7.3.2): queues, event requests and features are gone; AQA,
    /// ASQ and ACQ stay.
    fn disable(&mut self) {
        self.forget_queues();
        self.set_status(0);
    }

    fn forget_queues(&mut self) {
        self.sqs.fill(None);
        self.cqs.fill(None);
        self.live_sqs.clear();
        self.live_cqs.clear();
        self.events.reset();
        self.features.reset();
        self.completions.clear();
        let words = self.registers.words().iter();
        for doorbell in words.take(register::DOORBELLS_END).skip(register::DOORBELLS) {
            doorbell.store(0, Ordering::Relaxed);
        }
    }

    /// CC.SHN (7.6.2). When the storage cannot be flushed, the shutdown did not work: CFS.
    fn shut_down(&mut self) {
        let flushed = self.flush_all();
        let fatal = if flushed.is_ok() { 0 } else { status_register::FATAL };
        self.set_status(self.status | status_register::SHUTDOWN_COMPLETE | fatal);
    }

    fn look_at_doorbells(&mut self) {
        if self.submission_queue(0).is_none()
            && low(self.load(tail_doorbell(0))) != 0
            && self.latch_admin_queues().is_none()
        {
            self.set_status(self.status | status_register::FATAL);
            return;
        }
        let words = self.registers.words();
        let doorbell = |word: usize| words.get(word).map_or(0, load);
        let mut valid = true;
        for &id in &self.live_sqs {
            if let Some(Some(queue)) = self.sqs.get_mut(usize::from(id)) {
                valid &= queue.look(doorbell(tail_doorbell(id))).is_ok();
            }
        }
        for &id in &self.live_cqs {
            if let Some(Some(queue)) = self.cqs.get_mut(usize::from(id)) {
                valid &= queue.look(doorbell(head_doorbell(id))).is_ok();
            }
        }
        if !valid {
            self.events.report(Event::InvalidDoorbellValue);
        }
    }

    /// The lenient latch: creates the admin queues as AQA, ASQ and ACQ say now.
    fn latch_admin_queues(&mut self) -> Option<()> {
        const ADMIN_VECTOR: u16 = 0;
        let sizes = self.load(register::AQA);
        let (asq, acq) = (self.load_pair(register::ASQ), self.load_pair(register::ACQ));
        if !(asq | acq).is_multiple_of(self.page_size) {
            return None;
        }
        let submission = SubmissionQueue::new(0, 0, asq, (sizes & 0xfff) + 1)?;
        let completion =
            CompletionQueue::new(0, Some(ADMIN_VECTOR), acq, (sizes >> 16 & 0xfff) + 1)?;
        // The doorbells are being rung already: they keep their values.
        *self.sqs.first_mut()? = Some(submission);
        *self.cqs.first_mut()? = Some(completion);
        self.live_sqs.insert(0, 0);
        self.live_cqs.insert(0, 0);
        Some(())
    }

    /// A trapped write to a doorbell of a queue that does not exist is an error event. Through a
    /// mapping it is not seen.
    fn check_doorbell_exists(&mut self, word: usize) {
        let index = word - register::DOORBELLS;
        let exists = match (index / 2, index % 2) {
            (0, _) => true,
            (id, 0) => matches!(self.sqs.get(id), Some(Some(_))),
            (id, _) => matches!(self.cqs.get(id), Some(Some(_))),
        };
        if !exists && self.is_running() {
            self.events.report(Event::InvalidDoorbellRegister);
        }
    }

    /// One turn for every queue.
    fn run(&mut self) -> Result<bool, Fatal> {
        let mut did = self.run_admin()?;
        did |= self.deliver_events()?;
        self.turn = self.turn.wrapping_add(1);
        let queues = self.live_sqs.len();
        for i in 0..queues {
            let at = self.turn.wrapping_add(i) % queues;
            if let Some(&id) = self.live_sqs.get(at)
                && id != 0
            {
                did |= self.run_io(id)?;
            }
        }
        Ok(did)
    }

    /// Admin commands one by one: each may change what the next one finds.
    fn run_admin(&mut self) -> Result<bool, Fatal> {
        let mut did = false;
        for _ in 0..BATCH {
            if self.fetch(0, 1)? == 0 {
                break;
            }
            did = true;
            let sqe = self.command(0);
            let done = self.execute_admin(&sqe);
            let sq_head = self.sqs.first_mut().and_then(Option::as_mut);
            let sq_head = sq_head.map_or(0, SubmissionQueue::advance);
            if let Some((status, result)) = done {
                let cid = sqe.cid();
                self.completions.push(Completion { result, sq_head, sqid: 0, cid, status });
            }
            self.post(0)?;
        }
        Ok(did)
    }

    fn deliver_events(&mut self) -> Result<bool, Fatal> {
        if self.completion_queue(0).is_none_or(|cq| cq.room() == 0) {
            return Ok(false);
        }
        let Some((cid, result)) = self.events.next() else {
            return Ok(false);
        };
        let sq_head = self.submission_queue(0).map_or(0, SubmissionQueue::head);
        let status = spec::Status::SUCCESS;
        self.completions.push(Completion { result, sq_head, sqid: 0, cid, status });
        self.post(0)?;
        Ok(true)
    }

    fn run_io(&mut self, id: u16) -> Result<bool, Fatal> {
        let count = self.fetch(id, BATCH)?;
        let mut unposted = 0;
        for i in 0..count {
            let sqe = self.command(i);
            let (status, moved) = self.execute_io(id, &sqe);
            let Some(Some(queue)) = self.sqs.get_mut(usize::from(id)) else {
                return Ok(true);
            };
            let (sq_head, cqid) = (queue.advance(), queue.cqid);
            let cid = sqe.cid();
            self.completions.push(Completion { result: 0, sq_head, sqid: id, cid, status });
            unposted += moved;
            if unposted >= POST_AFTER || i + 1 == count {
                unposted = 0;
                self.post(cqid)?;
            }
        }
        Ok(count != 0)
    }

    /// Reads up to `limit` commands of submission queue `id`, as many as its completion queue has
    /// room for, in one transfer. So no completion ever waits for room: a full completion queue
    /// holds back its commands.
    fn fetch(&mut self, id: u16, limit: u32) -> Result<u32, Fatal> {
        let Some(Some(queue)) = self.sqs.get(usize::from(id)) else {
            return Ok(0);
        };
        let room = self.completion_queue(queue.cqid).map_or(0, CompletionQueue::room);
        let count = queue.waiting().min(limit).min(room);
        if count == 0 {
            return Ok(0);
        }
        let bytes = self.fetched.get_mut(..count as usize * SQE_SIZE).ok_or(Fatal)?;
        let initiator = Entries::Fetch { queue: id, from: queue.head(), count };
        self.bus.read(&initiator, queue.next(count).segments(), bytes).map_err(|_| Fatal)?;
        Ok(count)
    }

    /// The `i`-th command of the last fetch.
    fn command(&self, i: u32) -> Sqe {
        let entries = self.fetched.as_chunks::<SQE_SIZE>().0;
        entries.get(i as usize).map_or(Sqe::default(), Sqe::new)
    }

    /// Posts the waiting completions to completion queue `id`, then raises its interrupt.
    ///
    /// Only the phase tells the driver that an entry is new, and drivers look at entries in order.
    /// So a transfer of any granularity writes all entries, the first one with the phase of an
    /// old entry, and then one aligned 4-byte write, which is ordered after it, turns that phase:
    /// the first entry is the gate to those behind it.
    fn post(&mut self, id: u16) -> Result<(), Fatal> {
        if self.completions.is_empty() {
            return Ok(());
        }
        let Some(Some(queue)) = self.cqs.get_mut(usize::from(id)) else {
            self.completions.clear();
            return Ok(());
        };
        self.posted.clear();
        let mut count = 0;
        for completion in self.completions.drain(..) {
            let phase = queue.phase(count) ^ (count == 0);
            self.posted.extend_from_slice(&completion.encode(phase));
            count += 1;
        }
        let initiator = Entries::Post { queue: id, from: queue.tail(), count };
        let runs = queue.next(count);
        self.bus.write(&initiator, runs.segments(), &self.posted).map_err(|_| Fatal)?;
        let gate = gate(runs.segments(), &self.posted).ok_or(Fatal)?;
        self.bus.write(&initiator, &[gate.0], &gate.1).map_err(|_| Fatal)?;
        queue.advance(count);
        if let Some(vector) = queue.vector
            && let Some(msi) = self.msix.raise(vector, self.space.msix_gate())
        {
            self.bus.msi(msi);
        }
        Ok(())
    }

    /// Software may have stored to registers that are not its own.
    fn repair_registers(&self) {
        for (at, word) in self.registers.words().iter().enumerate().take(register::END) {
            let value = self.read_only_value(at);
            if !register::is_writable(at) && load(word) != value {
                word.store(value.to_le(), Ordering::Relaxed);
            }
        }
    }

    fn read_only_value(&self, word: usize) -> u32 {
        let capabilities = spec::capabilities(self.limits.max_queue_entries);
        match word {
            register::CAP_LOW => (capabilities & 0xffff_ffff) as u32,
            register::CAP_HIGH => (capabilities >> 32) as u32,
            register::VS => VERSION,
            register::CSTS => self.status,
            _ => 0,
        }
    }

    fn set_status(&mut self, status: u32) {
        self.status = status;
        self.store(register::CSTS, status);
    }

    fn load(&self, word: usize) -> u32 {
        self.registers.words().get(word).map_or(0, load)
    }

    fn load_pair(&self, word: usize) -> u64 {
        u64::from(self.load(word)) | u64::from(self.load(word + 1)) << 32
    }

    fn store(&self, word: usize, value: u32) {
        if let Some(word) = self.registers.words().get(word) {
            word.store(value.to_le(), Ordering::Release);
        }
    }
}

/// The last dword of the first of the completions that were just written, with its phase turned,
/// and where it goes.
fn gate(
    runs: &[lychgate_model::DmaSegment],
    posted: &[u8],
) -> Option<(lychgate_model::DmaSegment, [u8; 4])> {
    const LAST_DWORD: usize = CQE_SIZE - 4;
    const PHASE_BYTE: usize = 2;
    let mut dword = *posted.get(LAST_DWORD..)?.first_chunk()?;
    dword[PHASE_BYTE] ^= 1;
    let start = runs.first()?.start.wrapping_add(LAST_DWORD as u64);
    Some((lychgate_model::DmaSegment { start, len: 4 }, dword))
}

fn load(word: &AtomicU32) -> u32 {
    u32::from_le(word.load(Ordering::Acquire))
}

fn tail_doorbell(id: u16) -> usize {
    register::DOORBELLS + 2 * usize::from(id)
}

fn head_doorbell(id: u16) -> usize {
    tail_doorbell(id) + 1
}
