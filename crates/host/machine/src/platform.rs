//! The IOMMU of the machine: the model, its driver, and the thread that serves its interrupt.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use lychgate_amd_vi::driver::{AmdVi as Driver, Config as DriverConfig};
use lychgate_amd_vi::model::{AmdVi as Model, CAPABILITY_OFFSET, Config as ModelConfig};
use lychgate_amd_vi::spec::capability;
use lychgate_model::{Checking, Msi, PciFunction, Policy};
use lychgate_types::{Memory, Mmio, StdLocks};
use lychgate_vfio::Interrupts;

use crate::builder::BuildError;
use crate::faults::Faults;
use crate::interrupts::InterruptController;
use crate::memory::PhysicalMemory;

/// The AMD driver on the machine's memory.
pub(crate) type AmdDriver = Driver<PhysicalMemory, StdLocks>;

/// The IOMMU, running.
pub(crate) struct Platform {
    pub(crate) model: Arc<Model>,
    pub(crate) driver: Arc<AmdDriver>,
    interrupt: InterruptThread,
}

/// Width of the IOVAs that the platform says its devices can use: a whole 64-bit space would give
/// clients a range that ends at the last address, and QEMU's NVMe driver counts one byte past the
/// end of a range (`util/vfio-helpers.c`), which then is 0.
const IOVA_BITS: u8 = 48;

impl Platform {
    /// Powers the IOMMU on and lets the driver take it over, every device blocked.
    pub(crate) fn start(
        policy: Policy,
        checking: bool,
        memory: &Arc<PhysicalMemory>,
        controller: &Arc<InterruptController>,
        faults: &Arc<Faults>,
    ) -> Result<Self, BuildError> {
        let table: Arc<dyn Memory> = Arc::clone(memory) as _;
        let target = Arc::clone(controller);
        let deliver = Arc::new(move |msi| {
            target.deliver(msi);
        });
        let policy = if checking { Policy::Adversarial } else { policy };
        let config = ModelConfig {
            policy,
            checking: checking.then(Checking::default),
            va_bits: IOVA_BITS,
            ..ModelConfig::default()
        };
        let model = Arc::new(Model::new(config, table, deliver));

        let line = Arc::new(Line::default());
        let raised = Arc::clone(&line);
        let vector = controller.request(Arc::new(move || raised.raise()));
        enable_msi(&*model, vector.map_err(BuildError::Vector)?);

        let registers: Arc<dyn Mmio> = Arc::clone(&model) as _;
        let (header, misc0) =
            (block(&*model, capability::HEADER), block(&*model, capability::MISC0));
        let config = DriverConfig::from_capability(header, misc0);
        let driver = Driver::new(registers, Arc::clone(memory), Arc::clone(faults) as _, config);
        let driver = Arc::new(driver.map_err(BuildError::Iommu)?);

        let interrupt = InterruptThread::start(line, Arc::clone(&driver))
            .map_err(BuildError::host("start a thread"))?;
        Ok(Self { model, driver, interrupt })
    }

    /// Waits until every interrupt so far is served.
    pub(crate) fn settle(&self) {
        self.interrupt.line.settle();
    }

    /// The capability block's header.
    pub(crate) fn capability_header(&self) -> u32 {
        block(&*self.model, capability::HEADER)
    }
}

/// A word of the IOMMU's capability block.
fn block(function: &dyn PciFunction, offset: u16) -> u32 {
    let mut bytes = [0; 4];
    function.config_read(CAPABILITY_OFFSET + offset, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Programs the MSI capability of the IOMMU's function and enables it (PCIe Base 5.0 7.7.1).
fn enable_msi(function: &dyn PciFunction, msi: Msi) {
    const MSI: u8 = 0x05;
    const ENABLE: u8 = 1;
    const CAPABILITY_POINTER: u16 = 0x34;
    let byte = |at: u16| {
        let mut byte = [0];
        function.config_read(at, &mut byte);
        u16::from(byte[0])
    };
    let mut at = byte(CAPABILITY_POINTER) & 0xfc;
    // A list in 256 bytes has at most 48 capabilities of 4 bytes behind the header.
    for _ in 0..48 {
        if at == 0 || byte(at) == u16::from(MSI) {
            break;
        }
        at = byte(at + 1) & 0xfc;
    }
    if at != 0 {
        function.config_write(at + 4, &msi.address.to_le_bytes());
        function.config_write(at + 12, &msi.data.to_le_bytes()[..2]);
        function.config_write(at + 2, &[ENABLE]);
    }
}

/// The IOMMU's interrupt line, as the thread behind it sees it.
#[derive(Default)]
struct Line {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    raised: bool,
    serving: bool,
    stop: bool,
}

impl Line {
    fn raise(&self) {
        self.lock().raised = true;
        self.changed.notify_all();
    }

    fn stop(&self) {
        self.lock().stop = true;
        self.changed.notify_all();
    }

    /// Waits for an interrupt; `false` when there is none any more.
    fn wait(&self) -> bool {
        let mut state = self.lock();
        state.serving = false;
        self.changed.notify_all();
        while !state.raised && !state.stop {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.serving = std::mem::take(&mut state.raised);
        state.serving
    }

    fn settle(&self) {
        let mut state = self.lock();
        while (state.raised || state.serving) && !state.stop {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves the IOMMU's interrupt outside of whatever raised it, as Linux's threaded handler does.
struct InterruptThread {
    line: Arc<Line>,
    thread: Option<JoinHandle<()>>,
}

impl InterruptThread {
    fn start(line: Arc<Line>, driver: Arc<AmdDriver>) -> io::Result<Self> {
        let served = Arc::clone(&line);
        let serve = move || {
            while served.wait() {
                while driver.handle_interrupt() {}
            }
        };
        let thread = thread::Builder::new().name("iommu-interrupt".to_owned()).spawn(serve)?;
        Ok(Self { line, thread: Some(thread) })
    }
}

impl Drop for InterruptThread {
    fn drop(&mut self) {
        self.line.stop();
        if let Some(thread) = self.thread.take() {
            // It panicked only if a listener did; there is nothing more to stop.
            let _ = thread.join();
        }
    }
}
