//! What the PASIDs of a group are attached to, and the handles left there (Linux,
//! `iommu_attach_device_pasid` and its neighbours).

use alloc::sync::Arc;
use alloc::vec::Vec;

use lychgate_types::{Errno, Pasid};

use crate::domain::Domain;
use crate::error::AttachError;
use crate::handle::{AttachHandle, Attached, DomainKind};
use crate::subsystem::{Device, Group, GroupId, Iommu, Owner};

impl Iommu {
    /// Attaches a PASID of every device in the group to `domain`. Devices that had moved when one
    /// fails are put back.
    ///
    /// `Busy` unless the group's DMA is claimed by `owner`, and when the PASID is attached.
    /// `Unsupported` when domain or driver has no PASIDs. `Incompatible` for PASID 0, for one that
    /// passes what a device can use, and when a driver says so.
    pub fn attach_pasid(
        &mut self,
        group: GroupId,
        owner: Owner,
        pasid: Pasid,
        domain: Domain,
        handle: Option<Arc<dyn AttachHandle>>,
    ) -> Result<(), AttachError> {
        self.check_pasid(group, owner, pasid, &domain)?;
        let state = self.groups.get(&group).ok_or(AttachError::NoDevice)?;
        if state.pasids.contains_key(&pasid) {
            return Err(AttachError::Busy);
        }
        let old = Attached { domain: Domain::Blocked, handle: None };
        self.move_pasid(group, pasid, &old, Attached { domain, handle })
    }

    /// Attaches a PASID that is attached to something else, without a moment in between in which it
    /// is attached to nothing. On an error the old attachment stays.
    ///
    /// `Incompatible` when the PASID is not attached, and when it is attached just so; else as
    /// [`Iommu::attach_pasid`].
    pub fn replace_pasid(
        &mut self,
        group: GroupId,
        owner: Owner,
        pasid: Pasid,
        domain: Domain,
        handle: Arc<dyn AttachHandle>,
    ) -> Result<(), AttachError> {
        self.check_pasid(group, owner, pasid, &domain)?;
        let state = self.groups.get(&group).ok_or(AttachError::NoDevice)?;
        let old = state.pasids.get(&pasid).ok_or(AttachError::Incompatible)?.clone();
        let new = Attached { domain, handle: Some(handle) };
        if old.same(&new) {
            return Err(AttachError::Incompatible);
        }
        self.move_pasid(group, pasid, &old, new)
    }

    /// Detaches a PASID; its requests are blocked. Cannot fail.
    pub fn detach_pasid(&mut self, group: GroupId, pasid: Pasid) {
        let Some(state) = self.groups.get_mut(&group) else {
            return;
        };
        let Some(old) = state.pasids.remove(&pasid) else {
            return;
        };
        for id in &state.devices {
            if let Some(device) = self.devices.get_mut(id) {
                device.block_pasid(pasid, &old.domain);
                if old.handles_faults() && device.uses_pasids() {
                    device.drop_fault_user();
                }
            }
        }
    }

    /// The handle that was left with what a PASID is attached to; PASID 0 for requests without one
    /// (`iommu_attach_handle_get`).
    ///
    /// `ENOENT` when nothing is attached. `EBUSY` when the domain is of another kind than `kind`, and
    /// when it was attached without a handle.
    pub fn attach_handle(
        &self,
        group: GroupId,
        pasid: Pasid,
        kind: Option<DomainKind>,
    ) -> Result<Arc<dyn AttachHandle>, Errno> {
        let state = self.groups.get(&group).ok_or(Errno::ENOENT)?;
        let attached = if pasid == Pasid::NONE {
            Some(&state.attached).filter(|_| state.claim.owner().is_some())
        } else {
            state.pasids.get(&pasid)
        };
        let attached = attached.ok_or(Errno::ENOENT)?;
        let idle = pasid == Pasid::NONE && attached.domain.kind() == DomainKind::Blocked;
        if idle && attached.handle.is_none() {
            return Err(Errno::ENOENT);
        }
        if kind.is_some_and(|kind| kind != attached.domain.kind()) {
            return Err(Errno::EBUSY);
        }
        attached.handle.clone().ok_or(Errno::EBUSY)
    }

