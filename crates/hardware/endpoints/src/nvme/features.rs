//! Features (5.21): what Get and Set Features speak about.

use std::time::Instant;

use super::spec::{Sqe, Status, low};

/// Feature identifiers.
mod id {
    pub(super) const ARBITRATION: u8 = 0x01;
    pub(super) const POWER_MANAGEMENT: u8 = 0x02;
    pub(super) const TEMPERATURE_THRESHOLD: u8 = 0x04;
    pub(super) const ERROR_RECOVERY: u8 = 0x05;
    pub(super) const VOLATILE_WRITE_CACHE: u8 = 0x06;
    pub(super) const NUMBER_OF_QUEUES: u8 = 0x07;
    pub(super) const INTERRUPT_COALESCING: u8 = 0x08;
    pub(super) const INTERRUPT_VECTOR: u8 = 0x09;
    pub(super) const WRITE_ATOMICITY: u8 = 0x0a;
    pub(super) const ASYNC_EVENTS: u8 = 0x0b;
    pub(super) const TIMESTAMP: u8 = 0x0e;
}

/// Bytes of the data of the timestamp feature.
pub(crate) const TIMESTAMP_LEN: usize = 8;

/// Over temperature threshold after reset, in kelvins.
const DEFAULT_OVER_TEMPERATURE: u16 = 343;

/// What Get Features answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    /// In dword 0 of the completion.
    Dword(u32),
    /// In the data buffer.
    Timestamp([u8; TIMESTAMP_LEN]),
}

/// The current values. A controller reset brings the defaults back: nothing can be saved.
#[derive(Clone, Debug)]
pub(crate) struct Features {
    arbitration: u32,
    power: u32,
    over_temperature: u16,
    under_temperature: u16,
    /// Time limited error recovery, by namespace.
    error_recovery: Vec<u16>,
    write_cache: bool,
    coalescing: u16,
    /// Coalescing Disable, by vector.
    coalescing_disabled: Vec<bool>,
    write_atomicity: u32,
    async_events: u32,
    timestamp: Timestamp,
    io_queue_pairs: u16,
}

#[derive(Clone, Copy, Debug)]
struct Timestamp {
    /// Milliseconds, 48 bits, at `since`.
    value: u64,
    since: Instant,
    set_by_host: bool,
}

impl Features {
    pub(crate) fn new(namespaces: usize, vectors: u16, io_queue_pairs: u16) -> Self {
        Self {
            arbitration: 0,
            power: 0,
            over_temperature: DEFAULT_OVER_TEMPERATURE,
            under_temperature: 0,
            error_recovery: vec![0; namespaces],
            write_cache: true,
            coalescing: 0,
            coalescing_disabled: vec![false; usize::from(vectors)],
            write_atomicity: 0,
            async_events: 0,
            timestamp: Timestamp { value: 0, since: Instant::now(), set_by_host: false },
            io_queue_pairs,
        }
    }

    /// Every feature at its default.
    pub(crate) fn reset(&mut self) {
        let vectors = u16::try_from(self.coalescing_disabled.len()).unwrap_or(u16::MAX);
        *self = Self::new(self.error_recovery.len(), vectors, self.io_queue_pairs);
    }

    /// Whether writes may stay in the storage's cache until a flush.
    pub(crate) fn write_cache(&self) -> bool {
        self.write_cache
    }

    /// Whether Set Features `sqe` brings data.
    pub(crate) fn takes_data(sqe: &Sqe) -> bool {
        feature(sqe) == id::TIMESTAMP
    }

