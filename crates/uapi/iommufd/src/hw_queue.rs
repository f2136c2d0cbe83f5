//! Queues of a guest that hardware reads: `IOMMU_HW_QUEUE_ALLOC` (`iommufd_hw_queue_alloc_ioctl`).

use lychgate_iommu::{HwQueue, HwQueueRequest, NewHwQueue};
use lychgate_types::{Errno, Iova, PhysAddr, PhysRun};

use crate::abi::iommufd as abi;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection::allocation;
use crate::mm::PAGE_SIZE;
use crate::objects::Object;
use crate::state::State;

/// A queue that hardware reads (`struct iommufd_hw_queue`).
pub(crate) struct HwQueueObject {
    viommu: u32,
    kind: u32,
    index: u32,
    /// The number of the queue that cannot go before it.
    after: Option<u32>,
    pinned: Pinned,
    queue: Box<dyn HwQueue>,
}

/// The memory of a queue: it can be neither unmapped nor moved while hardware reads it.
#[derive(Clone, Copy)]
struct Pinned {
    /// The number of the internal access object.
    access: u32,
    /// The first page.
    iova: u64,
    /// Whole pages.
    len: u64,
}

impl Context {
    /// `IOMMU_HW_QUEUE_ALLOC`.
    pub(crate) fn hw_queue_alloc(
        &self,
        command: &mut Command<'_, abi::HwQueueAlloc>,
    ) -> Result<()> {
        let argument = command.argument;
        if argument.flags != 0 || argument.kind == 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set, or no type is given");
        }
        if argument.length == 0 {
            return refuse(Errno::EINVAL, "the length is 0");
        }
        if argument.nesting_parent_iova.checked_add(argument.length - 1).is_none() {
            return refuse(Errno::EOVERFLOW, "the queue passes the end of the IOVA space");
        }
        let mut state = self.lock();
        let viommu = state.objects.viommu(argument.viommu_id)?;
        let kind = argument.kind;
        if !viommu.driver.supports_hw_queue(kind) {
            return refuse(Errno::EOPNOTSUPP, format!("the vIOMMU has no queue of type {kind:#x}"));
        }
        let ioas = state.objects.hwpt(viommu.hwpt)?.ioas;
        let driver = std::sync::Arc::clone(&viommu.driver);
        allocation()?;
        let (pinned, base) = state.pin_queue(ioas, &argument)?;
        let request = HwQueueRequest {
            kind,
            index: argument.index,
            iova: Iova::new(argument.nesting_parent_iova),
            base,
            len: argument.length,
        };
        let made = driver.hw_queue_init(&request);
        let NewHwQueue { queue, after } = made.map_err(|errno| {
            state.unpin_queue(pinned);
            Refusal::new(errno, "the driver does not take the queue")
        })?;
        let after = after.and_then(|index| state.find_queue(argument.viommu_id, kind, index));
        let (viommu, index) = (argument.viommu_id, argument.index);
        let object = HwQueueObject { viommu, kind, index, after, pinned, queue };
        let id = state.objects.add(Object::HwQueue(object));
        let id = id.inspect_err(|_| state.unpin_queue(pinned))?;
        state.objects.hold(viommu);
        if let Some(after) = after {
            state.objects.hold(after);
        }
        drop(state);
        command.argument.out_hw_queue_id = id;
        self.finish(command, id)
    }
}

impl HwQueueObject {
    /// It was destroyed.
    pub(crate) fn end(self, state: &mut State) {
        let Self { viommu, after, pinned, queue, .. } = self;
        drop(queue);
        if let Some(after) = after {
            state.objects.put(after);
        }
        state.unpin_queue(pinned);
        state.objects.put(viommu);
    }
}

impl State {
    /// Pins the pages of a queue, which must be contiguous, and gives where it begins.
    fn pin_queue(&mut self, ioas: u32, argument: &abi::HwQueueAlloc) -> Result<(Pinned, PhysAddr)> {
        let offset = argument.nesting_parent_iova % PAGE_SIZE;
        let iova = argument.nesting_parent_iova - offset;
        let len = offset.checked_add(argument.length);
        let Some(len) = len.and_then(|len| len.checked_next_multiple_of(PAGE_SIZE)) else {
            return refuse(Errno::ERANGE, "the queue has too many pages");
        };
        allocation()?;
        let access = self.add_internal_access(ioas)?;
        let pinned = Pinned { access, iova, len };
        let frames = match self.pin_pages(access, iova, len, false) {
            Ok(frames) => frames,
            Err(refusal) => {
                self.remove_internal_access(access);
                return Err(refusal);
            }
        };
        let contiguous = |pair: &[PhysRun]| match pair {
            [run, next] => run.start.checked_add(run.len) == Some(next.start),
            _ => true,
        };
        match frames.first().and_then(|first| first.start.checked_add(offset)) {
            Some(base) if frames.windows(2).all(contiguous) => Ok((pinned, base)),
            _ => {
                self.unpin_queue(pinned);
                refuse(Errno::EFAULT, "the queue is not contiguous in memory")
            }
        }
    }

    fn unpin_queue(&mut self, pinned: Pinned) {
        self.unpin_pages(pinned.access, pinned.iova, pinned.len);
        self.remove_internal_access(pinned.access);
    }

    fn find_queue(&self, viommu: u32, kind: u32, index: u32) -> Option<u32> {
        self.objects.iter().find_map(|(id, object)| match object {
            Object::HwQueue(queue) => {
                ((queue.viommu, queue.kind, queue.index) == (viommu, kind, index)).then_some(id)
            }
            _ => None,
        })
    }
}
