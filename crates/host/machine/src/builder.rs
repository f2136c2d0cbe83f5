//! What a machine is to be made of, and why it cannot be.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use lychgate_amd_vi::driver::InitError;
use lychgate_endpoints::NvmeError;
use lychgate_iommu::ProbeError;
use lychgate_iommufd::Refusal;
use lychgate_model::Policy;
use lychgate_origins::Origins;
use lychgate_types::{Bdf, Errno};

use crate::faults::FaultListener;
use crate::image::ImageError;
use crate::machine::Machine;
use crate::memory::{FrameOrder, MemlockPolicy};

/// Which IOMMU is in front of the devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum IommuKind {
    /// AMD-Vi with host ("v1") page tables.
    #[default]
    Amd,
}

/// Where a namespace keeps its blocks.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NamespaceSource {
    /// A disk image: a file or a block device of whole 512-byte blocks.
    File {
        /// Where it is.
        path: PathBuf,
        /// Writes are refused, and others may read the image too.
        read_only: bool,
    },
    /// Memory that ends with the machine.
    Memory {
        /// Size in bytes, a multiple of 512, not 0.
        bytes: u64,
    },
}

/// What a device is.
#[derive(Clone, Debug)]
pub(crate) enum Endpoint {
    Nvme(Vec<NamespaceSource>),
    Edu,
}

/// A machine to be.
#[derive(Clone)]
pub struct MachineBuilder {
    pub(crate) iommu: IommuKind,
    pub(crate) policy: Policy,
    pub(crate) order: FrameOrder,
    pub(crate) memlock: MemlockPolicy,
    pub(crate) endpoints: Vec<(Bdf, Endpoint)>,
    pub(crate) allow_unsafe_interrupts: bool,
    pub(crate) selftest: bool,
    pub(crate) checking: bool,
    pub(crate) origins: Option<Arc<Origins>>,
    pub(crate) listener: Option<Arc<dyn FaultListener>>,
    pub(crate) scratch: Option<PathBuf>,
}

impl Default for MachineBuilder {
    fn default() -> Self {
        Self {
            iommu: IommuKind::default(),
            policy: Policy::Plain,
            order: FrameOrder::default(),
            memlock: MemlockPolicy::default(),
            endpoints: Vec::new(),
            allow_unsafe_interrupts: true,
            selftest: false,
            checking: false,
            origins: None,
            listener: None,
            scratch: None,
        }
    }
}

impl MachineBuilder {
    /// A machine with an AMD IOMMU whose caches behave as in hardware, contiguous frames, and no
    /// device.
    pub fn new() -> Self {
        Self::default()
    }

    /// Which IOMMU it has.
    #[must_use]
    pub fn iommu(mut self, kind: IommuKind) -> Self {
        self.iommu = kind;
        self
    }

