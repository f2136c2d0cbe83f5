//! Attaching groups to page tables (`iommufd_hw_pagetable_attach` and its neighbours).

use std::ops::RangeInclusive;
use std::sync::Arc;

use lychgate_iommu::{Domain, GroupId, ReservedKind};
use lychgate_types::{Errno, Pasid};

use crate::context::Context;
use crate::error::{Result, refuse};
use crate::objects::{DeviceObject, Object};
use crate::observer::Event;
use crate::reserved::ReservedBy;
use crate::state::{Attachment, State};

/// How a device comes to a page table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It is attached to nothing.
    Attach,
    /// Its group changes over.
    Replace,
}

impl Context {
    /// Attaches the requests of device `id` with `pasid`, or without one for [`Pasid::NONE`], to what
    /// has the number `pt_id`, and gives the page table.
    pub(crate) fn change_pt(
        &self,
        state: &mut State,
        id: u32,
        pasid: Pasid,
        pt_id: u32,
        way: Way,
    ) -> Result<u32> {
        if pasid != Pasid::NONE {
            return refuse(Errno::EOPNOTSUPP, "no device here has PASIDs");
        }
        let device = state.objects.device(id)?;
        match state.objects.get(pt_id)? {
            Object::Hwpt(_) => {
                self.change_hwpt(state, id, &device, pt_id, way)?;
                Ok(pt_id)
            }
            Object::Ioas(_) => self.change_ioas(state, id, &device, pt_id, way),
            other => refuse(
                Errno::EINVAL,
                format!("object {pt_id} is {}, nothing to attach to", other.kind()),
            ),
        }
    }

    /// Detaches the requests of a device with `pasid`, or without one for [`Pasid::NONE`], if they
    /// are attached, and destroys the page table that was made for it.
    pub(crate) fn detach(&self, state: &mut State, id: u32, pasid: Pasid) {
        if pasid != Pasid::NONE {
            return;
        }
        let Ok(device) = state.objects.device(id) else {
            return;
        };
        let Some(attachment) = state.attached.get_mut(&device.group) else {
            return;
        };
        let Some(index) = attachment.devices.iter().position(|attached| *attached == id) else {
            return;
        };
        attachment.devices.remove(index);
        let hwpt = attachment.hwpt;
        if attachment.devices.is_empty() {
            state.attached.remove(&device.group);
            self.lock_iommu().detach_group(device.group);
        }
        self.unreserve(state, hwpt, &[id]);
        self.observer.event(&Event::Detached { device: device.bdf });
        self.put_hwpt(state, hwpt, 1);
    }

    /// Whether a device is attached.
    pub(crate) fn is_attached(state: &State, id: u32) -> bool {
        state.attached.values().any(|attachment| attachment.devices.contains(&id))
    }

    fn change_hwpt(
        &self,
        state: &mut State,
        id: u32,
        device: &DeviceObject,
        hwpt: u32,
        way: Way,
    ) -> Result<()> {
        match way {
            Way::Attach => self.attach(state, id, device, hwpt),
            Way::Replace => self.replace(state, id, device, hwpt),
        }
    }

    /// Attaches to an IOAS: to the first page table made for it that fits the device, else to a
    /// new one (`iommufd_device_auto_get_domain`).
    fn change_ioas(
        &self,
        state: &mut State,
        id: u32,
        device: &DeviceObject,
        ioas: u32,
        way: Way,
    ) -> Result<u32> {
        for hwpt in state.objects.ioas(ioas)?.hwpts.clone() {
            if !state.objects.hwpt(hwpt).is_ok_and(|hwpt| hwpt.auto) {
                continue;
            }
            match self.change_hwpt(state, id, device, hwpt, way) {
                Ok(()) => return Ok(hwpt),
                Err(refusal) if refusal.errno == Errno::EINVAL => {}
                Err(refusal) => return Err(refusal),
            }
        }
        let hwpt = self.new_hwpt(state, device, ioas, Default::default(), None)?;
        state.objects.set_auto(hwpt);
        state.objects.publish(hwpt);
        // Attaching comes first, so that what does not fit is told before anything is pinned.
        let result = match way {
            Way::Attach => self.attach(state, id, device, hwpt).and_then(|()| {
                self.fill_hwpt(state, hwpt).inspect_err(|_| self.detach(state, id, Pasid::NONE))
            }),
            Way::Replace => {
                self.fill_hwpt(state, hwpt).and_then(|()| self.replace(state, id, device, hwpt))
            }
        };
        if let Err(refusal) = result {
            self.destroy_object(state, hwpt);
            return Err(refusal);
        }
        Ok(hwpt)
    }