    /// Get Features: the value that SEL asks for.
    pub(crate) fn get(&self, sqe: &Sqe) -> Result<Answer, Status> {
        const DEFAULT: u32 = 1;
        const SAVED: u32 = 2;
        const CAPABILITIES: u32 = 3;
        match sqe.dw10() >> 8 & 7 {
            0 => self.current(sqe),
            DEFAULT | SAVED => {
                let mut defaults = self.clone();
                defaults.reset();
                defaults.current(sqe)
            }
            CAPABILITIES => capabilities(feature(sqe)).map(Answer::Dword),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn current(&self, sqe: &Sqe) -> Result<Answer, Status> {
        let dw11 = sqe.dw11();
        Ok(Answer::Dword(match feature(sqe) {
            id::ARBITRATION => self.arbitration,
            id::POWER_MANAGEMENT => self.power,
            id::TEMPERATURE_THRESHOLD => u32::from(match threshold(dw11)? {
                Threshold::Over => self.over_temperature,
                Threshold::Under => self.under_temperature,
                Threshold::Absent => return Err(Status::INVALID_FIELD),
            }),
            id::ERROR_RECOVERY => {
                let index = usize::try_from(sqe.nsid()).ok().and_then(|nsid| nsid.checked_sub(1));
                let value = index.and_then(|index| self.error_recovery.get(index));
                u32::from(*value.ok_or(Status::INVALID_NAMESPACE)?)
            }
            id::VOLATILE_WRITE_CACHE => u32::from(self.write_cache),
            id::NUMBER_OF_QUEUES => self.granted_queues(),
            id::INTERRUPT_COALESCING => u32::from(self.coalescing),
            id::INTERRUPT_VECTOR => {
                let disabled = self.coalescing_disabled.get(usize::from(low(dw11)));
                let disabled = *disabled.ok_or(Status::INVALID_FIELD)?;
                u32::from(low(dw11)) | u32::from(disabled) << 16
            }
            id::WRITE_ATOMICITY => self.write_atomicity,
            id::ASYNC_EVENTS => self.async_events,
            id::TIMESTAMP => return Ok(Answer::Timestamp(self.timestamp.now().to_le_bytes())),
            _ => return Err(Status::INVALID_FIELD),
        }))
    }

    /// Set Features. `data` is the command's data, zeros if it has none; `queues_exist` says that
    /// an I/O queue was created. Gives dword 0 of the completion.
    pub(crate) fn set(
        &mut self,
        sqe: &Sqe,
        data: [u8; TIMESTAMP_LEN],
        queues_exist: bool,
    ) -> Result<u32, Status> {
        const SAVE: u32 = 1 << 31;
        let feature = feature(sqe);
        capabilities(feature)?;
        if sqe.dw10() & SAVE != 0 {
            return Err(Status::FEATURE_NOT_SAVEABLE);
        }
        let dw11 = sqe.dw11();
        match feature {
            id::ARBITRATION => self.arbitration = dw11,
            id::POWER_MANAGEMENT => {
                // There is one power state.
                if dw11 & 0x1f != 0 {
                    return Err(Status::INVALID_FIELD);
                }
                self.power = dw11 & 0xff;
            }
            id::TEMPERATURE_THRESHOLD => match threshold(dw11)? {
                Threshold::Over => self.over_temperature = low(dw11),
                Threshold::Under => self.under_temperature = low(dw11),
                Threshold::Absent => {}
            },
            id::ERROR_RECOVERY => self.set_error_recovery(sqe)?,
            id::VOLATILE_WRITE_CACHE => self.write_cache = dw11 & 1 != 0,
            id::NUMBER_OF_QUEUES => {
                if queues_exist {
                    return Err(Status::SEQUENCE_ERROR);
                }
                if dw11 & 0xffff == 0xffff || dw11 >> 16 == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                return Ok(self.granted_queues());
            }
            id::INTERRUPT_COALESCING => self.coalescing = low(dw11),
            id::INTERRUPT_VECTOR => {
                let disabled = self.coalescing_disabled.get_mut(usize::from(low(dw11)));
                *disabled.ok_or(Status::INVALID_FIELD)? = dw11 & 1 << 16 != 0;
            }
            id::WRITE_ATOMICITY => self.write_atomicity = dw11 & 1,
            id::ASYNC_EVENTS => self.async_events = dw11,
            _ => {
                self.timestamp = Timestamp {
                    value: u64::from_le_bytes(data) & TIMESTAMP_MASK,
                    since: Instant::now(),
                    set_by_host: true,
                };
            }
        }
        Ok(0)
    }

    /// Submission and completion queues that may be created, 0-based.
    fn granted_queues(&self) -> u32 {
        let granted = u32::from(self.io_queue_pairs.max(1) - 1);
        granted | granted << 16
    }

    fn set_error_recovery(&mut self, sqe: &Sqe) -> Result<(), Status> {
        const DULBE: u32 = 1 << 16;
        // Identify Namespace does not claim the deallocated block error.
        if sqe.dw11() & DULBE != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let time = low(sqe.dw11());
        if sqe.nsid() == u32::MAX {
            self.error_recovery.fill(time);
            return Ok(());
        }
        let index = usize::try_from(sqe.nsid()).ok().and_then(|nsid| nsid.checked_sub(1));
        let value = index.and_then(|index| self.error_recovery.get_mut(index));
        *value.ok_or(Status::INVALID_NAMESPACE)? = time;
        Ok(())
    }
}

const TIMESTAMP_MASK: u64 = (1 << 48) - 1;

impl Timestamp {
    /// Timestamp 47:0, and its origin in 51:49 (5.21.1.14).
    fn now(&self) -> u64 {
        let elapsed = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        let value = self.value.wrapping_add(elapsed) & TIMESTAMP_MASK;
        value | u64::from(self.set_by_host) << 49
    }
}

/// Which threshold of the composite temperature dword 11 names. Other sensors do not exist; a
/// setting for all sensors reaches the composite temperature.
enum Threshold {
    Over,
    Under,
    Absent,
}

fn threshold(dw11: u32) -> Result<Threshold, Status> {
    match (dw11 >> 16 & 0xf, dw11 >> 20 & 3) {
        (0 | 0xf, 0) => Ok(Threshold::Over),
        (0 | 0xf, 1) => Ok(Threshold::Under),
        (1..=8, 0 | 1) => Ok(Threshold::Absent),
        _ => Err(Status::INVALID_FIELD),
    }
}

/// The attributes that SEL = 3 asks for: changeable, specific to a namespace. None is saveable.
fn capabilities(feature: u8) -> Result<u32, Status> {
    const NAMESPACE_SPECIFIC: u32 = 1 << 1;
    const CHANGEABLE: u32 = 1 << 2;
    match feature {
        id::ERROR_RECOVERY => Ok(CHANGEABLE | NAMESPACE_SPECIFIC),
        id::ARBITRATION
        | id::POWER_MANAGEMENT
        | id::TEMPERATURE_THRESHOLD
        | id::VOLATILE_WRITE_CACHE
        | id::NUMBER_OF_QUEUES
        | id::INTERRUPT_COALESCING
        | id::INTERRUPT_VECTOR
        | id::WRITE_ATOMICITY
        | id::ASYNC_EVENTS
        | id::TIMESTAMP => Ok(CHANGEABLE),
        _ => Err(Status::INVALID_FIELD),
    }
}

fn feature(sqe: &Sqe) -> u8 {
    sqe.dw10().to_le_bytes()[0]
}
