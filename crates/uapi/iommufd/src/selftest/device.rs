//! Mock devices as objects of a context, and what is done to them.

use std::sync::Arc;

use lychgate_iommu::{DeviceId, Domain, PageFault};
use lychgate_types::{Bdf, Errno, Iova, Pasid};

use super::{Selftest, TestCommand, abi};
use crate::attach::Way;
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection;
use crate::objects::{DeviceObject, Object, SelftestObject};
use crate::state::State;

/// A mock device that a context owns (`struct selftest_obj`). Destroying it ends the device.
#[derive(Clone)]
struct MockDevice {
    selftest: Arc<Selftest>,
    at: Bdf,
    device: DeviceId,
    /// The object of the device, as iommufd has it.
    idev: u32,
}

impl SelftestObject for MockDevice {
    fn destroy(self: Box<Self>, context: &Context, state: &mut State, _id: u32) {
        context.unbind_device(state, self.idev);
        context.lock_iommu().remove(self.device);
        self.selftest.devices().destroy(self.at);
    }
}

impl Context {
    /// `IOMMU_TEST_OP_MOCK_DOMAIN` and `IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS`.
    pub(super) fn test_mock_domain(
        &self,
        selftest: &Arc<Selftest>,
        command: &mut TestCommand<'_>,
        flags: u32,
    ) -> Result<()> {
        fault_injection::allocation()?;
        let mock = self.new_mock_device(selftest, flags)?;
        let idev = mock.idev;
        let mut state = self.lock();
        let attached = self
            .change_pt(&mut state, idev, Pasid::NONE, command.argument.id, Way::Attach)
            .and_then(|hwpt| {
                let object = Object::Selftest(Box::new(mock.clone()));
                state.objects.add(object).map(|id| (hwpt, id))
            });
        let (hwpt, id) = match attached {
            Ok(numbers) => numbers,
            Err(refusal) => {
                Box::new(mock).destroy(self, &mut state, 0);
                return Err(refusal);
            }
        };
        drop(state);
        let mut member = command.argument.member::<abi::MockDomain>();
        (member.out_stdev_id, member.out_hwpt_id, member.out_idev_id) = (id, hwpt, idev);
        command.argument.set_member(&member);
        let answered = command.respond();
        let mut state = self.lock();
        match answered {
            Ok(()) => state.objects.publish(id),
            Err(_) => self.destroy_object(&mut state, id),
        }
        answered
    }

    /// `IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE`.
    pub(super) fn test_mock_domain_replace(&self, command: &mut TestCommand<'_>) -> Result<()> {
        let mut member = command.argument.member::<abi::MockDomainReplace>();
        {
            let mut state = self.lock();
            let idev = mock_device(&mut state, command.argument.id)?.idev;
            let pt_id = member.pt_id;
            member.pt_id = self.change_pt(&mut state, idev, Pasid::NONE, pt_id, Way::Replace)?;
        }
        command.argument.set_member(&member);
        command.respond()
    }

    /// `IOMMU_TEST_OP_PASID_ATTACH`.
    pub(super) fn test_pasid_attach(&self, command: &mut TestCommand<'_>) -> Result<()> {
        let (idev, pasid) = self.change_pasid(command, Way::Attach)?;
        let answered = command.respond();
        if answered.is_err() {
            self.detach(&mut self.lock(), idev, pasid);
        }
        answered
    }

    /// `IOMMU_TEST_OP_PASID_REPLACE`.
    pub(super) fn test_pasid_replace(&self, command: &mut TestCommand<'_>) -> Result<()> {
        self.change_pasid(command, Way::Replace)?;
        command.respond()
    }

    /// `IOMMU_TEST_OP_PASID_DETACH`.
    pub(super) fn test_pasid_detach(&self, command: &TestCommand<'_>) -> Result<()> {
        let pasid = command.argument.member::<abi::PasidDetach>().pasid;
        let mut state = self.lock();
        let idev = mock_device(&mut state, command.argument.id)?.idev;
        // Nothing is attached to a PASID that no device can have.
        if let Some(pasid) = Pasid::new(pasid) {
            self.detach(&mut state, idev, pasid);
        }
        Ok(())
    }

    /// `IOMMU_TEST_OP_PASID_CHECK_HWPT`.
    pub(super) fn test_pasid_check(&self, command: &TestCommand<'_>) -> Result<()> {
        let member = command.argument.member::<abi::PasidCheck>();
        let mut state = self.lock();
        let device = mock_device(&mut state, command.argument.id)?.device;
        let expected = match member.hwpt_id {
            0 => None,
            id => Some(state.objects.page_table(id)?.domain),
        };
        let attached = self.attached_to(device, member.pasid);
        let same = match (&attached, &expected) {
            (None, None) => true,
            (Some(attached), Some(expected)) => attached.same(expected),
            _ => false,
        };
        if same {
            return Ok(());
        }
        let pasid = member.pasid;
        refuse(Errno::EINVAL, format!("PASID {pasid} is attached to something else: {attached:?}"))
    }

