//! What a context holds, and how it comes and goes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_iommu::GroupId;
use lychgate_types::{Errno, Pasid};

use crate::abi::Argument;
use crate::command::Command;
use crate::context::{Context, NodeKind};
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
use crate::handle::Handle;
use crate::io_pagetable::IoPageTable;
use crate::mm::Accounting;
use crate::objects::{Faults, Ioas, Object, Objects};

/// What changes in a context, behind its lock.
pub(crate) struct State {
    /// Everything with a number.
    pub(crate) objects: Objects,
    /// What groups, and PASIDs of them, are attached to.
    pub(crate) attached: BTreeMap<Place, Attachment>,
    /// The compatibility IOAS, for callers that take the context for a VFIO container.
    pub(crate) compat: Option<u32>,
    /// Whose limit pins of later mappings count against.
    pub(crate) accounting: Accounting,
    /// References that VFIO holds.
    pub(crate) references: usize,
    /// Whether the file was closed.
    pub(crate) closed: bool,
}

/// What can be attached: a group, and a PASID of it or, as [`Pasid::NONE`], its requests without one.
pub(crate) type Place = (GroupId, Pasid);

/// What a group, or a PASID of it, is attached to (`struct iommufd_attach`).
pub(crate) struct Attachment {
    /// Page table.
    pub(crate) hwpt: u32,
    /// The devices that asked for it, never empty.
    pub(crate) devices: Vec<u32>,
    /// What was left with the core.
    pub(crate) handle: Arc<Handle>,
    /// vDEVICEs by which hardware finds its way from a request to its virtual id, each with its
    /// device: they stay while they are in use.
    pub(crate) pins: Vec<(u32, u32)>,
}

impl Attachment {
    /// Forgets the vDEVICEs of the devices that `of` picks, and gives them.
    pub(crate) fn unpin(&mut self, of: impl Fn(u32) -> bool) -> Vec<u32> {
        let pins = std::mem::take(&mut self.pins);
        let (gone, kept): (Vec<_>, Vec<_>) = pins.into_iter().partition(|(device, _)| of(*device));
        self.pins = kept;
        gone.into_iter().map(|(_, vdevice)| vdevice).collect()
    }
}

impl State {
    pub(crate) fn new(node: NodeKind) -> Self {
        let accounting = match node {
            NodeKind::Iommu => Accounting::User,
            NodeKind::VfioContainer => Accounting::Mm,
        };
        Self {
            objects: Objects::default(),
            attached: BTreeMap::new(),
            compat: None,
            accounting,
            references: 0,
            closed: false,
        }
    }

    /// Adds an empty IOAS that callers cannot name yet.
    pub(crate) fn add_ioas(&mut self) -> Result<u32> {
        static NEXT_SERIAL: AtomicU64 = AtomicU64::new(1);
        allocation()?;
        self.objects.add(Object::Ioas(Box::new(Ioas {
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
            table: IoPageTable::new(),
            hwpts: Vec::new(),
        })))
    }

    /// Keeps the vDEVICEs of devices that were attached to a nested page table, where they are on the
    /// same vIOMMU as the table.
    pub(crate) fn pin_vdevices(&mut self, place: Place, devices: &[u32]) {
        let Some(attachment) = self.attached.get_mut(&place) else {
            return;
        };
        let viommu = self.objects.page_table(attachment.hwpt).ok().and_then(|table| table.viommu);
        for id in devices {
            let vdevice = self.objects.device(*id).ok().and_then(|device| device.vdevice);
            if let Some(vdevice) = vdevice
                && let Some(Object::Vdevice(object)) = self.objects.find(vdevice)
                && Some(object.viommu) == viommu
            {
                attachment.pins.push((*id, vdevice));
                self.objects.hold(vdevice);
            }
        }
    }

    /// Takes a page table off its fault queue.
    pub(crate) fn put_faults(&mut self, faults: Option<Faults>) {
        if let Some(faults) = faults {
            self.objects.put(faults.id);
        }
    }

    /// Takes a user off each object.
    pub(crate) fn put_all(&mut self, objects: &[u32]) {
        for id in objects {
            self.objects.put(*id);
        }
    }

    /// The compatibility IOAS: `ENODEV`.
    pub(crate) fn compat_ioas(&self) -> Result<u32> {
        match self.compat {
            Some(id) => Ok(id),
            None => refuse(Errno::ENODEV, "there is no compatibility IOAS"),
        }
    }
}

impl Context {
    /// Makes sure that there is a compatibility IOAS and gives its number, as when a VFIO group is
    /// put into this container (`iommufd_vfio_compat_ioas_create`). `EBUSY` when no object number
    /// is free.
    pub fn create_compat_ioas(&self) -> Result<u32> {
        let mut state = self.lock();
        if let Some(id) = state.compat {
            return Ok(id);
        }
        let id = state.add_ioas()?;
        state.objects.publish(id);
        state.compat = Some(id);
        Ok(id)
    }

    /// The compatibility IOAS, to which the devices of containers are attached
    /// (`iommufd_vfio_compat_ioas_get_id`). `ENODEV` without one.
    pub fn compat_ioas(&self) -> Result<u32> {
        self.lock().compat_ioas()
    }

    /// Answers a call that made the object `id`, which can be named from then on; takes it back when
    /// the answer cannot be stored.
    pub(crate) fn finish<A: Argument>(&self, command: &Command<'_, A>, id: u32) -> Result<()> {
        let answered = command.respond();
        let mut state = self.lock();
        match answered {
            Ok(()) => state.objects.publish(id),
            Err(_) => self.destroy_object(&mut state, id),
        }
        answered
    }

    /// Destroys an object that nothing refers to. Whoever holds a page table keeps its domain.
    pub(crate) fn destroy_object(&self, state: &mut State, id: u32) {
        if let Some(object) = state.objects.remove(id) {
            self.end_object(state, id, object);
        }
    }

    /// Undoes what an object did that was taken out, and lets go of what it used.
    pub(crate) fn end_object(&self, state: &mut State, id: u32, object: Object) {
        match object {
            Object::Ioas(mut ioas) => {
                if state.compat == Some(id) {
                    state.compat = None;
                }
                self.unmap_all(&mut ioas);
            }
            Object::Hwpt(hwpt) => {
                if let Ok(ioas) = state.objects.ioas_mut(hwpt.ioas) {
                    ioas.table.remove_domain(id);
                    ioas.hwpts.retain(|hwpt| *hwpt != id);
                }
                state.objects.put(hwpt.ioas);
                state.put_faults(hwpt.faults);
            }
            Object::Nested(nested) => nested.end(state),
            Object::Fault(queue) => queue.close(),
            Object::Viommu(viommu) => viommu.end(state),
            Object::Vdevice(vdevice) => vdevice.end(state),
            Object::Veventq(veventq) => veventq.end(state),
            Object::HwQueue(queue) => queue.end(state),
            Object::Selftest(object) => object.destroy(self, state, id),
            Object::Device(_) | Object::Access(_) => {}
        }
    }

    /// Destroys everything: the file is closed and VFIO has let go of it. Objects refer to others, so
    /// that those which nothing refers to go first, again and again (`iommufd_fops_release`).
    pub(crate) fn tear_down(&self, state: &mut State) {
        loop {
            let unused = state.objects.unused();
            if unused.is_empty() {
                return;
            }
            for id in unused {
                self.destroy_object(state, id);
            }
        }
    }
}
