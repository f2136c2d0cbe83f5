//! vIOMMUs: `IOMMU_VIOMMU_ALLOC`, and what their drivers find in us
//! (`drivers/iommu/iommufd/viommu.c`, `driver.c`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lychgate_iommu::{
    Instance, NewViommu, SharedMemory, UserData, ViommuHost, ViommuRequest, VirtualDevices,
    VirtualIommu,
};
use lychgate_types::{Errno, RequesterId};

use crate::abi::iommufd as abi;
use crate::client::Client;
use crate::command::Command;
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection::allocation;
use crate::mm::PAGE_SIZE;
use crate::mmap::{Region, Regions};
use crate::objects::Object;
use crate::state::State;
use crate::veventq::EventQueue;

/// A vIOMMU (`struct iommufd_viommu`).
pub(crate) struct Viommu {
    /// What its driver made.
    pub(crate) driver: Arc<dyn VirtualIommu>,
    /// What its driver was given.
    pub(crate) host: Arc<Host>,
    /// The number of its second stage.
    pub(crate) hwpt: u32,
    /// The IOMMU that it is a slice of.
    pub(crate) instance: Instance,
}

impl Context {
    /// `IOMMU_VIOMMU_ALLOC`.
    pub(crate) fn viommu_alloc(&self, command: &mut Command<'_, abi::ViommuAlloc>) -> Result<()> {
        let argument = command.argument;
        if argument.flags != 0 || argument.kind == 0 {
            return refuse(Errno::EOPNOTSUPP, "an unknown flag is set, or no type is given");
        }
        let mut state = self.lock();
        let device = state.objects.device(argument.dev_id)?;
        if !self.lock_iommu().supports_viommu(device.device, argument.kind) {
            let kind = argument.kind;
            return refuse(Errno::EOPNOTSUPP, format!("the IOMMU has no vIOMMU of type {kind:#x}"));
        }
        let parent = state.objects.hwpt(argument.hwpt_id)?;
        if !parent.nest_parent {
            return refuse(Errno::EINVAL, "the page table is not allocated to be a nesting parent");
        }
        let parent = Arc::clone(&parent.domain);
        let bytes = read_data(command)?;
        allocation()?;
        let host = Host::new(Arc::clone(&self.regions));
        let data = UserData { kind: argument.kind, bytes: &bytes };
        let request = ViommuRequest { kind: argument.kind, parent: &parent, data };
        let weak: Weak<dyn ViommuHost> = Arc::<Host>::downgrade(&host);
        let mut iommu = self.lock_iommu();
        let made = iommu.viommu_init(device.device, &request, weak);
        let instance = iommu.instance(device.device);
        drop(iommu);
        let (NewViommu { viommu, out }, instance) = match (made, instance) {
            (Ok(made), Some(instance)) => (made, instance),
            (made, _) => {
                host.end();
                let errno = made.err().unwrap_or(Errno::ENODEV);
                return refuse(errno, "the driver makes no such vIOMMU");
            }
        };
        let object = Viommu { driver: viommu, host, hwpt: argument.hwpt_id, instance };
        let id = state.objects.add(Object::Viommu(object))?;
        state.objects.hold(argument.hwpt_id);
        drop(state);
        let out = out.get(..bytes.len()).unwrap_or(&out);
        if !out.is_empty()
            && let Err(refusal) = command.write(argument.data_uptr, out)
        {
            self.destroy_object(&mut self.lock(), id);
            return Err(refusal);
        }
        command.argument.out_viommu_id = id;
        self.finish(command, id)
    }
}

/// The driver's structure, for the driver to understand.
fn read_data(command: &Command<'_, abi::ViommuAlloc>) -> Result<Vec<u8>> {
    let argument = &command.argument;
    if u64::from(argument.data_len) > PAGE_SIZE {
        return refuse(Errno::EINVAL, "the vendor data is longer than any that there is");
    }
    let mut bytes = vec![0; usize::try_from(argument.data_len).unwrap_or(0)];
    if !bytes.is_empty() {
        command.read(argument.data_uptr, &mut bytes)?;
    }
    Ok(bytes)
}

