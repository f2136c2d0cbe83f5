//! What a context holds, and how it comes and goes.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_iommu::GroupId;
use lychgate_types::Errno;

use crate::context::{Context, NodeKind};
use crate::error::{Result, refuse};
use crate::io_pagetable::IoPageTable;
use crate::mm::Accounting;
use crate::objects::{Ioas, Object, Objects};

/// What changes in a context, behind its lock.
pub(crate) struct State {
    /// Everything with a number.
    pub(crate) objects: Objects,
    /// Groups of which a device is attached.
    pub(crate) attached: BTreeMap<GroupId, Attachment>,
    /// The compatibility IOAS, for callers that take the context for a VFIO container.
    pub(crate) compat: Option<u32>,
    /// Whose limit pins of later mappings count against.
    pub(crate) accounting: Accounting,
    /// References that VFIO holds.
    pub(crate) references: usize,
    /// Whether the file was closed.
    pub(crate) closed: bool,
}

/// What a group is attached to (`struct iommufd_attach`).
pub(crate) struct Attachment {
    /// Page table.
    pub(crate) hwpt: u32,
    /// The devices that asked for it, never empty.
    pub(crate) devices: Vec<u32>,
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
        self.objects.add(Object::Ioas(Box::new(Ioas {
            serial: NEXT_SERIAL.fetch_add(1, Ordering::Relaxed),
            table: IoPageTable::new(),
            hwpts: Vec::new(),
        })))
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

    /// Destroys an object that nothing refers to. Whoever holds a page table keeps its domain.
    pub(crate) fn destroy_object(&self, state: &mut State, id: u32) {
        match state.objects.remove(id) {
            Some(Object::Ioas(mut ioas)) => {
                if state.compat == Some(id) {
                    state.compat = None;
                }
                self.unmap_all(&mut ioas);
            }
            Some(Object::Hwpt(hwpt)) => {
                if let Ok(ioas) = state.objects.ioas_mut(hwpt.ioas) {
                    ioas.table.remove_domain(id);
                    ioas.hwpts.retain(|hwpt| *hwpt != id);
                }
                state.objects.put(hwpt.ioas);
            }
            Some(Object::Selftest(object)) => object.destroy(self, state, id),
            Some(Object::Device(_) | Object::Access(_)) | None => {}
        }
    }

    /// Destroys everything: the file is closed and VFIO has let go of it.
    pub(crate) fn tear_down(&self, state: &mut State) {
        let numbers = |state: &State, hwpts: bool| -> Vec<u32> {
            let wanted = |object: &Object| matches!(object, Object::Hwpt(_)) == hwpts;
            state.objects.iter().filter(|(_, object)| wanted(object)).map(|(id, _)| id).collect()
        };
        for hwpts in [true, false] {
            for id in numbers(state, hwpts) {
                self.destroy_object(state, id);
            }
        }
    }
}
