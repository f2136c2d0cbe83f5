//! Memory that areas map, and which of it is pinned (`struct iopt_pages`).
//!
//! Several areas may map the same memory, in one IOAS or several. A page is pinned and counted once
//! however many of them use it, from the first use to the end of the last.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_types::{Errno, PhysAddr, PhysRun};

use crate::error::{Refusal, Result, refuse};
use crate::mm::{Accounting, Mm, PAGE_SIZE, PinSource};

/// Whose pins these are.
#[derive(Clone)]
pub(crate) struct Account {
    /// Who pays.
    pub(crate) mm: Arc<dyn Mm>,
    /// Against which limit.
    pub(crate) mode: Accounting,
    /// The limit in bytes.
    pub(crate) limit: u64,
}

/// A range of an address space or of a file.
pub(crate) struct Pages {
    source: Arc<dyn PinSource>,
    /// Position of the first page in the source, a multiple of the page size.
    base: u64,
    writable: bool,
    is_file: bool,
    pins: Mutex<Pins>,
}

struct Pins {
    account: Account,
    /// Pinned pages: by the number of the first one, runs of pages with the same users.
    segments: BTreeMap<u64, Segment>,
    pinned: u64,
}

struct Segment {
    pages: u64,
    users: u32,
    runs: Vec<PhysRun>,
}

impl Pages {
    /// Memory of `source` from the page at `base`. Nothing is pinned yet.
    pub(crate) fn new(
        source: Arc<dyn PinSource>,
        base: u64,
        writable: bool,
        is_file: bool,
        account: Account,
    ) -> Arc<Self> {
        let pins = Mutex::new(Pins { account, segments: BTreeMap::new(), pinned: 0 });
        Arc::new(Self { source, base, writable, is_file, pins })
    }

    /// Whether devices may write.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// Whether it is a range of a file rather than of an address space.
    pub(crate) fn is_file(&self) -> bool {
        self.is_file
    }

    /// Where byte `start` lies in the source.
    pub(crate) fn position(&self, start: u64) -> u64 {
        self.base.wrapping_add(start)
    }

    /// Adds a user to `len` bytes from byte `start`, pins pages that had none, and gives the
    /// frames of exactly these bytes. On an error nothing changes.
    pub(crate) fn acquire(&self, start: u64, len: u64) -> Result<Vec<PhysRun>> {
        let (first, end) = page_span(start, len)?;
        let mut pins = self.lock();
        pins.split_at(first);
        pins.split_at(end);
        let added = self.pin_gaps(&mut pins, first, end)?;
        let account = pins.account.clone();
        if added > 0
            && let Err(errno) = account.mm.charge(added, account.mode, account.limit)
        {
            self.unpin_unused(&mut pins, first, end);
            return Err(Refusal::new(errno, "pinned memory would pass RLIMIT_MEMLOCK"));
        }
        pins.pinned += added;
        let mut runs = Vec::new();
        for segment in pins.segments.range_mut(first..end).map(|(_, segment)| segment) {
            segment.users = segment.users.saturating_add(1);
            append(&mut runs, &segment.runs);
        }
        Ok(trim(runs, start % PAGE_SIZE, len))
    }

    /// The frames of `len` bytes from byte `start`, which have a user.
    pub(crate) fn runs(&self, start: u64, len: u64) -> Result<Vec<PhysRun>> {
        let (first, end) = page_span(start, len)?;
        let mut pins = self.lock();
        pins.split_at(first);
        pins.split_at(end);
        let mut runs = Vec::new();
        for segment in pins.segments.range(first..end).map(|(_, segment)| segment) {
            append(&mut runs, &segment.runs);
        }
        Ok(trim(runs, start % PAGE_SIZE, len))
    }

    /// Takes a user off `len` bytes from byte `start`, and unpins pages that have none left.
    pub(crate) fn release(&self, start: u64, len: u64) {
        let Ok((first, end)) = page_span(start, len) else {
            return;
        };
        let mut pins = self.lock();
        pins.split_at(first);
        pins.split_at(end);
        for segment in pins.segments.range_mut(first..end).map(|(_, segment)| segment) {
            segment.users = segment.users.saturating_sub(1);
        }
        let freed = self.unpin_unused(&mut pins, first, end);
        pins.pinned = pins.pinned.saturating_sub(freed);
        if freed > 0 {
            pins.account.mm.uncharge(freed, pins.account.mode);
        }
    }

    /// Charges what is pinned to `mm` with its own `limit`, without taking it off the present
    /// account yet; gives the account to change to. `ENOMEM`.
    pub(crate) fn charge_to(&self, mm: &Arc<dyn Mm>, limit: u64) -> Result<Account> {
        let pins = self.lock();
        let account = Account { mm: Arc::clone(mm), mode: pins.account.mode, limit };
        account
            .mm
            .charge(pins.pinned, account.mode, limit)
            .map_err(|errno| Refusal::new(errno, "pinned memory would pass RLIMIT_MEMLOCK"))?;
        Ok(account)
    }

