//! A stale copy, for people.

use std::fmt::Write;

use lychgate_model::{CacheKind, Finding};
use lychgate_types::{Bdf, Iova};

use crate::journal::{Cause, History};

/// A copy in the IOMMU that its tables contradict, with everything that is known of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StaleStory {
    /// A device whose requests get it.
    pub device: Bdf,
    /// What the device is, in a word.
    pub name: String,
    /// What the checker found.
    pub finding: Finding,
    /// What is and was mapped there.
    pub history: History,
    /// After which call it was found.
    pub after: Cause,
}

/// Columns of the labels.
const LABEL: usize = 13;

impl StaleStory {
    /// The report: one line that says it all, then what is known, a line each. `colour` adds ANSI
    /// escapes.
    pub fn render(&self, colour: bool) -> String {
        let (bold, red, dim, off) =
            if colour { ("\x1b[1m", "\x1b[1;31m", "\x1b[2m", "\x1b[0m") } else { ("", "", "", "") };
        let mut text = format!(
            "{red}stale {}:{off} {bold}{} ({}) still gets {}, the tables say {}{off}\n",
            self.finding.kind, self.device, self.name, self.finding.cached, self.finding.now
        );
        for (label, content) in self.lines() {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {dim}{label:LABEL$}{off} {content}");
        }
        text
    }

    fn lines(&self) -> Vec<(&'static str, String)> {
        let finding = &self.finding;
        let mut lines = Vec::new();
        let (first, last) = (Iova::new(finding.span.start), Iova::new(finding.span.last()));
        match finding.kind {
            CacheKind::Leaf | CacheKind::Directory => {
                let domain = finding.domain.map_or(String::new(), |id| format!(" of domain {id}"));
                lines.push(("covers", format!("{first}-{last}{domain}")));
            }
            CacheKind::Interrupt => lines.push(("covers", format!("interrupt {}", first.get()))),
            CacheKind::Device => {}
        }
        if let Some(used) = &finding.used {
            let times = match used.times {
                1 => "once".to_owned(),
                times => format!("{times} times"),
            };
            lines.push(("used", format!("{times} since, first for {}", used.at)));
        }
        for word in &finding.words {
            let now = word.now.map_or("gone".to_owned(), |now| format!("{now:#018x}"));
            lines.push(("changed", format!("{} was {:#018x}, is {now}", word.at, word.then)));
        }
        if let Some(call) = &self.after.call {
            let place =
                self.after.place.as_ref().map_or(String::new(), |place| format!(" at {place}"));
            lines.push(("after", format!("{}{place} (call {})", call.name, call.number)));
        }
        let rule = finding.rule;
        lines.push(("rule", format!("when {}: {}", rule.change, rule.needs)));
        lines.push(("else", rule.consequence.to_owned()));
        let certainty = if rule.is_strict() { "" } else { ", which software may live with" };
        lines.push(("see", format!("{} ({}{certainty})", rule.section, rule.id)));
        lines
    }
}