impl Viommu {
    /// Whether a process maps memory of it: it cannot be destroyed before that ends.
    pub(crate) fn is_mapped(&self, client: &dyn Client) -> bool {
        self.host.regions().iter().any(|region| region.is_mapped(client))
    }

    /// It was destroyed.
    pub(crate) fn end(self, state: &mut State) {
        let Self { driver, host, hwpt, .. } = self;
        drop(driver);
        host.end();
        state.objects.put(hwpt);
    }
}

/// What the driver of a vIOMMU finds in us. Its locks are taken last, whatever else is locked: drivers
/// call with their own held.
pub(crate) struct Host {
    devices: Mutex<Devices>,
    queues: Mutex<Vec<Arc<EventQueue>>>,
    all_regions: Arc<Regions>,
    own_regions: Mutex<Vec<Arc<Region>>>,
}

/// Virtual ids and devices, both ways: the one table of them.
#[derive(Default)]
struct Devices {
    by_id: BTreeMap<u64, RequesterId>,
    by_requester: BTreeMap<RequesterId, u64>,
}

impl Host {
    fn new(all_regions: Arc<Regions>) -> Arc<Self> {
        Arc::new(Self {
            devices: Mutex::default(),
            queues: Mutex::default(),
            all_regions,
            own_regions: Mutex::default(),
        })
    }

    /// Gives a device a virtual id. `EEXIST` when another has it.
    pub(crate) fn add_device(&self, virtual_id: u64, device: RequesterId) -> Result<()> {
        let mut devices = guard(&self.devices);
        if devices.by_id.contains_key(&virtual_id) {
            return refuse(Errno::EEXIST, format!("the virtual id {virtual_id:#x} is in use"));
        }
        devices.by_id.insert(virtual_id, device);
        devices.by_requester.insert(device, virtual_id);
        Ok(())
    }

    /// Takes a virtual id back.
    pub(crate) fn remove_device(&self, virtual_id: u64) {
        let mut devices = guard(&self.devices);
        if let Some(device) = devices.by_id.remove(&virtual_id) {
            devices.by_requester.remove(&device);
        }
    }

    /// Adds a queue of events. `EEXIST` when there is one of its type.
    pub(crate) fn add_queue(&self, queue: Arc<EventQueue>) -> Result<()> {
        let mut queues = guard(&self.queues);
        if queues.iter().any(|other| other.kind() == queue.kind()) {
            return refuse(Errno::EEXIST, "the vIOMMU has a queue for events of this type");
        }
        queues.push(queue);
        Ok(())
    }

    /// Takes a queue away.
    pub(crate) fn remove_queue(&self, queue: &Arc<EventQueue>) {
        guard(&self.queues).retain(|other| !Arc::ptr_eq(other, queue));
    }

    fn regions(&self) -> MutexGuard<'_, Vec<Arc<Region>>> {
        guard(&self.own_regions)
    }

    /// Nothing of the vIOMMU can be mapped any more.
    fn end(&self) {
        for region in self.regions().drain(..) {
            self.all_regions.free(&region);
        }
    }
}

impl ViommuHost for Host {
    fn alloc_mmap(&self, len: u64) -> Result<Arc<dyn SharedMemory>, Errno> {
        allocation().map_err(|Refusal { errno, .. }| errno)?;
        let region = self.all_regions.alloc(len)?;
        self.regions().push(Arc::clone(&region));
        Ok(region)
    }

    fn devices(&self) -> &dyn VirtualDevices {
        self
    }

    fn report_event(&self, kind: u32, data: &[u8]) -> Result<(), Errno> {
        let queue = guard(&self.queues).iter().find(|queue| queue.kind() == kind).cloned();
        match queue {
            Some(queue) => {
                queue.report(data);
                Ok(())
            }
            None => Err(Errno::EOPNOTSUPP),
        }
    }
}

impl VirtualDevices for Host {
    fn find(&self, virtual_id: u64) -> Option<RequesterId> {
        guard(&self.devices).by_id.get(&virtual_id).copied()
    }

    fn virtual_id(&self, device: RequesterId) -> Option<u64> {
        guard(&self.devices).by_requester.get(&device).copied()
    }
}

fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
