//! edu, QEMU's teaching device (its `docs/specs/edu.rst`): a DMA engine with a 4 KiB buffer, a
//! factorial unit and interrupts, as PCI function 1234:11e8.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lychgate_model::{
    Bar, BarKind, Capabilities, ConfigSpace, DmaRequest, DmaSegment, Header, MsiLayout,
    PciFunction, Service, Upstream,
};
use lychgate_types::{Iova, RequesterId};

/// What edu tells the time by.
pub trait Clock: Send + Sync {
    /// The present.
    fn now(&self) -> Instant;
}

/// The clock of the system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

/// What distinguishes one edu from another.
#[derive(Clone)]
pub struct EduConfig {
    /// The id in its requests.
    pub requester: RequesterId,
    /// Bits of a bus address that the engine has; the others are dropped silently.
    pub dma_mask: u64,
    /// From the command to the transfer.
    pub dma_delay: Duration,
    /// What the delay is measured by.
    pub clock: Arc<dyn Clock>,
}

impl Default for EduConfig {
    /// 28 address bits, 100 ms, the clock of the system.
    fn default() -> Self {
        Self {
            requester: RequesterId::default(),
            dma_mask: (1 << 28) - 1,
            dma_delay: Duration::from_millis(100),
            clock: Arc::new(SystemClock),
        }
    }
}

impl fmt::Debug for EduConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EduConfig")
            .field("requester", &self.requester)
            .field("dma_mask", &format_args!("{:#x}", self.dma_mask))
            .field("dma_delay", &self.dma_delay)
            .finish_non_exhaustive()
    }
}

/// The device. Every register access must be trapped; transfers and factorials are done by
/// [`PciFunction::service`].
///
/// The upstream must not call back into the function: it is called with the device locked.
pub struct Edu {
    config: EduConfig,
    upstream: Arc<dyn Upstream>,
    state: Mutex<State>,
}

const HEADER: Header = Header {
    vendor: 0x1234,
    device: 0x11e8,
    revision: 0x10,
    class: 0x00_ff00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    interrupt_pin: 1,
};

const BARS: [Option<Bar>; 6] = [
    Some(Bar { size: 1 << 20, kind: BarKind::Memory32, prefetchable: false, mappable: 0 }),
    None,
    None,
    None,
    None,
    None,
];

const MSI: MsiLayout = MsiLayout { vectors_log2: 0, wide: true, maskable: false };

/// Register offsets in BAR 0.
mod register {
    pub(super) const IDENTIFICATION: u64 = 0x00;
    pub(super) const LIVENESS: u64 = 0x04;
    pub(super) const FACTORIAL: u64 = 0x08;
    pub(super) const STATUS: u64 = 0x20;
    pub(super) const INTERRUPT_STATUS: u64 = 0x24;
    pub(super) const INTERRUPT_RAISE: u64 = 0x60;
    pub(super) const INTERRUPT_ACKNOWLEDGE: u64 = 0x64;
    pub(super) const DMA_SOURCE: u64 = 0x80;
    pub(super) const DMA_DESTINATION: u64 = 0x88;
    pub(super) const DMA_COUNT: u64 = 0x90;
    pub(super) const DMA_COMMAND: u64 = 0x98;

    /// From here on, accesses may be 8 bytes wide.
    pub(super) const WIDE: u64 = DMA_SOURCE;
}

/// Major 1, minor 0, and the mark of the device.
const IDENTIFICATION: u32 = 0x0100_00ed;

const STATUS_INTERRUPT: u32 = 1 << 7;
const STATUS_COMPUTING: u32 = 1;

const INTERRUPT_FACTORIAL: u32 = 1;
const INTERRUPT_DMA: u32 = 0x100;

const DMA_RUN: u64 = 1;
const DMA_TO_MEMORY: u64 = 1 << 1;
const DMA_INTERRUPT: u64 = 1 << 2;

/// The engine's address of the buffer.
const BUFFER_START: u64 = 0x4_0000;
const BUFFER_LEN: usize = 4096;

