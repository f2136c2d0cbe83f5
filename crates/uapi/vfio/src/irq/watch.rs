//! Waits until a client signals an eventfd (`virqfd.c`).

use std::io::IoSliceMut;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{EventFd, Refusal};
use lychgate_types::Errno;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{ReadWriteFlags, preadv2, read, write};

/// Calls a handler for each signal of an eventfd, until it is dropped.
pub(crate) struct Watch {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches `source`; a signal that is pending counts. `EOPNOTSUPP` for an eventfd that this side
    /// can only signal, `ENOMEM` when there is no thread for it.
    pub(crate) fn new(
        source: Arc<dyn EventFd>,
        handler: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        if source.as_fd().is_none() {
            return refuse(Errno::EOPNOTSUPP, "this eventfd cannot be waited on");
        }
        let no_resources =
            |error: &dyn std::fmt::Display| Refusal::new(Errno::ENOMEM, error.to_string());
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| no_resources(&error))?;
        let stop = Arc::new(stop);
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("vfio-virqfd".into())
            .spawn(move || watch(&*source, &stopped, handler))
            .map_err(|error| no_resources(&error))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Only a full counter could refuse, and then the thread is awake.
        let _ = write(&*self.stop, &1u64.to_le_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(source: &dyn EventFd, stop: &OwnedFd, handler: impl Fn()) {
    let Some(source) = source.as_fd() else { return };
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(source, PollFlags::IN),
            PollFd::from_borrowed_fd(stop.as_fd(), PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return,
        }
        let [source_ready, stop_ready] = fds.map(|fd| fd.revents());
        if !stop_ready.is_empty() {
            return;
        }
        if source_ready.contains(PollFlags::IN) {
            if take(source) {
                handler();
            }
        } else if !source_ready.is_empty() {
            return;
        }
    }
}

/// Takes the count of an eventfd; `false` when somebody else was faster. The file is the client's too
/// and may block, so this asks for the count only if it is still there, where the kernel lets it.
fn take(source: BorrowedFd<'_>) -> bool {
    const CURRENT_POSITION: u64 = u64::MAX;
    let mut count = [0; 8];
    let buffers = &mut [IoSliceMut::new(&mut count)];
    match preadv2(source, buffers, CURRENT_POSITION, ReadWriteFlags::NOWAIT) {
        Ok(_) => true,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
        Err(_) => read(source, &mut count).is_ok(),
    }
}
