//! Access objects: kernel users of an IOAS that pin, read or write what is mapped there, as drivers
//! of mediated devices do (`struct iommufd_access`, `drivers/iommu/iommufd/device.c`).

use std::sync::{Arc, MutexGuard};

use lychgate_types::{Errno, PhysRun};

use crate::client::Client;
use crate::context::{Context, ContextRef};
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
use crate::io_pagetable::Pin;
use crate::objects::Object;
use crate::pages::Transfer;
use crate::state::State;

/// What a kernel user of an IOAS does when it is told something (`struct iommufd_access_ops`).
pub trait AccessOps: Send + Sync {
    /// `len` bytes from `iova` are about to be unmapped: whatever is pinned there is to be unpinned
    /// before this returns. Everything, from 0 with `u64::MAX`, when the access object leaves the
    /// IOAS. Called without any lock of the context.
    fn unmap(&self, iova: u64, len: u64);
}

/// An access object that a kernel user holds. Dropping it destroys it; what it pinned is to be unpinned
/// by then, at the latest when [`Access::detach`] asks for it.
pub struct Access {
    context: ContextRef,
    id: u32,
}

impl ContextRef {
    /// Makes an access object (`iommufd_access_create`). It pins pages if `pins`, else it only reads
    /// and writes; `ops` hears of unmaps. `EBUSY` when no object number is free.
    pub fn create_access(&self, ops: Arc<dyn AccessOps>, pins: bool) -> Result<Access> {
        let id = self.lock().add_access(Some(ops), pins)?;
        Ok(Access { context: self.clone(), id })
    }
}

impl Access {
    /// The number of its object, `out_devid` of a mediated device.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The context that it is in.
    pub fn context(&self) -> &ContextRef {
        &self.context
    }

    /// Begins to use an IOAS (`iommufd_access_attach`). `EINVAL` when it uses one; `ENOENT` when
    /// `ioas` is none; `EADDRINUSE` when it pins pages and an area is not made of whole ones;
    /// `EBUSY` while another thread takes it off one.
    pub fn attach(&self, ioas: u32) -> Result<()> {
        let state = self.context.lock();
        if state.objects.access(self.id)?.ioas.is_some() {
            return refuse(Errno::EINVAL, "the access object has an IOAS already");
        }
        state.objects.ioas(ioas)?;
        self.context.change_access(state, self.id, Some(ioas))
    }

    /// Changes over to another IOAS (`iommufd_access_replace`). `ENOENT` when it uses none, else as
    /// [`Access::attach`].
    pub fn replace(&self, ioas: u32) -> Result<()> {
        let state = self.context.lock();
        if state.objects.access(self.id)?.ioas.is_none() {
            return refuse(Errno::ENOENT, "the access object has no IOAS");
        }
        state.objects.ioas(ioas)?;
        self.context.change_access(state, self.id, Some(ioas))
    }

    /// Uses no IOAS any more (`iommufd_access_detach`).
    pub fn detach(&self) {
        // Only another thread that does the same is in the way.
        let _ = self.context.change_access(self.context.lock(), self.id, None);
    }

    /// Pins what is mapped at `len` bytes from `iova`, and gives the frames, whole pages of them, in
    /// order. Pages are pinned until [`Access::unpin_pages`] is called with the same range
    /// (`iommufd_access_pin_pages`).
    ///
    /// `EINVAL` when it pins no pages, `len` is 0, the range does not lead to whole pages, or it is
    /// being unmapped; `EOVERFLOW`; `ENOENT` without an IOAS and where nothing is mapped; `EPERM`
    /// where what is mapped may not be read, or written with `write`; `EFAULT`, `ENOMEM` from
    /// pinning.
    pub fn pin_pages(&self, iova: u64, len: u64, write: bool) -> Result<Vec<PhysRun>> {
        self.context.lock().pin_pages(self.id, iova, len, write)
    }

    /// Undoes [`Access::pin_pages`] of the same range (`iommufd_access_unpin_pages`).
    pub fn unpin_pages(&self, iova: u64, len: u64) {
        self.context.lock().unpin_pages(self.id, iova, len);
    }

    /// Reads what is mapped from `iova` on (`iommufd_access_rw`): as `caller` does where it is the
    /// caller's own memory, else, and without a caller, by its frames. Errors as of
    /// [`Access::pin_pages`].
    pub fn read(&self, iova: u64, to: &mut [u8], caller: Option<&dyn Client>) -> Result<()> {
        self.copy(iova, Transfer::Read(to), caller)
    }

    /// Writes what is mapped from `iova` on, as [`Access::read`].
    pub fn write(&self, iova: u64, from: &[u8], caller: Option<&dyn Client>) -> Result<()> {
        self.copy(iova, Transfer::Write(from), caller)
    }

    fn copy(&self, iova: u64, copy: Transfer<'_>, caller: Option<&dyn Client>) -> Result<()> {
        let state = self.context.lock();
        let ioas = state.objects.access(self.id)?.ioas()?;
        state.objects.ioas(ioas)?.table.copy(iova, copy, caller)
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        self.detach();
        self.context.lock().objects.remove(self.id);
    }
}

