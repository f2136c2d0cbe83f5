//! The host above a function: memory with holes, and a record of what the function did to it.

use std::ops::Range;
use std::sync::atomic::AtomicU32;
use std::sync::{Mutex, MutexGuard, PoisonError};

use lychgate_model::{DmaError, DmaRequest, RegisterFile, Upstream};
use lychgate_types::{Iova, RequesterId};

/// Memory from bus address 0 on. What lies beyond it, and in its holes, aborts.
#[derive(Debug)]
pub struct Host {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    memory: Vec<u8>,
    holes: Vec<Range<u64>>,
    written: Vec<Range<u64>>,
    msis: Vec<(u64, u32)>,
}

impl Host {
    /// `len` zero bytes but for the holes.
    pub fn new(len: usize, holes: Vec<Range<u64>>) -> Self {
        let state = State { memory: vec![0; len], holes, written: Vec::new(), msis: Vec::new() };
        Self { state: Mutex::new(state) }
    }

    /// The bytes at `at`, zeros beyond the memory.
    pub fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let state = self.lock();
        let byte = |at: u64| usize::try_from(at).ok().and_then(|at| state.memory.get(at));
        (0..len as u64).map(|offset| byte(at.wrapping_add(offset)).copied().unwrap_or(0)).collect()
    }

    /// Stores bytes as the processor does, in holes too; those beyond the memory are dropped.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        let mut state = self.lock();
        for (at, byte) in (at..).zip(bytes) {
            if let Some(to) = usize::try_from(at).ok().and_then(|at| state.memory.get_mut(at)) {
                *to = *byte;
            }
        }
    }

    /// Where the function wrote since it was asked last, also where it did not pass.
    pub fn take_written(&self) -> Vec<Range<u64>> {
        std::mem::take(&mut self.lock().written)
    }

    /// The messages since it was asked last.
    pub fn take_msis(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.lock().msis)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The places of the segments in memory, or the first address that aborts.
    fn places(&self, request: &DmaRequest<'_>, len: usize) -> Result<Vec<Range<usize>>, DmaError> {
        let total: u64 = request.segments.iter().map(|segment| segment.len).sum();
        assert_eq!(total, len as u64, "the segments of {request:?} do not add up");
        assert!(!request.segments.is_empty());
        let place = |start: u64, len: u64| {
            assert_ne!(len, 0, "{request:?}");
            let end = start.checked_add(len).filter(|end| *end <= self.memory.len() as u64);
            let end = end.ok_or(DmaError { at: Iova::new(start) })?;
            for hole in &self.holes {
                if hole.start < end && start < hole.end {
                    return Err(DmaError { at: Iova::new(start.max(hole.start)) });
                }
            }
            Ok(start as usize..end as usize)
        };
        request.segments.iter().map(|segment| place(segment.start.get(), segment.len)).collect()
    }
}

impl Upstream for Host {
    fn read(&self, request: &DmaRequest<'_>, to: &mut [u8]) -> Result<(), DmaError> {
        let state = self.lock();
        let mut rest = &mut *to;
        for place in state.places(request, rest.len())? {
            let (here, after) = rest.split_at_mut(place.len());
            here.copy_from_slice(&state.memory[place]);
            rest = after;
        }
        Ok(())
    }

    fn write(&self, request: &DmaRequest<'_>, from: &[u8]) -> Result<(), DmaError> {
        let mut state = self.lock();
        for segment in request.segments {
            let start = segment.start.get();
            state.written.push(start..start.saturating_add(segment.len));
        }
        let mut rest = from;
        for place in state.places(request, rest.len())? {
            let (here, after) = rest.split_at(place.len());
            state.memory[place].copy_from_slice(here);
            rest = after;
        }
        // Explanations are made for every request.
        assert!(!request.initiator.to_string().is_empty());
        Ok(())
    }

    fn msi(&self, _: RequesterId, address: u64, data: u32) {
        assert!(address.is_multiple_of(4));
        self.lock().msis.push((address, data));
    }

    fn intx(&self, _: RequesterId, _: bool) {}
}

/// Registers that a function shares with software that has mapped them.
#[derive(Debug)]
pub struct Words(Vec<AtomicU32>);

impl Words {
    /// `count` words of 0.
    pub fn new(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU32::new(0)).collect())
    }
}

impl RegisterFile for Words {
    fn words(&self) -> &[AtomicU32] {
        &self.0
    }
}