    /// The PASIDs of the group that are attached, ascending.
    pub fn attached_pasids(&self, group: GroupId) -> Vec<Pasid> {
        self.groups
            .get(&group)
            .map(|state| state.pasids.keys().copied().collect())
            .unwrap_or_default()
    }

    /// What a PASID of the group is attached to.
    pub fn pasid_domain(&self, group: GroupId, pasid: Pasid) -> Option<Domain> {
        self.groups.get(&group)?.pasids.get(&pasid).map(|attached| attached.domain.clone())
    }

    pub(crate) fn detach_all_pasids(&mut self, group: GroupId) {
        for pasid in self.attached_pasids(group) {
            self.detach_pasid(group, pasid);
        }
    }

    fn check_pasid(
        &self,
        group: GroupId,
        owner: Owner,
        pasid: Pasid,
        domain: &Domain,
    ) -> Result<(), AttachError> {
        let state = self.groups.get(&group).ok_or(AttachError::NoDevice)?;
        if state.claim.owner() != Some(owner) {
            return Err(AttachError::Busy);
        }
        let limits = || self.members(state).map(Device::max_pasids).filter(|limit| *limit != 0);
        if !domain.supports_pasid() || limits().next().is_none() {
            return Err(AttachError::Unsupported);
        }
        if pasid == Pasid::NONE || limits().any(|limit| pasid.get() >= limit) {
            return Err(AttachError::Incompatible);
        }
        Ok(())
    }

    fn members<'a>(&'a self, state: &'a Group) -> impl Iterator<Item = &'a Device> {
        state.devices.iter().filter_map(|id| self.devices.get(id))
    }

    /// Moves a PASID of every member, or of none.
    fn move_pasid(
        &mut self,
        group: GroupId,
        pasid: Pasid,
        old: &Attached,
        new: Attached,
    ) -> Result<(), AttachError> {
        let state = self.groups.get_mut(&group).ok_or(AttachError::NoDevice)?;
        for (moved, id) in state.devices.iter().enumerate() {
            let Some(device) = self.devices.get_mut(id) else {
                continue;
            };
            if let Err(error) = device.move_pasid(pasid, old, &new) {
                for id in state.devices.iter().take(moved).rev() {
                    if let Some(device) = self.devices.get_mut(id)
                        && device.move_pasid(pasid, &new, old).is_err()
                    {
                        device.block_pasid(pasid, &new.domain);
                    }
                }
                return Err(error);
            }
        }
        state.pasids.insert(pasid, new);
        Ok(())
    }
}

impl Device {
    fn max_pasids(&self) -> u32 {
        self.driver.max_pasids(self.info.bdf.requester)
    }

    /// Whether attachments of PASIDs concern the device: a bridge in a group of PASID-capable
    /// devices has none (Linux skips members with a `max_pasids` of 0).
    fn uses_pasids(&self) -> bool {
        self.max_pasids() != 0
    }

    fn move_pasid(
        &mut self,
        pasid: Pasid,
        old: &Attached,
        new: &Attached,
    ) -> Result<(), AttachError> {
        if !self.uses_pasids() {
            return Ok(());
        }
        if new.handles_faults() {
            self.add_fault_user()?;
        }
        // The same domain with another handle is nothing that hardware sees.
        let result = if old.domain.same(&new.domain) {
            Ok(())
        } else {
            let requester = self.info.bdf.requester;
            self.driver.attach_pasid(requester, pasid, &new.domain, &old.domain)
        };
        let gone = if result.is_ok() { old } else { new };
        if gone.handles_faults() {
            self.drop_fault_user();
        }
        result
    }

    fn block_pasid(&mut self, pasid: Pasid, old: &Domain) {
        if self.uses_pasids() {
            // `Blocked` cannot fail (`Driver::attach_pasid`).
            let requester = self.info.bdf.requester;
            let _ = self.driver.attach_pasid(requester, pasid, &Domain::Blocked, old);
        }
    }
}
