//! One run: launch, service, signals, end.

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use lychgate_machine::System;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::{Pid, Resource, Rlimit, Signal};

use crate::command::{Command, ExitStatus};
use crate::error::Error;
use crate::files::Files;
use crate::filter::{self, Selection};
use crate::paths::Paths;
use crate::process;
use crate::server::Server;
use crate::sys::guardian::Message;
use crate::sys::notify::Listener;
use crate::sys::seccomp::{self, Lack};
use crate::sys::signals::{Caught, Signals};
use crate::sys::spawn::{Failure, Leash, Plan, Spawned, Stage, spawn};
use crate::trace::Tracer;

/// Descriptors end here: programs with `select` need theirs below `FD_SETSIZE`.
const NUMBERS_END: u64 = 1024;
/// How many descriptors a process can have.
const NUMBERS: u64 = 256;
/// The least hard limit of open files that leaves room for the client's own.
const LEAST_FILES: u64 = 512;

/// How long to wait before a file that seems closed is looked at again.
const SOON: Timespec = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };

/// How a run is done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Options {
    /// Eventfds are made by the supervisor even where it could fetch a client's.
    pub make_eventfds: bool,
    /// Where the run puts its files, such as [`Scratch::path`](crate::Scratch::path); `None` for
    /// where temporary files are. They go with the run.
    pub scratch: Option<PathBuf>,
    /// What looks for the program's frames in each call that the machine serves, for
    /// [`lychgate_machine::System::call_came_from`]. Nothing does, unless it is given.
    pub origins: Option<Origins>,
}

/// Frames of programs, shared with whoever looks for their places in the source.
#[derive(Clone)]
pub struct Origins(pub Arc<lychgate_origins::Origins>);

/// Two are the same when they are shared.
impl PartialEq for Origins {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Origins {}

impl std::fmt::Debug for Origins {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Origins")
    }
}

/// Runs a program on a machine, until it and all that it started have ended, daemons included.
///
/// The program is in the caller's process group and on its terminal. `SIGINT`, `SIGQUIT` and
/// `SIGHUP` of a terminal reach it from there; those and `SIGTERM`, `SIGUSR1` and `SIGUSR2` that
/// others send to the caller are passed on: to the program, and after its end to what it left
/// behind. Of several runs at once in a process, the first one passes signals on.
///
/// If the caller dies, by `SIGKILL` even, the program and all that it started are killed.
///
/// The status is that of the program; processes that outlive it count for nothing.
pub fn run(
    command: &Command,
    system: Arc<dyn System>,
    options: &Options,
    tracer: Arc<dyn Tracer>,
) -> Result<ExitStatus, Error> {
    check_host()?;
    let paths = Paths::new(system.tree(), options.scratch.clone())?;
    let files = Files::new().map_err(|error| Error::Os("inotify", error))?;
    let (descriptors, open_files) = numbers()?;
    let eventfds = options.make_eventfds || !can_fetch_files();
    let selection = Selection { descriptors: descriptors.clone(), eventfds };
    let program = filter::program(&selection);
    let signals = Signals::catch().map_err(|error| Error::Os("cannot catch signals", error))?;
    let (candidates, arguments) = (command.candidates()?, command.arguments()?);
    let environment = command.environment()?;
    let spawned = spawn(&Plan {
        candidates: &candidates,
        arguments: &arguments,
        environment: &environment,
        filter: &program,
        open_files,
        last_number: i32::try_from(descriptors.end - 1).unwrap_or(0),
        signals: signals.as_ref(),
    })
    .map_err(|error| Error::Os("cannot start a process", error))?;
    let run = Run { command, spawned, signals };
    let client = run.client()?;
    let listener = Listener::new(run.listener()?);
    let server = Arc::new(Server::new(
        listener,
        system,
        tracer,
        paths,
        files,
        descriptors,
        options.origins.clone(),
    ));
    let serving = {
        let server = server.clone();
        let end = End(run.spawned.leash.clone());
        let thread = std::thread::Builder::new().name("interpose".to_owned());
        let serve = move || {
            let _end = end;
            server.serve();
        };
        thread.spawn(serve).map_err(|error| Error::Os("cannot serve", error))?
    };
    let status = run.watch(client, &server);
    run.spawned.leash.let_go();
    let served = serving.join();
    server.files.settle();
    server.files.release_all();
    served.map_err(|_| Error::Panicked)?;
    status
}