    fn attach(&self, state: &mut State, id: u32, device: &DeviceObject, hwpt: u32) -> Result<()> {
        let attachment = state.attached.get(&device.group);
        if let Some(attachment) = attachment {
            if attachment.devices.contains(&id) {
                return refuse(Errno::EBUSY, format!("device {} is attached already", device.bdf));
            }
            if attachment.hwpt != hwpt {
                return refuse(
                    Errno::EINVAL,
                    format!("the group of {} is attached to another page table", device.bdf),
                );
            }
        }
        let first = attachment.is_none();
        self.reserve(state, hwpt, device.group, &[id])?;
        if first && let Err(refusal) = self.attach_group(state, device.group, hwpt) {
            self.unreserve(state, hwpt, &[id]);
            return Err(refusal);
        }
        let attachment = Attachment { hwpt, devices: Vec::new() };
        state.attached.entry(device.group).or_insert(attachment).devices.push(id);
        state.objects.hold(hwpt);
        self.tell_attached(state, device, hwpt);
        Ok(())
    }

    fn replace(&self, state: &mut State, id: u32, device: &DeviceObject, hwpt: u32) -> Result<()> {
        let attachment = state.attached.get(&device.group);
        let Some(attachment) = attachment.filter(|attachment| attachment.devices.contains(&id))
        else {
            return refuse(Errno::EINVAL, format!("device {} is not attached", device.bdf));
        };
        let old = attachment.hwpt;
        if old == hwpt {
            return Ok(());
        }
        let devices = attachment.devices.clone();
        let moves = state.objects.hwpt(old)?.ioas != state.objects.hwpt(hwpt)?.ioas;
        if moves {
            self.reserve(state, hwpt, device.group, &devices)?;
        }
        if let Err(refusal) = self.attach_group(state, device.group, hwpt) {
            if moves {
                self.unreserve(state, hwpt, &devices);
            }
            return Err(refusal);
        }
        if moves {
            self.unreserve(state, old, &devices);
        }
        if let Some(attachment) = state.attached.get_mut(&device.group) {
            attachment.hwpt = hwpt;
        }
        for id in &devices {
            state.objects.hold(hwpt);
            if let Ok(device) = state.objects.device(*id) {
                self.tell_attached(state, &device, hwpt);
            }
        }
        self.put_hwpt(state, old, devices.len());
        Ok(())
    }

    /// Attaches a group to the domain of a page table.
    fn attach_group(&self, state: &State, group: GroupId, hwpt: u32) -> Result<()> {
        let domain = Domain::Paging(Arc::clone(&state.objects.hwpt(hwpt)?.domain));
        Ok(self.lock_iommu().attach_group(group, self.owner, domain)?)
    }

    /// Keeps the IOAS of a page table from using what devices of a group reserve
    /// (`iopt_table_enforce_dev_resv_regions`).
    fn reserve(&self, state: &mut State, hwpt: u32, group: GroupId, devices: &[u32]) -> Result<()> {
        let regions = self.lock_iommu().reserved_regions(group);
        let ranges: Vec<RangeInclusive<u64>> = regions
            .iter()
            .filter(|region| region.kind != ReservedKind::DirectRelaxable)
            .map(|region| region.first.get()..=region.last.get())
            .collect();
        let ioas = state.objects.hwpt(hwpt)?.ioas;
        let ioas = state.objects.ioas_mut(ioas)?;
        for id in devices {
            for range in &ranges {
                if let Err(refusal) = ioas.table.reserve(range.clone(), ReservedBy::Device(*id)) {
                    devices.iter().for_each(|id| ioas.table.unreserve(ReservedBy::Device(*id)));
                    return Err(refusal);
                }
            }
        }
        Ok(())
    }

    fn unreserve(&self, state: &mut State, hwpt: u32, devices: &[u32]) {
        let Ok(ioas) = state.objects.hwpt(hwpt).map(|hwpt| hwpt.ioas) else {
            return;
        };
        if let Ok(ioas) = state.objects.ioas_mut(ioas) {
            devices.iter().for_each(|id| ioas.table.unreserve(ReservedBy::Device(*id)));
        }
    }

    /// Takes `users` off a page table, and destroys it with the last one if it was made for them.
    fn put_hwpt(&self, state: &mut State, hwpt: u32, users: usize) {
        let mut left = 0;
        for _ in 0..users {
            left = state.objects.put(hwpt);
        }
        if left == 0 && state.objects.hwpt(hwpt).is_ok_and(|hwpt| hwpt.auto) {
            self.destroy_object(state, hwpt);
        }
    }

    fn tell_attached(&self, state: &State, device: &DeviceObject, hwpt: u32) {
        let ioas = state.objects.hwpt(hwpt).and_then(|hwpt| state.objects.ioas(hwpt.ioas));
        if let Ok(ioas) = ioas {
            self.observer.event(&Event::Attached { device: device.bdf, ioas: ioas.serial });
        }
    }
}