    /// `IOMMU_TEST_OP_TRIGGER_IOPF`. The device is told, not the caller, when nobody takes the fault.
    pub(super) fn test_trigger_iopf(
        &self,
        selftest: &Selftest,
        command: &TestCommand<'_>,
    ) -> Result<()> {
        let member = command.argument.member::<abi::TriggerIopf>();
        let device = self.mock_idev(selftest, member.dev_id)?;
        let fault = PageFault {
            pasid: Pasid::new(member.pasid).filter(|pasid| *pasid != Pasid::NONE),
            group: member.grpid,
            last: true,
            response_needs_pasid: false,
            perm: member.perm,
            iova: Iova::new(member.addr),
            private_data: [0; 2],
        };
        // Nobody answers for a PASID that no device can have.
        if Pasid::new(member.pasid).is_some() {
            let _ = self.lock_iommu().report_page_fault(device.device, fault);
        }
        Ok(())
    }

    /// `IOMMU_TEST_OP_DEV_CHECK_CACHE`.
    pub(super) fn test_check_cache(
        &self,
        selftest: &Selftest,
        command: &TestCommand<'_>,
    ) -> Result<()> {
        let member = command.argument.member::<abi::CheckDevCache>();
        let device = self.mock_idev(selftest, command.argument.id)?;
        match selftest.devices().cached(device.bdf, member.id) {
            Some(cached) if cached == member.cache => Ok(()),
            Some(cached) => {
                refuse(Errno::EINVAL, format!("entry {} of the cache holds {cached:#x}", member.id))
            }
            None => refuse(Errno::EINVAL, format!("the cache has no entry {}", member.id)),
        }
    }

    /// `IOMMU_TEST_OP_TRIGGER_VEVENT`.
    pub(super) fn test_trigger_vevent(
        &self,
        selftest: &Selftest,
        command: &TestCommand<'_>,
    ) -> Result<()> {
        let member = command.argument.member::<abi::TriggerVevent>();
        let device = self.mock_idev(selftest, member.dev_id)?;
        selftest
            .devices()
            .report_event(device.bdf)
            .map_err(|errno| Refusal::new(errno, "nobody takes an event of the device"))
    }

    /// Makes a mock device and binds it.
    fn new_mock_device(&self, selftest: &Arc<Selftest>, flags: u32) -> Result<MockDevice> {
        fault_injection::allocation()?;
        let at = selftest
            .devices()
            .create(flags)
            .map_err(|errno| Refusal::new(errno, format!("no mock device has flags {flags:#x}")))?;
        let added = self.lock_iommu().add_generic(at, Arc::clone(&selftest.driver) as _);
        let bound = added.map_err(|error| Refusal::new(error.errno(), error.to_string())).and_then(
            |device| match self.bind_device(device) {
                Ok(idev) => Ok(MockDevice { selftest: Arc::clone(selftest), at, device, idev }),
                Err(refusal) => {
                    self.lock_iommu().remove(device);
                    Err(refusal)
                }
            },
        );
        bound.inspect_err(|_| selftest.devices().destroy(at))
    }

    fn change_pasid(&self, command: &mut TestCommand<'_>, way: Way) -> Result<(u32, Pasid)> {
        let mut member = command.argument.member::<abi::PasidAttach>();
        let mut state = self.lock();
        let idev = mock_device(&mut state, command.argument.id)?.idev;
        let Some(pasid) = Pasid::new(member.pasid) else {
            return refuse(Errno::EINVAL, format!("{} is no PASID", member.pasid));
        };
        member.pt_id = self.change_pt(&mut state, idev, pasid, member.pt_id, way)?;
        command.argument.set_member(&member);
        Ok((idev, pasid))
    }

    /// What a PASID of a device is attached to, 0 for the requests without one.
    fn attached_to(&self, device: DeviceId, pasid: u32) -> Option<Domain> {
        let iommu = self.lock_iommu();
        let group = iommu.group(device)?;
        match Pasid::new(pasid)? {
            Pasid::NONE => iommu.group_domain(group).filter(|domain| !is_blocked(domain)),
            pasid => iommu.pasid_domain(group, pasid),
        }
    }

    /// The device with a number: `ENOENT`; `EINVAL` for one that is none of the mock's.
    fn mock_idev(&self, selftest: &Selftest, id: u32) -> Result<DeviceObject> {
        let device = self.lock().objects.device(id)?;
        if !selftest.devices().contains(device.bdf) {
            return refuse(Errno::EINVAL, format!("device {} is no mock device", device.bdf));
        }
        Ok(device)
    }
}

/// Whether a domain is what a group has that is attached to nothing.
fn is_blocked(domain: &Domain) -> bool {
    matches!(domain, Domain::Blocked)
}

/// The mock device with a number: `ENOENT`.
fn mock_device(state: &mut State, id: u32) -> Result<&mut MockDevice> {
    state.objects.selftest::<MockDevice>(id)
}
