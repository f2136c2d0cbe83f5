//! The host page tables (AMD 48882 2.2.3).

use lychgate_model::{CacheKind, FaultCause, Span};
use lychgate_types::PhysAddr;

use super::cached::{Allowed, Directory, Leaf};
use super::fault::{Fault, Flags};
use super::runs::Runs;
use super::{AmdVi, Requested};
use crate::spec::dte::HAD_ACCESS_DIRTY;
use crate::spec::host_page_table::{
    ENTRIES, NEXT_LEVEL_PAGE, NEXT_LEVEL_SIZED_PAGE, PDE_RESERVED, PTE_RESERVED, level_shift, reach,
};
use crate::spec::{Dte, Entry};

/// Levels, at most.
pub(super) const LEVELS: usize = 6;

/// How often a walk starts again because an entry changed under it.
const RETRIES: usize = 8;

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

/// A walk that came to a page.
struct Found {
    span: Span,
    leaf: Leaf,
    /// The entries that were read, the page's last.
    path: Path,
}

/// The entries that a walk read, in order.
#[derive(Clone, Copy, Default)]
pub(super) struct Path {
    steps: [Step; LEVELS],
    len: usize,
}

/// One entry as it was read.
#[derive(Clone, Copy, Default)]
pub(super) struct Step {
    pub(super) at: u64,
    pub(super) word: u64,
}

impl Path {
    pub(super) fn push(&mut self, step: Step) {
        if let Some(free) = self.steps.get_mut(self.len) {
            *free = step;
            self.len += 1;
        }
    }

    pub(super) fn steps(&self) -> &[Step] {
        self.steps.get(..self.len).unwrap_or(&[])
    }
}

/// An entry changed between its read and the update of its access bits.
struct Changed;

impl AmdVi {
    /// Appends the physical memory of `at..=last`, from the cache or from the tables, if the
    /// request may have it.
    pub(super) fn pages(
        &self,
        dte: Dte,
        requested: Requested,
        mut at: u64,
        last: u64,
        runs: &mut Runs,
    ) -> Result<(), Fault> {
        let track_dirty = requested.write && dte.had() == HAD_ACCESS_DIRTY;
        loop {
            let mut refused = false;
            let rest = self.caches.leaves.visit(domain(dte), at, last, |span, leaf| {
                refused = !leaf.allowed.permits(requested.write);
                // A write to a page that is clean must go by the tables and set D.
                let usable = !refused && (leaf.dirty || !track_dirty);
                if usable {
                    self.note_use(dte, (requested.requester, requested.write), span, *leaf, at);
                    at = runs.push_page(span, leaf.page, at, last);
                }
                usable
            });
            let Some(missing) = rest else { return Ok(()) };
            if refused {
                return Err(denied(dte, requested, missing));
            }
            let (span, page) = self.page(dte, requested, missing, track_dirty)?;
            if span.last() >= last {
                runs.push_page(span, page, missing, last);
                return Ok(());
            }
            at = runs.push_page(span, page, missing, last);
        }
    }

    /// The page of `at` and where it is, from the tables, if the request may have it.
    fn page(
        &self,
        dte: Dte,
        requested: Requested,
        at: u64,
        track_dirty: bool,
    ) -> Result<(Span, PhysAddr), Fault> {
        let mut tries = 0;
        loop {
            let mut found = self.walk(dte, requested, at)?;
            let permitted = found.leaf.allowed.permits(requested.write);
            if permitted && dte.had() != 0 {
                tries += 1;
                match self.mark(&mut found, track_dirty) {
                    Ok(Ok(())) => {}
                    Ok(Err(Changed)) if tries < RETRIES => continue,
                    // Software rewrites the entry without end: any of its values will do.
                    Ok(Err(Changed)) => {}
                    Err(table) => return Err(Fault::table(requested, dte, at, table)),
                }
            }
            self.caches.leaves.insert(domain(dte), found.span, found.leaf);
            let requester = requested.requester;
            self.note_fill(CacheKind::Leaf, requester, dte, found.span, &found.path);
            self.fetch_beside(requester, dte, at);
            if !permitted {
                return Err(denied(dte, requested, at));
            }
            return Ok((found.span, found.leaf.page));
        }
    }

