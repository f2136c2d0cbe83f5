//! A machine of memory, an AMD IOMMU and its driver, and devices that do DMA.

use std::sync::{Arc, Mutex};

use lychgate_amd_vi::spec::Command;
use lychgate_amd_vi::spec::capability;
use lychgate_amd_vi::spec::registers::{COMMAND_BUFFER_BASE, COMMAND_HEAD, COMMAND_TAIL, RingBase};
use lychgate_amd_vi::{driver, model};
use lychgate_iommu::{AllocFlags, Domain, Driver, FaultReport, FaultSink, PagingDomain};
use lychgate_model::{
    Access, Audit, Checking, IommuPort, Msi, PciFunction, Policy, Scope, Translation,
};
use lychgate_types::{
    HeapPages, Iova, Memory, Mmio, PhysAddr, PhysRun, Prot, RequesterId, StdLocks,
};

pub(crate) const RW: Prot = Prot::READ.union(Prot::WRITE);
pub(crate) const POLICIES: [Policy; 3] =
    [Policy::Plain, Policy::Adversarial, Policy::EvictRandom(7)];

pub(crate) const DEVICE: RequesterId = RequesterId::new(0x0108);
pub(crate) const ALIAS: RequesterId = RequesterId::new(0x0100);
pub(crate) const OTHER: RequesterId = RequesterId::new(0x0210);

pub(crate) struct Bench {
    pub(crate) memory: Arc<HeapPages>,
    pub(crate) port: Arc<model::AmdVi>,
    pub(crate) meddler: Arc<Meddler>,
    pub(crate) sink: Arc<Sink>,
    /// Interrupts of the IOMMU itself.
    pub(crate) interrupts: Arc<Mutex<Vec<Msi>>>,
    pub(crate) driver: driver::AmdVi<HeapPages, StdLocks>,
}

impl Bench {
    /// `DEVICE`, with `ALIAS`, and `OTHER` are probed. An adversarial model checks the driver too.
    pub(crate) fn new(policy: Policy) -> Self {
        let checking = (policy == Policy::Adversarial).then(Checking::default);
        Self::with(model::Config { policy, checking, ..model::Config::default() })
    }

    /// Asserts that nothing is cached which the tables contradict.
    pub(crate) fn assert_nothing_stale(&self) {
        let findings = self.port.audit(Scope::Everything);
        assert!(findings.is_empty(), "{findings:#?}");
    }

    pub(crate) fn with(config: model::Config) -> Self {
        let memory = Arc::new(HeapPages::new());
        let interrupts = Arc::new(Mutex::new(Vec::new()));
        let raised = interrupts.clone();
        let msi = Arc::new(move |msi| raised.lock().unwrap().push(msi));
        let port = Arc::new(model::AmdVi::new(config, memory.clone(), msi));
        enable_msi(&*port);
        let meddler = Arc::new(Meddler {
            port: port.clone(),
            memory: memory.clone(),
            armed: Mutex::new(0),
            mutation: Mutex::default(),
        });
        let sink = Arc::new(Sink::default());
        let block = capability(&*port, capability::CAP_ID);
        let config = driver::Config {
            last_device: RequesterId::new(0x03ff),
            event_log_len: 8,
            patience: 1 << 16,
            ..driver::Config::from_capability(
                config_dword(&*port, block + capability::HEADER),
                config_dword(&*port, block + capability::MISC0),
            )
        };
        let driver =
            driver::AmdVi::new(meddler.clone(), memory.clone(), sink.clone(), config).unwrap();
        driver.probe(DEVICE, &[ALIAS]).unwrap();
        driver.probe(OTHER, &[]).unwrap();
        Self { memory, port, meddler, sink, interrupts, driver }
    }

    pub(crate) fn paging(&self) -> Arc<dyn PagingDomain> {
        self.driver.alloc_paging(DEVICE, AllocFlags::default(), None).unwrap()
    }

    pub(crate) fn attach(&self, device: RequesterId, domain: &Domain) {
        self.driver.attach(device, domain, &Domain::Blocked).unwrap();
    }

    pub(crate) fn attach_paging(&self, device: RequesterId, domain: &Arc<dyn PagingDomain>) {
        self.attach(device, &Domain::Paging(domain.clone()));
    }

    /// Where a transfer of `len` bytes leads, or the address that did not pass.
    pub(crate) fn dma(
        &self,
        requester: RequesterId,
        iova: u64,
        len: u64,
        access: Access,
    ) -> Result<Vec<PhysRun>, Iova> {
        dma(&self.port, requester, iova, len, access)
    }

    /// Where a read of 8 bytes leads.
    pub(crate) fn read(&self, requester: RequesterId, iova: u64) -> Option<u64> {
        let runs = self.dma(requester, iova, 8, Access::Read).ok()?;
        assert_eq!(runs.iter().map(|run| run.len).sum::<u64>(), 8);
        Some(runs[0].start.get())
    }

    /// Where a write of 8 bytes leads.
    pub(crate) fn write(&self, requester: RequesterId, iova: u64) -> Option<u64> {
        let runs = self.dma(requester, iova, 8, Access::Write).ok()?;
        Some(runs[0].start.get())
    }
}

