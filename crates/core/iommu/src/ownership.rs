//! Who owns a group's DMA (Linux, `iommu_device_claim_dma_owner` and its neighbours).

use crate::domain::Domain;
use crate::error::{AttachError, ClaimError};
use crate::handle::Attached;
use crate::subsystem::{DeviceId, GroupId, Iommu, Owner};

/// Who uses a group's DMA, and how often: `owner` and `owner_cnt` of Linux's `struct iommu_group`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Claim {
    /// Nobody.
    #[default]
    Free,
    /// Kernel drivers through the DMA API: so many are bound.
    Kernel(u32),
    /// User space, by claims on devices: so many.
    Devices(Owner, u32),
    /// User space, by one claim on the whole group.
    Group(Owner),
}

impl Claim {
    /// The owner in user space.
    pub(crate) fn owner(self) -> Option<Owner> {
        match self {
            Self::Free | Self::Kernel(_) => None,
            Self::Devices(owner, _) | Self::Group(owner) => Some(owner),
        }
    }
}

impl Iommu {
    /// Claims the DMA of the device's group for user space and blocks it
    /// (`iommu_device_claim_dma_owner`). The same owner may claim more than once, for each device
    /// of the group; every claim is undone by itself.
    ///
    /// `Owned` while another owner or a kernel driver has the group, `Busy` when the group is
    /// attached to something that is not its default domain.
    pub fn claim_dma_owner(&mut self, device: DeviceId, owner: Owner) -> Result<(), ClaimError> {
        let group = self.group(device).ok_or(ClaimError::NoDevice)?;
        let count = match self.claim_of(group)? {
            Claim::Free => {
                self.block_for_owner(group)?;
                0
            }
            Claim::Devices(holder, count) if holder == owner => count,
            Claim::Devices(..) | Claim::Group(_) | Claim::Kernel(_) => {
                return Err(ClaimError::Owned);
            }
        };
        let count = count.checked_add(1).ok_or(ClaimError::Busy)?;
        self.set_claim(group, Claim::Devices(owner, count));
        if let Some(device) = self.devices.get_mut(&device) {
            device.claims = device.claims.saturating_add(1);
        }
        Ok(())
    }

    /// Undoes one claim; the last one puts the group back to its default domain. Without a claim on
    /// this device nothing happens.
    pub fn release_dma_owner(&mut self, device: DeviceId) {
        let Some(state) = self.devices.get_mut(&device) else {
            return;
        };
        let Some(left) = state.claims.checked_sub(1) else {
            return;
        };
        state.claims = left;
        let group = state.group;
        self.drop_claims(group, 1);
    }

    /// Claims a whole group for an owner that opened it as a group
    /// (`iommu_group_claim_dma_owner`): `Owned` if anybody, `owner` too, uses it.
    pub fn claim_group(&mut self, group: GroupId, owner: Owner) -> Result<(), ClaimError> {
        match self.claim_of(group)? {
            Claim::Free => {
                self.block_for_owner(group)?;
                self.set_claim(group, Claim::Group(owner));
                Ok(())
            }
            Claim::Kernel(_) | Claim::Devices(..) | Claim::Group(_) => Err(ClaimError::Owned),
        }
    }

    /// Undoes [`Iommu::claim_group`] and puts the group back to its default domain.
    pub fn release_group(&mut self, group: GroupId) {
        if matches!(self.claim_of(group), Ok(Claim::Group(_))) {
            self.give_back(group);
        }
    }

    /// Whether somebody owns the group's DMA: a kernel driver through the DMA API or user space
    /// (`iommu_group_dma_owner_claimed`).
    pub fn group_owned(&self, group: GroupId) -> bool {
        matches!(self.claim_of(group), Ok(claim) if claim != Claim::Free)
    }

    /// A kernel driver binds to the device and wants the DMA API (`iommu_device_use_default_domain`).
    ///
    /// `Busy` while user space owns the group.
    pub fn use_default_domain(&mut self, device: DeviceId) -> Result<(), ClaimError> {
        let group = self.group(device).ok_or(ClaimError::NoDevice)?;
        let users = match self.claim_of(group)? {
            Claim::Free => 0,
            Claim::Kernel(users) => users,
            Claim::Devices(..) | Claim::Group(_) => return Err(ClaimError::Busy),
        };
        let users = users.checked_add(1).ok_or(ClaimError::Busy)?;
        self.set_claim(group, Claim::Kernel(users));
        if let Some(device) = self.devices.get_mut(&device) {
            device.drivers = device.drivers.saturating_add(1);
        }
        Ok(())
    }

    /// Undoes [`Iommu::use_default_domain`].
    pub fn unuse_default_domain(&mut self, device: DeviceId) {
        let Some(state) = self.devices.get_mut(&device) else {
            return;
        };
        let Some(left) = state.drivers.checked_sub(1) else {
            return;
        };
        state.drivers = left;
        let group = state.group;
        self.drop_claims(group, 1);
    }

    /// Takes `count` claims, of devices or of drivers, off the group.
    pub(crate) fn drop_claims(&mut self, group: GroupId, count: u32) {
        match self.claim_of(group) {
            Ok(Claim::Devices(owner, claims)) if claims > count => {
                self.set_claim(group, Claim::Devices(owner, claims - count));
            }
            Ok(Claim::Kernel(users)) if users > count => {
                self.set_claim(group, Claim::Kernel(users - count));
            }
            Ok(Claim::Devices(..)) if count > 0 => self.give_back(group),
            Ok(Claim::Kernel(_)) if count > 0 => self.set_claim(group, Claim::Free),
            _ => {}
        }
    }

    /// Blocks a free group for an owner to come (`__iommu_take_dma_ownership`).
    fn block_for_owner(&mut self, group: GroupId) -> Result<(), ClaimError> {
        let state = self.groups.get(&group).ok_or(ClaimError::NoDevice)?;
        if !state.attached.domain.same(&state.default) || !state.pasids.is_empty() {
            return Err(ClaimError::Busy);
        }
        let blocked = Attached { domain: Domain::Blocked, handle: None };
        self.set_domain(group, blocked).map_err(|error| match error {
            AttachError::Incompatible | AttachError::Unsupported | AttachError::NoVirtualDevice => {
                ClaimError::DirectMapped
            }
            AttachError::Busy => ClaimError::Busy,
            AttachError::OutOfMemory => ClaimError::OutOfMemory,
            AttachError::Hardware => ClaimError::Hardware,
            AttachError::NoDevice => ClaimError::NoDevice,
        })
    }

    fn give_back(&mut self, group: GroupId) {
        self.set_claim(group, Claim::Free);
        self.detach_all_pasids(group);
        self.detach_group(group);
    }

    fn claim_of(&self, group: GroupId) -> Result<Claim, ClaimError> {
        let state = self.groups.get(&group).ok_or(ClaimError::NoDevice)?;
        Ok(state.claim)
    }

    fn set_claim(&mut self, group: GroupId, claim: Claim) {
        if let Some(state) = self.groups.get_mut(&group) {
            state.claim = claim;
        }
    }
}
