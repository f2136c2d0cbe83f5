//! Moving bytes between a buffer and runs of physical memory.

use std::ops::Range;
use std::sync::Arc;

use lychgate_model::FileBytes;
use lychgate_types::{BusError, PhysAddr, PhysRun};

use super::frames::{Backing, Chunk, Frames};
use super::layout::CHUNK;
use super::ram::Ram;
use super::space::Space;
use crate::client::Span;
use crate::mapped::{self, Mapping};

/// A part of a transfer that is reached in one way.
struct Piece {
    at: PhysAddr,
    place: Place,
    /// Which bytes of the buffer.
    bytes: Range<usize>,
}

enum Place {
    /// An offset into RAM.
    Ram(usize),
    /// An offset into a chunk.
    Chunk(Arc<Chunk>, u64),
}

impl Piece {
    /// The space of private memory.
    fn space(&self) -> Option<&Arc<Space>> {
        match &self.place {
            Place::Chunk(chunk, _) => match chunk.backing() {
                Backing::Private(space) => Some(space),
                Backing::File(_) => None,
            },
            Place::Ram(_) => None,
        }
    }

    /// The virtual address of private memory.
    fn span(&self) -> Option<Span> {
        let Place::Chunk(chunk, offset) = &self.place else { return None };
        let start = chunk.index().checked_mul(CHUNK)?.checked_add(*offset)?;
        Some(Span { start, len: self.bytes.len() })
    }
}

/// The memory that runs may lie in.
#[derive(Clone, Copy)]
pub(super) struct Reach<'a> {
    /// The machine's own; `None` for runs of frames alone.
    pub(super) ram: Option<&'a Ram>,
    pub(super) frames: &'a Frames,
}

impl Reach<'_> {
    fn ram_bytes(&self) -> Option<&Mapping> {
        self.ram.map(Ram::bytes)
    }
}

/// Fills `to` from `runs`.
pub(super) fn read(memory: Reach<'_>, runs: &[PhysRun], to: &mut [u8]) -> Result<(), BusError> {
    let pieces = pieces(memory, runs, to.len())?;
    for group in pieces.chunk_by(same_space) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
        let error = BusError { at: first.at };
        let bytes = to.get_mut(first.bytes.start..last.bytes.end).ok_or(error)?;
        let done = match (&first.place, first.space()) {
            (_, Some(space)) => space.access().read(&spans(group), bytes).ok(),
            (Place::Ram(offset), _) => memory.ram_bytes().and_then(|ram| ram.read(*offset, bytes)),
            (Place::Chunk(chunk, offset), _) => match chunk.backing() {
                Backing::File(file) => file.read(chunk.mapping(), chunk.index(), *offset, bytes),
                Backing::Private(_) => None,
            },
        };
        done.ok_or(error)?;
    }
    Ok(())
}

/// Stores `from` to `runs`.
pub(super) fn write(memory: Reach<'_>, runs: &[PhysRun], from: &[u8]) -> Result<(), BusError> {
    let pieces = pieces(memory, runs, from.len())?;
    for group in pieces.chunk_by(same_space) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
        let error = BusError { at: first.at };
        let bytes = from.get(first.bytes.start..last.bytes.end).ok_or(error)?;
        let done = match (&first.place, first.space()) {
            (_, Some(space)) => space.access().write(&spans(group), bytes).ok(),
            (Place::Ram(offset), _) => memory.ram_bytes().and_then(|ram| ram.write(*offset, bytes)),
            (Place::Chunk(chunk, offset), _) => match chunk.backing() {
                Backing::File(file) => file.write(chunk.mapping(), chunk.index(), *offset, bytes),
                Backing::Private(_) => None,
            },
        };
        done.ok_or(error)?;
    }
    Ok(())
}

/// Stores bytes of a file to `runs`.
pub(super) fn write_from(
    memory: Reach<'_>,
    runs: &[PhysRun],
    from: &FileBytes<'_>,
) -> Result<(), BusError> {
    let pieces = pieces(memory, runs, from.len)?;
    for group in pieces.chunk_by(same_space) {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { continue };
        let part = first.bytes.start..last.bytes.end;
        let done = file_part(from, part).and_then(|from| match (&first.place, first.space()) {
            (_, Some(space)) => mapped::send(space.access().number()?, from.mapped, &spans(group)),
            (Place::Ram(offset), _) => memory.ram_bytes()?.write_from(*offset, &from),
            (Place::Chunk(chunk, offset), _) => match chunk.backing() {
                Backing::File(file) => {
                    file.write_from(chunk.mapping(), chunk.index(), *offset, &from)
                }
                Backing::Private(_) => None,
            },
        });
        done.ok_or(BusError { at: first.at })?;
    }
    Ok(())
}

fn file_part<'a>(whole: &FileBytes<'a>, part: Range<usize>) -> Option<FileBytes<'a>> {
    Some(FileBytes {
        offset: whole.offset.checked_add(part.start as u64)?,
        mapped: whole.mapped.checked_add(part.start)?,
        len: part.len(),
        ..*whole
    })
}

/// Cuts runs where the way to the bytes changes. The lengths must add up to `len`.
fn pieces(memory: Reach<'_>, runs: &[PhysRun], len: usize) -> Result<Vec<Piece>, BusError> {
    let mut pieces = Vec::with_capacity(runs.len());
    let mut done = 0_usize;
    for run in runs {
        let (mut at, mut left) = (run.start, run.len);
        while left > 0 {
            let error = BusError { at };
            let (place, part) = match memory.ram.and_then(|ram| ram.offset(at)) {
                Some(offset) => (Place::Ram(offset), left),
                None => {
                    let (chunk, offset) = memory.frames.locate(at).ok_or(error)?;
                    let part = memory.frames.run_len(offset).min(left);
                    (Place::Chunk(chunk, offset), part)
                }
            };
            let count = usize::try_from(part).map_err(|_| error)?;
            let end = done.checked_add(count).filter(|end| *end <= len).ok_or(error)?;
            pieces.push(Piece { at, place, bytes: done..end });
            done = end;
            at = at.wrapping_add(part);
            left -= part;
        }
    }
    match runs.first() {
        Some(run) if done < len => Err(BusError { at: run.start }),
        None if len > 0 => Err(BusError { at: PhysAddr::new(0) }),
        _ => Ok(pieces),
    }
}

/// Whether both are private memory of one process, to be moved by one call.
fn same_space(a: &Piece, b: &Piece) -> bool {
    matches!((a.space(), b.space()), (Some(a), Some(b)) if Arc::ptr_eq(a, b))
}

/// The spans of a group, merged where they touch.
fn spans(group: &[Piece]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::with_capacity(group.len());
    for span in group.iter().filter_map(Piece::span) {
        match spans.last_mut() {
            Some(last) if last.start + last.len as u64 == span.start => last.len += span.len,
            _ => spans.push(span),
        }
    }
    spans
}
