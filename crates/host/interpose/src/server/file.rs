//! Calls on descriptors.

use std::os::fd::AsFd;
use std::sync::{Arc, PoisonError};

use lychgate_iommufd::{Client, MmapRequest, Refusal, Reply};
use lychgate_types::Errno;
use rustix::fs::OFlags;

use super::{Answer, Called, Moment, Outcome, Server, low, signed};
use crate::caller::Caller;
use crate::files::Opened;
use crate::filter::KVM_SET_DEVICE_ATTR;
use crate::names;
use crate::sys::notify::{At, Notification};

/// The most bytes that one call transfers (`MAX_RW_COUNT`).
const MOST_BYTES: u64 = 0x7fff_f000;
/// The most pieces that one call takes (`UIO_MAXIOV`).
const MOST_PIECES: u64 = 1024;

/// How many bytes of a transfer are shown.
const SHOWN_BYTES: usize = 16;

/// `KVM_DEV_VFIO_FILE`.
const KVM_DEV_VFIO_FILE: u32 = 1;

impl Server {
    pub(super) fn ioctl(&self, n: &Notification) -> Answer {
        let (fd, command, argument) = (signed(n.args[0]), low(n.args[1]), n.args[2]);
        if command == KVM_SET_DEVICE_ATTR {
            return self.kvm_set_device_attr(n, argument);
        }
        let Ok(Some(found)) = self.files.find(n.pid, fd) else { return Answer::GoOn };
        let file = &found.opened.file;
        let file_name = found.opened.name.as_str();
        let name = names::ioctl(command, file_name);
        let describe = |caller: &Caller<'_>, _| {
            file.describe(caller, command, argument)
                .unwrap_or_else(|| format!("{}, {argument:#x}", names::ioctl(command, file_name)))
        };
        let called = Called { name, function: "ioctl", fd: Some(fd), file: file_name };
        self.served(n, called, describe, |caller| {
            Ok(match file.ioctl(caller, command, argument)? {
                Reply::Value(value) => Outcome::Value(i64::from(value)),
                Reply::File(new) => Outcome::File(new, None, OFlags::RDWR),
                Reply::FileAt { file, at } => Outcome::FileAt(file, at),
            })
        })
    }

    /// KVM only wants to know which files are VFIO's, and would not know ours
    /// (`Documentation/virt/kvm/devices/vfio.rst`).
    fn kvm_set_device_attr(&self, n: &Notification, argument: u64) -> Answer {
        let caller = Caller::new(self, n, n.pid);
        // struct kvm_device_attr { __u32 flags, group; __u64 attr, addr; }
        let mut attr = [0; 24];
        let mut fd = [0; 4];
        if caller.read(argument, &mut attr).is_err() {
            return Answer::GoOn;
        }
        let (Some(group), Some(address)) = (attr.get(4..8), attr.get(16..24)) else {
            return Answer::GoOn;
        };
        let group = group.try_into().map_or(0, u32::from_le_bytes);
        let address = address.try_into().map_or(0, u64::from_le_bytes);
        if group != KVM_DEV_VFIO_FILE || caller.read(address, &mut fd).is_err() {
            return Answer::GoOn;
        }
        match self.files.find(n.pid, i32::from_le_bytes(fd)) {
            Ok(Some(_)) => Answer::Value(Ok(0)),
            _ => Answer::GoOn,
        }
    }

    /// `read`, `write`, and what there is of them with positions and pieces.
    pub(super) fn transfer(&self, n: &Notification) -> Answer {
        let Ok(Some(found)) = self.files.find(n.pid, signed(n.args[0])) else {
            return Answer::GoOn;
        };
        let (kind, name) = Kind::of(libc::c_long::from(n.nr));
        let opened = &found.opened;
        let describe = |caller: &Caller<'_>, moment| kind.describe(caller, &n.args, &moment);
        let called = Called {
            name: name.to_owned(),
            function: name,
            fd: Some(signed(n.args[0])),
            file: &opened.name,
        };
        self.served(n, called, describe, |caller| {
            let allowed = if kind.write { found.writable() } else { found.readable() };
            if !allowed {
                return Err(Refusal::new(Errno::EBADF, "the file is not open for this"));
            }
            let pieces = if kind.pieces {
                pieces(caller, n.args[1], n.args[2])?
            } else {
                vec![(n.args[1], n.args[2])]
            };
            let at_position = !kind.at_offset || (kind.flags && n.args[3] == u64::MAX);
            let done = if at_position {
                let mut position = opened.position.lock().unwrap_or_else(PoisonError::into_inner);
                let done = run(caller, opened, kind.write, &pieces, *position)?;
                if !opened.file.is_queue() {
                    *position = position.saturating_add(done);
                }
                done
            } else if i64::try_from(n.args[3]).is_err() {
                return Err(Refusal::new(Errno::EINVAL, "the offset is negative"));
            } else {
                run(caller, opened, kind.write, &pieces, n.args[3])?
            };
            Ok(Outcome::Value(i64::try_from(done).unwrap_or(i64::MAX)))
        })
    }

    pub(super) fn mmap(&self, n: &Notification) -> Answer {
        let Ok(Some(found)) = self.files.find(n.pid, signed(n.args[4])) else {
            return Answer::GoOn;
        };
        let (protection, flags) = (signed(n.args[2]), signed(n.args[3]));
        if flags & libc::MAP_ANONYMOUS != 0 {
            return Answer::GoOn;
        }
        let request = MmapRequest {
            offset: n.args[5],
            len: n.args[1],
            read: protection & libc::PROT_READ != 0,
            write: protection & libc::PROT_WRITE != 0,
            exec: protection & libc::PROT_EXEC != 0,
            shared: flags & libc::MAP_SHARED != 0,
        };
        let file = &found.opened.file;
        let describe = |_: &Caller<'_>, _| {
            let (protection, flags) = (names::protection(protection), names::mapping(flags));
            format!("{:#x}, {protection}, {flags}, {:#x}", request.len, request.offset)
        };
        let called = Called {
            name: "mmap".to_owned(),
            function: "mmap",
            fd: Some(signed(n.args[4])),
            file: &found.opened.name,
        };
        self.served(n, called, describe, |_| {
            file.mmap(&request)?;
            if file.backing().is_none() {
                return Err(Refusal::new(Errno::ENODEV, "this file has no memory to map"));
            }
            Ok(Outcome::GoOn)
        })
    }

    /// Copies of our descriptors get numbers that the filter knows, rather than the lowest.
    pub(super) fn dup(&self, n: &Notification, least: u32, close_on_exec: bool) -> Answer {
        let Ok(Some(found)) = self.files.find(n.pid, signed(n.args[0])) else {
            return Answer::GoOn;
        };
        if least >= self.descriptors.end {
            return Answer::GoOn;
        }
        let Some(number) = self.free_number(n.pid, least) else {
            return Answer::Value(Err(Errno::EMFILE));
        };
        match self.files.again(&found) {
            Ok(file) => self.give(n, file.as_fd(), At::Number(number), close_on_exec),
            Err(error) => {
                tracing::warn!(%error, "cannot copy a descriptor");
                Answer::Value(Err(Errno::EMFILE))
            }
        }
    }

    /// Only texts have a position that can be set, and an end that nobody knows.
    pub(super) fn lseek(&self, n: &Notification) -> Answer {
        let Ok(Some(found)) = self.files.find(n.pid, signed(n.args[0])) else {
            return Answer::GoOn;
        };
        if !found.opened.node.as_ref().is_some_and(|path| self.is_text(path)) {
            return Answer::Value(Err(Errno::ESPIPE));
        }
        let mut position = found.opened.position.lock().unwrap_or_else(PoisonError::into_inner);
        let base = match signed(n.args[2]) {
            libc::SEEK_SET => Some(0),
            libc::SEEK_CUR => i64::try_from(*position).ok(),
            _ => None,
        };
        let to = base.and_then(|base| base.checked_add(n.args[1].cast_signed()));
        match to.map(|to| (to, u64::try_from(to))) {
            Some((to, Ok(new))) => {
                *position = new;
                Answer::Value(Ok(to))
            }
            _ => Answer::Value(Err(Errno::EINVAL)),
        }
    }

    /// What a character device refuses and the file behind our descriptor would not.
    pub(super) fn refuse_ours(&self, n: &Notification, errno: Errno) -> Answer {
        match self.files.find(n.pid, signed(n.args[0])) {
            Ok(Some(_)) => Answer::Value(Err(errno)),
            _ => Answer::GoOn,
        }
    }
}

