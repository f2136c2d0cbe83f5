//! Fault queues: I/O page faults on their way to user space, and its answers on their way back
//! (`drivers/iommu/iommufd/eventq.c`).

use std::collections::{BTreeMap, VecDeque};
use std::mem::offset_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_iommu::{FaultGroup, PageFault, PageResponse};
use lychgate_types::Errno;
use zerocopy::{FromZeros, IntoBytes};

use crate::abi::iommufd as abi;
use crate::client::Client;
use crate::command::{Command, offset, read_value, write};
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::event_file::Queue;
use crate::fault_injection::allocation;
use crate::file::{Readiness, Reply};
use crate::objects::Object;

const FAULT_BYTES: u64 = size_of::<abi::HwptPgfault>() as u64;
const RESPONSE_BYTES: u64 = size_of::<abi::HwptPageResponse>() as u64;

impl Context {
    /// `IOMMU_FAULT_QUEUE_ALLOC`.
    pub(crate) fn fault_queue_alloc(
        &self,
        command: &mut Command<'_, abi::FaultQueueAlloc>,
    ) -> Result<Reply> {
        if command.argument.flags != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set");
        }
        allocation()?;
        let queue = Arc::new(FaultQueue::default());
        let id = self.lock().objects.add(Object::Fault(Arc::clone(&queue)))?;
        command.argument.out_fault_id = id;
        self.give_queue(command, id, queue, offset_of!(abi::FaultQueueAlloc, out_fault_fd))
    }
}

/// A queue of faults (`struct iommufd_fault`).
///
/// The two locks are those of Linux: `mutex`, held through a whole call or the end of an attachment,
/// and the lock of the list that faults are added to, from whatever they come from.
#[derive(Default)]
pub(crate) struct FaultQueue {
    answers: Mutex<Answers>,
    waiting: Mutex<Waiting>,
}

/// Groups that were read and not answered, by cookie.
#[derive(Default)]
struct Answers(BTreeMap<u32, Reported>);

/// Groups that were not read.
#[derive(Default)]
struct Waiting {
    groups: VecDeque<Reported>,
    readiness: Option<Arc<dyn Readiness>>,
}

struct Reported {
    group: FaultGroup,
    /// The number of the device's object.
    device: u32,
    /// Through which attachment it came.
    attachment: u64,
}

impl FaultQueue {
    /// Queues a group of faults of the device with the number `device`. May be called with the core's
    /// lock held.
    pub(crate) fn report(&self, group: FaultGroup, device: u32, attachment: u64) {
        let mut waiting = self.waiting();
        waiting.groups.push_back(Reported { group, device, attachment });
        waiting.tell();
    }

    /// Answers whatever came through an attachment that has ended: dropping a group answers it
    /// `Invalid` (`iommufd_auto_response_faults`).
    pub(crate) fn end(&self, attachment: u64) {
        let mut answers = self.answers();
        answers.0.retain(|_, reported| reported.attachment != attachment);
        let mut waiting = self.waiting();
        let groups = std::mem::take(&mut waiting.groups).into_iter();
        let (ended, kept): (VecDeque<_>, _) =
            groups.partition(|reported| reported.attachment == attachment);
        waiting.groups = kept;
        waiting.tell();
        // Whoever reports a fault may hold a lock that the answer takes.
        drop(waiting);
        drop(ended);
    }

    /// Answers whatever is left: nobody can any more (`iommufd_fault_destroy`).
    pub(crate) fn close(&self) {
        self.answers().0.clear();
        let groups = std::mem::take(&mut self.waiting().groups);
        drop(groups);
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn tell(&self) {
        if let Some(readiness) = &self.readiness {
            readiness.set_readable(!self.groups.is_empty());
        }
    }
}

impl Answers {
    /// The lowest number that is free, from 1 (`XA_FLAGS_ALLOC1`).
    fn cookie(&self) -> Option<u32> {
        (1..=u32::MAX)
            .zip(self.0.keys().map(Some).chain(std::iter::repeat(None)))
            .find_map(|(free, taken)| (taken != Some(&free)).then_some(free))
    }
}

impl Queue for FaultQueue {
    const NAME: &'static str = "[iommufd-pgfault]";

