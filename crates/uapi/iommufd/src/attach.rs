//! Attaching groups, and PASIDs of them, to page tables (`iommufd_hw_pagetable_attach` and its
//! neighbours).

use std::ops::RangeInclusive;
use std::sync::Arc;

use lychgate_iommu::{AttachHandle, ReservedKind};
use lychgate_types::{Errno, Pasid};

use crate::context::Context;
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
use crate::handle::Handle;
use crate::objects::{DeviceObject, Object, PageTable};
use crate::observer::Event;
use crate::reserved::ReservedBy;
use crate::state::{Attachment, Place, State};

/// How a device comes to a page table.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// It is attached to nothing.
    Attach,
    /// Its group changes over.
    Replace,
}

/// Which requests of which device.
#[derive(Clone, Copy)]
struct Requests {
    id: u32,
    device: DeviceObject,
    pasid: Pasid,
}

impl Requests {
    fn place(&self) -> Place {
        (self.device.group, self.pasid)
    }

    /// Whether they are those without a PASID: what devices reserve concerns these alone.
    fn is_rid(&self) -> bool {
        self.pasid == Pasid::NONE
    }
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
        let requests = Requests { id, device: state.objects.device(id)?, pasid };
        match state.objects.get(pt_id)? {
            Object::Hwpt(_) | Object::Nested(_) => {
                self.change_hwpt(state, &requests, pt_id, way)?;
                Ok(pt_id)
            }
            Object::Ioas(_) => self.change_ioas(state, &requests, pt_id, way),
            other => refuse(
                Errno::EINVAL,
                format!("object {pt_id} is {}, nothing to attach to", other.kind()),
            ),
        }
    }

    /// Detaches the requests of a device with `pasid`, or without one for [`Pasid::NONE`], if they
    /// are attached, and destroys the page table that was made for it.
    pub(crate) fn detach(&self, state: &mut State, id: u32, pasid: Pasid) {
        let Ok(device) = state.objects.device(id) else {
            return;
        };
        let requests = Requests { id, device, pasid };
        let Some(attachment) = state.attached.get_mut(&requests.place()) else {
            return;
        };
        let Some(index) = attachment.devices.iter().position(|attached| *attached == id) else {
            return;
        };
        attachment.devices.remove(index);
        let hwpt = attachment.hwpt;
        let pins = attachment.unpin(|device| device == id);
        if attachment.devices.is_empty() {
            let handle = Arc::clone(&attachment.handle);
            state.attached.remove(&requests.place());
            match requests.is_rid() {
                true => self.lock_iommu().detach_group(device.group),
                false => self.lock_iommu().detach_pasid(device.group, pasid),
            }
            handle.end();
        }
        state.put_all(&pins);
        if requests.is_rid() {
            self.unreserve(state, hwpt, &[id]);
            self.observer.event(&Event::Detached { device: device.bdf });
        }
        self.put_hwpt(state, hwpt, 1);
    }

    /// Detaches all requests of a device, those with PASIDs first.
    pub(crate) fn detach_all(&self, state: &mut State, id: u32) {
        for pasid in Self::attached_pasids(state, id) {
            self.detach(state, id, pasid);
        }
        self.detach(state, id, Pasid::NONE);
    }

    /// The PASIDs of a device that are attached, ascending.
    pub(crate) fn attached_pasids(state: &State, id: u32) -> Vec<Pasid> {
        let mine = |(_, attachment): &(&Place, &Attachment)| attachment.devices.contains(&id);
        let pasids = state.attached.iter().filter(mine).map(|((_, pasid), _)| *pasid);
        pasids.filter(|pasid| *pasid != Pasid::NONE).collect()
    }

    /// Whether the requests of a device with `pasid`, or without one, are attached.
    pub(crate) fn is_attached(state: &State, id: u32, pasid: Pasid) -> bool {
        state.attached.iter().any(|((_, at), on)| *at == pasid && on.devices.contains(&id))
    }

    fn change_hwpt(
        &self,
        state: &mut State,
        requests: &Requests,
        hwpt: u32,
        way: Way,
    ) -> Result<()> {
        match way {
            Way::Attach => self.attach(state, requests, hwpt),
            Way::Replace => self.replace(state, requests, hwpt),
        }
    }

    /// Attaches to an IOAS: to the first page table made for it that fits the device, else to a
    /// new one (`iommufd_device_auto_get_domain`).
    fn change_ioas(
        &self,
        state: &mut State,
        requests: &Requests,
        ioas: u32,
        way: Way,
    ) -> Result<u32> {
        for hwpt in state.objects.ioas(ioas)?.hwpts.clone() {
            if !state.objects.hwpt(hwpt).is_ok_and(|hwpt| hwpt.auto) {
                continue;
            }
            match self.change_hwpt(state, requests, hwpt, way) {
                Ok(()) => return Ok(hwpt),
                Err(refusal) if refusal.errno == Errno::EINVAL => {}
                Err(refusal) => return Err(refusal),
            }
        }
        let hwpt = self.new_hwpt(state, &requests.device, ioas, Default::default(), None)?;
        state.objects.publish(hwpt);
        // Attaching comes first, so that what does not fit is told before anything is pinned.
        let result = match way {
            Way::Attach => self.attach(state, requests, hwpt).and_then(|()| {
                let detach = |state: &mut State| self.detach(state, requests.id, requests.pasid);
                self.fill_hwpt(state, hwpt).inspect_err(|_| detach(state))
            }),
            Way::Replace => {
                self.fill_hwpt(state, hwpt).and_then(|()| self.replace(state, requests, hwpt))
            }
        };
        if let Err(refusal) = result {
            self.destroy_object(state, hwpt);
            return Err(refusal);
        }
        if let Ok(hwpt) = state.objects.hwpt_mut(hwpt) {
            hwpt.auto = true;
        }
        Ok(hwpt)
    }

    fn attach(&self, state: &mut State, requests: &Requests, hwpt: u32) -> Result<()> {
        let Requests { id, device, .. } = *requests;
        let attachment = state.attached.get(&requests.place());
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
        allocation()?;
        if requests.is_rid() {
            self.reserve(state, hwpt, &device, &[id])?;
        }
        if first {
            match self.attach_first(state, requests, hwpt) {
                Ok(handle) => {
                    let attachment = Attachment { hwpt, devices: vec![], handle, pins: vec![] };
                    state.attached.insert(requests.place(), attachment);
                }
                Err(refusal) => {
                    if requests.is_rid() {
                        self.unreserve(state, hwpt, &[id]);
                    }
                    return Err(refusal);
                }
            }
        }
        if let Some(attachment) = state.attached.get_mut(&requests.place()) {
            attachment.devices.push(id);
        }
        state.objects.hold(hwpt);
        state.pin_vdevices(requests.place(), &[id]);
        self.tell_attached(state, requests, hwpt);
        Ok(())
    }

    fn replace(&self, state: &mut State, requests: &Requests, hwpt: u32) -> Result<()> {
        let Requests { id, device, .. } = *requests;
        let attachment = state.attached.get(&requests.place());
        let Some(attachment) = attachment.filter(|attachment| attachment.devices.contains(&id))
        else {
            return refuse(Errno::EINVAL, format!("device {} is not attached", device.bdf));
        };
        let old = attachment.hwpt;
        if old == hwpt {
            return Ok(());
        }
        let devices = attachment.devices.clone();
        let moves = requests.is_rid() && ioas_of(state, old)? != ioas_of(state, hwpt)?;
        if moves {
            self.reserve(state, hwpt, &device, &devices)?;
        }
        let handle = match self.attach_instead(state, requests, hwpt) {
            Ok(handle) => handle,
            Err(refusal) => {
                if moves {
                    self.unreserve(state, hwpt, &devices);
                }
                return Err(refusal);
            }
        };
        let mut pins = Vec::new();
        if let Some(attachment) = state.attached.get_mut(&requests.place()) {
            attachment.hwpt = hwpt;
            std::mem::replace(&mut attachment.handle, handle).end();
            pins = attachment.unpin(|_| true);
        }
        state.put_all(&pins);
        state.pin_vdevices(requests.place(), &devices);
        if moves {
            self.unreserve(state, old, &devices);
        }
        for id in &devices {
            state.objects.hold(hwpt);
            if let Ok(device) = state.objects.device(*id) {
                self.tell_attached(state, &Requests { id: *id, device, ..*requests }, hwpt);
            }
        }
        self.put_hwpt(state, old, devices.len());
        Ok(())
    }

    /// Attaches the group, or a PASID of it, which is attached to nothing.
    fn attach_first(&self, state: &State, requests: &Requests, hwpt: u32) -> Result<Arc<Handle>> {
        let (table, handle) = prepare(state, requests, hwpt)?;
        let leave = Arc::<Handle>::clone(&handle) as Arc<dyn AttachHandle>;
        let (group, pasid) = requests.place();
        let mut iommu = self.lock_iommu();
        match requests.is_rid() {
            true => iommu.attach_group_handle(group, self.owner, table.domain, leave)?,
            false => iommu.attach_pasid(group, self.owner, pasid, table.domain, Some(leave))?,
        }
        Ok(handle)
    }

    /// Attaches the group, or a PASID of it, to something else.
    fn attach_instead(&self, state: &State, requests: &Requests, hwpt: u32) -> Result<Arc<Handle>> {
        let (table, handle) = prepare(state, requests, hwpt)?;
        let leave = Arc::<Handle>::clone(&handle) as Arc<dyn AttachHandle>;
        let (group, pasid) = requests.place();
        let mut iommu = self.lock_iommu();
        match requests.is_rid() {
            true => iommu.replace_group_handle(group, self.owner, table.domain, leave)?,
            false => iommu.replace_pasid(group, self.owner, pasid, table.domain, leave)?,
        }
        Ok(handle)
    }

    /// Keeps the IOAS of a page table from using what devices of a group reserve
    /// (`iopt_table_enforce_dev_resv_regions`).
    fn reserve(
        &self,
        state: &mut State,
        hwpt: u32,
        device: &DeviceObject,
        devices: &[u32],
    ) -> Result<()> {
        let regions = self.lock_iommu().reserved_regions(device.group);
        let ranges: Vec<RangeInclusive<u64>> = regions
            .iter()
            .filter(|region| region.kind != ReservedKind::DirectRelaxable)
            .map(|region| region.first.get()..=region.last.get())
            .collect();
        let ioas = ioas_of(state, hwpt)?;
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
        let Ok(ioas) = ioas_of(state, hwpt) else {
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

    fn tell_attached(&self, state: &State, requests: &Requests, hwpt: u32) {
        let ioas = ioas_of(state, hwpt).and_then(|ioas| state.objects.ioas(ioas));
        if let Ok(ioas) = ioas
            && requests.is_rid()
        {
            self.observer
                .event(&Event::Attached { device: requests.device.bdf, ioas: ioas.serial });
        }
    }
}

/// The IOAS of a page table, or of its second stage.
fn ioas_of(state: &State, hwpt: u32) -> Result<u32> {
    let paging = state.objects.page_table(hwpt)?.paging;
    Ok(state.objects.hwpt(paging)?.ioas)
}

/// The page table, if the requests may be attached to it, and a handle to leave.
fn prepare(state: &State, requests: &Requests, hwpt: u32) -> Result<(PageTable, Arc<Handle>)> {
    let table = state.objects.page_table(hwpt)?;
    check_pasid(state, requests, &table)?;
    allocation()?;
    let faults = table.faults.as_ref().map(|faults| Arc::clone(&faults.queue));
    Ok((table, Handle::new(requests.id, faults)))
}

/// Page tables of one group are all for PASIDs, or none is attached to a PASID
/// (`iommufd_hwpt_pasid_compat`).
fn check_pasid(state: &State, requests: &Requests, table: &PageTable) -> Result<()> {
    let group = requests.device.group;
    if requests.is_rid() {
        let attached = |(at, pasid): &Place| *at == group && *pasid != Pasid::NONE;
        if !table.pasid && state.attached.keys().any(attached) {
            return refuse(
                Errno::EINVAL,
                "PASIDs are attached, and the page table is not allocated for that",
            );
        }
        return Ok(());
    }
    if !table.pasid {
        return refuse(Errno::EINVAL, "the page table is not allocated for PASIDs");
    }
    let rid = state.attached.get(&(group, Pasid::NONE));
    match rid.map(|rid| state.objects.page_table(rid.hwpt)) {
        Some(Ok(table)) if !table.pasid => refuse(
            Errno::EINVAL,
            "the page table for requests without PASID is not allocated for PASIDs beside it",
        ),
        _ => Ok(()),
    }
}
