//! Page tables: `IOMMU_HWPT_ALLOC`, and what is asked of one (`drivers/iommu/iommufd/hw_pagetable.c`).

use std::sync::Arc;

use lychgate_iommu::{AllocFlags, Capability, UserData};
use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::mm::PAGE_SIZE;
use crate::objects::{DeviceObject, Hwpt, Object};
use crate::state::State;

const KNOWN_FLAGS: u32 = abi::HWPT_ALLOC_NEST_PARENT
    | abi::HWPT_ALLOC_DIRTY_TRACKING
    | abi::HWPT_FAULT_ID_VALID
    | abi::HWPT_ALLOC_PASID;

impl Context {
    /// `IOMMU_HWPT_ALLOC`.
    pub(crate) fn hwpt_alloc(&self, command: &mut Command<'_, abi::HwptAlloc>) -> Result<()> {
        let argument = command.argument;
        if argument.flags & !KNOWN_FLAGS != 0 || argument.reserved != 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag or a reserved member is set");
        }
        if (argument.data_type == abi::HWPT_DATA_NONE) != (argument.data_len == 0) {
            return refuse(Errno::EINVAL, "vendor data has either no type or no length");
        }
        let mut state = self.lock();
        let device = state.objects.device(argument.dev_id)?;
        let Ok(parent) = state.objects.get(argument.pt_id) else {
            return refuse(Errno::EINVAL, format!("no object has the number {}", argument.pt_id));
        };
        match parent {
            Object::Ioas(_) => {}
            Object::Hwpt(_) => return nested(&argument),
            other => {
                return refuse(
                    Errno::EINVAL,
                    format!("object {} is {}, no IOAS", argument.pt_id, other.kind()),
                );
            }
        }
        let flags = self.paging_flags(&device, argument.flags)?;
        let data = read_data(command)?;
        let data = data.as_deref().map(|bytes| UserData { kind: argument.data_type, bytes });
        let id = self.new_hwpt(&mut state, &device, argument.pt_id, flags, data)?;
        let filled = self.fill_hwpt(&mut state, id).and_then(|()| no_fault_queue(&argument));
        if let Err(refusal) = filled {
            self.destroy_object(&mut state, id);
            return Err(refusal);
        }
        drop(state);
        command.argument.out_hwpt_id = id;
        let answered = command.respond();
        let mut state = self.lock();
        match answered {
            Ok(()) => state.objects.publish(id),
            Err(_) => self.destroy_object(&mut state, id),
        }
        answered
    }

    /// Allocates a page table for a device in an IOAS. Callers cannot name it yet, and nothing is
    /// mapped in it.
    pub(crate) fn new_hwpt(
        &self,
        state: &mut State,
        device: &DeviceObject,
        ioas: u32,
        flags: AllocFlags,
        data: Option<UserData<'_>>,
    ) -> Result<u32> {
        let domain = self.lock_iommu().alloc_paging(device.device, flags, data)?;
        // Decided before anything is mapped: some formats keep it in every entry.
        let coherent = device.enforces_coherency && domain.enforce_cache_coherency();
        let hwpt = Hwpt { ioas, domain, auto: false, coherent };
        let id = state.objects.add(Object::Hwpt(hwpt))?;
        state.objects.hold(ioas);
        Ok(id)
    }

    /// Maps everything in the IOAS of a new page table into it.
    pub(crate) fn fill_hwpt(&self, state: &mut State, id: u32) -> Result<()> {
        let Some((ioas, domain)) = state.objects.iter().find_map(|(number, object)| match object {
            Object::Hwpt(hwpt) if number == id => Some((hwpt.ioas, Arc::clone(&hwpt.domain))),
            _ => None,
        }) else {
            return refuse(Errno::ENOENT, format!("no object has the number {id}"));
        };
        let ioas = state.objects.ioas_mut(ioas)?;
        ioas.table.add_domain(id, &domain)?;
        ioas.hwpts.push(id);
        Ok(())
    }

    /// What a paging domain is needed for (`iommufd_hwpt_paging_alloc`).
    fn paging_flags(&self, device: &DeviceObject, flags: u32) -> Result<AllocFlags> {
        let dirty = flags & abi::HWPT_ALLOC_DIRTY_TRACKING != 0;
        if dirty && !self.lock_iommu().capable(device.device, Capability::DirtyTracking) {
            return refuse(Errno::EOPNOTSUPP, "the IOMMU does not track dirty pages");
        }
        let nest_parent = flags & abi::HWPT_ALLOC_NEST_PARENT != 0;
        if nest_parent && flags & abi::HWPT_FAULT_ID_VALID != 0 {
            return refuse(Errno::EOPNOTSUPP, "a nesting parent cannot have a fault queue");
        }
        Ok(AllocFlags { pasid: flags & abi::HWPT_ALLOC_PASID != 0, nest_parent, dirty })
    }
}

/// A nested page table, which no driver below has.
fn nested(argument: &abi::HwptAlloc) -> Result<()> {
    if argument.flags & !(abi::HWPT_FAULT_ID_VALID | abi::HWPT_ALLOC_PASID) != 0 {
        return refuse(Errno::EOPNOTSUPP, "a nested page table cannot have these flags");
    }
    refuse(Errno::EOPNOTSUPP, "the IOMMU has no nested page tables")
}

/// Fault queues cannot be allocated, so that none has any number.
fn no_fault_queue(argument: &abi::HwptAlloc) -> Result<()> {
    if argument.flags & abi::HWPT_FAULT_ID_VALID != 0 {
        return refuse(Errno::ENOENT, format!("object {} is no fault queue", argument.fault_id));
    }
    Ok(())
}

/// The vendor data, for the driver to understand.
fn read_data(command: &Command<'_, abi::HwptAlloc>) -> Result<Option<Vec<u8>>> {
    let argument = &command.argument;
    if argument.data_type == abi::HWPT_DATA_NONE {
        return Ok(None);
    }
    if u64::from(argument.data_len) > PAGE_SIZE {
        return refuse(Errno::EINVAL, "the vendor data is longer than any that there is");
    }
    let mut bytes = vec![0; usize::try_from(argument.data_len).unwrap_or(0)];
    command.read(argument.data_uptr, &mut bytes)?;
    Ok(Some(bytes))
}
