//! Moving groups from domain to domain.

use crate::domain::Domain;
use crate::error::AttachError;
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
        let state = self.groups.get(&group).ok_or(AttachError::NoDevice)?;
        if state.claim.owner() != Some(owner) {
            return Err(AttachError::Busy);
        }
        self.set_domain(group, domain)
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
        self.set_domain_nofail(group, domain);
    }

    /// Moves every device of the group, or none (`__iommu_group_set_domain_internal`).
    pub(crate) fn set_domain(&mut self, group: GroupId, domain: Domain) -> Result<(), AttachError> {
        let state = self.groups.get_mut(&group).ok_or(AttachError::NoDevice)?;
        if state.domain.same(&domain) {
            return Ok(());
        }
        for (moved, id) in state.devices.iter().enumerate() {
            let result = match self.devices.get_mut(id) {
                Some(device) => device.move_to(&domain),
                None => Err(AttachError::NoDevice),
            };
            if let Err(error) = result {
                for id in state.devices.iter().take(moved).rev() {
                    if let Some(device) = self.devices.get_mut(id) {
                        device.move_or_block(&state.domain);
                    }
                }
                return Err(error);
            }
        }
        state.domain = domain;
        Ok(())
    }

    /// Moves every device of the group; one whose driver fails is blocked.
    pub(crate) fn set_domain_nofail(&mut self, group: GroupId, domain: Domain) {
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        for id in &state.devices {
            if let Some(device) = self.devices.get_mut(id) {
                device.move_or_block(&domain);
            }
        }
        state.domain = domain;
    }

    /// Attaches a device that was just probed to the current domain of its group.
    pub(crate) fn join(&mut self, device: DeviceId, group: GroupId) -> Result<(), AttachError> {
        let domain = match self.groups.get(&group) {
            Some(state) => state.domain.clone(),
            None => return Err(AttachError::NoDevice),
        };
        match self.devices.get_mut(&device) {
            Some(device) => device.move_to(&domain),
            None => Err(AttachError::NoDevice),
        }
    }
}

impl Device {
    /// Moves the device, unless firmware forbids to block it.
    fn move_to(&mut self, domain: &Domain) -> Result<(), AttachError> {
        if self.needs_direct && matches!(domain, Domain::Blocked) {
            return Err(AttachError::Incompatible);
        }
        self.driver_attach(domain)
    }

    /// Moves the device where it has to go: if the driver cannot, it is blocked, so that it never
    /// stays in a domain that its group has left.
    fn move_or_block(&mut self, domain: &Domain) {
        if self.driver_attach(domain).is_err() {
            // `Blocked` cannot fail (`Driver::attach`).
            let _ = self.driver_attach(&Domain::Blocked);
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