    /// How the IOMMU's caches forget.
    #[must_use]
    pub fn iotlb(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// How the frames of consecutive pages lie.
    #[must_use]
    pub fn frames(mut self, order: FrameOrder) -> Self {
        self.order = order;
        self
    }

    /// What `RLIMIT_MEMLOCK` means for pinned memory. Counted only, unless said otherwise.
    #[must_use]
    pub fn memlock(mut self, policy: MemlockPolicy) -> Self {
        self.memlock = policy;
        self
    }

    /// Adds an NVMe controller; namespace n of the list has NSID n + 1.
    #[must_use]
    pub fn nvme(mut self, bdf: Bdf, namespaces: Vec<NamespaceSource>) -> Self {
        self.endpoints.push((bdf, Endpoint::Nvme(namespaces)));
        self
    }

    /// Adds an edu device.
    #[must_use]
    pub fn edu(mut self, bdf: Bdf) -> Self {
        self.endpoints.push((bdf, Endpoint::Edu));
        self
    }

    /// Whether devices may be given to user space though their interrupts are not isolated: the
    /// module parameter of that name. On unless said otherwise, as the AMD driver does not remap
    /// interrupts, and there is no processor here that a wrong one could reach.
    #[must_use]
    pub fn allow_unsafe_interrupts(mut self, allow: bool) -> Self {
        self.allow_unsafe_interrupts = allow;
        self
    }

    /// Whether the machine has what the kernel's own tests of iommufd need: the mock IOMMU behind
    /// `IOMMU_TEST_CMD` (`CONFIG_IOMMUFD_TEST`), and fault injection (`CONFIG_FAULT_INJECTION`). It
    /// has neither unless said otherwise.
    #[must_use]
    pub fn selftest(mut self, selftest: bool) -> Self {
        self.selftest = selftest;
        self
    }

    /// Whether the machine checks its IOMMU's driver: the IOMMU is then as unhelpful as its
    /// specification allows, whatever [`MachineBuilder::iotlb`] says, and every copy that the tables
    /// contradict is told of.
    #[must_use]
    pub fn checking(mut self, checking: bool) -> Self {
        self.checking = checking;
        self
    }

    /// Where stories look for the places in the source of programs. Nowhere, unless said otherwise.
    #[must_use]
    pub fn origins(mut self, origins: Arc<Origins>) -> Self {
        self.origins = Some(origins);
        self
    }

    /// Who hears of DMA that does not pass.
    #[must_use]
    pub fn on_fault(mut self, listener: Arc<dyn FaultListener>) -> Self {
        self.listener = Some(listener);
        self
    }

    /// Where the tree of `/dev` and `/sys` is written. A private directory in memory, unless said
    /// otherwise.
    #[must_use]
    pub fn scratch(mut self, directory: impl Into<PathBuf>) -> Self {
        self.scratch = Some(directory.into());
        self
    }

    /// Builds the machine and starts it.
    pub fn build(self) -> Result<Machine, BuildError> {
        Machine::new(self)
    }
}

/// A machine cannot be built. Each message is a sentence that says what to do, where there is
/// something to do.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Two devices at one address.
    #[error("the PCI address {bdf} is used twice; give each device its own")]
    Twice {
        /// Which address.
        bdf: Bdf,
    },
    /// Only segment 0 exists.
    #[error("{bdf} is in another PCI segment; only segment 0000 exists")]
    Segment {
        /// Which address.
        bdf: Bdf,
    },
    /// The machine itself is there.
    #[error("{bdf} belongs to the host bridge and the IOMMU; use another device number")]
    Reserved {
        /// Which address.
        bdf: Bdf,
    },
    /// No device number on bus 0 is left for a root port.
    #[error("too many buses: there are root ports for 31 buses, less one for each device on bus 0")]
    TooManyBuses,
    /// A disk image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A controller.
    #[error("cannot make the NVMe controller {bdf}: {error}")]
    Nvme {
        /// Which.
        bdf: Bdf,
        /// Why.
        error: NvmeError,
    },
    /// Memory for a disk.
    #[error("a disk of {bytes} bytes in memory: the size must be a multiple of 512, and fit")]
    DiskSize {
        /// The size asked for.
        bytes: u64,
    },
    /// The IOMMU's driver does not start.
    #[error("the IOMMU cannot be started: {0}")]
    Iommu(InitError),
    /// The core does not take a device.
    #[error("the device {bdf} cannot be put behind the IOMMU: {error}")]
    Probe {
        /// Which.
        bdf: Bdf,
        /// Why.
        error: ProbeError,
    },
    /// VFIO does not take a device.
    #[error("the device {bdf} cannot be bound to vfio-pci: {error}")]
    Bind {
        /// Which.
        bdf: Bdf,
        /// Why.
        error: Refusal,
    },
    /// No interrupt vector.
    #[error("no interrupt vector for the IOMMU: {0}")]
    Vector(Errno),
    /// The host refuses something.
    #[error("cannot {what}: {error}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why not.
        error: io::Error,
    },
}

impl BuildError {
    pub(crate) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Host { what, error }
    }
}