struct State {
    space: ConfigSpace,
    liveness: u32,
    factorial: u32,
    computing: bool,
    interrupt_after_factorial: bool,
    interrupts: u32,
    /// The level of INTx as it was last driven.
    intx: bool,
    source: u64,
    destination: u64,
    count: u64,
    command: u64,
    /// When the transfer that was commanded runs.
    due: Option<Instant>,
    buffer: [u8; BUFFER_LEN],
}

impl State {
    fn new() -> Self {
        let capabilities = Capabilities { msi: Some(MSI), ..Capabilities::default() };
        Self {
            space: ConfigSpace::new(&HEADER, &BARS, &capabilities),
            liveness: 0,
            factorial: 0,
            computing: false,
            interrupt_after_factorial: false,
            interrupts: 0,
            intx: false,
            source: 0,
            destination: 0,
            count: 0,
            command: 0,
            due: None,
            buffer: [0; BUFFER_LEN],
        }
    }

    fn read(&self, offset: u64) -> u64 {
        match offset {
            register::IDENTIFICATION => IDENTIFICATION.into(),
            register::LIVENESS => self.liveness.into(),
            register::FACTORIAL => self.factorial.into(),
            register::STATUS => {
                let computing = if self.computing { STATUS_COMPUTING } else { 0 };
                let interrupt = if self.interrupt_after_factorial { STATUS_INTERRUPT } else { 0 };
                u64::from(computing | interrupt)
            }
            register::INTERRUPT_STATUS => self.interrupts.into(),
            register::DMA_SOURCE => self.source,
            register::DMA_DESTINATION => self.destination,
            register::DMA_COUNT => self.count,
            register::DMA_COMMAND => self.command,
            _ => u64::MAX,
        }
    }
}

impl Edu {
    /// The device after power-on.
    pub fn new(config: EduConfig, upstream: Arc<dyn Upstream>) -> Self {
        Self { config, upstream, state: Mutex::new(State::new()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, state: &mut State, offset: u64, value: u64) {
        let value32 = (value & 0xffff_ffff) as u32;
        match offset {
            register::LIVENESS => state.liveness = !value32,
            register::FACTORIAL if !state.computing => {
                state.factorial = value32;
                state.computing = true;
            }
            register::STATUS => state.interrupt_after_factorial = value32 & STATUS_INTERRUPT != 0,
            register::INTERRUPT_RAISE => self.raise(state, value32),
            register::INTERRUPT_ACKNOWLEDGE => {
                state.interrupts &= !value32;
                self.drive_intx(state);
            }
            _ if state.due.is_some() => {}
            register::DMA_SOURCE => state.source = value,
            register::DMA_DESTINATION => state.destination = value,
            register::DMA_COUNT => state.count = value,
            register::DMA_COMMAND if value & DMA_RUN != 0 => {
                state.command = value;
                let now = self.config.clock.now();
                state.due = Some(now.checked_add(self.config.dma_delay).unwrap_or(now));
            }
            _ => {}
        }
    }

    /// One message per raise with MSI; else the level of INTx.
    fn raise(&self, state: &mut State, interrupts: u32) {
        state.interrupts |= interrupts;
        if state.interrupts != 0
            && let Some(msi) = state.space.raise_msi(0)
        {
            self.upstream.msi(self.config.requester, msi.address, msi.data);
        }
        self.drive_intx(state);
    }

    fn drive_intx(&self, state: &mut State) {
        let pending = state.interrupts != 0 && !state.space.msi_enabled();
        state.space.set_intx_status(pending);
        let level = pending && !state.space.intx_disabled();
        if level != state.intx {
            state.intx = level;
            self.upstream.intx(self.config.requester, level);
        }
    }

    fn reset_state(&self, state: &mut State) {
        state.interrupts = 0;
        self.drive_intx(state);
        *state = State::new();
    }

    fn compute(&self, state: &mut State) {
        state.factorial = factorial(state.factorial);
        state.computing = false;
        if state.interrupt_after_factorial {
            self.raise(state, INTERRUPT_FACTORIAL);
        }
    }

    fn transfer(&self, state: &mut State) {
        state.due = None;
        let to_memory = state.command & DMA_TO_MEMORY != 0;
        let (memory, device) = if to_memory {
            (state.destination, state.source)
        } else {
            (state.source, state.destination)
        };
        let memory = memory & self.config.dma_mask;
        if state.space.bus_master()
            && let Some(bytes) = buffer_part(&mut state.buffer, device, state.count)
        {
            let request = DmaRequest {
                requester: self.config.requester,
                pasid: None,
                segments: &[DmaSegment { start: Iova::new(memory), len: state.count }],
                initiator: &Initiator { to_memory, count: state.count },
            };
            let done = if to_memory {
                self.upstream.write(&request, bytes)
            } else {
                self.upstream.read(&request, bytes)
            };
            // The device has no error status of its own.
            if done.is_err() {
                state.space.set_received_master_abort();
            }
        }
        let interrupt = state.command & DMA_INTERRUPT != 0;
        state.command &= !DMA_RUN;
        if interrupt {
            self.raise(state, INTERRUPT_DMA);
        }
    }
}

/// What the engine was doing, for people.
struct Initiator {
    to_memory: bool,
    count: u64,
}

impl fmt::Display for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, to) = if self.to_memory { ("buffer", "memory") } else { ("memory", "buffer") };
        write!(f, "edu DMA of {} bytes from {from} to {to}", self.count)
    }
}

