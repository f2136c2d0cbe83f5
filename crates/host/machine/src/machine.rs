//! The machine: everything put together, and what programs ask of it.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use lychgate_iommu::{Driver, Iommu, ReservedKind};
use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{
    Cap, Client, Config, Context, MemFile, Mm, NodeKind, Observer, OpenFile, Selftest, SharedIommu,
    fault_injection,
};
use lychgate_model::{PciFunction, Upstream};
use lychgate_origins::Stack;
use lychgate_types::{Bdf, Errno};
use lychgate_vfio::{Interrupts, Parts, Vfio, VfioPciDevice};

use crate::builder::{BuildError, MachineBuilder};
use crate::bus::Bus;
use crate::check::CheckedDriver;
use crate::client::AddressSpace;
use crate::endpoints::{self, BarWindows};
use crate::fault_injection::Injection;
use crate::faults::Faults;
use crate::interrupts::InterruptController;
use crate::journal::{self, Journal};
use crate::memory::PhysicalMemory;
use crate::platform::Platform;
use crate::service::{Served, ServiceThread};
use crate::system::{Call, Node, System};
use crate::text::Text;
use crate::topology::{self, Topology};
use crate::tree::{Content, FunctionNode, IommuNode, Tree};

/// Major and minor number of `/dev/iommu`: a misc device with a dynamic minor.
const IOMMU_DEVICE_NUMBER: (u32, u32) = (10, 125);

const IOMMU_NODE: &str = "/dev/iommu";
const CONTAINER_NODE: &str = "/dev/vfio/vfio";
const CDEV_PREFIX: &str = "/dev/vfio/devices/vfio";
const GROUP_PREFIX: &str = "/dev/vfio/";

/// A running machine. Dropping it stops its threads and removes its files.
///
/// The fields end in the order in which they stand: first whatever issues DMA.
pub struct Machine {
    services: Vec<ServiceThread>,
    vfio: Vfio,
    iommu: SharedIommu,
    platform: Platform,
    bus: Arc<Bus>,
    memory: Arc<PhysicalMemory>,
    journal: Arc<Journal>,
    faults: Arc<Faults>,
    tree: Tree,
    allow_unsafe_interrupts: bool,
    injection: Option<Injection>,
    selftest: Option<Arc<Selftest>>,
}

impl Machine {
    /// What to build one from.
    pub fn builder() -> MachineBuilder {
        MachineBuilder::new()
    }

    pub(crate) fn new(builder: MachineBuilder) -> std::result::Result<Self, BuildError> {
        let addresses: Vec<Bdf> = builder.endpoints.iter().map(|(bdf, _)| *bdf).collect();
        let topology = Topology::new(&addresses)?;
        let memory = PhysicalMemory::new(builder.order, builder.memlock)
            .map_err(BuildError::host("reserve memory"))?;
        let memory = Arc::new(memory);
        let journal = Arc::new(Journal::new());
        let faults = Arc::new(Faults::new(Arc::clone(&journal), builder.listener, builder.origins));
        let controller = Arc::new(InterruptController::new());
        let platform =
            Platform::start(builder.policy, builder.checking, &memory, &controller, &faults)?;
        let driver: Arc<dyn Driver> = Arc::clone(&platform.driver) as _;
        let driver = if builder.checking {
            let model = Arc::clone(&platform.model) as _;
            Arc::new(CheckedDriver::new(driver, model, Arc::clone(&faults)))
        } else {
            driver
        };
        let port = Arc::clone(&platform.model);
        let bus = Bus::new(port, Arc::clone(&memory), Arc::clone(&controller), Arc::clone(&faults));

        let mut iommu = Iommu::new();
        topology.ports().for_each(|port| iommu.add_bridge(port));
        let iommu: SharedIommu = Arc::new(Mutex::new(iommu));
        let mut assembly = Assembly {
            bus: Arc::new(bus),
            vfio: Vfio::new(Arc::clone(&iommu)),
            iommu: Arc::clone(&iommu),
            driver,
            interrupts: controller,
            windows: BarWindows::default(),
            services: Vec::new(),
            functions: fixed_functions(&topology, &platform),
            names: HashMap::new(),
        };
        for (bdf, endpoint) in builder.endpoints {
            let made = endpoints::make(bdf, endpoint, &assembly.bus)?;
            assembly.add(bdf, made, &topology)?;
        }
        faults.name_devices(assembly.names);
        let injection = builder.selftest.then(Injection::new);
        let selftest = builder.selftest.then(|| Selftest::new(Arc::clone(&memory) as _));
        let mut content = content(assembly.functions, &assembly.vfio, &platform);
        content.attributes = injection.as_ref().map_or_else(Vec::new, Injection::attributes);
        let tree = Tree::new(&content, builder.scratch.as_deref())
            .map_err(BuildError::host("write the tree of /dev and /sys"))?;
        Ok(Self {
            services: assembly.services,
            vfio: assembly.vfio,
            iommu,
            platform,
            bus: assembly.bus,
            memory,
            journal,
            faults,
            tree,
            allow_unsafe_interrupts: builder.allow_unsafe_interrupts,
            injection,
            selftest,
        })
    }

