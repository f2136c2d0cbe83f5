//! Data between memory and storage: PRP lists (4.3), and copies in pieces that stay in the cache.

use std::cell::Cell;
use std::fmt;
use std::sync::Arc;

use lychgate_model::{DmaError, DmaRequest, DmaSegment, FileBytes, Upstream};
use lychgate_types::{Iova, RequesterId};

use super::initiator::{CommandData, PrpList};
use super::spec::Status;
use crate::storage::Storage;

/// Bytes that pass through the bounce buffer at once, so that it stays in the second-level cache.
const PIECE: usize = 256 << 10;

/// From here on a transfer straight from a file is cheaper than one through the buffer.
const LEAST_DIRECT: usize = 32 << 10;

/// The function's way to memory.
pub(crate) struct Bus {
    upstream: Arc<dyn Upstream>,
    requester: RequesterId,
    aborted: Cell<bool>,
}

impl Bus {
    pub(crate) fn new(upstream: Arc<dyn Upstream>, requester: RequesterId) -> Self {
        Self { upstream, requester, aborted: Cell::new(false) }
    }

    pub(crate) fn read(
        &self,
        initiator: &dyn fmt::Display,
        segments: &[DmaSegment],
        to: &mut [u8],
    ) -> Result<(), DmaError> {
        let done = self.upstream.read(&self.request(initiator, segments), to);
        done.inspect_err(|_| self.aborted.set(true))
    }

    pub(crate) fn write(
        &self,
        initiator: &dyn fmt::Display,
        segments: &[DmaSegment],
        from: &[u8],
    ) -> Result<(), DmaError> {
        let done = self.upstream.write(&self.request(initiator, segments), from);
        done.inspect_err(|_| self.aborted.set(true))
    }

    /// As [`Bus::write`]; see [`Upstream::write_from`].
    fn write_from(
        &self,
        initiator: &dyn fmt::Display,
        segments: &[DmaSegment],
        from: &FileBytes<'_>,
    ) -> Option<Result<(), DmaError>> {
        let done = self.upstream.write_from(&self.request(initiator, segments), from)?;
        Some(done.inspect_err(|_| self.aborted.set(true)))
    }

    pub(crate) fn msi(&self, msi: lychgate_model::Msi) {
        self.upstream.msi(self.requester, msi.address, msi.data);
    }

    /// Whether a transfer was aborted since the last question.
    pub(crate) fn take_aborted(&self) -> bool {
        self.aborted.take()
    }

    fn request<'a>(
        &self,
        initiator: &'a dyn fmt::Display,
        segments: &'a [DmaSegment],
    ) -> DmaRequest<'a> {
        DmaRequest { requester: self.requester, pasid: None, segments, initiator }
    }
}

/// The data of the command at hand: where it lies in memory, and the buffers to move it, kept from
/// command to command.
#[derive(Default)]
pub(crate) struct Mover {
    segments: Vec<DmaSegment>,
    piece: Vec<DmaSegment>,
    list: Vec<u8>,
    bounce: Vec<u8>,
    compared: Vec<u8>,
}

/// A position in the segments.
#[derive(Default)]
struct Cursor {
    segment: usize,
    used: u64,
}

impl Cursor {
    /// Moves the next `len` bytes of `segments` to `piece`.
    fn take(&mut self, segments: &[DmaSegment], len: usize, piece: &mut Vec<DmaSegment>) {
        piece.clear();
        let mut left = len as u64;
        while left > 0
            && let Some(segment) = segments.get(self.segment)
        {
            let now = left.min(segment.len - self.used);
            piece.push(DmaSegment { start: segment.start.wrapping_add(self.used), len: now });
            left -= now;
            self.used += now;
            if self.used == segment.len {
                *self = Self { segment: self.segment + 1, used: 0 };
            }
        }
    }
}

impl Mover {
    /// Finds the `len` bytes (not 0) that PRP1 and PRP2 of `command` name, reading PRP lists.
    pub(crate) fn prepare(
        &mut self,
        bus: &Bus,
        command: CommandData<'_>,
        page: u64,
        len: u64,
    ) -> Result<(), Status> {
        self.segments.clear();
        let (prp1, prp2) = (command.sqe.prp1(), command.sqe.prp2());
        if prp1 & 3 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        let first = len.min(page - prp1 % page);
        self.push(prp1, first);
        let rest = len - first;
        match rest {
            0 => Ok(()),
            _ if rest <= page => self.push_page(prp2, page, rest),
            _ => self.walk(bus, command, page, prp2, rest),
        }
    }

