//! Answers the notifications.

mod file;
mod path;
mod text;

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use lychgate_iommufd::{Mm, NewFile, OpenFile, Refusal};
use lychgate_machine::{AddressSpace, Call, Span, System, Unreachable, Vma};
use lychgate_types::Errno;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;

use crate::caller::Caller;
use crate::eventfds::EventFds;
use crate::files::{Files, Opened};
use crate::filter::bpf::{ARCH_I386, ARCH_X86_64};
use crate::filter::i386;
use crate::origin::Waiting;
use crate::paths::Paths;
use crate::process::{self, Status};
use crate::space::Space;
use crate::supervisor::Origins;
use crate::sys::notify::{At, Gone, Listener, Notification};
use crate::trace::{Served, Tracer};

/// The longest path, with its terminating zero (`PATH_MAX`).
const PATH_MAX: usize = 4096;

/// How many address spaces are kept before those of ended processes are looked for.
const MANY_SPACES: usize = 64;

/// All that a run serves from.
pub(crate) struct Server {
    pub(crate) listener: Listener,
    pub(crate) system: Arc<dyn System>,
    pub(crate) files: Files,
    pub(crate) eventfds: EventFds,
    paths: Paths,
    tracer: Arc<dyn Tracer>,
    traces: bool,
    origins: Option<Origins>,
    descriptors: Range<u32>,
    calls: AtomicU64,
    spaces: Mutex<HashMap<u32, Known>>,
    processes: Mutex<HashMap<u32, u32>>,
    warned: Mutex<HashSet<(u32, &'static str)>>,
}

/// An address space, and what the machine made of it.
type Known = (Arc<Space>, Arc<dyn Mm>);

/// What a call comes to.
enum Answer {
    /// The kernel goes on with it.
    GoOn,
    /// This is its result.
    Value(Result<i64, Errno>),
    /// It has been answered.
    Answered,
}

/// A call, as the machine and the tracer are told of it.
struct Called<'a> {
    name: String,
    function: &'static str,
    fd: Option<i32>,
    file: &'a str,
}

/// When a call is described.
enum Moment {
    Before,
    /// It succeeded with this value.
    After(i64),
}

/// What a file of the machine made of a call.
enum Outcome {
    GoOn,
    Value(i64),
    File(NewFile, Option<PathBuf>, OFlags),
    FileAt(NewFile, u64),
}

impl Server {
    /// For a listener; `descriptors` are the numbers that the filter knows.
    pub(crate) fn new(
        listener: Listener,
        system: Arc<dyn System>,
        tracer: Arc<dyn Tracer>,
        paths: Paths,
        files: Files,
        descriptors: Range<u32>,
        origins: Option<Origins>,
    ) -> Self {
        let traces = tracer.wants_calls();
        Self {
            listener,
            system,
            files,
            eventfds: EventFds::default(),
            paths,
            tracer,
            traces,
            origins,
            descriptors,
            calls: AtomicU64::new(0),
            spaces: Mutex::default(),
            processes: Mutex::default(),
            warned: Mutex::default(),
        }
    }

