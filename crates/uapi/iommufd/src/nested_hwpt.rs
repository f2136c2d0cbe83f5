//! Page tables of guests (`iommufd_hwpt_nested_alloc`, `iommufd_viommu_alloc_hwpt_nested`).

use std::sync::Arc;

use lychgate_iommu::{NestedDomain, UserData};
use lychgate_types::Errno;

use crate::abi::iommufd as abi;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
use crate::objects::{DeviceObject, Faults, Object};
use crate::state::State;

/// A page table whose first stage is a guest's (`struct iommufd_hwpt_nested`).
pub(crate) struct NestedHwpt {
    /// The page table itself.
    pub(crate) domain: Arc<dyn NestedDomain>,
    /// The number of its second stage.
    pub(crate) paging: u32,
    /// The vIOMMU that it was allocated on.
    pub(crate) viommu: Option<u32>,
    /// Whether it was allocated for PASIDs.
    pub(crate) pasid: bool,
    /// Where faults go.
    pub(crate) faults: Option<Faults>,
}

impl NestedHwpt {
    /// What it was allocated on, and holds: its second stage or its vIOMMU.
    fn parent(&self) -> u32 {
        self.viommu.unwrap_or(self.paging)
    }

    /// It was destroyed.
    pub(crate) fn end(self, state: &mut State) {
        let parent = self.parent();
        let Self { domain, faults, .. } = self;
        drop(domain);
        state.objects.put(parent);
        state.put_faults(faults);
    }
}

impl Context {
    /// Allocates a nested page table on a nesting parent. Callers cannot name it yet.
    pub(crate) fn new_nested_on_hwpt(
        &self,
        state: &mut State,
        device: &DeviceObject,
        argument: &abi::HwptAlloc,
        data: Option<UserData<'_>>,
    ) -> Result<u32> {
        let data = check_nested(argument, data)?;
        let parent = state.objects.hwpt(argument.pt_id)?;
        if parent.auto || !parent.nest_parent {
            return refuse(Errno::EINVAL, "the page table is not allocated to be a nesting parent");
        }
        let parent = Arc::clone(&parent.domain);
        allocation()?;
        let pasid = is_for_pasids(argument);
        let domain = self.lock_iommu().alloc_nested(device.device, &parent, pasid, data)?;
        let (paging, viommu) = (argument.pt_id, None);
        add(state, NestedHwpt { domain, paging, viommu, pasid, faults: None })
    }

    /// Allocates a nested page table on a vIOMMU. Callers cannot name it yet.
    pub(crate) fn new_nested_on_viommu(
        &self,
        state: &mut State,
        device: &DeviceObject,
        argument: &abi::HwptAlloc,
        data: Option<UserData<'_>>,
    ) -> Result<u32> {
        let viommu = state.objects.viommu(argument.pt_id)?;
        if self.lock_iommu().instance(device.device).as_ref() != Some(&viommu.instance) {
            return refuse(Errno::EINVAL, "the device is behind another IOMMU than the vIOMMU");
        }
        let data = check_nested(argument, data)?;
        allocation()?;
        let pasid = is_for_pasids(argument);
        let domain = viommu.driver.alloc_nested(pasid, data)?;
        let (paging, viommu) = (viommu.hwpt, Some(argument.pt_id));
        add(state, NestedHwpt { domain, paging, viommu, pasid, faults: None })
    }
}

fn is_for_pasids(argument: &abi::HwptAlloc) -> bool {
    argument.flags & abi::HWPT_ALLOC_PASID != 0
}

fn check_nested<'a>(argument: &abi::HwptAlloc, data: Option<UserData<'a>>) -> Result<UserData<'a>> {
    if argument.flags & !(abi::HWPT_FAULT_ID_VALID | abi::HWPT_ALLOC_PASID) != 0 {
        return refuse(Errno::EOPNOTSUPP, "a nested page table cannot have these flags");
    }
    match data {
        Some(data) => Ok(data),
        None => refuse(Errno::EOPNOTSUPP, "a nested page table cannot be without vendor data"),
    }
}

fn add(state: &mut State, nested: NestedHwpt) -> Result<u32> {
    let parent = nested.parent();
    let id = state.objects.add(Object::Nested(nested))?;
    state.objects.hold(parent);
    Ok(id)
}
