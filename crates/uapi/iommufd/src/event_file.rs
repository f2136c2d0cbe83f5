//! Descriptors of queues that user space reads (`drivers/iommu/iommufd/eventq.c`).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use lychgate_types::Errno;

use crate::abi::Argument;
use crate::client::Client;
use crate::command::Command;
use crate::context::{Context, ContextRef};
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection::allocation;
use crate::file::{NewFile, OpenFile, Readiness, Reply};

/// What is behind a descriptor.
pub(crate) trait Queue: Send + Sync + 'static {
    /// What the descriptor is called.
    const NAME: &'static str;

    /// Moves what fits into `count` bytes to the client's `buffer`, and gives the bytes.
    fn read(&self, client: &dyn Client, buffer: u64, count: u64) -> Result<u64>;

    /// Takes `count` bytes from the client's `buffer`, and gives those that were taken.
    fn write(&self, client: &dyn Client, buffer: u64, count: u64) -> Result<u64>;

    /// Whom to tell from now on whether there is something to read.
    fn wait_with(&self, readiness: Arc<dyn Readiness>);
}

impl Context {
    /// Answers a call that made the object `id`, a queue, of which the caller gets a descriptor in the
    /// member at `offset`. The object can be named once the caller has it, and is used for as long.
    pub(crate) fn give_queue<A: Argument, Q: Queue>(
        &self,
        command: &Command<'_, A>,
        id: u32,
        queue: Arc<Q>,
        offset: usize,
    ) -> Result<Reply> {
        let promised = self.reference().and_then(|context| {
            command.respond()?;
            Ok(QueueFile { context, id, queue, given: AtomicBool::new(false) })
        });
        let mut state = self.lock();
        match promised {
            Ok(file) => {
                state.objects.hold(id);
                let file = NewFile { file: Arc::new(file), cloexec: true };
                Ok(Reply::FileAt { file, at: command.member_at(offset) })
            }
            Err(refusal) => {
                self.destroy_object(&mut state, id);
                Err(refusal)
            }
        }
    }

    /// A reference for a file that a call makes.
    fn reference(&self) -> Result<ContextRef> {
        allocation()?;
        Self::from_file(self).ok_or_else(|| Refusal::new(Errno::ENODEV, "the file is being closed"))
    }
}

/// An open file of a queue. It keeps the context, and uses the queue's object.
struct QueueFile<Q> {
    context: ContextRef,
    id: u32,
    queue: Arc<Q>,
    given: AtomicBool,
}

impl<Q: Queue> OpenFile for QueueFile<Q> {
    fn name(&self) -> String {
        Q::NAME.to_owned()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        None
    }

    fn ioctl(&self, _: &dyn Client, _: u32, _: u64) -> Result<Reply> {
        refuse(Errno::ENOTTY, "a queue has no ioctls")
    }

    fn read_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        at_start(offset)?;
        self.queue.read(client, buffer, count)
    }

    fn write_at(&self, client: &dyn Client, buffer: u64, count: u64, offset: u64) -> Result<u64> {
        at_start(offset)?;
        self.queue.write(client, buffer, count)
    }

    fn is_queue(&self) -> bool {
        true
    }

    fn wait_with(&self, readiness: Arc<dyn Readiness>) -> bool {
        self.queue.wait_with(readiness);
        true
    }

    fn given(&self) {
        self.given.store(true, Ordering::Relaxed);
        self.context.lock().objects.publish(self.id);
    }

    fn release(&self) {
        let mut state = self.context.lock();
        state.objects.put(self.id);
        if !self.given.load(Ordering::Relaxed) {
            self.context.destroy_object(&mut state, self.id);
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

fn at_start(offset: u64) -> Result<()> {
    if offset != 0 {
        return refuse(Errno::ESPIPE, "a queue has no positions");
    }
    Ok(())
}
