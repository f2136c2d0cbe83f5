//! Log pages (5.14) and asynchronous events (5.2).

use std::collections::VecDeque;

use super::spec::{Sqe, Status, admin, nvm};

/// Entries of the error log, as Identify's ELPE + 1 says.
pub(crate) const ERROR_LOG_ENTRIES: u8 = 64;
/// Outstanding asynchronous event requests, as Identify's AERL + 1 says.
pub(crate) const ASYNC_EVENT_REQUESTS: u8 = 4;
/// Composite temperature, in kelvins.
const TEMPERATURE: u16 = 310;
/// Firmware revision, as Identify and the firmware slot log give it.
pub(crate) const FIRMWARE_REVISION: &[u8; 8] = b"1.0     ";

const ERROR_ENTRY_SIZE: usize = 64;

/// Log page identifiers.
mod id {
    pub(super) const ERROR: u8 = 0x01;
    pub(super) const HEALTH: u8 = 0x02;
    pub(super) const FIRMWARE: u8 = 0x03;
    pub(super) const CHANGED_NAMESPACES: u8 = 0x04;
    pub(super) const EFFECTS: u8 = 0x05;
}

/// What the controller remembers for its log pages.
#[derive(Clone, Debug, Default)]
pub(crate) struct Logs {
    errors: VecDeque<[u8; ERROR_ENTRY_SIZE]>,
    error_count: u64,
    pub(crate) health: Health,
}

/// The counters of the SMART log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health {
    bytes_read: u64,
    bytes_written: u64,
    reads: u64,
    writes: u64,
    media_errors: u64,
}

impl Health {
    pub(crate) fn read(&mut self, bytes: u64) {
        self.reads = self.reads.wrapping_add(1);
        self.bytes_read = self.bytes_read.wrapping_add(bytes);
    }

    pub(crate) fn written(&mut self, bytes: u64) {
        self.writes = self.writes.wrapping_add(1);
        self.bytes_written = self.bytes_written.wrapping_add(bytes);
    }
}

impl Logs {
    /// Remembers a command that failed; the newest entries are kept.
    pub(crate) fn record_error(&mut self, queue: u16, sqe: &Sqe, status: Status) {
        self.error_count = self.error_count.wrapping_add(1);
        if status.is_media_error() {
            self.health.media_errors = self.health.media_errors.wrapping_add(1);
        }
        let lba = if queue != 0 && nvm::has_range(sqe.opcode()) { sqe.slba() } else { 0 };
        let mut entry = [0; ERROR_ENTRY_SIZE];
        put(&mut entry, 0, &self.error_count.to_le_bytes());
        put(&mut entry, 8, &queue.to_le_bytes());
        put(&mut entry, 10, &sqe.cid().to_le_bytes());
        put(&mut entry, 12, &(status.bits() << 1).to_le_bytes());
        // Parameter error location: not specific to a parameter.
        put(&mut entry, 14, &[0xff, 0xff]);
        put(&mut entry, 16, &lba.to_le_bytes());
        put(&mut entry, 24, &sqe.nsid().to_le_bytes());
        self.errors.truncate(usize::from(ERROR_LOG_ENTRIES) - 1);
        self.errors.push_front(entry);
    }

    /// The contents of log page `log`; reads beyond its end give zeros.
    pub(crate) fn page(&self, log: u8, nsid: u32) -> Result<Vec<u8>, Status> {
        match log {
            id::ERROR => {
                let mut page = vec![0; usize::from(ERROR_LOG_ENTRIES) * ERROR_ENTRY_SIZE];
                for (to, entry) in page.as_chunks_mut().0.iter_mut().zip(&self.errors) {
                    *to = *entry;
                }
                Ok(page)
            }
            // Health is the controller's: LPA bit 0 is 0.
            id::HEALTH if nsid == 0 || nsid == u32::MAX => Ok(self.health_page()),
            id::HEALTH => Err(Status::INVALID_FIELD),
            id::FIRMWARE => {
                let mut page = vec![0; 512];
                page[0] = 1;
                put(&mut page, 8, FIRMWARE_REVISION);
                Ok(page)
            }
            id::CHANGED_NAMESPACES => Ok(vec![0; 4096]),
            id::EFFECTS => Ok(effects_page()),
            _ => Err(Status::INVALID_LOG_PAGE),
        }
    }