/// Without the thread that serves, nothing of the client is to wait for an answer.
struct End(Arc<Leash>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.let_go();
    }
}

/// What is held of a run under way. When it is dropped, nothing of the client is left.
struct Run<'a> {
    command: &'a Command,
    spawned: Spawned,
    signals: Option<Signals>,
}

impl Run<'_> {
    /// The process that becomes the client.
    fn client(&self) -> Result<u32, Error> {
        match Message::read(&self.spawned.messages) {
            Ok(Some(Message::Started(process))) => Ok(process),
            Ok(_) => Err(Error::Os("cannot start a process", io::ErrorKind::OutOfMemory.into())),
            Err(error) => Err(Error::Os("cannot hear of the program", error)),
        }
    }

    /// The listener, once the client has its filter.
    fn listener(&self) -> Result<OwnedFd, Error> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut pieces = [io::IoSliceMut::new(&mut byte)];
        let received = rustix::io::retry_on_intr(|| {
            rustix::net::recvmsg(
                &self.spawned.socket,
                &mut pieces,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )
        });
        received.map_err(|error| Error::Os("cannot receive the listener", error.into()))?;
        let file = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut files) => files.next(),
            _ => None,
        });
        match file {
            Some(file) => Ok(file),
            None => Err(self.failure()?.unwrap_or_else(|| {
                Error::Start("it was killed", io::ErrorKind::UnexpectedEof.into())
            })),
        }
    }

    /// What the child reported; `None` when it runs the program.
    fn failure(&self) -> Result<Option<Error>, Error> {
        let failure = Failure::read(&self.spawned.report)
            .map_err(|error| Error::Os("cannot hear of the program", error))?;
        Ok(failure.map(|failure| self.explain(failure)))
    }

    fn explain(&self, failure: Failure) -> Error {
        let source = io::Error::from_raw_os_error(failure.errno);
        match (failure.stage, failure.errno) {
            (Stage::Filter, libc::EBUSY) => Error::Nested,
            (Stage::Filter, libc::EINVAL) => Error::NoNotification,
            (Stage::Prepare, _) => Error::Start("its process cannot be prepared", source),
            (Stage::Filter, _) => Error::Start("its filter is refused", source),
            (Stage::Listener, _) => Error::Start("its listener cannot be sent", source),
            (Stage::Exec, libc::ENOENT | libc::ENOTDIR) => {
                Error::NotFound(self.command.program().to_owned())
            }
            (Stage::Exec, _) => {
                Error::NotExecutable { program: self.command.program().to_owned(), source }
            }
        }
    }

    /// Releases files and passes signals on until nothing is left to be served.
    fn watch(&self, client: u32, server: &Server) -> Result<ExitStatus, Error> {
        let mut status = None;
        let mut again = false;
        loop {
            let mut polled = vec![
                PollFd::new(&self.spawned.messages, PollFlags::IN),
                PollFd::from_borrowed_fd(server.files.hints(), PollFlags::IN),
            ];
            if let Some(signals) = &self.signals {
                polled.push(PollFd::new(signals, PollFlags::IN));
            }
            match rustix::event::poll(&mut polled, again.then_some(&SOON)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::Os("cannot wait", error.into())),
            }
            let message = polled.first().is_some_and(|polled| !polled.revents().is_empty());
            again = server.files.settle();
            while let Some(caught) = self.signals.as_ref().and_then(Signals::next) {
                self.pass_on(caught, client, status.is_some());
            }
            if !message {
                continue;
            }
            match Message::read(&self.spawned.messages) {
                Ok(Some(Message::Ended(ended))) => status = Some(ended),
                Ok(Some(Message::Started(_))) => {}
                // The guardian ends with the last process.
                Ok(None) => break,
                Err(error) => return Err(Error::Os("cannot hear of the program", error)),
            }
        }
        if let Some(failure) = self.failure()? {
            return Err(failure);
        }
        match status {
            Some(status) => Ok(ExitStatus::from_wait(status)),
            None => Err(Error::Os("the guardian was killed", io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn pass_on(&self, caught: Caught, client: u32, ended: bool) {
        let Some(signal) = Signal::from_named_raw(caught.signal) else { return };
        let to = if ended {
            process::children(self.spawned.guardian.cast_unsigned())
        } else if caught.by_kernel {
            // The terminal has sent it to the client as well.
            Vec::new()
        } else {
            vec![client]
        };
        for process in to.into_iter().filter_map(pid) {
            let _ = rustix::process::kill_process(process, signal);
        }
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        self.spawned.leash.let_go();
        if let Some(guardian) = pid(self.spawned.guardian.cast_unsigned()) {
            let _ = rustix::io::retry_on_intr(|| {
                rustix::process::waitpid(Some(guardian), rustix::process::WaitOptions::empty())
            });
        }
    }
}

fn pid(process: u32) -> Option<Pid> {
    i32::try_from(process).ok().and_then(Pid::from_raw)
}

/// Whether this host can do it at all.
fn check_host() -> Result<(), Error> {
    seccomp::probe().map_err(|lack| match lack {
        Lack::Notification => Error::NoNotification,
        Lack::WaitKillable => Error::NoWaitKillable,
    })?;
    let own = std::fs::read_link("/proc/self").map_err(|_| Error::NoProc)?;
    if own.to_str().and_then(|own| own.parse().ok()) != Some(std::process::id()) {
        return Err(Error::NoProc);
    }
    let scope = std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope");
    match scope.ok().and_then(|scope| scope.trim().parse().ok()) {
        Some(2) if !may_trace() => Err(Error::Yama(2)),
        Some(scope) if scope > 2 => Err(Error::Yama(scope)),
        _ => Ok(()),
    }
}

/// `CAP_SYS_PTRACE`.
fn may_trace() -> bool {
    let status = process::Status::of(std::process::id());
    status.ok().and_then(|status| status.capabilities()).is_some_and(|set| set & 1 << 19 != 0)
}

/// Whether `pidfd_getfd` is allowed; Docker's default profile denies it.
fn can_fetch_files() -> bool {
    let Some(own) = pid(std::process::id()) else { return false };
    let Ok(pidfd) = rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty()) else {
        return false;
    };
    let flags = rustix::process::PidfdGetfdFlags::empty();
    let number = std::os::fd::AsRawFd::as_raw_fd(&pidfd);
    rustix::process::pidfd_getfd(&pidfd, number, flags).is_ok()
}

/// The numbers for descriptors of ours, and the soft limit of open files that they need: 768 to
/// 1023, or less where the hard limit is lower. The supervisor's own soft limit becomes the hard
/// one.
fn numbers() -> Result<(Range<u32>, u64), Error> {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let (soft, hard) = (limit.current.unwrap_or(u64::MAX), limit.maximum.unwrap_or(u64::MAX));
    if hard < LEAST_FILES {
        return Err(Error::TooFewFiles(hard));
    }
    let end = hard.min(NUMBERS_END);
    let numbers = u32::try_from(end - NUMBERS).ok().zip(u32::try_from(end).ok());
    let (first, end) = numbers.ok_or(Error::TooFewFiles(hard))?;
    let all = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, all) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
    Ok((first..end, soft.max(u64::from(end))))
}
