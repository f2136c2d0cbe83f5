//! The address space of a client process, as the machine reaches it.
//!
//! It is held by an open `/proc/PID/mem`, which stays with the address space it was opened on: after
//! an `exec`, or the end of the process, it reads nothing, and never the next program. Larger and
//! scattered transfers go by `process_vm_readv`, which is faster but goes by number; that way is
//! shut when the process calls `execve`, before the kernel goes on with it.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use lychgate_machine::{AddressSpace, Span, Unreachable, Vma};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, Stat};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::process::{self, Image, Status};
use crate::sys::maps::{self, Found};
use crate::sys::memory;

/// Up to here one transfer by `/proc/PID/mem` is cheaper than `process_vm_readv`.
const SMALL: usize = 8 << 10;

/// An address space.
pub(crate) struct Space {
    process: u32,
    user: u32,
    image: Option<Image>,
    mem: File,
    maps: File,
    life: OwnedFd,
    by_number: AtomicBool,
    /// The descriptor that [`AddressSpace::open_file`] found last, and of which file.
    last_file: Mutex<Option<(i32, (u64, u64))>>,
}

impl Space {
    /// That of a process now.
    pub(crate) fn open(process: u32) -> io::Result<Self> {
        let mem = File::options().read(true).write(true).open(format!("/proc/{process}/mem"))?;
        let maps = File::open(format!("/proc/{process}/maps"))?;
        let user = Status::of(process)?.user().ok_or(io::ErrorKind::InvalidData)?;
        let image = Image::of(process);
        let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
        let life = pidfd_open(pid.ok_or(io::ErrorKind::InvalidInput)?, PidfdFlags::empty())?;
        let (by_number, last_file) = (AtomicBool::new(true), Mutex::default());
        Ok(Self { process, user, image, mem, maps, life, by_number, last_file })
    }

    /// The process may be about to have another address space.
    pub(crate) fn suspect(&self) {
        self.by_number.store(false, Ordering::SeqCst);
    }

    /// Whether this is still the process's address space, asked when it makes a call at
    /// `instruction`. After a failed `exec` it is.
    pub(crate) fn is_current(&self, instruction: u64) -> bool {
        // The memory is gone when another process has taken the number over.
        let mut byte = [0];
        if !self.mem.read_at(&mut byte, instruction).is_ok_and(|length| length == 1) {
            return false;
        }
        if self.by_number.load(Ordering::SeqCst) {
            return true;
        }
        // The memory is still there when a `vfork` child has left it to its parent.
        let current = Image::of(self.process) == self.image;
        self.by_number.store(current, Ordering::SeqCst);
        current
    }

    /// Whether it is that of the process of this number, asked while none of its calls is at hand.
    pub(crate) fn is_of_process(&self) -> bool {
        let same = self.by_number.load(Ordering::SeqCst) || Image::of(self.process) == self.image;
        same && self.lives() && !self.is_gone()
    }

    /// Whether anything of it is left.
    pub(crate) fn is_gone(&self) -> bool {
        // A kernel maps no page there; an address space that is gone gives 0 bytes instead of EIO.
        let mut byte = [0];
        matches!(self.mem.read_at(&mut byte, 0), Ok(0))
    }

    fn fast(&self, spans: &[Span], total: usize) -> bool {
        (spans.len() > 1 || total > SMALL) && self.by_number.load(Ordering::SeqCst) && self.lives()
    }

    /// Whether the number is still that of the process.
    fn lives(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut polled = [PollFd::new(&self.life, PollFlags::IN)];
        matches!(poll(&mut polled, Some(&now)), Ok(0))
    }
}

impl Space {
    /// The mappings that touch `start` to `end`; `None` where the kernel has only the text of all.
    fn query(&self, start: u64, end: u64) -> io::Result<Option<Vec<Vma>>> {
        let mut vmas = Vec::new();
        let mut at = start;
        while at < end {
            match maps::query(&self.maps, at)? {
                Found::Vma(vma) if vma.start < end => {
                    at = vma.end;
                    vmas.push(vma);
                }
                Found::Vma(_) | Found::Nothing => break,
                Found::Unknown => return Ok(None),
            }
        }
        Ok(Some(vmas))
    }

    /// Opens a descriptor of the process if it is of this file.
    fn open_if(&self, fd: i32, file: (u64, u64)) -> Option<OwnedFd> {
        let is_it = |stat: Stat| (stat.st_dev, stat.st_ino) == file;
        if !is_it(process::stat_file(self.process, fd).ok()?)
            || !self.by_number.load(Ordering::SeqCst)
        {
            return None;
        }
        let opened = process::reopen(self.process, fd, OFlags::RDWR).ok()?;
        // The descriptor may have changed hands in between.
        is_it(rustix::fs::fstat(&opened).ok()?).then_some(opened)
    }
}