#[derive(Clone, Copy)]
struct Kind {
    write: bool,
    pieces: bool,
    at_offset: bool,
    flags: bool,
}

impl Kind {
    fn of(number: libc::c_long) -> (Self, &'static str) {
        let kind = |write, pieces, at_offset, flags| Self { write, pieces, at_offset, flags };
        match number {
            libc::SYS_read => (kind(false, false, false, false), "read"),
            libc::SYS_pread64 => (kind(false, false, true, false), "pread"),
            libc::SYS_readv => (kind(false, true, false, false), "readv"),
            libc::SYS_preadv => (kind(false, true, true, false), "preadv"),
            libc::SYS_preadv2 => (kind(false, true, true, true), "preadv2"),
            libc::SYS_write => (kind(true, false, false, false), "write"),
            libc::SYS_pwrite64 => (kind(true, false, true, false), "pwrite"),
            libc::SYS_writev => (kind(true, true, false, false), "writev"),
            libc::SYS_pwritev => (kind(true, true, true, false), "pwritev"),
            _ => (kind(true, true, true, true), "pwritev2"),
        }
    }

    /// The arguments behind the descriptor: the buffer as its bytes once they are there and where
    /// they are few, then its length, and the offset.
    fn describe(self, caller: &Caller<'_>, args: &[u64; 6], moment: &Moment) -> String {
        let [_, buffer, count, offset, ..] = *args;
        let there = match moment {
            Moment::Before if self.write => Some(count),
            Moment::After(length) if !self.write => u64::try_from(*length).ok(),
            _ => None,
        };
        let mut bytes = [0; SHOWN_BYTES];
        let bytes = there.filter(|_| !self.pieces).and_then(|length| {
            let bytes = bytes.get_mut(..usize::try_from(length).ok()?)?;
            caller.read(buffer, bytes).ok()?;
            Some(bytes)
        });
        let buffer = match (bytes, self.write, moment) {
            (Some(bytes), ..) => format!("\"{}\"", escape(bytes)),
            // What a write took does not change: as before.
            (None, true, Moment::After(_)) if !self.pieces && count <= SHOWN_BYTES as u64 => {
                return self.describe(caller, args, &Moment::Before);
            }
            _ => format!("{buffer:#x}"),
        };
        if self.at_offset {
            format!("{buffer}, {count}, {offset:#x}")
        } else {
            format!("{buffer}, {count}")
        }
    }
}

