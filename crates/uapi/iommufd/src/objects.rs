//! The objects of a context and their numbers (`struct iommufd_object`, `ictx->objects`).

use std::any::Any;
use std::sync::Arc;

use lychgate_iommu::{DeviceId, Domain, GroupId, PagingDomain};
use lychgate_types::{Bdf, Errno};

use crate::access::AccessObject;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::fault_queue::FaultQueue;
use crate::hw_queue::HwQueueObject;
use crate::io_pagetable::IoPageTable;
use crate::nested_hwpt::NestedHwpt;
use crate::state::State;
use crate::vdevice::Vdevice;
use crate::veventq::Veventq;
use crate::viommu::Viommu;

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
    /// Whether it was allocated to be the second stage of others.
    pub(crate) nest_parent: bool,
    /// Whether it was allocated for PASIDs.
    pub(crate) pasid: bool,
    /// Where faults go.
    pub(crate) faults: Option<Faults>,
}

/// A fault queue that a page table uses.
#[derive(Clone)]
pub(crate) struct Faults {
    /// The number of its object.
    pub(crate) id: u32,
    /// The queue itself.
    pub(crate) queue: Arc<FaultQueue>,
}

/// What a device needs to know of a page table to be attached to it.
pub(crate) struct PageTable {
    /// The page table itself.
    pub(crate) domain: Domain,
    /// The number of its second stage, or of itself.
    pub(crate) paging: u32,
    /// The vIOMMU that it was allocated on.
    pub(crate) viommu: Option<u32>,
    /// Whether it was allocated for PASIDs.
    pub(crate) pasid: bool,
    /// Where faults go.
    pub(crate) faults: Option<Faults>,
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
    /// Its vDEVICE.
    pub(crate) vdevice: Option<u32>,
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
    /// A page table of an IOAS (`IOMMUFD_OBJ_HWPT_PAGING`).
    Hwpt(Hwpt),
    /// A page table of a guest (`IOMMUFD_OBJ_HWPT_NESTED`).
    Nested(NestedHwpt),
    /// A device.
    Device(DeviceObject),
    /// A kernel user of an IOAS.
    Access(Box<AccessObject>),
    /// A queue of I/O page faults.
    Fault(Arc<FaultQueue>),
    /// A slice of an IOMMU for a guest.
    Viommu(Viommu),
    /// A device on a vIOMMU.
    Vdevice(Vdevice),
    /// A queue of a vIOMMU's events.
    Veventq(Veventq),
    /// A queue of the guest that hardware reads.
    HwQueue(HwQueueObject),
    /// Something of the selftest.
    Selftest(Box<dyn SelftestObject>),
}

impl Object {
    /// What it is, for people.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Ioas(_) => "an IOAS",
            Self::Hwpt(_) => "a page table",
            Self::Nested(_) => "a nested page table",
            Self::Device(_) => "a device",
            Self::Access(_) => "an access object",
            Self::Fault(_) => "a fault queue",
            Self::Viommu(_) => "a vIOMMU",
            Self::Vdevice(_) => "a vDEVICE",
            Self::Veventq(_) => "a vEVENTQ",
            Self::HwQueue(_) => "a hardware queue",
            Self::Selftest(_) => "an object of the selftest",
        }
    }
}

/// What a number stands for.
enum Slot {
    /// Nothing.
    Free,
    /// Nothing, for ever: a vDEVICE whose device went before it (`XA_ZERO_ENTRY`).
    Tombstone,
    /// An object.
    Taken(Entry),
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
    slots: Vec<Slot>,
    /// No slot below it is free.
    full_below: usize,
    /// Slots that are not free.
    count: usize,
}

