//! Eventfds that the supervisor made for clients, where it cannot fetch theirs.
//!
//! Docker's default profile denies `pidfd_getfd`. There the supervisor makes each eventfd itself and
//! keeps a descriptor of it, to be found by the identity that `/proc/PID/fdinfo` shows.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use lychgate_types::Errno;
use rustix::event::EventfdFlags;

use crate::process;

/// How many are kept: a program with more has closed most, and the oldest goes.
const MOST: usize = 512;

/// Those that are kept.
#[derive(Default)]
pub(crate) struct EventFds(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    by_id: HashMap<String, (u64, OwnedFd)>,
    next: u64,
}

impl EventFds {
    /// Makes one, and gives a descriptor to hand to the client.
    pub(crate) fn make(&self, count: u32, flags: i32) -> Result<OwnedFd, Errno> {
        let allowed = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK | libc::EFD_SEMAPHORE;
        if flags & !allowed != 0 {
            return Err(Errno::EINVAL);
        }
        let flags = EventfdFlags::from_bits_retain(flags.cast_unsigned()) | EventfdFlags::CLOEXEC;
        let made = rustix::event::eventfd(count, flags).map_err(|_| Errno::EMFILE)?;
        let own = made.try_clone().map_err(|_| Errno::EMFILE)?;
        let id = process::file_info(std::process::id(), own.as_raw_fd(), "eventfd-id");
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = id {
            if kept.by_id.len() >= MOST {
                let oldest = kept.by_id.iter().min_by_key(|(_, (age, _))| *age);
                if let Some(oldest) = oldest.map(|(id, _)| id.clone()) {
                    kept.by_id.remove(&oldest);
                }
            }
            let age = kept.next;
            kept.next += 1;
            kept.by_id.insert(id, (age, own));
        }
        Ok(made)
    }

    /// A descriptor of the one with this identity.
    pub(crate) fn get(&self, id: &str) -> Option<OwnedFd> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.by_id.get(id)?.1.try_clone().ok()
    }
}