    /// Whole groups only.
    fn read(&self, client: &dyn Client, buffer: u64, count: u64) -> Result<u64> {
        if !count.is_multiple_of(FAULT_BYTES) {
            return refuse(Errno::ESPIPE, format!("the size is not a multiple of {FAULT_BYTES}"));
        }
        let mut answers = self.answers();
        let mut done = 0;
        loop {
            let Some(reported) = self.waiting().groups.pop_front() else {
                break;
            };
            let result = match answers.cookie() {
                Some(cookie) => {
                    reported.write(client, buffer, done, count, cookie).map(|bytes| (bytes, cookie))
                }
                None => refuse(Errno::EBUSY, "every cookie is taken"),
            };
            match result {
                Ok((bytes, cookie)) => {
                    answers.0.insert(cookie, reported);
                    done += bytes;
                }
                Err(refusal) => {
                    self.waiting().groups.push_front(reported);
                    if done == 0 {
                        return Err(refusal);
                    }
                    break;
                }
            }
        }
        self.waiting().tell();
        Ok(done)
    }

    fn write(&self, client: &dyn Client, buffer: u64, count: u64) -> Result<u64> {
        if !count.is_multiple_of(RESPONSE_BYTES) {
            return refuse(
                Errno::ESPIPE,
                format!("the size is not a multiple of {RESPONSE_BYTES}"),
            );
        }
        let mut answers = self.answers();
        let mut done = 0;
        while done < count {
            let answered = offset(buffer, done).and_then(|at| answers.answer(client, at));
            match answered {
                Ok(()) => done += RESPONSE_BYTES,
                Err(refusal) if done == 0 => return Err(refusal),
                Err(_) => break,
            }
        }
        Ok(done)
    }

    fn wait_with(&self, readiness: Arc<dyn Readiness>) {
        let mut waiting = self.waiting();
        waiting.readiness = Some(readiness);
        waiting.tell();
    }
}

impl Answers {
    /// Takes one answer from the client.
    fn answer(&mut self, client: &dyn Client, at: u64) -> Result<()> {
        let abi::HwptPageResponse { cookie, code } = read_value(client, at)?;
        let response = match code {
            abi::PAGE_RESP_SUCCESS => PageResponse::Success,
            abi::PAGE_RESP_INVALID => PageResponse::Invalid,
            code => return refuse(Errno::EINVAL, format!("there is no response {code}")),
        };
        match self.0.remove(&cookie) {
            Some(reported) => {
                reported.group.respond(response);
                Ok(())
            }
            None => refuse(Errno::EINVAL, format!("no group of faults has the cookie {cookie}")),
        }
    }
}

impl Reported {
    /// Writes the records of the group behind `done` bytes, if they fit into `count`; gives theirs.
    fn write(
        &self,
        client: &dyn Client,
        buffer: u64,
        done: u64,
        count: u64,
        cookie: u32,
    ) -> Result<u64> {
        let faults = self.group.faults();
        let bytes = FAULT_BYTES.saturating_mul(faults.len() as u64);
        if bytes > count - done {
            return refuse(Errno::EINVAL, format!("the group of faults needs {bytes} bytes"));
        }
        let mut at = offset(buffer, done)?;
        for fault in faults {
            write(client, at, self.record(fault, cookie).as_bytes())?;
            at = offset(at, FAULT_BYTES)?;
        }
        Ok(bytes)
    }

    fn record(&self, fault: &PageFault, cookie: u32) -> abi::HwptPgfault {
        let mut record = abi::HwptPgfault {
            dev_id: self.device,
            grpid: fault.group,
            perm: fault.perm,
            addr: fault.iova.get(),
            cookie,
            ..FromZeros::new_zeroed()
        };
        if let Some(pasid) = fault.pasid {
            record.flags |= abi::PGFAULT_FLAGS_PASID_VALID;
            record.pasid = pasid.get();
        }
        if fault.last {
            record.flags |= abi::PGFAULT_FLAGS_LAST_PAGE;
        }
        record
    }
}
