//! What the tables say now, read without the caches.

use lychgate_model::Span;
use lychgate_types::PhysAddr;

use super::super::AmdVi;
use super::super::cached::{Allowed, Directory, Leaf};
use super::super::walk::{LEVELS, Path, Step, page_of, skipped};
use crate::spec::host_page_table::{
    ENTRIES, NEXT_LEVEL_PAGE, NEXT_LEVEL_SIZED_PAGE, PDE_RESERVED, PTE_RESERVED, level_shift, reach,
};
use crate::spec::{Dte, Entry};

/// Where a walk from the root came.
pub(super) struct Resolved {
    /// The tables on the way, from the one below the root on.
    pub(super) tables: Vec<Directory>,
    /// What was at its end.
    pub(super) end: End,
    /// The entries that were read.
    pub(super) path: Path,
}

/// The end of a walk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum End {
    /// A page.
    Page(Span, Leaf),
    /// An entry that is not present.
    NotPresent,
    /// An entry that no walk passes, or memory that does not answer.
    Malformed,
    /// The address lies beyond what the root reaches.
    OutOfReach,
}

impl AmdVi {
    /// Walks from the root that `dte` names to the page of `at`.
    pub(super) fn resolve(&self, dte: Dte, at: u64) -> Resolved {
        let levels = u32::try_from(dte.mode()).unwrap_or(0);
        let mut resolved =
            Resolved { tables: Vec::new(), end: End::OutOfReach, path: Path::default() };
        if at.checked_shr(reach(levels)).unwrap_or(0) != 0 {
            return resolved;
        }
        let mut directory = Directory {
            table: dte.host_root(),
            level: levels,
            allowed: Allowed { read: dte.ir(), write: dte.iw() },
        };
        for _ in 0..LEVELS {
            let level = directory.level;
            let index = at >> level_shift(level) & (ENTRIES - 1);
            let entry_at = directory.table.wrapping_add(index * 8);
            resolved.end = End::Malformed;
            let Ok(word) = self.memory.load_u64(entry_at) else { return resolved };
            resolved.path.push(Step { at: entry_at.get(), word });
            let entry = Entry([word]);
            if !entry.pr() {
                resolved.end = End::NotPresent;
                return resolved;
            }
            let allowed = directory.allowed.and(entry.ir(), entry.iw());
            let next = match entry.next_level() {
                NEXT_LEVEL_PAGE | NEXT_LEVEL_SIZED_PAGE => {
                    if word & PTE_RESERVED == 0
                        && let Some((span, page)) = page_of(entry, level, at)
                    {
                        let leaf = Leaf { page, allowed, dirty: entry.d() };
                        resolved.end = End::Page(span, leaf);
                    }
                    return resolved;
                }
                next => u32::try_from(next).unwrap_or(0),
            };
            if word & PDE_RESERVED != 0 || next >= level || skipped(at, level, next) != 0 {
                return resolved;
            }
            directory = Directory { table: entry.address(), level: next, allowed };
            resolved.tables.push(directory);
        }
        resolved
    }

    /// The word at `at` now; `None` where no memory answers.
    pub(super) fn word(&self, at: u64) -> Option<u64> {
        self.memory.load_u64(PhysAddr::new(at)).ok()
    }
}
