//! Queues of a vIOMMU's events: `IOMMU_VEVENTQ_ALLOC` (`drivers/iommu/iommufd/eventq.c`).

use std::collections::VecDeque;
use std::mem::offset_of;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_types::Errno;
use zerocopy::IntoBytes;

use crate::abi::iommufd as abi;
use crate::client::Client;
use crate::command::{Command, offset, write};
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::event_file::Queue;
use crate::fault_injection::allocation;
use crate::file::{Readiness, Reply};
use crate::objects::Object;
use crate::state::State;

/// The most events that a queue may hold.
const MAX_DEPTH: u32 = 1 << 19;

const HEADER_BYTES: u64 = size_of::<abi::VeventHeader>() as u64;

/// A queue of a vIOMMU (`struct iommufd_veventq`).
pub(crate) struct Veventq {
    viommu: u32,
    queue: Arc<EventQueue>,
}

impl Context {
    /// `IOMMU_VEVENTQ_ALLOC`.
    pub(crate) fn veventq_alloc(
        &self,
        command: &mut Command<'_, abi::VeventqAlloc>,
    ) -> Result<Reply> {
        let argument = command.argument;
        if argument.flags != 0 || argument.reserved != 0 || argument.kind == 0 {
            return refuse(
                Errno::EOPNOTSUPP,
                "an unknown flag or a reserved member is set, or no type is given",
            );
        }
        if !(1..=MAX_DEPTH).contains(&argument.veventq_depth) {
            return refuse(Errno::EINVAL, format!("the depth is 0 or above {MAX_DEPTH}"));
        }
        let mut state = self.lock();
        let viommu = state.objects.viommu(argument.viommu_id)?;
        if !viommu.driver.supports_veventq(argument.kind) {
            let kind = argument.kind;
            return refuse(
                Errno::EOPNOTSUPP,
                format!("the vIOMMU has no events of type {kind:#x}"),
            );
        }
        let queue = Arc::new(EventQueue::new(argument.kind, argument.veventq_depth));
        allocation()?;
        let host = Arc::clone(&viommu.host);
        host.add_queue(Arc::clone(&queue))?;
        let object = Veventq { viommu: argument.viommu_id, queue: Arc::clone(&queue) };
        let id = state.objects.add(Object::Veventq(object));
        let id = id.inspect_err(|_| host.remove_queue(&queue))?;
        state.objects.hold(argument.viommu_id);
        drop(state);
        command.argument.out_veventq_id = id;
        self.give_queue(command, id, queue, offset_of!(abi::VeventqAlloc, out_veventq_fd))
    }
}

impl Veventq {
    /// It was destroyed.
    pub(crate) fn end(self, state: &mut State) {
        if let Ok(viommu) = state.objects.viommu(self.viommu) {
            viommu.host.remove_queue(&self.queue);
        }
        state.objects.put(self.viommu);
    }
}

/// Events on their way to user space.
pub(crate) struct EventQueue {
    kind: u32,
    depth: usize,
    /// One read at a time, so that events stay in order.
    reading: Mutex<()>,
    waiting: Mutex<Waiting>,
}

struct Waiting {
    events: VecDeque<Event>,
    /// Stands behind all events, in place of those that came when the queue was full.
    lost: Option<abi::VeventHeader>,
    sequence: u32,
    readiness: Option<Arc<dyn Readiness>>,
}

#[derive(Clone)]
struct Event {
    header: abi::VeventHeader,
    data: Box<[u8]>,
}

impl EventQueue {
    fn new(kind: u32, depth: u32) -> Self {
        let waiting = Waiting { events: VecDeque::new(), lost: None, sequence: 0, readiness: None };
        Self {
            kind,
            depth: usize::try_from(depth).unwrap_or(usize::MAX),
            reading: Mutex::default(),
            waiting: Mutex::new(waiting),
        }
    }

    /// The type of its events.
    pub(crate) fn kind(&self) -> u32 {
        self.kind
    }

    /// Queues an event, or, in a full queue, that one was lost (`iommufd_vevent_handler`). A gap in the
    /// sequence tells of lost ones before an event, the header alone of those after the last.
    pub(crate) fn report(&self, data: &[u8]) {
        let mut waiting = self.waiting();
        let sequence = waiting.sequence;
        waiting.sequence = (sequence + 1) & i32::MAX.unsigned_abs();
        if waiting.events.len() < self.depth {
            waiting.lost = None;
            let header = abi::VeventHeader { flags: 0, sequence };
            waiting.events.push_back(Event { header, data: data.into() });
        } else {
            let flags = abi::VEVENTQ_FLAG_LOST_EVENTS;
            waiting.lost = Some(abi::VeventHeader { flags, sequence });
        }
        waiting.tell();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// The next record, and how it looks in the client.
    fn first(&self) -> Option<Event> {
        let lost = || self.lost.map(|header| Event { header, data: Box::default() });
        self.events.front().cloned().or_else(lost)
    }

    /// Forgets the record that [`Waiting::first`] gave, if it is still there.
    fn remove(&mut self, read: &Event) {
        if self.events.front().is_some_and(|event| event.header == read.header) {
            self.events.pop_front();
        } else if self.lost == Some(read.header) {
            self.lost = None;
        }
    }

    fn tell(&self) {
        if let Some(readiness) = &self.readiness {
            readiness.set_readable(!self.events.is_empty() || self.lost.is_some());
        }
    }
}

impl Queue for EventQueue {
    const NAME: &'static str = "[iommufd-viommu-event]";

    /// Whole records only.
    fn read(&self, client: &dyn Client, buffer: u64, count: u64) -> Result<u64> {
        if count < HEADER_BYTES {
            return refuse(Errno::EINVAL, format!("fewer than the {HEADER_BYTES} of a header"));
        }
        let _reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let mut done = 0;
        loop {
            let Some(event) = self.waiting().first() else {
                break;
            };
            match event.write(client, buffer, done, count) {
                Ok(bytes) => {
                    done += bytes;
                    self.waiting().remove(&event);
                }
                Err(refusal) if done == 0 => return Err(refusal),
                Err(_) => break,
            }
        }
        self.waiting().tell();
        Ok(done)
    }

    fn write(&self, _: &dyn Client, _: u64, _: u64) -> Result<u64> {
        refuse(Errno::EINVAL, "events are not answered")
    }

    fn wait_with(&self, readiness: Arc<dyn Readiness>) {
        let mut waiting = self.waiting();
        waiting.readiness = Some(readiness);
        waiting.tell();
    }
}

impl Event {
    /// Writes the record behind `done` bytes, if it fits into `count`; gives its bytes.
    fn write(&self, client: &dyn Client, buffer: u64, done: u64, count: u64) -> Result<u64> {
        let bytes = HEADER_BYTES.saturating_add(self.data.len() as u64);
        if bytes > count - done {
            return refuse(Errno::EINVAL, format!("the event needs {bytes} bytes"));
        }
        let at = offset(buffer, done)?;
        write(client, at, self.header.as_bytes())?;
        write(client, offset(at, HEADER_BYTES)?, &self.data)?;
        Ok(bytes)
    }
}
