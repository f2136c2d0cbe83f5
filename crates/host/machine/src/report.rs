//! The fault report: what a device did that it may not, and who is to blame, for people.

use std::fmt::{self, Write};
use std::time::{Duration, Instant};

use lychgate_iommu::FaultReason;
use lychgate_model::Access;
use lychgate_types::{Bdf, Iova, Pasid, Prot};

use crate::journal::{Cause, History, Mapping};

/// Why a request did not pass.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// The IOMMU stopped it.
    Iommu(FaultReason),
    /// It is mapped, but the memory behind it does not answer: the program has unmapped it, truncated
    /// the file, or ended, without unmapping it for DMA.
    MemoryGone,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iommu(reason) => reason.fmt(f),
            Self::MemoryGone => f.write_str("mapped, but its memory is gone"),
        }
    }
}

/// One request that did not pass, with everything that is known of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FaultStory {
    /// Whose request it was.
    pub device: Bdf,
    /// What the device is, in a word.
    pub name: String,
    /// What it was doing; `None` when only the IOMMU's log tells of it.
    pub initiator: Option<String>,
    /// Whether it read or wrote.
    pub access: Access,
    /// First address that did not pass.
    pub iova: Iova,
    /// With which PASID.
    pub pasid: Option<Pasid>,
    /// Why it did not pass.
    pub reason: Reason,
    /// When.
    pub time: Instant,
    /// What was mapped there.
    pub history: History,
    /// The IOMMU's own record; `None` when it did not stop the request.
    pub raw: Option<[u64; 4]>,
}

/// Columns of the labels.
const LABEL: usize = 13;

impl FaultStory {
    /// The report: one line that says it all, then what is known, a line each. `colour` adds ANSI
    /// escapes.
    pub fn render(&self, colour: bool) -> String {
        let (bold, red, dim, off) =
            if colour { ("\x1b[1m", "\x1b[1;31m", "\x1b[2m", "\x1b[0m") } else { ("", "", "", "") };
        let verb = match self.access {
            Access::Read => "read",
            Access::Write => "write",
        };
        let mut text = format!(
            "{red}DMA fault:{off} {bold}{} ({}) could not {verb} {}: {}{off}\n",
            self.device, self.name, self.iova, self.reason
        );
        for (label, content) in self.lines() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {dim}{label:LABEL$}{off} {content}");
        }
        text
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = Vec::new();
        if let Some(initiator) = &self.initiator {
            lines.push(("device did", initiator.clone()));
        }
        if let Some(pasid) = self.pasid {
            lines.push(("PASID", format!("{:#x}", pasid.get())));
        }
        match &self.history.mapping {
            Some(mapping) => self.mapping_lines(mapping, &mut lines),
            None => self.neighbour_lines(&mut lines),
        }
        if let Some(raw) = self.raw {
            let used = raw.iter().rposition(|word| *word != 0).map_or(1, |last| last + 1).max(2);
            let words = raw.iter().take(used).map(|word| format!("{word:#018x}"));
            lines.push(("event", words.collect::<Vec<_>>().join(" ")));
        }
        lines
    }

    fn mapping_lines(&self, mapping: &Mapping, lines: &mut Vec<(&'static str, String)>) {
        let state = if mapping.unmapped.is_some() { "was mapped" } else { "is mapped" };
        let range = range(mapping);
        lines.push((
            state,
            format!("{range} {}, {}", rights(mapping.prot), self.cause(&mapping.mapped)),
        ));
        if let Some(unmapped) = &mapping.unmapped {
            lines.push(("unmapped", self.cause(unmapped)));
        }
    }

    fn neighbour_lines(&self, lines: &mut Vec<(&'static str, String)>) {
        if !self.history.attached {
            lines.push(("attached to", "nothing".to_owned()));
        }
        let (below, above) = (&self.history.below, &self.history.above);
        if self.history.attached && below.is_none() && above.is_none() {
            lines.push(("mapped", "nothing, for this device".to_owned()));
        }
        if let Some(below) = below {
            let gap = self.iova.get().saturating_sub(below.last().get()).saturating_sub(1);
            let distance = match gap {
                0 => "ends just before".to_owned(),
                gap => format!("ends {gap:#x} bytes before"),
            };
            lines.push((
                "next below",
                format!("{} {distance}, {}", range(below), self.cause(&below.mapped)),
            ));
        }
        if let Some(above) = above {
            let gap = above.iova.get().saturating_sub(self.iova.get());
            let distance = format!("starts {gap:#x} bytes behind");
            lines.push((
                "next above",
                format!("{} {distance}, {}", range(above), self.cause(&above.mapped)),
            ));
        }
    }

    fn cause(&self, cause: &Cause) -> String {
        let when = match self.time.checked_duration_since(cause.time) {
            Some(before) => format!("{} before", Span(before)),
            None => format!("{} later", Span(cause.time.duration_since(self.time))),
        };
        let Some(call) = &cause.call else { return format!("{when}, by no call") };
        let thread = match call.thread {
            main if main == call.process => String::new(),
            thread => format!(", thread {thread}"),
        };
        let (name, number, process) = (&call.name, call.number, call.process);
        match &cause.place {
            Some(place) => {
                format!("{when} by {name} at {place} (call {number}, process {process}{thread})")
            }
            None => format!(
                "{when} by {name} (call {number}, process {process}{thread}, at {:#x})",
                call.instruction
            ),
        }
    }
}

impl fmt::Display for FaultStory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

fn range(mapping: &Mapping) -> String {
    format!("{}-{}", mapping.iova, mapping.last())
}

fn rights(prot: Prot) -> &'static str {
    match (prot.contains(Prot::READ), prot.contains(Prot::WRITE)) {
        (true, true) => "read-write",
        (true, false) => "read-only",
        (false, true) => "write-only",
        (false, false) => "without any right",
    }
}

/// A time span with three digits or more.
struct Span(Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanoseconds = self.0.as_nanos();
        match nanoseconds {
            0..1_000 => write!(f, "{nanoseconds} ns"),
            1_000..1_000_000 => write!(f, "{}.{} us", nanoseconds / 1_000, nanoseconds / 100 % 10),
            1_000_000..1_000_000_000 => {
                write!(f, "{}.{} ms", nanoseconds / 1_000_000, nanoseconds / 100_000 % 10)
            }
            _ => write!(f, "{}.{} s", nanoseconds / 1_000_000_000, nanoseconds / 100_000_000 % 10),
        }
    }
}

#[cfg(test)]
mod tests;