    /// Walks from the deepest directory that is cached, or else from the root.
    fn walk(&self, dte: Dte, requested: Requested, at: u64) -> Result<Found, Fault> {
        let fault = |cause, flags| Fault::page(requested, Some(dte), at, cause, flags);
        let levels = u32::try_from(dte.mode()).unwrap_or(0);
        if at.checked_shr(reach(levels)).unwrap_or(0) != 0 {
            return Err(fault(FaultCause::OutOfReach, Flags::NONE));
        }
        let root = Directory {
            table: dte.host_root(),
            level: levels,
            allowed: Allowed { read: dte.ir(), write: dte.iw() },
        };
        let cached = self.caches.directories.lookup(domain(dte), at);
        let mut directory = cached.map_or(root, |(_, directory)| directory);
        let mut path = Path::default();
        loop {
            let level = directory.level;
            let index = at >> level_shift(level) & (ENTRIES - 1);
            let entry_at = directory.table.wrapping_add(index * 8);
            let word = self
                .memory
                .load_u64(entry_at)
                .map_err(|error| Fault::table(requested, dte, at, error.at))?;
            path.push(Step { at: entry_at.get(), word });
            let entry = Entry([word]);
            if !entry.pr() {
                return Err(fault(FaultCause::NotPresent, Flags::NONE));
            }
            let allowed = directory.allowed.and(entry.ir(), entry.iw());
            let next = match entry.next_level() {
                NEXT_LEVEL_PAGE | NEXT_LEVEL_SIZED_PAGE => {
                    if word & PTE_RESERVED != 0 {
                        return Err(fault(FaultCause::ReservedBits, Flags::RESERVED));
                    }
                    let Some((span, page)) = page_of(entry, level, at) else {
                        return Err(fault(FaultCause::BadEntry, Flags::BAD));
                    };
                    let leaf = Leaf { page, allowed, dirty: entry.d() };
                    return Ok(Found { span, leaf, path });
                }
                next => u32::try_from(next).unwrap_or(0),
            };
            if word & PDE_RESERVED != 0 {
                return Err(fault(FaultCause::ReservedBits, Flags::RESERVED));
            }
            if next >= level || skipped(at, level, next) != 0 {
                return Err(fault(FaultCause::BadEntry, Flags::BAD));
            }
            directory = Directory { table: entry.address(), level: next, allowed };
            let span = Span::around(at, order(reach(next)));
            self.caches.directories.insert(domain(dte), span, directory);
            self.note_fill(CacheKind::Directory, requested.requester, dte, span, &path);
        }
    }

    /// Sets A in every entry of the walk, and D in the page's if `dirty`; `Err` where memory does
    /// not answer.
    fn mark(&self, found: &mut Found, dirty: bool) -> Result<Result<(), Changed>, PhysAddr> {
        let Some((leaf, above)) = found.path.steps().split_last() else {
            return Ok(Ok(()));
        };
        let bits = if dirty { ACCESSED | DIRTY } else { ACCESSED };
        for (step, bits) in above.iter().map(|step| (step, ACCESSED)).chain([(leaf, bits)]) {
            if step.word & bits == bits {
                continue;
            }
            let before =
                self.memory.fetch_or_u64(PhysAddr::new(step.at), bits).map_err(|error| error.at)?;
            if (before ^ step.word) & !(ACCESSED | DIRTY) != 0 {
                return Ok(Err(Changed));
            }
        }
        found.leaf.dirty |= dirty;
        Ok(Ok(()))
    }
}

/// The page that an entry of `level` names for `at`: the addresses it covers, and where it is.
/// `None` for a size that the level cannot have.
pub(super) fn page_of(entry: Entry, level: u32, at: u64) -> Option<(Span, PhysAddr)> {
    let smallest = level_shift(level);
    // No page is as large as what an entry of level 6 covers.
    if level >= 6 {
        return None;
    }
    if entry.next_level() == NEXT_LEVEL_PAGE {
        let page = entry.address().align_down(1 << smallest);
        return Some((Span::around(at, order(smallest)), page));
    }
    let block = entry.sized_page();
    let fits = smallest < block.order && block.order < level_shift(level + 1);
    fits.then(|| (Span::around(at, order(block.order)), PhysAddr::new(block.start)))
}

/// The bits of `at` that belong to levels between `level` and `next`.
pub(super) fn skipped(at: u64, level: u32, next: u32) -> u64 {
    let below = reach(next).min(63);
    let above = level_shift(level);
    let bits = (1u64 << above.min(63)) - (1 << below.min(above));
    at & bits
}

fn order(bits: u32) -> u8 {
    u8::try_from(bits).unwrap_or(64)
}

fn domain(dte: Dte) -> u16 {
    (dte.domain_id() & 0xffff) as u16
}

fn denied(dte: Dte, requested: Requested, at: u64) -> Fault {
    Fault::page(requested, Some(dte), at, FaultCause::Permission, Flags::PERMISSION)
}
