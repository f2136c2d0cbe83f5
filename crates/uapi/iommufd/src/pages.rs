//! Memory that areas map, and which of it is pinned (`struct iopt_pages`).
//!
//! Several areas may map the same memory, in one IOAS or several. A page is pinned and counted once
//! however many of them and of the access objects use it, from the first use to the end of the last.

mod frames;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_types::{Errno, PhysRun};

use self::frames::Frames;
use crate::client::Client;
use crate::dma_buf::Import;
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection::{Step, allocation, should_fail};
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

/// Where memory comes from (`enum iopt_address_type`).
pub(crate) enum Origin {
    /// The address space of whoever mapped it, for as long as it lives.
    User(Arc<dyn Mm>),
    /// A file in memory.
    File(Arc<dyn PinSource>),
    /// A device, through a dma-buf.
    DmaBuf(Arc<Import>),
}

/// Which way bytes go.
pub(crate) enum Transfer<'a> {
    /// From the memory.
    Read(&'a mut [u8]),
    /// Into the memory.
    Write(&'a [u8]),
}

/// A range of an address space, of a file or of a device's memory.
pub(crate) struct Pages {
    origin: Origin,
    /// Position of the first page in the origin, a multiple of the page size.
    base: u64,
    writable: bool,
    pins: Mutex<Pins>,
}

struct Pins {
    account: Account,
    /// Pinned pages: by the number of the first one, runs of pages with the same users.
    segments: BTreeMap<u64, Segment>,
    /// Pages that are pinned and counted.
    pinned: u64,
}

struct Segment {
    pages: u64,
    users: u32,
    frames: Frames,
}

impl Pages {
    /// Memory of `origin` from the page at `base`. Nothing is pinned yet.
    pub(crate) fn new(origin: Origin, base: u64, writable: bool, account: Account) -> Arc<Self> {
        let pins = Mutex::new(Pins { account, segments: BTreeMap::new(), pinned: 0 });
        Arc::new(Self { origin, base, writable, pins })
    }

    /// Whether devices may write.
    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    /// Whether it is a range of a file in memory.
    pub(crate) fn is_file(&self) -> bool {
        matches!(self.origin, Origin::File(_))
    }

    /// What a dma-buf gave, if it is a device's memory.
    pub(crate) fn import(&self) -> Option<&Arc<Import>> {
        match &self.origin {
            Origin::DmaBuf(import) => Some(import),
            Origin::User(_) | Origin::File(_) => None,
        }
    }

    /// Where byte `start` lies in the origin.
    pub(crate) fn position(&self, start: u64) -> u64 {
        self.base.wrapping_add(start)
    }

    /// Adds a user to `len` bytes from byte `start`, pins pages that had none, and hands the frames
    /// of exactly these bytes to `with`. On an error, also one of `with`, nothing changes.
    pub(crate) fn acquire<R>(
        &self,
        start: u64,
        len: u64,
        with: impl FnOnce(&[PhysRun]) -> Result<R>,
    ) -> Result<R> {
        let (first, end) = page_span(start, len)?;
        allocation()?;
        let mut pins = self.lock();
        pins.split_at(first);
        pins.split_at(end);
        let added = self.pin_gaps(&mut pins, first, end)?;
        if let Err(refusal) = pins.charge(added) {
            self.unpin_unused(&mut pins, first, end);
            return Err(refusal);
        }
        let result = pins.with_runs(first, end, start % PAGE_SIZE, len, with);
        match result {
            Ok(_) => pins.for_each(first, end, |segment| segment.users += 1),
            Err(_) => {
                self.unpin_unused(&mut pins, first, end);
                pins.uncharge(added);
            }
        }
        result
    }

    /// Hands the frames of `len` bytes from byte `start`, which have a user, to `with`.
    pub(crate) fn with_frames<R>(
        &self,
        start: u64,
        len: u64,
        with: impl FnOnce(&[PhysRun]) -> Result<R>,
    ) -> Result<R> {
        let (first, end) = page_span(start, len)?;
        let mut pins = self.lock();
        pins.split_at(first);
        pins.split_at(end);
        pins.with_runs(first, end, start % PAGE_SIZE, len, with)
    }

    /// Takes a user off `len` bytes from byte `start`, and unpins pages that have none left.
    pub(crate) fn release(&self, start: u64, len: u64) {
        let Ok((first, end)) = page_span(start, len) else {
            return;
        };
        let mut pins = self.lock();
        pins.split_at(first);
        pins.split_at(end);
        pins.for_each(first, end, |segment| segment.users = segment.users.saturating_sub(1));
        let freed = self.unpin_unused(&mut pins, first, end);
        pins.uncharge(freed);
    }

    /// Copies bytes from or to byte `start` on (`iopt_pages_rw_access`). Memory of the caller's own
    /// address space is reached as the caller reaches it; all other by its frames, pinned for as
    /// long as it takes.
    ///
    /// `EPERM` for a write of memory that was mapped for reading; `EINVAL` for memory of a device;
    /// `EFAULT` where nothing is.
    pub(crate) fn copy(
        &self,
        start: u64,
        copy: Transfer<'_>,
        caller: Option<&dyn Client>,
    ) -> Result<()> {
        if matches!(copy, Transfer::Write(_)) && !self.writable {
            return refuse(Errno::EPERM, "the memory was mapped for reading only");
        }
        let source: &dyn PinSource = match &self.origin {
            Origin::DmaBuf(_) => {
                return refuse(Errno::EINVAL, "processors do not reach the memory of a device");
            }
            Origin::File(file) => file.as_ref(),
            Origin::User(mm) => {
                if let Some(client) = caller.filter(|client| client.mm().id() == mm.id()) {
                    let at = self.position(start);
                    return match copy {
                        Transfer::Read(to) => client.read(at, to),
                        Transfer::Write(from) => client.write(at, from),
                    }
                    .map_err(|errno| Refusal::new(errno, "the memory is not there any more"));
                }
                mm.as_ref()
            }
        };
        let len = match &copy {
            Transfer::Read(to) => to.len() as u64,
            Transfer::Write(from) => from.len() as u64,
        };
        let (first, end) = page_span(start, len)?;
        allocation()?;
        let mut pins = self.lock();
        pins.split_at(first);
        pins.split_at(end);
        self.pin_gaps(&mut pins, first, end)?;
        let result = pins.with_runs(first, end, start % PAGE_SIZE, len, |runs| {
            match copy {
                Transfer::Read(to) => source.read_frames(runs, to),
                Transfer::Write(from) => source.write_frames(runs, from),
            }
            .map_err(|errno| Refusal::new(errno, "the memory cannot be reached"))
        });
        self.unpin_unused(&mut pins, first, end);
        result
    }

    /// Whether it counts against `mm` already, or against nobody, so that it stays as it is when
    /// `mm` takes over (`need_charge_update`).
    pub(crate) fn stays_with(&self, mm: &Arc<dyn Mm>) -> bool {
        let account = &self.lock().account;
        account.mode == Accounting::None || account.mm.id() == mm.id()
    }

    /// Charges what is pinned to `mm` with its own `limit`, without taking it off the present
    /// account yet; gives the account to change to. `ENOMEM`.
    pub(crate) fn charge_to(&self, mm: &Arc<dyn Mm>, limit: u64) -> Result<Account> {
        let pins = self.lock();
        let account = Account { mm: Arc::clone(mm), mode: pins.account.mode, limit };
        account.mm.charge(pins.pinned, account.mode, limit).map_err(over_limit)?;
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

    fn source(&self) -> Result<&dyn PinSource> {
        match &self.origin {
            Origin::User(mm) => Ok(mm.as_ref()),
            Origin::File(file) => Ok(file.as_ref()),
            Origin::DmaBuf(_) => refuse(Errno::EINVAL, "the memory of a device has no pages"),
        }
    }

    /// Pins each maximal run of unpinned pages in `first..end` and gives their number. The new
    /// segments have no user yet.
    fn pin_gaps(&self, pins: &mut Pins, first: u64, end: u64) -> Result<u64> {
        let mut added = 0;
        let mut at = first;
        while at < end {
            let next =
                pins.segments.range(at..end).next().map(|(&start, found)| (start, found.pages));
            let (gap_end, resume) =
                next.map_or((end, end), |(start, pages)| (start, start + pages));
            if at < gap_end {
                match self.pin(at, gap_end - at) {
                    Ok(frames) => {
                        let pages = gap_end - at;
                        pins.segments.insert(at, Segment { pages, users: 0, frames });
                        added += pages;
                    }
                    Err(refusal) => {
                        self.unpin_unused(pins, first, end);
                        return Err(refusal);
                    }
                }
            }
            at = resume;
        }
        Ok(added)
    }

    fn pin(&self, first: u64, pages: u64) -> Result<Frames> {
        let source = self.source()?;
        let span = || {
            let len = pages.checked_mul(PAGE_SIZE)?;
            let start = self.base.checked_add(first.checked_mul(PAGE_SIZE)?)?;
            start.checked_add(len).map(|_| (start, len))
        };
        let Some((start, len)) = span() else {
            return refuse(Errno::EFAULT, "the memory passes the end of the address space");
        };
        if should_fail(Step::Iommufd) {
            return refuse(Errno::EFAULT, "this pin is to fail (fail-nth)");
        }
        let runs = source.pin(start, len, self.writable).map_err(|errno| {
            let why = match errno {
                Errno::EFAULT if self.writable => {
                    format!("{len:#x} bytes from {start:#x} are not all there and writable")
                }
                Errno::EFAULT => format!("{len:#x} bytes from {start:#x} are not all there"),
                _ => format!("{len:#x} bytes from {start:#x} of the file cannot be pinned"),
            };
            Refusal::new(errno, why)
        })?;
        let whole = runs.iter().all(|run| run.len > 0 && run.len.is_multiple_of(PAGE_SIZE));
        let sum = runs.iter().try_fold(0_u64, |sum, run| sum.checked_add(run.len));
        if !whole || sum != Some(len) {
            source.unpin(&runs);
            return refuse(Errno::EFAULT, "fewer pages could be pinned than were asked for");
        }
        Ok(Frames::new(&runs))
    }

    /// Unpins the pages in `first..end` that have no user, and gives their number.
    fn unpin_unused(&self, pins: &mut Pins, first: u64, end: u64) -> u64 {
        let Ok(source) = self.source() else {
            return 0;
        };
        let mut freed = 0;
        let mut runs = Vec::new();
        let mut at = first;
        let unused = |(&start, segment): (&u64, &Segment)| (segment.users == 0).then_some(start);
        while let Some(start) = pins.segments.range(at..end).find_map(unused) {
            if let Some(segment) = pins.segments.remove(&start) {
                freed += segment.pages;
                match segment.frames {
                    Frames::Run(run) => {
                        source.unpin(&[PhysRun { start: run, len: segment.pages * PAGE_SIZE }]);
                    }
                    scattered @ Frames::Scattered { .. } => {
                        runs.clear();
                        scattered.append(segment.pages, &mut runs);
                        source.unpin(&runs);
                    }
                }
            }
            at = start;
        }
        freed
    }

    fn lock(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pins {
    /// Counts pages that were pinned: `ENOMEM`.
    fn charge(&mut self, pages: u64) -> Result<()> {
        if pages > 0 {
            let Account { mm, mode, limit } = &self.account;
            mm.charge(pages, *mode, *limit).map_err(over_limit)?;
            self.pinned += pages;
        }
        Ok(())
    }

    /// Undoes [`Pins::charge`].
    fn uncharge(&mut self, pages: u64) {
        if pages > 0 {
            self.pinned = self.pinned.saturating_sub(pages);
            self.account.mm.uncharge(pages, self.account.mode);
        }
    }

    /// Makes `page` the first of its segment, if it is pinned.
    fn split_at(&mut self, page: u64) {
        let Some((&start, segment)) = self.segments.range_mut(..page).next_back() else {
            return;
        };
        let keep = page - start;
        if keep >= segment.pages {
            return;
        }
        let rest = Segment {
            pages: segment.pages - keep,
            users: segment.users,
            frames: segment.frames.skip(keep),
        };
        segment.pages = keep;
        self.segments.insert(page, rest);
    }

    fn for_each(&mut self, first: u64, end: u64, f: impl FnMut(&mut Segment)) {
        self.segments.range_mut(first..end).map(|(_, segment)| segment).for_each(f);
    }

    /// Hands the frames of pages `first..end`, all pinned, to `with`: of `len` bytes behind the first
    /// `skip`.
    fn with_runs<R>(
        &self,
        first: u64,
        end: u64,
        skip: u64,
        len: u64,
        with: impl FnOnce(&[PhysRun]) -> Result<R>,
    ) -> Result<R> {
        let mut segments = self.segments.range(first..end).map(|(_, segment)| segment);
        if let Some(Segment { pages, frames: Frames::Run(start), .. }) = segments.next()
            && *pages == end - first
        {
            return with(&[PhysRun { start: start.wrapping_add(skip), len }]);
        }
        let mut runs = Vec::new();
        for segment in self.segments.range(first..end).map(|(_, segment)| segment) {
            segment.frames.append(segment.pages, &mut runs);
        }
        trim(&mut runs, skip, len);
        with(&runs)
    }
}

fn over_limit(errno: Errno) -> Refusal {
    Refusal::new(errno, "pinned memory would pass RLIMIT_MEMLOCK")
}

/// The pages that hold `len` bytes from byte `start`: the first one, and the one behind the last.
fn page_span(start: u64, len: u64) -> Result<(u64, u64)> {
    match start.checked_add(len) {
        Some(end) if len > 0 => Ok((start / PAGE_SIZE, end.div_ceil(PAGE_SIZE))),
        _ => refuse(Errno::EOVERFLOW, "the memory passes the end of the address space"),
    }
}

/// Cuts runs of whole pages to `len` bytes behind the first `skip`, which are in the first page, the
/// last byte in the last page.
fn trim(runs: &mut [PhysRun], skip: u64, len: u64) {
    if let Some(run) = runs.first_mut() {
        *run = PhysRun { start: run.start.wrapping_add(skip), len: run.len - skip };
    }
    let all: u64 = runs.iter().map(|run| run.len).sum();
    if let Some(run) = runs.last_mut() {
        run.len = run.len.saturating_sub(all.saturating_sub(len));
    }
}