    /// Serves until no process is left that the filter applies to.
    pub(crate) fn serve(&self) {
        let wakes_at_end = process::kernel_version() >= Some((6, 11));
        loop {
            // Before 6.11 a kernel lets the receiver sleep on when the last process has ended.
            if !wakes_at_end && self.has_ended() {
                return;
            }
            match self.listener.receive() {
                Ok(Some(notification)) => self.handle(&notification),
                Ok(None) if wakes_at_end && self.has_ended_now() => return,
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot receive notifications");
                    return;
                }
            }
        }
    }

    /// Waits for a notification or the end of all processes; whether it is the end.
    fn has_ended(&self) -> bool {
        self.poll(None)
    }

    fn has_ended_now(&self) -> bool {
        self.poll(Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))
    }

    fn poll(&self, timeout: Option<&Timespec>) -> bool {
        let mut polled = [PollFd::new(&self.listener, PollFlags::IN)];
        let polled = match rustix::event::poll(&mut polled, timeout) {
            Ok(_) => polled,
            Err(rustix::io::Errno::INTR) => return false,
            Err(error) => {
                tracing::error!(%error, "cannot wait for notifications");
                return true;
            }
        };
        let [polled] = &polled;
        polled.revents().contains(PollFlags::HUP)
    }

    /// Says once for a process what keeps it from being served.
    pub(crate) fn warn(&self, process: u32, text: &'static str) {
        if guard(&self.warned).insert((process, text)) {
            self.tracer.warning(process, text);
        }
    }

    /// The address space of a process that makes a call at `instruction`.
    pub(crate) fn mm(&self, process: u32, instruction: u64) -> Arc<dyn Mm> {
        let mut spaces = guard(&self.spaces);
        if let Some((space, mm)) = spaces.get(&process)
            && space.is_current(instruction)
        {
            return mm.clone();
        }
        if spaces.len() >= MANY_SPACES {
            spaces.retain(|_, (space, _)| !space.is_gone());
        }
        match Space::open(process) {
            Ok(space) => {
                let space = Arc::new(space);
                let mm = self.system.mm(space.clone());
                spaces.insert(process, (space, mm.clone()));
                mm
            }
            Err(error) => {
                tracing::debug!(process, %error, "no address space");
                self.warn(
                    process,
                    "its memory cannot be opened: it has made itself undumpable, its program file \
                     is not readable, or a security module forbids it",
                );
                self.system.mm(Arc::new(Lost { process }))
            }
        }
    }

    fn handle(&self, notification: &Notification) {
        let answer = match notification.arch {
            ARCH_X86_64 => self.native(notification),
            ARCH_I386 => self.i386(notification),
            _ => Answer::GoOn,
        };
        // Nothing depends on a client that is gone by now.
        let _ = match answer {
            Answer::GoOn => self.listener.go_on(notification.id),
            Answer::Value(result) => self.listener.answer(notification.id, result),
            Answer::Answered => Ok(()),
        };
    }

    fn native(&self, n: &Notification) -> Answer {
        match libc::c_long::from(n.nr) {
            libc::SYS_ioctl => self.ioctl(n),
            libc::SYS_open => self.open(n, libc::AT_FDCWD, n.args[0], low(n.args[1]), n.args[2]),
            libc::SYS_openat => {
                self.open(n, signed(n.args[0]), n.args[1], low(n.args[2]), n.args[3])
            }
            libc::SYS_creat => {
                let flags = libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC;
                self.open(n, libc::AT_FDCWD, n.args[0], flags.cast_unsigned(), n.args[1])
            }
            libc::SYS_openat2 => self.openat2(n),
            libc::SYS_stat => self.stat(n, libc::AT_FDCWD, n.args[0], n.args[1], 0),
            libc::SYS_lstat => {
                self.stat(n, libc::AT_FDCWD, n.args[0], n.args[1], libc::AT_SYMLINK_NOFOLLOW)
            }
            libc::SYS_newfstatat => {
                self.stat(n, signed(n.args[0]), n.args[1], n.args[2], signed(n.args[3]))
            }
            libc::SYS_statx => self.statx(n),
            libc::SYS_fstat => self.fstat(n),
            libc::SYS_access => self.access(n, libc::AT_FDCWD, n.args[0], low(n.args[1]), 0),
            libc::SYS_faccessat => self.access(n, signed(n.args[0]), n.args[1], low(n.args[2]), 0),
            libc::SYS_faccessat2 => {
                self.access(n, signed(n.args[0]), n.args[1], low(n.args[2]), signed(n.args[3]))
            }
            libc::SYS_readlink => self.readlink(n, libc::AT_FDCWD, n.args[0], n.args[1], n.args[2]),
            libc::SYS_readlinkat => {
                self.readlink(n, signed(n.args[0]), n.args[1], n.args[2], n.args[3])
            }
            libc::SYS_execve | libc::SYS_execveat => self.exec(n),
            libc::SYS_read
            | libc::SYS_pread64
            | libc::SYS_readv
            | libc::SYS_preadv
            | libc::SYS_preadv2
            | libc::SYS_write
            | libc::SYS_pwrite64
            | libc::SYS_writev
            | libc::SYS_pwritev
            | libc::SYS_pwritev2 => self.transfer(n),
            libc::SYS_lseek => self.lseek(n),
            libc::SYS_ftruncate => self.refuse_ours(n, Errno::EINVAL),
            libc::SYS_fallocate => self.refuse_ours(n, Errno::ENODEV),
            libc::SYS_mmap => self.mmap(n),
            libc::SYS_dup => self.dup(n, 0, false),
            libc::SYS_fcntl => {
                let close_on_exec = signed(n.args[1]) == libc::F_DUPFD_CLOEXEC;
                self.dup(n, low(n.args[2]), close_on_exec)
            }
            libc::SYS_eventfd => self.eventfd(n, 0),
            libc::SYS_eventfd2 => self.eventfd(n, signed(n.args[1])),
            _ => Answer::GoOn,
        }
    }

    /// 32-bit programs are told so, rather than left to wonder where the devices are.
    fn i386(&self, n: &Notification) -> Answer {
        let ours = match n.nr.cast_unsigned() {
            i386::IOCTL => {
                self.files.find(n.pid, signed(n.args[0])).is_ok_and(|file| file.is_some())
            }
            i386::OPEN => self.is_ours(n, libc::AT_FDCWD, n.args[0]),
            i386::OPENAT | i386::OPENAT2 => self.is_ours(n, signed(n.args[0]), n.args[1]),
            _ => false,
        };
        if !ours {
            return Answer::GoOn;
        }
        self.warn(self.process_of(n.pid), "it is a 32-bit program, and those are not supported");
        Answer::Value(Err(Errno::ENOSYS))
    }

    /// The kernel is about to give the process another address space.
    fn exec(&self, n: &Notification) -> Answer {
        let process = self.process_of(n.pid);
        if let Some((space, _)) = guard(&self.spaces).get(&process) {
            space.suspect();
        }
        Answer::GoOn
    }

    fn eventfd(&self, n: &Notification, flags: i32) -> Answer {
        match self.eventfds.make(low(n.args[0]), flags) {
            Ok(file) => {
                let close_on_exec = flags & libc::EFD_CLOEXEC != 0;
                self.give(n, file.as_fd(), At::Lowest, close_on_exec)
            }
            Err(errno) => Answer::Value(Err(errno)),
        }
    }

    /// Lets a file of the machine work on a call, and answers it. `describe` gives its arguments as
    /// text, before the work and after it.
    fn served(
        &self,
        n: &Notification,
        called: Called<'_>,
        describe: impl Fn(&Caller<'_>, Moment) -> String,
        work: impl FnOnce(&Caller<'_>) -> Result<Outcome, Refusal>,
    ) -> Answer {
        let begin = Instant::now();
        // What a client closed is closed for all that it calls afterwards.
        self.files.settle();
        let caller = Caller::new(self, n, self.process_of(n.pid));
        let call = Call {
            number: self.calls.fetch_add(1, Ordering::Relaxed) + 1,
            process: caller.process,
            thread: n.pid,
            instruction: n.instruction,
            name: called.name,
        };
        let arguments = if self.traces { describe(&caller, Moment::Before) } else { String::new() };
        let mut after = None;
        let mut look = |value| {
            if self.traces {
                // A caller of its own, which has read nothing yet.
                let caller = Caller::new(self, n, caller.process);
                after = Some(describe(&caller, Moment::After(value)));
            }
        };
        self.system.call_begins(call.clone());
        if let Some(Origins(origins)) = &self.origins {
            let mm = self.mm(caller.process, n.instruction);
            let waiting = Waiting { process: caller.process, thread: n.pid, mm };
            self.system.call_came_from(origins.stack(waiting.mm.id(), &waiting));
        }
        let outcome = work(&caller);
        self.system.call_ends();
        let result = match outcome {
            Ok(Outcome::GoOn) => self.listener.go_on(n.id).map(|()| Ok(0)),
            Ok(Outcome::Value(value)) => {
                look(value);
                self.listener.answer(n.id, Ok(value)).map(|()| Ok(value))
            }
            Ok(Outcome::File(file, node, access)) => self.end_with(n, file, node, access),
            Ok(Outcome::FileAt(file, at)) => self.store(&caller, file, at, &mut look),
            Err(refusal) => self.listener.answer(n.id, Err(refusal.errno)).map(|()| Err(refusal)),
        };
        if let Ok(result) = result {
            let duration = begin.elapsed();
            self.tracer.served(&Served {
                call: &call,
                file: called.file,
                function: called.function,
                fd: called.fd,
                arguments: &arguments,
                after: after.as_deref().filter(|after| *after != arguments),
                result: &result,
                duration,
            });
        }
        Answer::Answered
    }

    /// Ends a call with a new file. A client that is gone does not get it, and its release follows
    /// from its only descriptor being closed here.
    fn end_with(
        &self,
        n: &Notification,
        new: NewFile,
        node: Option<PathBuf>,
        access: OFlags,
    ) -> Result<Result<i64, Refusal>, Gone> {
        let given = self.describe(n, new.file, node, access).and_then(|(file, at)| {
            match self.listener.add_file(n.id, file.as_fd(), at, new.cloexec, true) {
                Ok(given) => given.map(Ok),
                Err(Gone) => Ok(Err(Gone)),
            }
        });
        match given {
            Ok(number) => number.map(|number| Ok(i64::from(number))),
            Err(errno) => {
                self.listener.answer(n.id, Err(errno))?;
                Ok(Err(Refusal::new(errno, "the client can have no descriptor of it")))
            }
        }
    }

    /// Gives a new file to the client, its number to the client's memory, and 0 to the call.
    fn store(
        &self,
        caller: &Caller<'_>,
        new: NewFile,
        address: u64,
        look: &mut dyn FnMut(i64),
    ) -> Result<Result<i64, Refusal>, Gone> {
        use lychgate_iommufd::Client;
        let n = caller.notification;
        let opened = new.file.clone();
        let given = self.describe(n, new.file, None, OFlags::RDWR).and_then(|(file, at)| {
            if let At::Number(number) = at {
                caller.write(address, &number.to_le_bytes())?;
            }
            match self.listener.add_file(n.id, file.as_fd(), at, new.cloexec, false) {
                Ok(given) => given.map(Ok),
                Err(Gone) => Ok(Err(Gone)),
            }
        });
        match given {
            Ok(Ok(_)) => {
                opened.given();
                look(0);
                self.listener.answer(n.id, Ok(0)).map(|()| Ok(0))
            }
            Ok(Err(Gone)) => Err(Gone),
            Err(errno) => {
                self.listener.answer(n.id, Err(errno))?;
                Ok(Err(Refusal::new(errno, "the client can have no descriptor of it")))
            }
        }
    }

    fn describe(
        &self,
        n: &Notification,
        file: Arc<dyn OpenFile>,
        node: Option<PathBuf>,
        access: OFlags,
    ) -> Result<(std::os::fd::OwnedFd, At), Errno> {
        let Some(number) = self.free_number(n.pid, 0) else {
            file.release();
            return Err(Errno::EMFILE);
        };
        let name = file.name();
        let opened = Opened { file, name, node, position: Mutex::new(0) };
        Ok((self.files.open(opened, access)?, At::Number(number)))
    }

    /// Ends a call with a descriptor of a real file.
    fn give(&self, n: &Notification, file: BorrowedFd<'_>, at: At, close_on_exec: bool) -> Answer {
        match self.listener.add_file(n.id, file, at, close_on_exec, true) {
            Ok(Ok(_)) | Err(Gone) => Answer::Answered,
            Ok(Err(errno)) => Answer::Value(Err(errno)),
        }
    }

    /// A number of ours that a client does not use. From the top: `dup` and `open` of the client
    /// itself come from below.
    fn free_number(&self, thread: u32, least: u32) -> Option<u32> {
        self.descriptors
            .clone()
            .rev()
            .take_while(|number| *number >= least)
            .find(|number| !process::is_open(thread, *number))
    }

    /// The process of a thread; the thread itself when `/proc` does not tell. The number of a
    /// process's first thread stays the way to its memory, whatever has it later.
    fn process_of(&self, thread: u32) -> u32 {
        let mut processes = guard(&self.processes);
        if let Some(process) = processes.get(&thread)
            && (*process == thread || process::has_thread(*process, thread))
        {
            return *process;
        }
        let process = Status::of(thread).ok().and_then(|status| status.process());
        let process = process.unwrap_or(thread);
        if processes.len() >= MANY_SPACES * 16 {
            processes.clear();
        }
        processes.insert(thread, process);
        process
    }

    /// A path in the client's memory. `None` where the kernel had better say what is wrong with it.
    fn read_path(&self, n: &Notification, address: u64) -> Option<OsString> {
        let caller = Caller::new(self, n, n.pid);
        let mut path = Vec::new();
        let mut at = address;
        while path.len() < PATH_MAX {
            // Up to the end of a page: the next one need not be there.
            let length = usize::try_from(4096 - at % 4096).ok()?.min(256);
            let mut piece = vec![0; length];
            caller.read_some(at, &mut piece).ok().filter(|read| *read == length)?;
            if let Some(end) = piece.iter().position(|byte| *byte == 0) {
                path.extend_from_slice(piece.get(..end)?);
                return Some(OsString::from_vec(path));
            }
            path.append(&mut piece);
            at = at.checked_add(u64::try_from(length).ok()?)?;
        }
        None
    }
}

/// The address space of a process that cannot be reached.
struct Lost {
    process: u32,
}

impl AddressSpace for Lost {
    fn process(&self) -> u32 {
        self.process
    }

    fn read(&self, _: &[Span], _: &mut [u8]) -> Result<(), Unreachable> {
        Err(Unreachable)
    }

    fn write(&self, _: &[Span], _: &[u8]) -> Result<(), Unreachable> {
        Err(Unreachable)
    }

    fn vmas(&self, _: u64, _: u64) -> Result<Vec<Vma>, Unreachable> {
        Err(Unreachable)
    }

    fn open_file(&self, _: &Vma) -> Option<std::os::fd::OwnedFd> {
        None
    }

    fn user(&self) -> u32 {
        Status::of(self.process).ok().and_then(|status| status.user()).unwrap_or(u32::MAX)
    }
}

/// The kernel takes the low word of an argument that is a C `int` or `unsigned int`.
#[expect(clippy::cast_possible_truncation, reason = "what the kernel does")]
const fn low(argument: u64) -> u32 {
    argument as u32
}

const fn signed(argument: u64) -> i32 {
    low(argument).cast_signed()
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