    /// Follows the PRP list at `pointer`. In a list page that is too short for the entries that
    /// are left, the last slot points to the next list page (4.3).
    fn walk(
        &mut self,
        bus: &Bus,
        command: CommandData<'_>,
        page: u64,
        mut pointer: u64,
        mut rest: u64,
    ) -> Result<(), Status> {
        if pointer & 7 != 0 {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        let mut list = std::mem::take(&mut self.list);
        let walked = loop {
            let needed = rest.div_ceil(page);
            let slots = (page - pointer % page) / 8;
            let len = needed.min(slots) * 8;
            // A page holds at most 8192 entries, so the length fits.
            list.resize(usize::try_from(len).unwrap_or(0), 0);
            let run = [DmaSegment { start: Iova::new(pointer), len }];
            if bus.read(&PrpList(command), &run, &mut list).is_err() {
                break Err(Status::DATA_TRANSFER_ERROR);
            }
            let entries = list.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
            let data = if needed > slots { slots - 1 } else { needed };
            let mut entries = entries.fuse();
            let pushed = entries.by_ref().zip(0..data).try_for_each(|(entry, _)| {
                let now = rest.min(page);
                rest -= now;
                self.push_page(entry, page, now)
            });
            if pushed.is_err() || rest == 0 {
                break pushed;
            }
            match list.as_chunks::<8>().0.last().map(|bytes| u64::from_le_bytes(*bytes)) {
                Some(next) if next.is_multiple_of(page) => pointer = next,
                _ => break Err(Status::INVALID_PRP_OFFSET),
            }
        };
        self.list = list;
        walked
    }

    fn push_page(&mut self, entry: u64, page: u64, len: u64) -> Result<(), Status> {
        if !entry.is_multiple_of(page) {
            return Err(Status::INVALID_PRP_OFFSET);
        }
        self.push(entry, len);
        Ok(())
    }

    /// Appends a run; consecutive pages become one.
    fn push(&mut self, start: u64, len: u64) {
        if let Some(last) = self.segments.last_mut()
            && last.start.checked_add(last.len) == Some(Iova::new(start))
        {
            last.len += len;
        } else {
            self.segments.push(DmaSegment { start: Iova::new(start), len });
        }
    }

    /// Writes `bytes`, as many as were prepared, to memory.
    pub(crate) fn put(
        &self,
        bus: &Bus,
        command: CommandData<'_>,
        bytes: &[u8],
    ) -> Result<(), Status> {
        bus.write(&command, &self.segments, bytes).map_err(|_| Status::DATA_TRANSFER_ERROR)
    }

    /// Reads `bytes`, as many as were prepared, from memory.
    pub(crate) fn get(
        &self,
        bus: &Bus,
        command: CommandData<'_>,
        bytes: &mut [u8],
    ) -> Result<(), Status> {
        bus.read(&command, &self.segments, bytes).map_err(|_| Status::DATA_TRANSFER_ERROR)
    }

    /// Moves the `len` bytes that were prepared from `storage` to memory.
    pub(crate) fn read(
        &mut self,
        bus: &Bus,
        command: CommandData<'_>,
        storage: &dyn Storage,
        mut offset: u64,
        len: u64,
    ) -> Result<(), Status> {
        let Self { segments, piece, bounce, .. } = self;
        if let Ok(len) = usize::try_from(len)
            && len >= LEAST_DIRECT
            && let Some(bytes) = storage.file_bytes(offset, len)
            && let Some(sent) = bus.write_from(&command, segments, &bytes)
        {
            return sent.map_err(|_| Status::DATA_TRANSFER_ERROR);
        }
        let mut cursor = Cursor::default();
        let mut send = |bytes: &[u8]| {
            cursor.take(segments, bytes.len(), piece);
            bus.write(&command, piece, bytes).map_err(|_| Status::DATA_TRANSFER_ERROR)
        };
        let end = offset + len;
        while offset < end {
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let mut sent = Ok(());
            let moved = match storage.lend(offset, left, &mut |bytes| sent = send(bytes)) {
                Some(lent) => lent,
                None => {
                    let bytes = buffer(bounce, left);
                    storage.read_at(offset, bytes).map_err(|_| Status::UNRECOVERED_READ)?;
                    sent = send(bytes);
                    bytes.len()
                }
            };
            sent?;
            if moved == 0 {
                return Err(Status::UNRECOVERED_READ);
            }
            offset += moved as u64;
        }
        Ok(())
    }

    /// Moves the `len` bytes that were prepared from memory to `storage`.
    pub(crate) fn write(
        &mut self,
        bus: &Bus,
        command: CommandData<'_>,
        storage: &dyn Storage,
        mut offset: u64,
        len: u64,
    ) -> Result<(), Status> {
        let Self { segments, piece, bounce, .. } = self;
        let mut cursor = Cursor::default();
        let mut fetch = |bytes: &mut [u8]| {
            cursor.take(segments, bytes.len(), piece);
            bus.read(&command, piece, bytes).map_err(|_| Status::DATA_TRANSFER_ERROR)
        };
        let end = offset + len;
        while offset < end {
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let mut fetched = Ok(());
            let moved = match storage.lend_mut(offset, left, &mut |bytes| fetched = fetch(bytes)) {
                Some(lent) => lent,
                None => {
                    let bytes = buffer(bounce, left);
                    fetch(bytes)?;
                    storage.write_at(offset, bytes).map_err(|_| Status::WRITE_FAULT)?;
                    bytes.len()
                }
            };
            fetched?;
            if moved == 0 {
                return Err(Status::WRITE_FAULT);
            }
            offset += moved as u64;
        }
        Ok(())
    }

    /// Compares the `len` bytes that were prepared with those of `storage`.
    pub(crate) fn compare(
        &mut self,
        bus: &Bus,
        command: CommandData<'_>,
        storage: &dyn Storage,
        mut offset: u64,
        len: u64,
    ) -> Result<(), Status> {
        let mut cursor = Cursor::default();
        let end = offset + len;
        while offset < end {
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let host = buffer(&mut self.bounce, left);
            let here = buffer(&mut self.compared, left);
            cursor.take(&self.segments, host.len(), &mut self.piece);
            bus.read(&command, &self.piece, host).map_err(|_| Status::DATA_TRANSFER_ERROR)?;
            storage.read_at(offset, here).map_err(|_| Status::UNRECOVERED_READ)?;
            if host != here {
                return Err(Status::COMPARE_FAILURE);
            }
            offset += here.len() as u64;
        }
        Ok(())
    }
}

/// The first `len` bytes of a buffer of one piece, at most.
fn buffer(bytes: &mut Vec<u8>, len: usize) -> &mut [u8] {
    let len = len.min(PIECE);
    if bytes.len() < len {
        bytes.resize(PIECE, 0);
    }
    &mut bytes[..len]
}