/// Look-ups by number that accept one kind: `ENOENT`, also for another one.
macro_rules! lookups {
    ($($(#[$doc:meta])* $name:ident, $name_mut:ident: $kind:ident($object:ty), $what:literal;)*) => {
        impl Objects {
            $(
                $(#[$doc])*
                pub(crate) fn $name(&self, id: u32) -> Result<&$object> {
                    match self.get(id)? {
                        Object::$kind(object) => Ok(object),
                        _ => refuse(Errno::ENOENT, format!(concat!("object {} is no ", $what), id)),
                    }
                }

                $(#[$doc])*
                pub(crate) fn $name_mut(&mut self, id: u32) -> Result<&mut $object> {
                    match self.get_mut(id)? {
                        Object::$kind(object) => Ok(object),
                        _ => refuse(Errno::ENOENT, format!(concat!("object {} is no ", $what), id)),
                    }
                }
            )*
        }
    };
}

lookups! {
    /// The IOAS with a number.
    ioas, ioas_mut: Ioas(Ioas), "IOAS";
    /// The page table of an IOAS with a number.
    hwpt, hwpt_mut: Hwpt(Hwpt), "page table of an IOAS";
    /// The access object with a number.
    access, access_mut: Access(AccessObject), "access object";
    /// The device with a number.
    device_ref, device_mut: Device(DeviceObject), "device";
}

impl Objects {
    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Adds an object that callers cannot name yet. `EBUSY` when all 2^31 - 1 numbers are taken.
    pub(crate) fn add(&mut self, object: Object) -> Result<u32> {
        let behind = self.slots.iter().skip(self.full_below);
        let index = self.full_below + behind.take_while(|slot| !matches!(slot, Slot::Free)).count();
        let id = u32::try_from(index).ok().and_then(|index| index.checked_add(1));
        let Some(id) = id.filter(|id| *id <= i32::MAX.unsigned_abs()) else {
            return refuse(Errno::EBUSY, "no object number is free");
        };
        let entry = Slot::Taken(Entry { object, users: 0, visible: false });
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
        let object = self.take(id, Slot::Free)?;
        self.full_below = self.full_below.min(index_of(id)?);
        self.count -= 1;
        Some(object)
    }

    /// As [`Objects::remove`], and the number is never given out again
    /// (`iommufd_object_tombstone_user`).
    pub(crate) fn bury(&mut self, id: u32) -> Option<Object> {
        self.take(id, Slot::Tombstone)
    }

    fn take(&mut self, id: u32, leave: Slot) -> Option<Object> {
        let slot = self.slots.get_mut(index_of(id)?)?;
        if !matches!(slot, Slot::Taken(_)) {
            return None;
        }
        match std::mem::replace(slot, leave) {
            Slot::Taken(entry) => Some(entry.object),
            Slot::Free | Slot::Tombstone => None,
        }
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

    fn get_mut(&mut self, id: u32) -> Result<&mut Object> {
        match self.entry_mut(id) {
            Some(entry) if entry.visible => Ok(&mut entry.object),
            _ => not_found(id),
        }
    }

    /// The device with a number: `ENOENT`, also for another kind.
    pub(crate) fn device(&self, id: u32) -> Result<DeviceObject> {
        self.device_ref(id).copied()
    }

    /// The fault queue with a number: `ENOENT`, also for another kind.
    pub(crate) fn faults(&self, id: u32) -> Result<Faults> {
        match self.get(id)? {
            Object::Fault(queue) => Ok(Faults { id, queue: Arc::clone(queue) }),
            _ => refuse(Errno::ENOENT, format!("object {id} is no fault queue")),
        }
    }

    /// The vIOMMU with a number: `ENOENT`, also for another kind.
    pub(crate) fn viommu(&self, id: u32) -> Result<&Viommu> {
        match self.get(id)? {
            Object::Viommu(viommu) => Ok(viommu),
            _ => refuse(Errno::ENOENT, format!("object {id} is no vIOMMU")),
        }
    }

    /// The page table of either kind with a number: `ENOENT`, also for another kind.
    pub(crate) fn page_table(&self, id: u32) -> Result<PageTable> {
        match self.get(id)? {
            Object::Hwpt(hwpt) => Ok(PageTable {
                domain: Domain::Paging(Arc::clone(&hwpt.domain)),
                paging: id,
                viommu: None,
                pasid: hwpt.pasid,
                faults: hwpt.faults.clone(),
            }),
            Object::Nested(nested) => Ok(PageTable {
                domain: Domain::Nested(Arc::clone(&nested.domain)),
                paging: nested.paging,
                viommu: nested.viommu,
                pasid: nested.pasid,
                faults: nested.faults.clone(),
            }),
            _ => refuse(Errno::ENOENT, format!("object {id} is no page table")),
        }
    }

    /// Any object, whether or not callers can name it.
    pub(crate) fn find(&self, id: u32) -> Option<&Object> {
        self.entry(id).map(|entry| &entry.object)
    }

    /// As [`Objects::find`].
    pub(crate) fn find_mut(&mut self, id: u32) -> Option<&mut Object> {
        self.entry_mut(id).map(|entry| &mut entry.object)
    }

    /// The objects that nothing refers to.
    pub(crate) fn unused(&self) -> Vec<u32> {
        let unused = |(id, slot): (u32, &Slot)| match slot {
            Slot::Taken(entry) if entry.users == 0 => Some(id),
            _ => None,
        };
        (1_u32..).zip(&self.slots).filter_map(unused).collect()
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
        self.slots.iter_mut().filter_map(|slot| match slot {
            Slot::Taken(Entry { object: Object::Ioas(ioas), .. }) => Some(&mut **ioas),
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
        (1_u32..).zip(&self.slots).filter_map(|(id, slot)| match slot {
            Slot::Taken(entry) => Some((id, &entry.object)),
            Slot::Free | Slot::Tombstone => None,
        })
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
        match self.slots.get(index_of(id)?)? {
            Slot::Taken(entry) => Some(entry),
            Slot::Free | Slot::Tombstone => None,
        }
    }

    fn entry_mut(&mut self, id: u32) -> Option<&mut Entry> {
        match self.slots.get_mut(index_of(id)?)? {
            Slot::Taken(entry) => Some(entry),
            Slot::Free | Slot::Tombstone => None,
        }
    }
}

fn index_of(id: u32) -> Option<usize> {
    usize::try_from(id).ok()?.checked_sub(1)
}

fn not_found<T>(id: u32) -> Result<T> {
    refuse(Errno::ENOENT, format!("no object has the number {id}"))
}