    /// The physical memory.
    pub fn memory(&self) -> &Arc<PhysicalMemory> {
        &self.memory
    }

    /// The IOMMU core, with a group for each device.
    pub fn iommu(&self) -> &SharedIommu {
        &self.iommu
    }

    /// The way of devices to memory, through the IOMMU: what a function that somebody brings along
    /// is given.
    pub fn upstream(&self) -> Arc<dyn Upstream> {
        Arc::clone(&self.bus) as _
    }

    /// What is and was mapped.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// How many requests did not pass so far.
    pub fn fault_count(&self) -> u64 {
        self.faults.count()
    }

    /// Waits until the listener has heard of every fault up to now.
    pub fn settle(&self) {
        self.platform.settle();
    }

    /// The devices that do DMA.
    pub fn devices(&self) -> usize {
        self.services.len()
    }

    /// Opens a node that iommufd serves.
    fn context(&self, node: NodeKind, device_number: (u32, u32)) -> Arc<dyn OpenFile> {
        let observer: Arc<dyn Observer> = Arc::clone(&self.journal) as _;
        let allow_unsafe_interrupts = self.allow_unsafe_interrupts;
        let config = Config { node, device_number, allow_unsafe_interrupts };
        let iommu = Arc::clone(&self.iommu);
        match &self.selftest {
            None => Context::open(iommu, observer, config),
            Some(selftest) => {
                Context::open_with_selftest(iommu, observer, config, Arc::clone(selftest))
            }
        }
    }
}

impl System for Machine {
    fn tree(&self) -> &Path {
        self.tree.path()
    }

    fn node(&self, path: &Path) -> Option<Node> {
        self.tree.node(path)
    }

    fn open(&self, path: &Path, _client: &dyn Client) -> Result<Arc<dyn OpenFile>> {
        let number = |text: &str| text.parse::<u32>().ok();
        let known = path.to_str().filter(|_| self.node(path).is_some());
        match known {
            Some(IOMMU_NODE) => Ok(self.context(NodeKind::Iommu, IOMMU_DEVICE_NUMBER)),
            Some(CONTAINER_NODE) => {
                Ok(self.context(NodeKind::VfioContainer, Vfio::CONTAINER_DEVICE_NUMBER))
            }
            Some(path) => {
                if let Some(index) = path.strip_prefix(CDEV_PREFIX).and_then(number) {
                    return self.vfio.open_cdev(index);
                }
                match path.strip_prefix(GROUP_PREFIX).and_then(number) {
                    Some(group) => self.vfio.open_group(group),
                    None => refuse(Errno::ENOENT, "the node has no driver"),
                }
            }
            None => refuse(Errno::ENOENT, "the machine has no such node"),
        }
    }

    fn mm(&self, space: Arc<dyn AddressSpace>) -> Arc<dyn Mm> {
        self.memory.mm(space)
    }

    fn mem_file(&self, fd: OwnedFd) -> std::result::Result<Arc<dyn MemFile>, Errno> {
        self.memory.mem_file(fd)
    }

    /// The kernel's tests set how pins are accounted, which is root's to do and concerns this machine
    /// alone. Whoever runs it is root in it, though the host may give its root fewer capabilities.
    fn grants(&self, cap: Cap) -> bool {
        self.selftest.is_some() && cap == Cap::SysResource
    }

    fn attribute(&self, path: &Path) -> Option<Arc<dyn Text>> {
        self.injection.as_ref()?.attribute(path.to_str()?)
    }

    fn fail_nth(&self, thread: u32) -> Option<Arc<dyn Text>> {
        Some(self.injection.as_ref()?.fail_nth(thread))
    }

    fn call_begins(&self, call: Call) {
        if let Some(injection) = &self.injection {
            fault_injection::decide_by(injection.of(call.thread));
        }
        journal::call_begins(call);
    }

    fn call_came_from(&self, stack: Stack) {
        journal::call_came_from(stack);
    }

    fn call_ends(&self) {
        journal::call_ends();
        if self.injection.is_some() {
            fault_injection::decide_by(None);
        }
    }
}

/// What grows while devices are added.
struct Assembly {
    bus: Arc<Bus>,
    vfio: Vfio,
    iommu: SharedIommu,
    driver: Arc<dyn Driver>,
    interrupts: Arc<InterruptController>,
    windows: BarWindows,
    services: Vec<ServiceThread>,
    functions: Vec<FunctionNode>,
    names: HashMap<lychgate_types::RequesterId, (Bdf, String)>,
}

