//! Whether a copy and the tables differ in a way that a request could notice, and which rule that
//! breaks.

use std::fmt;

use lychgate_model::{Rule, Span};
use lychgate_types::PhysAddr;

use super::super::AmdVi;
use super::super::cached::{Allowed, CachedIrte, Directory, Leaf};
use super::resolve::End;
use super::rules;
use crate::spec::Dte;
use crate::spec::dte::HAD_ACCESS_DIRTY;

/// Most pages of one copy that are compared; beyond that only its first and last.
const MOST_PAGES: usize = 4096;

/// A difference.
#[derive(Debug)]
pub(super) struct Difference {
    pub(super) rule: &'static Rule,
    pub(super) cached: String,
    pub(super) now: String,
}

impl Difference {
    fn new(rule: &'static Rule, cached: impl fmt::Display, now: impl fmt::Display) -> Self {
        Self { rule, cached: cached.to_string(), now: now.to_string() }
    }
}

impl AmdVi {
    /// Compares a copied translation with the tables of `dte`.
    pub(super) fn compare_leaf(&self, dte: Dte, span: Span, leaf: Leaf) -> Option<Difference> {
        let mut at = span.start;
        for _ in 0..MOST_PAGES {
            let (end, difference) = self.compare_page(dte, span, leaf, at);
            if difference.is_some() {
                return difference;
            }
            at = end.checked_add(1).filter(|next| *next <= span.last())?;
        }
        self.compare_page(dte, span, leaf, span.last()).1
    }

    /// Compares one page, the one of `at`, of a copied translation. Gives its last address.
    pub(super) fn compare_page(
        &self,
        dte: Dte,
        span: Span,
        leaf: Leaf,
        at: u64,
    ) -> (u64, Option<Difference>) {
        let frame = leaf.page.wrapping_add(at - span.start);
        let cached = Page { frame, allowed: leaf.allowed, dirty: leaf.dirty };
        let (now_span, now) = match self.resolve(dte, at).end {
            End::Page(span, now) => (span, now),
            End::NotPresent => {
                return (at, Some(Difference::new(&rules::UNMAP, cached, "nothing is mapped")));
            }
            End::Malformed => {
                return (at, Some(Difference::new(&rules::MALFORMED, cached, "a malformed entry")));
            }
            End::OutOfReach => {
                let now = "the address is beyond the reach of the tables";
                return (at, Some(Difference::new(&rules::DEVICE_ENTRY, cached, now)));
            }
        };
        let page = Page {
            frame: now.page.wrapping_add(at - now_span.start),
            allowed: now.allowed,
            dirty: now.dirty,
        };
        let rule = if page.frame != cached.frame {
            Some(&rules::REMAP)
        } else if let Some(rule) = permissions(leaf.allowed, now.allowed) {
            Some(rule)
        } else if leaf.dirty && !now.dirty && dte.had() == HAD_ACCESS_DIRTY {
            Some(&rules::DIRTY_CLEARED)
        } else {
            None
        };
        (now_span.last(), rule.map(|rule| Difference::new(rule, cached, page)))
    }

    /// Compares a copied directory entry with the tables of `dte`.
    pub(super) fn compare_directory(
        &self,
        dte: Dte,
        span: Span,
        cached: Directory,
    ) -> Option<Difference> {
        let resolved = self.resolve(dte, span.start);
        let there = resolved.tables.iter().find(|table| table.level == cached.level);
        if let Some(now) = there {
            let rule = if now.table == cached.table {
                permissions(cached.allowed, now.allowed)?
            } else {
                &rules::TABLE_FREED
            };
            return Some(Difference::new(rule, cached, now));
        }
        Some(match resolved.end {
            End::Page(_, leaf) => {
                let page = Page { frame: leaf.page, allowed: leaf.allowed, dirty: leaf.dirty };
                Difference::new(&rules::TABLE_REPLACED_BY_PAGE, cached, page)
            }
            End::NotPresent => Difference::new(&rules::TABLE_FREED, cached, "no table"),
            End::Malformed => Difference::new(&rules::TABLE_FREED, cached, "a malformed entry"),
            End::OutOfReach => Difference::new(
                &rules::DEVICE_ENTRY,
                cached,
                "the address is beyond the reach of the tables",
            ),
        })
    }
}

