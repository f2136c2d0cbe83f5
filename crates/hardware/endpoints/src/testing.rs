//! What the tests stand on: a host with plain memory, some of which is not mapped, and registers.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard};

use lychgate_model::{DmaError, DmaRequest, FileBytes, RegisterFile, Upstream};
use lychgate_types::{Iova, RequesterId};

/// One thing a function did to its host.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Act {
    Read { initiator: String, len: usize },
    Write { initiator: String, start: u64, bytes: Vec<u8> },
    Msi { address: u64, data: u32 },
    Intx(bool),
}

/// Memory from bus address 0 on, with parts that abort.
pub(crate) struct Host {
    state: Mutex<State>,
    size: u64,
    /// Whether bytes may come straight from a file, and how often they did.
    pub(crate) takes_files: AtomicBool,
    pub(crate) files_taken: AtomicU32,
}

struct State {
    memory: Vec<u8>,
    unmapped: Vec<Range<u64>>,
    read_only: Vec<Range<u64>>,
    acts: Option<Vec<Act>>,
    msis: Vec<(u64, u32)>,
    intx: bool,
}

impl Host {
    pub(crate) fn new(size: usize) -> Self {
        let state = State {
            memory: vec![0; size],
            unmapped: Vec::new(),
            read_only: Vec::new(),
            acts: None,
            msis: Vec::new(),
            intx: false,
        };
        Self {
            state: Mutex::new(state),
            size: size as u64,
            takes_files: AtomicBool::new(false),
            files_taken: AtomicU32::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub(crate) fn unmap(&self, range: Range<u64>) {
        self.state().unmapped.push(range);
    }

    pub(crate) fn map_all(&self) {
        self.state().unmapped.clear();
    }

    pub(crate) fn protect(&self, range: Range<u64>) {
        self.state().read_only.push(range);
    }

    pub(crate) fn peek(&self, at: u64, len: usize) -> Vec<u8> {
        let at = usize::try_from(at).unwrap();
        self.state().memory[at..at + len].to_vec()
    }

    pub(crate) fn poke(&self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at).unwrap();
        self.state().memory[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn record(&self) {
        self.state().acts = Some(Vec::new());
    }

    pub(crate) fn recorded(&self) -> Vec<Act> {
        self.state().acts.take().unwrap_or_default()
    }

    pub(crate) fn take_msis(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut self.state().msis)
    }

    pub(crate) fn intx_level(&self) -> bool {
        self.state().intx
    }

    fn check(
        &self,
        request: &DmaRequest<'_>,
        len: usize,
        blocked: &[&[Range<u64>]],
    ) -> Result<Vec<Range<usize>>, DmaError> {
        let total: u64 = request.segments.iter().map(|segment| segment.len).sum();
        assert_eq!(total, len as u64, "segments of {request:?} do not add up");
        assert!(!request.segments.is_empty());
        request
            .segments
            .iter()
            .map(|segment| {
                assert_ne!(segment.len, 0, "{request:?}");
                let start = segment.start.get();
                let end = start.checked_add(segment.len).filter(|end| *end <= self.size);
                let end = end.ok_or(DmaError { at: segment.start })?;
                for hole in blocked.iter().copied().flatten() {
                    if hole.start < end && start < hole.end {
                        return Err(DmaError { at: Iova::new(start.max(hole.start)) });
                    }
                }
                Ok(usize::try_from(start).unwrap()..usize::try_from(end).unwrap())
            })
            .collect()
    }
}

impl Upstream for Host {
    fn read(&self, request: &DmaRequest<'_>, to: &mut [u8]) -> Result<(), DmaError> {
        let mut state = self.state();
        let ranges = self.check(request, to.len(), &[&state.unmapped])?;
        let mut rest = &mut *to;
        for range in ranges {
            let (here, after) = rest.split_at_mut(range.len());
            here.copy_from_slice(&state.memory[range]);
            rest = after;
        }
        if let Some(acts) = &mut state.acts {
            acts.push(Act::Read { initiator: request.initiator.to_string(), len: to.len() });
        }
        Ok(())
    }

    fn write(&self, request: &DmaRequest<'_>, from: &[u8]) -> Result<(), DmaError> {
        let mut state = self.state();
        let ranges = self.check(request, from.len(), &[&state.unmapped, &state.read_only])?;
        let mut rest = from;
        for range in ranges {
            let (here, after) = rest.split_at(range.len());
            state.memory[range].copy_from_slice(here);
            rest = after;
        }
        if let Some(acts) = &mut state.acts {
            acts.push(Act::Write {
                initiator: request.initiator.to_string(),
                start: request.segments[0].start.get(),
                bytes: from.to_vec(),
            });
        }
        Ok(())
    }

    fn write_from(
        &self,
        request: &DmaRequest<'_>,
        from: &FileBytes<'_>,
    ) -> Option<Result<(), DmaError>> {
        if !self.takes_files.load(Ordering::Relaxed) {
            return None;
        }
        let file = File::from(from.file.try_clone_to_owned().unwrap());
        let mut bytes = vec![0; from.len];
        file.read_exact_at(&mut bytes, from.offset).ok()?;
        self.files_taken.fetch_add(1, Ordering::Relaxed);
        Some(self.write(request, &bytes))
    }

    fn msi(&self, _requester: RequesterId, address: u64, data: u32) {
        let mut state = self.state();
        state.msis.push((address, data));
        if let Some(acts) = &mut state.acts {
            acts.push(Act::Msi { address, data });
        }
    }

    fn intx(&self, _requester: RequesterId, asserted: bool) {
        let mut state = self.state();
        state.intx = asserted;
        if let Some(acts) = &mut state.acts {
            acts.push(Act::Intx(asserted));
        }
    }
}

/// Registers that nobody else maps.
pub(crate) struct Words(Vec<AtomicU32>);

impl Words {
    pub(crate) fn new(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU32::new(0)).collect())
    }
}

impl RegisterFile for Words {
    fn words(&self) -> &[AtomicU32] {
        &self.0
    }
}