    fn health_page(&self) -> Vec<u8> {
        /// Data units are thousands of 512 bytes, rounded up.
        const DATA_UNIT: u64 = 512 * 1000;
        let health = &self.health;
        let mut page = vec![0; 512];
        put(&mut page, 1, &TEMPERATURE.to_le_bytes());
        // Available spare and its threshold, in percent.
        put(&mut page, 3, &[100, 10]);
        put(&mut page, 32, &health.bytes_read.div_ceil(DATA_UNIT).to_le_bytes());
        put(&mut page, 48, &health.bytes_written.div_ceil(DATA_UNIT).to_le_bytes());
        put(&mut page, 64, &health.reads.to_le_bytes());
        put(&mut page, 80, &health.writes.to_le_bytes());
        // Power cycles.
        put(&mut page, 112, &[1]);
        put(&mut page, 160, &health.media_errors.to_le_bytes());
        put(&mut page, 176, &self.error_count.to_le_bytes());
        page
    }
}

/// Commands Supported and Effects (5.14.1.5).
fn effects_page() -> Vec<u8> {
    const SUPPORTED: u8 = 1;
    const CHANGES_BLOCKS: u8 = 1 << 1;
    let mut page = vec![0; 4096];
    for (opcode, _) in admin::ALL {
        page[usize::from(opcode) * 4] = SUPPORTED;
    }
    for (opcode, _) in nvm::ALL {
        let effect = if nvm::writes(opcode) { CHANGES_BLOCKS } else { 0 };
        page[1024 + usize::from(opcode) * 4] = SUPPORTED | effect;
    }
    page
}

/// Copies `value` to `at`, as far as `page` reaches.
pub(crate) fn put(page: &mut [u8], at: usize, value: &[u8]) {
    for (to, from) in page.iter_mut().skip(at).zip(value) {
        *to = *from;
    }
}

/// Something the host wants to hear of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// Error event: a doorbell of a queue that does not exist was written.
    InvalidDoorbellRegister,
    /// Error event: a doorbell was given a value that its queue cannot have.
    InvalidDoorbellValue,
}

impl Event {
    /// Type 2:0, information 15:8, log page 23:16.
    fn dword(self) -> u32 {
        let info = match self {
            Self::InvalidDoorbellRegister => 0,
            Self::InvalidDoorbellValue => 1,
        };
        info << 8 | u32::from(id::ERROR) << 16
    }
}

/// Asynchronous event requests of the host, and events that wait for one. Every event here is of
/// type 0, error: once one is sent, the type is masked until the host reads the error log.
#[derive(Clone, Debug, Default)]
pub(crate) struct Events {
    requests: VecDeque<u16>,
    waiting: Option<Event>,
    masked: bool,
}

impl Events {
    /// Takes the request with command id `cid`.
    pub(crate) fn request(&mut self, cid: u16) -> Result<(), Status> {
        if self.requests.len() >= usize::from(ASYNC_EVENT_REQUESTS) {
            return Err(Status::ASYNC_EVENT_LIMIT);
        }
        self.requests.push_back(cid);
        Ok(())
    }

    /// Whether a request with command id `cid` is outstanding.
    pub(crate) fn is_outstanding(&self, cid: u16) -> bool {
        self.requests.contains(&cid)
    }

    /// Takes the request with command id `cid` back.
    pub(crate) fn abort(&mut self, cid: u16) -> bool {
        let before = self.requests.len();
        self.requests.retain(|outstanding| *outstanding != cid);
        self.requests.len() < before
    }

    /// Remembers `event`, unless the host has one to look at already.
    pub(crate) fn report(&mut self, event: Event) {
        if !self.masked {
            self.waiting.get_or_insert(event);
        }
    }

    /// An event and the request that it completes: command id, dword 0.
    pub(crate) fn next(&mut self) -> Option<(u16, u32)> {
        self.waiting.filter(|_| !self.requests.is_empty())?;
        let (cid, event) = (self.requests.pop_front()?, self.waiting.take()?);
        self.masked = true;
        Some((cid, event.dword()))
    }

    /// The host read log page `log` without Retain Asynchronous Event.
    pub(crate) fn log_read(&mut self, log: u8) {
        if log == id::ERROR {
            self.masked = false;
        }
    }

    /// Everything is forgotten; requests get no answer (7.6.2).
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }
}
