//! The objects of a context and their numbers (`struct iommufd_object`, `ictx->objects`).

use std::any::Any;
use std::sync::Arc;

use lychgate_iommu::{DeviceId, GroupId, PagingDomain};
use lychgate_types::{Bdf, Errno};

use crate::access::AccessObject;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::io_pagetable::IoPageTable;
use crate::state::State;

/// An IO address space (`struct iommufd_ioas`).
pub(crate) struct Ioas {
    /// Distinct for each IOAS in the life of the process.
    pub(crate) serial: u64,
    /// What is mapped.
    pub(crate) table: IoPageTable,
    /// The page tables that hold it, in the order in which they came.
    pub(crate) hwpts: Vec<u32>,
}

/// A page table of an IOAS (`struct iommufd_hwpt_paging`).
pub(crate) struct Hwpt {
    /// Which IOAS.
    pub(crate) ioas: u32,
    /// The page table itself.
    pub(crate) domain: Arc<dyn PagingDomain>,
    /// Whether it was made by attaching to the IOAS; it goes with its last device.
    pub(crate) auto: bool,
    /// Whether DMA through it always snoops.
    pub(crate) coherent: bool,
}

/// A bound device (`struct iommufd_device`).
#[derive(Clone, Copy)]
pub(crate) struct DeviceObject {
    /// Which device.
    pub(crate) device: DeviceId,
    /// Where it is.
    pub(crate) bdf: Bdf,
    /// Its group.
    pub(crate) group: GroupId,
    /// Whether its IOMMU can make DMA always snoop.
    pub(crate) enforces_coherency: bool,
}

/// What the selftest keeps as an object, a mock device (`struct selftest_obj`).
pub(crate) trait SelftestObject: Any + Send {
    /// It was taken out of `state` to be destroyed, where it had the number `id`.
    fn destroy(self: Box<Self>, context: &Context, state: &mut State, id: u32);
}

/// Any object.
pub(crate) enum Object {
    /// An IO address space.
    Ioas(Box<Ioas>),
    /// A page table.
    Hwpt(Hwpt),
    /// A device.
    Device(DeviceObject),
    /// A kernel user of an IOAS.
    Access(Box<AccessObject>),
    /// Something of the selftest.
    Selftest(Box<dyn SelftestObject>),
}

impl Object {
    /// What it is, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Ioas(_) => "an IOAS",
            Self::Hwpt(_) => "a page table",
            Self::Device(_) => "a device",
            Self::Access(_) => "an access object",
            Self::Selftest(_) => "an object of the selftest",
        }
    }
}

struct Entry {
    object: Object,
    /// What refers to it; it cannot be destroyed before (`users` of Linux, less its own one).
    users: u32,
    /// Whether callers can name it: not before the call that makes it has answered.
    visible: bool,
}

/// Objects by number. The lowest free number is given out first, from 1 (`XA_FLAGS_ALLOC1`).
#[derive(Default)]
pub(crate) struct Objects {
    /// The object with number n is at n - 1.
    slots: Vec<Option<Entry>>,
    /// No slot below it is free.
    full_below: usize,
    count: usize,
}

impl Objects {
    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds an object that callers cannot name yet. `EBUSY` when all 2^31 - 1 numbers are taken.
    pub(crate) fn add(&mut self, object: Object) -> Result<u32> {
        let taken = self.slots.iter().skip(self.full_below).take_while(|slot| slot.is_some());
        let index = self.full_below + taken.count();
        let id = u32::try_from(index).ok().and_then(|index| index.checked_add(1));
        let Some(id) = id.filter(|id| *id <= i32::MAX.unsigned_abs()) else {
            return refuse(Errno::EBUSY, "no object number is free");
        };
        let entry = Some(Entry { object, users: 0, visible: false });
        match self.slots.get_mut(index) {
            Some(slot) => *slot = entry,
            None => self.slots.push(entry),
        }
        self.full_below = index + 1;
        self.count += 1;
        Ok(id)
    }

    /// Lets callers name an object (`iommufd_object_finalize`).
    pub(crate) fn publish(&mut self, id: u32) {
        if let Some(entry) = self.entry_mut(id) {
            entry.visible = true;
        }
    }

    /// Takes an object out, whoever uses it.
    pub(crate) fn remove(&mut self, id: u32) -> Option<Object> {
        let index = index_of(id)?;
        let entry = self.slots.get_mut(index)?.take()?;
        self.full_below = self.full_below.min(index);
        self.count -= 1;
        Some(entry.object)
    }

    /// Whether a caller may destroy an object: `ENOENT`, `EBUSY`.
    pub(crate) fn check_unused(&self, id: u32) -> Result<()> {
        match self.entry(id) {
            Some(entry) if !entry.visible => not_found(id),
            Some(entry) if entry.users > 0 => {
                refuse(Errno::EBUSY, format!("object {id} is in use by {} others", entry.users))
            }
            Some(_) => Ok(()),
            None => not_found(id),
        }
    }

    /// What a caller means by a number: `ENOENT`.
    pub(crate) fn get(&self, id: u32) -> Result<&Object> {
        match self.entry(id) {
            Some(entry) if entry.visible => Ok(&entry.object),
            _ => not_found(id),
        }
    }