impl Assembly {
    /// Puts a device behind the IOMMU, starts its thread and binds it to vfio-pci.
    fn add(
        &mut self,
        bdf: Bdf,
        made: endpoints::Made,
        topology: &Topology,
    ) -> std::result::Result<(), BuildError> {
        let resources = self.windows.assign(&*made.function);
        let (device, group, reserved) = {
            let mut iommu = self.iommu.lock().unwrap_or_else(PoisonError::into_inner);
            let driver = Arc::clone(&self.driver);
            let device = iommu
                .add_pci(topology.endpoint(bdf), driver)
                .map_err(|error| BuildError::Probe { bdf, error })?;
            let group = iommu.group(device);
            (device, group, group.map_or_else(Vec::new, |group| iommu.reserved_regions(group)))
        };
        let thread = ServiceThread::start(Arc::clone(&made.function))
            .map_err(BuildError::host("start a thread"))?;
        let function: Arc<dyn PciFunction> = Arc::new(Served::new(made.function, &thread));
        self.services.push(thread);
        let driver = Arc::new(VfioPciDevice::new(Parts {
            function: Arc::clone(&function),
            device,
            bdf,
            interrupts: Arc::clone(&self.interrupts) as Arc<dyn Interrupts>,
            regions: made.regions,
        }));
        self.bus.connect_pin(bdf.requester, &driver);
        let index = self.vfio.add(driver).map_err(|error| BuildError::Bind { bdf, error })?;
        self.names.insert(bdf.requester, (bdf, function.name().to_owned()));

        let node = self.vfio.devices().into_iter().find(|node| node.index == index);
        let region = |region: &lychgate_iommu::ReservedRegion| {
            (region.first.get(), region.last.get(), kind_name(region.kind))
        };
        self.functions.push(FunctionNode {
            bdf,
            port: topology.port_of(bdf),
            config: config_of(&*function),
            resources,
            group: group.map(|group| group.get()),
            reserved: reserved.iter().map(region).collect(),
            driver: Some("vfio-pci"),
            vfio: node.map(|node| (index, device_node(node.device_number))),
        });
        Ok(())
    }
}

/// The functions that every machine has: host bridge, IOMMU, root ports.
fn fixed_functions(topology: &Topology, platform: &Platform) -> Vec<FunctionNode> {
    let function = |bdf, config, driver| FunctionNode {
        bdf,
        port: None,
        config,
        resources: [[0; 3]; 7],
        group: None,
        reserved: Vec::new(),
        driver,
        vfio: None,
    };
    let mut functions = vec![
        function(topology::HOST_BRIDGE, topology::host_bridge_config(), None),
        function(topology::IOMMU, config_of(&*platform.model), None),
    ];
    functions.extend(topology.ports().map(|port| {
        let config = topology::port_config(port.secondary_bus.unwrap_or(0));
        function(port.bdf, config, Some("pcieport"))
    }));
    functions
}

/// Everything that the tree shows.
fn content(functions: Vec<FunctionNode>, vfio: &Vfio, platform: &Platform) -> Content {
    use lychgate_amd_vi::spec::registers::{EFR, EFR2};
    use lychgate_types::Mmio;
    let [efr, efr2] = [EFR, EFR2].map(|register| platform.model.read64(register));
    // As Linux's `amd_iommu_show_cap` and `amd_iommu_show_features` print them.
    let attributes = vec![
        ("amd-iommu", "cap", format!("{:x}", platform.capability_header())),
        ("amd-iommu", "features", format!("{efr2:x}:{efr:x}")),
    ];
    let group = |node: lychgate_vfio::GroupNode| (node.number, device_node(node.device_number));
    Content {
        functions,
        iommu: Some(IommuNode { bdf: topology::IOMMU, name: "ivhd0", attributes }),
        nodes: vec![
            (IOMMU_NODE.into(), device_node(IOMMU_DEVICE_NUMBER)),
            (CONTAINER_NODE.into(), device_node(Vfio::CONTAINER_DEVICE_NUMBER)),
        ],
        groups: vfio.groups().into_iter().map(group).collect(),
        attributes: Vec::new(),
    }
}

/// A node that every user may open: who runs a machine owns it.
fn device_node((major, minor): (u32, u32)) -> Node {
    Node { major, minor, mode: 0o666 }
}

fn config_of(function: &dyn PciFunction) -> Vec<u8> {
    let mut config = vec![0; 4096];
    function.config_read(0, &mut config);
    config
}

/// As `iommu_group_resv_type_string` spells it.
fn kind_name(kind: ReservedKind) -> &'static str {
    match kind {
        ReservedKind::Direct => "direct",
        ReservedKind::DirectRelaxable => "direct-relaxable",
        ReservedKind::Reserved => "reserved",
        ReservedKind::Msi | ReservedKind::SwMsi => "msi",
    }
}