/// An access object as the context keeps it.
pub(crate) struct AccessObject {
    /// `None` for an internal one, whose pins no unmap takes away.
    ops: Option<Arc<dyn AccessOps>>,
    pins: bool,
    /// The IOAS in which it may pin, read and write.
    ioas: Option<u32>,
    /// The IOAS in which it may unpin: differs from `ioas` while it leaves it.
    ioas_unpin: Option<u32>,
}

impl AccessObject {
    pub(crate) fn ioas(&self) -> Result<u32> {
        match self.ioas {
            Some(ioas) => Ok(ioas),
            None => refuse(Errno::ENOENT, "the access object has no IOAS"),
        }
    }
}

impl State {
    /// Adds an access object; without `ops` an internal one, as hardware queues use it. Whoever made
    /// it uses it: callers cannot destroy it.
    pub(crate) fn add_access(
        &mut self,
        ops: Option<Arc<dyn AccessOps>>,
        pins: bool,
    ) -> Result<u32> {
        allocation()?;
        let access = AccessObject { ops, pins, ioas: None, ioas_unpin: None };
        let id = self.objects.add(Object::Access(Box::new(access)))?;
        self.objects.hold(id);
        self.objects.publish(id);
        Ok(id)
    }

    /// Adds an internal access object that uses an IOAS and pins its pages
    /// (`iommufd_access_create_internal`). `ENOENT` when `ioas` is none; `EADDRINUSE`.
    pub(crate) fn add_internal_access(&mut self, ioas: u32) -> Result<u32> {
        self.objects.ioas(ioas)?;
        let id = self.add_access(None, true)?;
        if let Err(refusal) = self.enter(id, ioas) {
            self.objects.remove(id);
            return Err(refusal);
        }
        if let Ok(access) = self.objects.access_mut(id) {
            (access.ioas, access.ioas_unpin) = (Some(ioas), Some(ioas));
        }
        Ok(id)
    }

    /// Removes an internal access object, which has unpinned what it pinned.
    pub(crate) fn remove_internal_access(&mut self, id: u32) {
        if let Some(Object::Access(access)) = self.objects.remove(id)
            && let Some(ioas) = access.ioas
        {
            self.leave(id, ioas);
        }
    }

    /// As [`Access::pin_pages`]. What an internal access object pins cannot be unmapped.
    pub(crate) fn pin_pages(
        &mut self,
        id: u32,
        iova: u64,
        len: u64,
        write: bool,
    ) -> Result<Vec<PhysRun>> {
        let access = self.objects.access(id)?;
        if !access.pins {
            return refuse(Errno::EINVAL, "the access object pins no pages");
        }
        let how = Pin { write, lock: access.ops.is_none() };
        let ioas = access.ioas()?;
        self.objects.ioas_mut(ioas)?.table.pin(iova, len, how)
    }

    /// As [`Access::unpin_pages`].
    pub(crate) fn unpin_pages(&mut self, id: u32, iova: u64, len: u64) {
        let Ok(access) = self.objects.access(id) else {
            return;
        };
        let locked = access.ops.is_none();
        if let Some(ioas) = access.ioas_unpin
            && let Ok(ioas) = self.objects.ioas_mut(ioas)
        {
            ioas.table.unpin(iova, len, locked);
        }
    }

    fn enter(&mut self, id: u32, ioas: u32) -> Result<()> {
        let access = self.objects.access(id)?;
        let (pins, ops) = (access.pins, access.ops.clone());
        self.objects.ioas_mut(ioas)?.table.add_access(id, pins, ops)?;
        self.objects.hold(ioas);
        Ok(())
    }

    fn leave(&mut self, id: u32, ioas: u32) {
        if let Ok(ioas) = self.objects.ioas_mut(ioas) {
            ioas.table.remove_access(id);
        }
        self.objects.put(ioas);
    }
}

impl Context {
    /// Takes an access object off its IOAS and puts it onto `new` (`iommufd_access_change_ioas`).
    fn change_access<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        id: u32,
        new: Option<u32>,
    ) -> Result<()> {
        let access = state.objects.access_mut(id)?;
        let old = access.ioas;
        if old != access.ioas_unpin {
            return refuse(Errno::EBUSY, "the access object is leaving its IOAS");
        }
        if old == new {
            return Ok(());
        }
        // From here on it pins nothing, and unpins in its old IOAS.
        access.ioas = None;
        let ops = access.ops.clone();
        if let Some(new) = new
            && let Err(refusal) = state.enter(id, new)
        {
            state.objects.access_mut(id)?.ioas = old;
            return Err(refusal);
        }
        if let Some(old) = old {
            if let Some(ops) = ops {
                drop(state);
                ops.unmap(0, u64::MAX);
                state = self.lock();
            }
            state.leave(id, old);
        }
        let access = state.objects.access_mut(id)?;
        (access.ioas, access.ioas_unpin) = (new, new);
        Ok(())
    }
}