    /// Undoes [`Pages::charge_to`].
    pub(crate) fn uncharge_from(&self, account: &Account) {
        account.mm.uncharge(self.lock().pinned, account.mode);
    }

    /// Changes to an account that [`Pages::charge_to`] charged.
    pub(crate) fn change_account(&self, account: Account) {
        let mut pins = self.lock();
        pins.account.mm.uncharge(pins.pinned, pins.account.mode);
        pins.account = account;
    }

    /// Pins each maximal run of unpinned pages in `first..end` and gives their number. The new
    /// segments have no user yet.
    fn pin_gaps(&self, pins: &mut Pins, first: u64, end: u64) -> Result<u64> {
        let mut gaps = Vec::new();
        let mut at = first;
        for (&start, segment) in pins.segments.range(first..end) {
            if at < start {
                gaps.push((at, start - at));
            }
            at = start + segment.pages;
        }
        if at < end {
            gaps.push((at, end - at));
        }
        let mut added = 0;
        for (start, pages) in gaps {
            match self.pin(start, pages) {
                Ok(runs) => {
                    pins.segments.insert(start, Segment { pages, users: 0, runs });
                    added += pages;
                }
                Err(refusal) => {
                    self.unpin_unused(pins, first, end);
                    return Err(refusal);
                }
            }
        }
        Ok(added)
    }

    fn pin(&self, first: u64, pages: u64) -> Result<Vec<PhysRun>> {
        let span = || {
            let len = pages.checked_mul(PAGE_SIZE)?;
            let start = self.base.checked_add(first.checked_mul(PAGE_SIZE)?)?;
            start.checked_add(len).map(|_| (start, len))
        };
        let Some((start, len)) = span() else {
            return refuse(Errno::EFAULT, "the memory passes the end of the address space");
        };
        let runs = self.source.pin(start, len, self.writable).map_err(|errno| {
            let why = match errno {
                Errno::EFAULT if self.writable => {
                    format!("{len:#x} bytes from {start:#x} are not all there and writable")
                }
                Errno::EFAULT => format!("{len:#x} bytes from {start:#x} are not all there"),
                _ => format!("{len:#x} bytes from {start:#x} of the file cannot be pinned"),
            };
            Refusal::new(errno, why)
        })?;
        if runs.iter().try_fold(0_u64, |sum, run| sum.checked_add(run.len)) != Some(len) {
            self.source.unpin(&runs);
            return refuse(Errno::EFAULT, "fewer pages could be pinned than were asked for");
        }
        Ok(runs)
    }

    /// Unpins the pages in `first..end` that have no user, and gives their number.
    fn unpin_unused(&self, pins: &mut Pins, first: u64, end: u64) -> u64 {
        let mut freed = 0;
        let unused = |(&start, segment): (&u64, &Segment)| (segment.users == 0).then_some(start);
        while let Some(start) = pins.segments.range(first..end).find_map(unused) {
            if let Some(segment) = pins.segments.remove(&start) {
                self.source.unpin(&segment.runs);
                freed += segment.pages;
            }
        }
        freed
    }

    fn lock(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pins {
    /// Makes `page` the first of its segment, if it is pinned.
    fn split_at(&mut self, page: u64) {
        let Some((&start, segment)) = self.segments.range_mut(..page).next_back() else {
            return;
        };
        let keep = page - start;
        if keep >= segment.pages {
            return;
        }
        let after = segment.pages - keep;
        let all = std::mem::take(&mut segment.runs);
        let rest = trim(all.clone(), keep * PAGE_SIZE, after * PAGE_SIZE);
        segment.runs = trim(all, 0, keep * PAGE_SIZE);
        segment.pages = keep;
        let users = segment.users;
        self.segments.insert(page, Segment { pages: after, users, runs: rest });
    }
}

/// The pages that hold `len` bytes from byte `start`: the first one, and the one behind the last.
fn page_span(start: u64, len: u64) -> Result<(u64, u64)> {
    match start.checked_add(len) {
        Some(end) if len > 0 => Ok((start / PAGE_SIZE, end.div_ceil(PAGE_SIZE))),
        _ => refuse(Errno::EOVERFLOW, "the memory passes the end of the address space"),
    }
}

/// `runs` without the first `skip` bytes, at most `len` bytes of it.
fn trim(mut runs: Vec<PhysRun>, mut skip: u64, mut len: u64) -> Vec<PhysRun> {
    runs.retain_mut(|run| {
        let skipped = skip.min(run.len);
        let kept = (run.len - skipped).min(len);
        skip -= skipped;
        len -= kept;
        *run = PhysRun { start: run.start.wrapping_add(skipped), len: kept };
        kept > 0
    });
    runs
}

/// Appends `more` to `runs`, joining adjacent ones.
fn append(runs: &mut Vec<PhysRun>, more: &[PhysRun]) {
    for run in more {
        match runs.last_mut() {
            Some(last) if end_of(last) == Some(run.start) => last.len += run.len,
            _ => runs.push(*run),
        }
    }
}

fn end_of(run: &PhysRun) -> Option<PhysAddr> {
    run.start.checked_add(run.len)
}
