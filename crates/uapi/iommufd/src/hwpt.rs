//! Page tables: `IOMMU_HWPT_ALLOC`, and what is asked of one (`drivers/iommu/iommufd/hw_pagetable.c`).

use std::sync::Arc;

use lychgate_iommu::{AllocFlags, Capability, UserData};
use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
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
        let id = match parent {
            Object::Ioas(_) => {
                let flags = self.paging_flags(&device, argument.flags)?;
                let bytes = read_data(command)?;
                let data = user_data(&argument, bytes.as_deref());
                let id = self.new_hwpt(&mut state, &device, argument.pt_id, flags, data)?;
                self.undo(&mut state, id, |state| self.fill_hwpt(state, id))?
            }
            Object::Hwpt(_) => {
                let bytes = read_data(command)?;
                let data = user_data(&argument, bytes.as_deref());
                self.new_nested_on_hwpt(&mut state, &device, &argument, data)?
            }
            Object::Viommu(_) => {
                let bytes = read_data(command)?;
                let data = user_data(&argument, bytes.as_deref());
                self.new_nested_on_viommu(&mut state, &device, &argument, data)?
            }
            other => {
                return refuse(
                    Errno::EINVAL,
                    format!("no page table can be allocated on {}", other.kind()),
                );
            }
        };
        let id = self.undo(&mut state, id, |state| use_faults(state, id, &argument))?;
        drop(state);
        command.argument.out_hwpt_id = id;
        self.finish(command, id)
    }

    /// Takes the next step for a page table, which is destroyed when that fails.
    fn undo(
        &self,
        state: &mut State,
        id: u32,
        step: impl FnOnce(&mut State) -> Result<()>,
    ) -> Result<u32> {
        match step(state) {
            Ok(()) => Ok(id),
            Err(refusal) => {
                self.destroy_object(state, id);
                Err(refusal)
            }
        }
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
        allocation()?;
        let domain = self.lock_iommu().alloc_paging(device.device, flags, data)?;
        // Decided before anything is mapped: some formats keep it in every entry.
        let coherent = device.enforces_coherency && domain.enforce_cache_coherency();
        let hwpt = Hwpt {
            ioas,
            domain,
            auto: false,
            coherent,
            nest_parent: flags.nest_parent,
            pasid: flags.pasid,
            faults: None,
        };
        let id = state.objects.add(Object::Hwpt(hwpt))?;
        state.objects.hold(ioas);
        Ok(id)
    }

    /// Maps everything in the IOAS of a new page table into it.
    pub(crate) fn fill_hwpt(&self, state: &mut State, id: u32) -> Result<()> {
        let Some(Object::Hwpt(hwpt)) = state.objects.find(id) else {
            return refuse(Errno::ENOENT, format!("no object has the number {id}"));
        };
        let (ioas, domain) = (hwpt.ioas, Arc::clone(&hwpt.domain));
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

/// Lets the faults of a page table go to the queue that its caller names.
fn use_faults(state: &mut State, id: u32, argument: &abi::HwptAlloc) -> Result<()> {
    if argument.flags & abi::HWPT_FAULT_ID_VALID == 0 {
        return Ok(());
    }
    let faults = state.objects.faults(argument.fault_id)?;
    match state.objects.find_mut(id) {
        Some(Object::Hwpt(hwpt)) => hwpt.faults = Some(faults),
        Some(Object::Nested(nested)) => nested.faults = Some(faults),
        _ => return refuse(Errno::ENOENT, format!("no object has the number {id}")),
    }
    state.objects.hold(argument.fault_id);
    Ok(())
}

fn user_data<'a>(argument: &abi::HwptAlloc, bytes: Option<&'a [u8]>) -> Option<UserData<'a>> {
    bytes.map(|bytes| UserData { kind: argument.data_type, bytes })
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
