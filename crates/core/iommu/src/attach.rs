//! Moving groups from domain to domain.

use alloc::sync::Arc;

use crate::domain::Domain;
use crate::error::AttachError;
use crate::handle::{AttachHandle, Attached};
use crate::subsystem::{Device, DeviceId, GroupId, Iommu, Owner};

impl Iommu {
    /// Attaches the device's whole group to `domain`, from whatever an owner had attached before:
    /// attach and replace in one (`iommu_attach_group`, `iommu_group_replace_domain`). Devices that
    /// had moved when one fails are put back, and the group keeps its old domain.
    ///
    /// `Busy` unless the group's DMA is claimed by `owner`. `Incompatible` when a driver says so,
    /// and when a device that needs a direct mapping would be blocked.
    pub fn attach_group(
        &mut self,
        group: GroupId,
        owner: Owner,
        domain: Domain,
    ) -> Result<(), AttachError> {
        self.check_owner(group, owner)?;
        self.set_domain(group, Attached { domain, handle: None })
    }

    /// Attaches a group and leaves a handle with it (`iommu_attach_group_handle`): as
    /// [`Iommu::attach_group`], and `Busy` when a handle is there already.
    pub fn attach_group_handle(
        &mut self,
        group: GroupId,
        owner: Owner,
        domain: Domain,
        handle: Arc<dyn AttachHandle>,
    ) -> Result<(), AttachError> {
        self.check_owner(group, owner)?;
        if self.groups.get(&group).is_some_and(|state| state.attached.handle.is_some()) {
            return Err(AttachError::Busy);
        }
        self.set_domain(group, Attached { domain, handle: Some(handle) })
    }

    /// Attaches a group to something else and leaves a handle, whatever was there
    /// (`iommu_replace_group_handle`): as [`Iommu::attach_group`].
    pub fn replace_group_handle(
        &mut self,
        group: GroupId,
        owner: Owner,
        domain: Domain,
        handle: Arc<dyn AttachHandle>,
    ) -> Result<(), AttachError> {
        self.check_owner(group, owner)?;
        self.set_domain(group, Attached { domain, handle: Some(handle) })
    }

    /// Detaches the group: blocked while it has an owner, else back to its default domain. Cannot
    /// fail.
    pub fn detach_group(&mut self, group: GroupId) {
        let Some(state) = self.groups.get(&group) else {
            return;
        };
        let domain = match state.claim.owner() {
            Some(_) => Domain::Blocked,
            None => state.default.clone(),
        };
        self.set_domain_nofail(group, Attached { domain, handle: None });
    }

    fn check_owner(&self, group: GroupId, owner: Owner) -> Result<(), AttachError> {
        let state = self.groups.get(&group).ok_or(AttachError::NoDevice)?;
        if state.claim.owner() == Some(owner) { Ok(()) } else { Err(AttachError::Busy) }
    }

    /// Moves every device of the group, or none (`__iommu_group_set_domain_internal`).
    pub(crate) fn set_domain(&mut self, group: GroupId, new: Attached) -> Result<(), AttachError> {
        let state = self.groups.get_mut(&group).ok_or(AttachError::NoDevice)?;
        if state.attached.same(&new) {
            return Ok(());
        }
        for (moved, id) in state.devices.iter().enumerate() {
            let result = match self.devices.get_mut(id) {
                Some(device) => device.move_to(&state.attached, &new),
                None => Err(AttachError::NoDevice),
            };
            if let Err(error) = result {
                for id in state.devices.iter().take(moved).rev() {
                    if let Some(device) = self.devices.get_mut(id) {
                        device.move_or_block(&new, &state.attached);
                    }
                }
                return Err(error);
            }
        }
        state.attached = new;
        Ok(())
    }

    /// Moves every device of the group; one whose driver fails is blocked.
    pub(crate) fn set_domain_nofail(&mut self, group: GroupId, new: Attached) {
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        for id in &state.devices {
            if let Some(device) = self.devices.get_mut(id) {
                device.move_or_block(&state.attached, &new);
            }
        }
        state.attached = new;
    }

    /// Attaches a device that was just probed to what its group is attached to. `Busy` when PASIDs
    /// of the group are attached: what its owner set up was not meant for this device.
    pub(crate) fn join(&mut self, device: DeviceId, group: GroupId) -> Result<(), AttachError> {
        let Some(state) = self.groups.get(&group) else {
            return Err(AttachError::NoDevice);
        };
        if !state.pasids.is_empty() {
            return Err(AttachError::Busy);
        }
        let blocked = Attached { domain: Domain::Blocked, handle: None };
        match self.devices.get_mut(&device) {
            Some(device) => device.move_to(&blocked, &state.attached),
            None => Err(AttachError::NoDevice),
        }
    }
}

impl Device {
    /// Moves the device, unless firmware forbids to block it.
    fn move_to(&mut self, old: &Attached, new: &Attached) -> Result<(), AttachError> {
        if self.needs_direct && matches!(new.domain, Domain::Blocked) {
            return Err(AttachError::Incompatible);
        }
        if new.handles_faults() {
            self.add_fault_user()?;
        }
        let result = self.driver_attach(&new.domain);
        let gone = if result.is_ok() { old } else { new };
        if gone.handles_faults() {
            self.drop_fault_user();
        }
        result
    }

    /// Moves the device where it has to go: if the driver cannot, it is blocked, so that it never
    /// stays in a domain that its group has left.
    fn move_or_block(&mut self, old: &Attached, new: &Attached) {
        // Without page requests the device's faults are lost, but it is attached all the same.
        let faults = new.handles_faults() && self.add_fault_user().is_ok();
        if self.driver_attach(&new.domain).is_err() {
            // `Blocked` cannot fail (`Driver::attach`).
            let _ = self.driver_attach(&Domain::Blocked);
        }
        if new.handles_faults() && !faults {
            // The count goes down again with the attachment.
            self.fault_users = self.fault_users.saturating_add(1);
        }
        if old.handles_faults() {
            self.drop_fault_user();
        }
    }

    fn driver_attach(&mut self, domain: &Domain) -> Result<(), AttachError> {
        if self.domain.same(domain) {
            return Ok(());
        }
        self.driver.attach(self.info.bdf.requester, domain, &self.domain)?;
        self.domain = domain.clone();
        Ok(())
    }
}