/// What the firmware or the operating system programs the IOMMU's own interrupt to be.
pub(crate) const IOMMU_MSI: Msi = Msi { address: 0xfee0_1000, data: 0x4041 };

fn enable_msi(function: &dyn PciFunction) {
    const ID_MSI: u8 = 0x05;
    let at = capability(function, ID_MSI);
    function.config_write(at + 4, &IOMMU_MSI.address.to_le_bytes());
    function.config_write(at + 12, &IOMMU_MSI.data.to_le_bytes());
    function.config_write(at + 2, &[1]);
}

/// Where the capability `id` is in configuration space.
fn capability(function: &dyn PciFunction, id: u8) -> u16 {
    let mut at = config_dword(function, 0x34) & 0xff;
    for _ in 0..48 {
        let offset = u16::try_from(at).unwrap();
        let [this, next, ..] = config_dword(function, offset).to_le_bytes();
        if this == id {
            return offset;
        }
        at = next.into();
    }
    panic!("no capability {id:#x}");
}

fn config_dword(function: &dyn PciFunction, offset: u16) -> u32 {
    let mut bytes = [0; 4];
    function.config_read(offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

pub(crate) fn dma(
    port: &model::AmdVi,
    requester: RequesterId,
    iova: u64,
    len: u64,
    access: Access,
) -> Result<Vec<PhysRun>, Iova> {
    let request = Translation { requester, pasid: None, start: Iova::new(iova), len, access };
    let mut reached = Vec::new();
    port.with_translation(&[request], &mut |runs| {
        reached.extend_from_slice(runs);
        Ok(())
    })
    .map_err(|aborted| aborted.at)?;
    Ok(reached)
}

pub(crate) fn frames(at: u64, len: u64) -> [PhysRun; 1] {
    [PhysRun { start: PhysAddr::new(at), len }]
}

/// Hears of faults.
#[derive(Default)]
pub(crate) struct Sink {
    pub(crate) faults: Mutex<Vec<FaultReport>>,
    pub(crate) lost: Mutex<usize>,
}

impl Sink {
    pub(crate) fn take(&self) -> Vec<FaultReport> {
        std::mem::take(&mut *self.faults.lock().unwrap())
    }
}

impl FaultSink for Sink {
    fn fault(&self, report: &FaultReport) {
        self.faults.lock().unwrap().push(*report);
    }

    fn faults_lost(&self) {
        *self.lost.lock().unwrap() += 1;
    }
}

/// Registers between driver and model that can spoil the next commands on their way.
pub(crate) struct Meddler {
    port: Arc<model::AmdVi>,
    memory: Arc<HeapPages>,
    armed: Mutex<usize>,
    mutation: Mutex<Option<Mutation>>,
}

/// Gives what the model shall see instead of the command of this number.
pub(crate) type Mutation = Box<dyn FnMut(usize, Command) -> Command + Send>;

impl Meddler {
    /// Changes commands on their way, from the next submission on. The numbers begin at 0.
    pub(crate) fn mutate(&self, mut mutation: Mutation) {
        let mut number = 0;
        *self.mutation.lock().unwrap() = Some(Box::new(move |_, command| {
            number += 1;
            mutation(number - 1, command)
        }));
    }

    /// Applies the mutation to the commands that a new tail hands over.
    fn apply(&self, tail: u64) {
        let mut mutation = self.mutation.lock().unwrap();
        let Some(mutation) = mutation.as_mut() else { return };
        let ring = RingBase([self.port.read64(COMMAND_BUFFER_BASE)]);
        let mut at = self.port.read64(COMMAND_TAIL);
        while at != tail {
            let words = [0, 8].map(|word| ring.base().wrapping_add(at + word));
            let command = Command(words.map(|word| self.memory.load_u64(word).unwrap()));
            let command = mutation(0, command);
            for (word, value) in words.into_iter().zip(command.0) {
                self.memory.store_u64(word, value).unwrap();
            }
            at = (at + 16) % ring.bytes().unwrap();
        }
    }

    /// The first command of each of the next `times` submissions becomes illegal.
    pub(crate) fn spoil(&self, times: usize) {
        *self.armed.lock().unwrap() = times;
    }
}

impl Mmio for Meddler {
    fn read32(&self, offset: u64) -> u32 {
        self.port.read32(offset)
    }

    fn read64(&self, offset: u64) -> u64 {
        self.port.read64(offset)
    }

    fn write32(&self, offset: u64, value: u32) {
        self.port.write32(offset, value);
    }

    fn write64(&self, offset: u64, value: u64) {
        let mut armed = self.armed.lock().unwrap();
        if offset == COMMAND_TAIL && *armed != 0 {
            *armed -= 1;
            let ring = RingBase([self.port.read64(COMMAND_BUFFER_BASE)]);
            let at = ring.base().wrapping_add(self.port.read64(COMMAND_HEAD));
            // Opcode Fh exists in no revision.
            self.memory.store_u64(at, 0xf << 60).unwrap();
        }
        drop(armed);
        if offset == COMMAND_TAIL {
            self.apply(value);
        }
        self.port.write64(offset, value);
    }
}