impl AddressSpace for Space {
    fn process(&self) -> u32 {
        self.process
    }

    fn number(&self) -> Option<u32> {
        (self.by_number.load(Ordering::SeqCst) && self.lives()).then_some(self.process)
    }

    fn read(&self, spans: &[Span], to: &mut [u8]) -> Result<(), Unreachable> {
        let fast = self.fast(spans, to.len());
        let mut rest = to;
        for spans in spans.chunks(memory::MAX_SPANS) {
            let (part, behind) = rest.split_at_mut_checked(total(spans)?).ok_or(Unreachable)?;
            rest = behind;
            if fast && memory::read(self.process, spans, part).is_ok_and(|n| n == part.len()) {
                continue;
            }
            let mut part = part;
            for span in spans {
                let (bytes, behind) = part.split_at_mut_checked(span.len).ok_or(Unreachable)?;
                part = behind;
                self.mem.read_exact_at(bytes, span.start).map_err(|_| Unreachable)?;
            }
        }
        Ok(())
    }

    fn write(&self, spans: &[Span], from: &[u8]) -> Result<(), Unreachable> {
        let fast = self.fast(spans, from.len());
        let mut rest = from;
        for spans in spans.chunks(memory::MAX_SPANS) {
            let (part, behind) = rest.split_at_checked(total(spans)?).ok_or(Unreachable)?;
            rest = behind;
            if fast && memory::write(self.process, spans, part).is_ok_and(|n| n == part.len()) {
                continue;
            }
            let mut part = part;
            for span in spans {
                let (bytes, behind) = part.split_at_checked(span.len).ok_or(Unreachable)?;
                part = behind;
                self.mem.write_all_at(bytes, span.start).map_err(|_| Unreachable)?;
            }
        }
        Ok(())
    }

    fn vmas(&self, start: u64, len: u64) -> Result<Vec<Vma>, Unreachable> {
        let end = start.saturating_add(len);
        match self.query(start, end) {
            Ok(Some(vmas)) => return Ok(vmas),
            Ok(None) => {}
            Err(_) => return Err(Unreachable),
        }
        let mut text = Vec::new();
        let mut piece = vec![0; 64 << 10];
        loop {
            let offset = u64::try_from(text.len()).map_err(|_| Unreachable)?;
            match self.maps.read_at(&mut piece, offset) {
                Ok(0) => break,
                Ok(length) => text.extend_from_slice(piece.get(..length).ok_or(Unreachable)?),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Err(Unreachable),
            }
        }
        if text.is_empty() {
            return Err(Unreachable);
        }
        Ok(String::from_utf8_lossy(&text)
            .lines()
            .filter_map(parse)
            .filter(|vma| vma.start < end && vma.end > start)
            .collect())
    }

    fn open_file(&self, vma: &Vma) -> Option<OwnedFd> {
        let file = vma.file.filter(|_| vma.shared)?;
        let mut last = self.last_file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((fd, of)) = *last
            && of == file
            && let Some(opened) = self.open_if(fd, file)
        {
            return Some(opened);
        }
        process::open_files(self.process).into_iter().find_map(|fd| {
            let fd = i32::try_from(fd).ok()?;
            let opened = self.open_if(fd, file)?;
            *last = Some((fd, file));
            Some(opened)
        })
    }

    fn user(&self) -> u32 {
        self.user
    }
}

fn total(spans: &[Span]) -> Result<usize, Unreachable> {
    spans.iter().try_fold(0_usize, |sum, span| sum.checked_add(span.len)).ok_or(Unreachable)
}

/// One line of `/proc/PID/maps`: `START-END rwxs OFFSET MAJOR:MINOR INODE   NAME`.
pub(crate) fn parse(line: &str) -> Option<Vma> {
    let mut fields = line.splitn(6, ' ');
    let mut next = || fields.next();
    let (start, end) = next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let rights = next()?.as_bytes();
    let offset = hex(next()?)?;
    let (major, minor) = next()?.split_once(':')?;
    let inode: u64 = next()?.parse().ok()?;
    let name = next().unwrap_or_default().trim_start().to_owned();
    let device = rustix::fs::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        read: rights.first() == Some(&b'r'),
        write: rights.get(1) == Some(&b'w'),
        shared: rights.get(3) == Some(&b's'),
        offset,
        file: (inode != 0).then_some((device, inode)),
        name,
    })
}

#[cfg(test)]
mod tests;