/// Each byte as `\xNN`.
fn escape(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "\\x{byte:02x}");
        text
    })
}

/// Reads `struct iovec`s.
fn pieces(caller: &Caller<'_>, address: u64, count: u64) -> Result<Vec<(u64, u64)>, Refusal> {
    if count > MOST_PIECES {
        return Err(Refusal::new(Errno::EINVAL, "more than 1024 pieces"));
    }
    let mut bytes = vec![0; usize::try_from(count).unwrap_or(0) * 16];
    caller.read(address, &mut bytes).map_err(|errno| Refusal::new(errno, "the list of pieces"))?;
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    Ok(bytes
        .chunks_exact(16)
        .map(|piece| {
            let (base, length) = piece.split_at(8);
            (word(base), word(length))
        })
        .collect())
}

/// Transfers piece by piece, up to the first that is not done in full.
fn run(
    caller: &Caller<'_>,
    opened: &Arc<Opened>,
    write: bool,
    pieces: &[(u64, u64)],
    offset: u64,
) -> Result<u64, Refusal> {
    let mut done = 0_u64;
    for (buffer, length) in pieces {
        let length = (*length).min(MOST_BYTES - done.min(MOST_BYTES));
        let at = if opened.file.is_queue() { offset } else { offset.saturating_add(done) };
        let result = if write {
            opened.file.write_at(caller, *buffer, length, at)
        } else {
            opened.file.read_at(caller, *buffer, length, at)
        };
        match result {
            Ok(moved) => {
                done = done.saturating_add(moved);
                if moved < length {
                    break;
                }
            }
            Err(refusal) if done == 0 => return Err(refusal),
            Err(_) => break,
        }
    }
    Ok(done)
}