/// `count` bytes (not 0) of the buffer at the engine's address `at`, if all lie in it.
fn buffer_part(buffer: &mut [u8; BUFFER_LEN], at: u64, count: u64) -> Option<&mut [u8]> {
    let start = usize::try_from(at.checked_sub(BUFFER_START)?).ok()?;
    let end = start.checked_add(usize::try_from(count).ok()?)?;
    buffer.get_mut(start..end).filter(|part| !part.is_empty())
}

/// `n!` modulo 2^32: 0 from 34 on, when 32 twos have been multiplied.
fn factorial(n: u32) -> u32 {
    let mut product = 1_u32;
    for factor in 2..=n {
        product = product.wrapping_mul(factor);
        if product == 0 {
            break;
        }
    }
    product
}

/// Whether an access of `len` bytes at `offset` reaches a register at all.
fn is_valid_access(offset: u64, len: usize) -> bool {
    len == 4 || len == 8 && offset >= register::WIDE
}

impl PciFunction for Edu {
    fn name(&self) -> &str {
        "edu"
    }

    fn bars(&self) -> [Option<Bar>; 6] {
        BARS
    }

    fn config_read(&self, offset: u16, to: &mut [u8]) {
        self.lock().space.read(offset, to);
    }

    fn config_write(&self, offset: u16, from: &[u8]) {
        let mut state = self.lock();
        if state.space.write(offset, from).function_level_reset {
            self.reset_state(&mut state);
        }
        self.drive_intx(&mut state);
    }

    fn bar_read(&self, bar: u8, offset: u64, to: &mut [u8]) {
        to.fill(0xff);
        let state = self.lock();
        if bar == 0 && state.space.memory_enabled() && is_valid_access(offset, to.len()) {
            for (to, byte) in to.iter_mut().zip(state.read(offset).to_le_bytes()) {
                *to = byte;
            }
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, from: &[u8]) {
        let mut state = self.lock();
        if bar == 0 && state.space.memory_enabled() && is_valid_access(offset, from.len()) {
            let mut value = [0; 8];
            for (to, byte) in value.iter_mut().zip(from) {
                *to = *byte;
            }
            self.write(&mut state, offset, u64::from_le_bytes(value));
        }
    }

    fn reset(&self) {
        self.reset_state(&mut self.lock());
    }

    fn service(&self) -> Service {
        let mut state = self.lock();
        if state.computing {
            self.compute(&mut state);
            return Service::Busy;
        }
        match state.due {
            Some(due) if due <= self.config.clock.now() => {
                self.transfer(&mut state);
                Service::Busy
            }
            Some(due) => Service::At(due),
            None => Service::Asleep,
        }
    }
}

#[cfg(test)]
mod tests;