    /// The IOAS with a number: `ENOENT`, also for another kind.
    pub(crate) fn ioas(&self, id: u32) -> Result<&Ioas> {
        match self.get(id)? {
            Object::Ioas(ioas) => Ok(ioas),
            _ => refuse(Errno::ENOENT, format!("object {id} is no IOAS")),
        }
    }

    /// As [`Objects::ioas`].
    pub(crate) fn ioas_mut(&mut self, id: u32) -> Result<&mut Ioas> {
        match self.entry_mut(id) {
            Some(Entry { object: Object::Ioas(ioas), visible: true, .. }) => Ok(ioas),
            Some(Entry { visible: true, .. }) => {
                refuse(Errno::ENOENT, format!("object {id} is no IOAS"))
            }
            _ => not_found(id),
        }
    }

    /// The page table with a number: `ENOENT`, also for another kind.
    pub(crate) fn hwpt(&self, id: u32) -> Result<&Hwpt> {
        match self.get(id)? {
            Object::Hwpt(hwpt) => Ok(hwpt),
            _ => refuse(Errno::ENOENT, format!("object {id} is no page table")),
        }
    }

    /// The device with a number: `ENOENT`, also for another kind.
    pub(crate) fn device(&self, id: u32) -> Result<DeviceObject> {
        match self.get(id)? {
            Object::Device(device) => Ok(*device),
            _ => refuse(Errno::ENOENT, format!("object {id} is no device")),
        }
    }

    /// The access object with a number: `ENOENT`, also for another kind.
    pub(crate) fn access(&self, id: u32) -> Result<&AccessObject> {
        match self.get(id)? {
            Object::Access(access) => Ok(access),
            _ => refuse(Errno::ENOENT, format!("object {id} is no access object")),
        }
    }

    /// As [`Objects::access`].
    pub(crate) fn access_mut(&mut self, id: u32) -> Result<&mut AccessObject> {
        match self.entry_mut(id) {
            Some(Entry { object: Object::Access(access), visible: true, .. }) => Ok(access),
            Some(Entry { visible: true, .. }) => {
                refuse(Errno::ENOENT, format!("object {id} is no access object"))
            }
            _ => not_found(id),
        }
    }

    /// The selftest's object with a number: `ENOENT`, also for another kind.
    pub(crate) fn selftest<T: SelftestObject>(&mut self, id: u32) -> Result<&mut T> {
        let object = match self.entry_mut(id) {
            Some(Entry { object: Object::Selftest(object), visible: true, .. }) => {
                let object: &mut dyn Any = object.as_mut();
                object.downcast_mut()
            }
            Some(Entry { visible: true, .. }) => None,
            _ => return not_found(id),
        };
        match object {
            Some(object) => Ok(object),
            None => refuse(Errno::ENOENT, format!("object {id} is none of the selftest's")),
        }
    }

    /// Every IOAS.
    pub(crate) fn ioases_mut(&mut self) -> impl Iterator<Item = &mut Ioas> {
        self.slots.iter_mut().flatten().filter_map(|entry| match &mut entry.object {
            Object::Ioas(ioas) => Some(&mut **ioas),
            _ => None,
        })
    }

    /// All devices with their numbers.
    pub(crate) fn devices(&self) -> impl Iterator<Item = (u32, &DeviceObject)> {
        self.iter().filter_map(|(id, object)| match object {
            Object::Device(device) => Some((id, device)),
            _ => None,
        })
    }

    /// All objects with their numbers, also those that callers cannot name yet.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Object)> {
        (1_u32..).zip(&self.slots).filter_map(|(id, slot)| Some((id, &slot.as_ref()?.object)))
    }

    /// Marks a page table as made by attaching to its IOAS.
    pub(crate) fn set_auto(&mut self, id: u32) {
        if let Some(Entry { object: Object::Hwpt(hwpt), .. }) = self.entry_mut(id) {
            hwpt.auto = true;
        }
    }

    /// Lets something refer to an object, which callers may not be able to name yet.
    pub(crate) fn hold(&mut self, id: u32) {
        if let Some(entry) = self.entry_mut(id) {
            entry.users = entry.users.saturating_add(1);
        }
    }

    /// Undoes [`Objects::hold`] and gives how many still refer to it.
    pub(crate) fn put(&mut self, id: u32) -> u32 {
        self.entry_mut(id).map_or(0, |entry| {
            entry.users = entry.users.saturating_sub(1);
            entry.users
        })
    }

    fn entry(&self, id: u32) -> Option<&Entry> {
        self.slots.get(index_of(id)?)?.as_ref()
    }

    fn entry_mut(&mut self, id: u32) -> Option<&mut Entry> {
        self.slots.get_mut(index_of(id)?)?.as_mut()
    }
}

fn index_of(id: u32) -> Option<usize> {
    usize::try_from(id).ok()?.checked_sub(1)
}

fn not_found<T>(id: u32) -> Result<T> {
    refuse(Errno::ENOENT, format!("no object has the number {id}"))
}