/// Compares a copied device table entry with the one in memory.
pub(super) fn compare_device(cached: Dte, now: Dte) -> Option<Difference> {
    if cached.v() != now.v() {
        let rule = if now.v() { &rules::FIRST_ATTACH } else { &rules::DEVICE_ENTRY };
        return Some(Difference::new(rule, Entry(cached), Entry(now)));
    }
    // With V = 0 nothing else of the translation half counts.
    let translation = [cached, now].map(|dte| (dte.0[0], dte.0[1]));
    if cached.v() && translation[0] != translation[1] {
        return Some(Difference::new(&rules::DEVICE_ENTRY, Entry(cached), Entry(now)));
    }
    let interrupts = [cached, now].map(|dte| if dte.iv() { (dte.0[2], dte.0[3]) } else { (0, 0) });
    if interrupts[0] != interrupts[1] {
        let [cached, now] = [cached, now].map(Interrupts);
        return Some(Difference::new(&rules::DEVICE_ENTRY_INTERRUPTS, cached, now));
    }
    None
}

/// Compares a copied interrupt entry with the one in memory.
pub(super) fn compare_interrupt(cached: CachedIrte, now: CachedIrte) -> Option<Difference> {
    let same = match (cached, now) {
        (CachedIrte::Short(cached), CachedIrte::Short(now)) => cached == now,
        // Software may change these three without a command (2.2.5).
        (CachedIrte::Long(cached), CachedIrte::Long(now)) => {
            let bare = |irte: crate::spec::Irte128| {
                irte.with_destination_low(0).with_destination_high(0).with_ga_tag(0)
            };
            bare(cached) == bare(now)
        }
        // Control.GAEn changed.
        _ => return None,
    };
    (!same).then(|| {
        let [cached, now] = [cached, now].map(Irte);
        Difference::new(&rules::INTERRUPT_ENTRY, cached, now)
    })
}

fn permissions(cached: Allowed, now: Allowed) -> Option<&'static Rule> {
    if cached.read && !now.read || cached.write && !now.write {
        Some(&rules::PERMISSION_TAKEN)
    } else if cached != now {
        Some(&rules::PERMISSION_GIVEN)
    } else {
        None
    }
}

struct Page {
    frame: PhysAddr,
    allowed: Allowed,
    dirty: bool,
}

impl fmt::Display for Page {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame {} {}", self.frame, self.allowed)?;
        if self.dirty { f.write_str(" dirty") } else { Ok(()) }
    }
}

impl fmt::Display for Allowed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.read, self.write) {
            (true, true) => "read-write",
            (true, false) => "read-only",
            (false, true) => "write-only",
            (false, false) => "no access",
        })
    }
}

impl fmt::Display for Directory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a level {} table at {} {}", self.level, self.table, self.allowed)
    }
}

struct Entry(Dte);

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dte = self.0;
        if !dte.v() {
            return f.write_str("V=0, everything passes");
        }
        if !dte.tv() {
            return f.write_str("TV=0, everything is aborted");
        }
        let allowed = Allowed { read: dte.ir(), write: dte.iw() };
        let domain = dte.domain_id();
        match dte.mode() {
            0 => write!(f, "domain {domain}, untranslated, {allowed}"),
            mode => write!(f, "domain {domain}, {mode} levels from {}, {allowed}", dte.host_root()),
        }
    }
}

struct Interrupts(Dte);

impl fmt::Display for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let dte = self.0;
        if !dte.iv() {
            return f.write_str("IV=0, interrupts pass");
        }
        let entries = 1u32 << dte.int_tab_len();
        write!(f, "{entries} interrupt entries at {}", dte.int_table_root())?;
        write!(f, ", IntCtl={}", dte.int_ctl())
    }
}

struct Irte(CachedIrte);

impl fmt::Display for Irte {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (enabled, vector) = match self.0 {
            CachedIrte::Short(irte) => (irte.remap_en(), irte.vector()),
            CachedIrte::Long(irte) => (irte.remap_en(), irte.vector()),
        };
        if enabled { write!(f, "vector {vector:#x}") } else { f.write_str("RemapEn=0") }
    }
}
