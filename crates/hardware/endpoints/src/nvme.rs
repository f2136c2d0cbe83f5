//! An NVM Express 1.4 controller with the NVM command set.
//!
//! Claimed: the mandatory commands and features, Compare, Write Zeroes, Dataset Management, Save and
//! Select, Timestamp, a volatile write cache, MSI-X. Not claimed: SGLs, fused operations, metadata,
//! namespace management, shadow doorbells, INTx.

mod admin;
mod controller;
mod features;
mod identify;
mod initiator;
mod io;
mod log;
mod mover;
mod namespace;
mod pci;
mod queue;
mod spec;

pub use namespace::Namespace;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_model::{Bar, PciFunction, RegisterFile, Service, Upstream};
use lychgate_types::RequesterId;

use controller::Controller;

/// What distinguishes one controller from another.
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// The id in its requests.
    pub requester: RequesterId,
    /// Serial number, up to 20 ASCII characters; it should differ between controllers.
    pub serial: String,
    /// Model number, up to 40 ASCII characters.
    pub model: String,
    /// I/O queue pairs that a driver may create, 1 to 511. Pair n has an MSI-X vector of its own up
    /// to the 255th.
    pub io_queue_pairs: u16,
    /// Most entries of a queue, 2 to 65536.
    pub max_queue_entries: u32,
    /// Log2 of the largest transfer in units of 4 KiB, 1 to 12: 8 is 1 MiB.
    pub max_transfer_log2: u8,
}

impl Default for NvmeConfig {
    /// 64 queue pairs of up to 65536 entries, transfers of up to 2 MiB.
    fn default() -> Self {
        Self {
            requester: RequesterId::default(),
            serial: "lychgate-0".into(),
            model: "lychgate NVMe controller".into(),
            io_queue_pairs: 64,
            max_queue_entries: 1 << 16,
            max_transfer_log2: 9,
        }
    }
}

/// Why a controller cannot be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NvmeError {
    /// [`NvmeConfig::io_queue_pairs`].
    #[error("{0} I/O queue pairs: must be 1 to 511")]
    QueuePairs(u16),
    /// [`NvmeConfig::max_queue_entries`].
    #[error("{0} entries in a queue: must be 2 to 65536")]
    QueueEntries(u32),
    /// [`NvmeConfig::max_transfer_log2`].
    #[error("transfers of 2^{0} * 4 KiB: must be 2^1 to 2^12")]
    Transfer(u8),
    /// [`Namespace::lba_shift`].
    #[error("logical blocks of 2^{0} bytes: must be 2^9 to 2^12")]
    BlockSize(u8),
    /// Identify can list 1024 namespaces.
    #[error("{0} namespaces: must be at most 1024")]
    Namespaces(usize),
    /// The register file holds fewer words than the mappable part of the BAR.
    #[error("register file of {0} words: must be at least 2048")]
    RegisterFile(usize),
}

/// The checked sizes of a controller.
#[derive(Clone, Copy, Debug)]
struct Limits {
    io_queue_pairs: u16,
    max_queue_entries: u32,
    /// Bytes.
    max_transfer: u64,
    /// As Identify spells it.
    mdts: u8,
    vectors: u16,
}

/// How often the service loop makes way for an access before it goes on regardless.
const MOST_YIELDS: u32 = 1000;

/// An NVMe controller.
///
/// Registers and doorbells live in the register file, where software that has mapped them may store
/// at any time; [`PciFunction::service`] looks at them. A trapped access has its effect on the
/// registers before it returns (CSTS follows CC), and the commands that a doorbell announces are
/// executed by the next `service`.
///
/// The upstream must not call back into the function: it is called with the controller locked, so
/// that a reset waits for the transfer at hand.
pub struct Nvme {
    controller: Mutex<Controller>,
    /// Threads that wait for `controller` to make an access.
    waiting: AtomicUsize,
}

impl Nvme {
    /// A controller after power-on. Namespace `n` of the list has NSID `n + 1`.
    ///
    /// # Errors
    ///
    /// A size that is out of its range.
    pub fn new(
        config: &NvmeConfig,
        upstream: Arc<dyn Upstream>,
        registers: Arc<dyn RegisterFile>,
        namespaces: Vec<Namespace>,
    ) -> Result<Self, NvmeError> {
        let limits = check(config, &*registers, &namespaces)?;
        let controller = Controller::new(config, limits, upstream, registers, namespaces);
        Ok(Self { controller: Mutex::new(controller), waiting: AtomicUsize::new(0) })
    }

    /// The controller, for an access: the service loop makes way.
    fn access(&self) -> MutexGuard<'_, Controller> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let controller = self.lock();
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        controller
    }

    fn lock(&self) -> MutexGuard<'_, Controller> {
        self.controller.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(
    config: &NvmeConfig,
    registers: &dyn RegisterFile,
    namespaces: &[Namespace],
) -> Result<Limits, NvmeError> {
    if !(1..pci::MAX_QUEUE_PAIRS).contains(&config.io_queue_pairs) {
        return Err(NvmeError::QueuePairs(config.io_queue_pairs));
    }
    if !(2..=1 << 16).contains(&config.max_queue_entries) {
        return Err(NvmeError::QueueEntries(config.max_queue_entries));
    }
    if !(1..=12).contains(&config.max_transfer_log2) {
        return Err(NvmeError::Transfer(config.max_transfer_log2));
    }
    if let Some(bad) = namespaces.iter().find(|ns| !(9..=12).contains(&ns.lba_shift)) {
        return Err(NvmeError::BlockSize(bad.lba_shift));
    }
    if namespaces.len() > 1024 {
        return Err(NvmeError::Namespaces(namespaces.len()));
    }
    let words = registers.words().len();
    if (words as u64) < pci::MAPPABLE / 4 {
        return Err(NvmeError::RegisterFile(words));
    }
    Ok(Limits {
        io_queue_pairs: config.io_queue_pairs,
        max_queue_entries: config.max_queue_entries,
        max_transfer: 4096 << config.max_transfer_log2,
        mdts: config.max_transfer_log2,
        vectors: (config.io_queue_pairs + 1).min(pci::MAX_VECTORS),
    })
}

impl PciFunction for Nvme {
    fn name(&self) -> &str {
        "nvme"
    }

    fn bars(&self) -> [Option<Bar>; 6] {
        pci::BARS
    }

    fn config_read(&self, offset: u16, to: &mut [u8]) {
        self.access().space.read(offset, to);
    }

    fn config_write(&self, offset: u16, from: &[u8]) {
        let mut controller = self.access();
        if controller.space.write(offset, from).function_level_reset {
            controller.reset();
        }
        controller.release_interrupts();
    }

    fn bar_read(&self, bar: u8, offset: u64, to: &mut [u8]) {
        let controller = self.access();
        to.fill(0xff);
        if bar != 0 || !controller.space.memory_enabled() {
            return;
        }
        match offset {
            0..pci::TABLE => {
                for (at, byte) in (offset..).zip(to) {
                    let [word, lane] = [at / 4, at % 4].map(|n| usize::try_from(n).unwrap_or(0));
                    *byte = controller.read_register(word).to_le_bytes()[lane];
                }
            }
            pci::TABLE..pci::PBA => controller.msix.read_table(offset - pci::TABLE, to),
            _ => controller.msix.read_pba(offset.saturating_sub(pci::PBA), to),
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, from: &[u8]) {
        let mut controller = self.access();
        if bar != 0 || !controller.space.memory_enabled() {
            return;
        }
        match offset {
            // Registers are 32 or 64 bits wide; narrower stores have no effect (3.1).
            0..pci::TABLE if offset.is_multiple_of(4) && from.len().is_multiple_of(4) => {
                let first = usize::try_from(offset / 4).unwrap_or(usize::MAX);
                for (word, bytes) in (first..).zip(from.as_chunks().0) {
                    controller.write_register(word, u32::from_le_bytes(*bytes));
                }
                controller.look();
            }
            pci::TABLE..pci::PBA => {
                controller.msix.write_table(offset - pci::TABLE, from);
                controller.release_interrupts();
            }
            _ => {}
        }
    }

    fn reset(&self) {
        self.access().reset();
    }

    fn service(&self) -> Service {
        // A lock that is taken again at once would starve whoever waits for it.
        for _ in 0..MOST_YIELDS {
            if self.waiting.load(Ordering::Relaxed) == 0 {
                break;
            }
            std::thread::yield_now();
        }
        if self.lock().serve() { Service::Busy } else { Service::Idle }
    }
}

#[cfg(test)]
mod tests;
