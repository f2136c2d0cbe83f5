//! A function whose configuration space is made of pieces, and the interrupt controller above it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use lychgate_iommu::{DeviceId, Iommu};
use lychgate_model::{Bar, BarKind, Msi, Msix, MsixGate, PciFunction, Service};
use lychgate_types::{Bdf, Errno};

use super::client::{MEMORY, TestClient};
use super::iommu;
use crate::abi::{VFIO_PCI_CONFIG_REGION_INDEX, region_offset};
use crate::{Handler, Interrupts, Parts, VfioPciDevice};

/// Where the fixture's capabilities are.
pub(crate) const PM: u16 = 0x40;
pub(crate) const MSI: u16 = 0x50;
pub(crate) const HIDDEN: u16 = 0x68;
pub(crate) const EXPRESS: u16 = 0x70;
pub(crate) const MSIX: u16 = 0xb0;
pub(crate) const VENDOR_SPECIFIC: u16 = 0xc0;
pub(crate) const AF: u16 = 0xd0;
pub(crate) const PASID: u16 = 0x100;
pub(crate) const AER: u16 = 0x110;
pub(crate) const HIDDEN_EXTENDED: u16 = 0x150;
pub(crate) const VSEC: u16 = 0x160;
/// Where the MSI-X table is in BAR 0, and how many vectors it has.
pub(crate) const TABLE: u64 = 0x2000;
pub(crate) const VECTORS: u16 = 4;
/// Length of BAR 0, and of what can be mapped of it.
pub(crate) const BAR0: u64 = 0x4000;
pub(crate) const MAPPABLE: u64 = 0x2000;
/// BAR 2 cannot be mapped at all.
pub(crate) const BAR2: u64 = 0x1000;

/// An access to BAR 0 or 2 that the function saw, but for its MSI-X table.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Seen {
    Read { bar: u8, at: u64, width: usize },
    Write { bar: u8, at: u64, width: usize },
}

/// The function.
pub(crate) struct TestFunction {
    controller: Arc<Controller>,
    state: Mutex<State>,
}

struct State {
    config: Vec<u8>,
    at_reset: Vec<u8>,
    writable: Vec<u8>,
    registers: BTreeMap<(u8, u64), u8>,
    msix: Msix,
    seen: Vec<Seen>,
    resets: u32,
}

impl TestFunction {
    pub(crate) fn new(controller: Arc<Controller>) -> Arc<Self> {
        let mut state = State {
            config: vec![0; 4096],
            at_reset: Vec::new(),
            writable: vec![0; 4096],
            registers: BTreeMap::new(),
            msix: Msix::new(VECTORS),
            seen: Vec::new(),
            resets: 0,
        };
        state.lay(0x00, &[0x36, 0x1b, 0x10, 0x00], &[]);
        state.lay(0x04, &[0, 0], &[0x47, 0x04]);
        state.lay(0x06, &[0x10, 0], &[]);
        state.lay(0x08, &[2, 2, 8, 1], &[]);
        state.lay(0x0c, &[0], &[0xff]);
        state.lay(0x10, &[4, 0, 0, 0], &[0, 0xc0, 0xff, 0xff]);
        state.lay(0x14, &[], &[0xff; 4]);
        state.lay(0x18, &[], &[0, 0xf0, 0xff, 0xff]);
        state.lay(0x34, &[0x40], &[]);
        state.lay(0x3c, &[0, 1], &[0xff, 0]);
        state.lay(PM, &[0x01, 0x50, 0x03, 0xf8, 0x08, 0x81, 0, 0], &[0, 0, 0, 0, 3, 0x81, 0, 0]);
        // MSI: 4 messages, 64 bit, maskable.
        state.lay(MSI, &[0x05, 0x68, 0x84, 0x01], &[0, 0, 0x71, 0]);
        state.lay(MSI + 4, &[], &[0xff; 10]);
        state.lay(MSI + 0x10, &[], &[0xf, 0, 0, 0]);
        state.lay(HIDDEN, &[0x0c, 0x70, 0, 0], &[0, 0, 0xff, 0xff]);
        // PCI Express endpoint, version 2, function level reset, 128-byte requests and payloads of 256.
        state.lay(EXPRESS, &[0x10, 0xb0, 0x02, 0x00, 0, 0, 0, 0x10], &[]);
        state.lay(EXPRESS + 8, &[0x20, 0x20], &[0xff, 0x7f]);
        state.lay(EXPRESS + 0x28, &[], &[0xff, 0xff]);
        state.lay(MSIX, &[0x11, 0xc0, 3, 0], &[0, 0, 0, 0xc0]);
        state.lay(MSIX + 4, &[0x00, 0x20, 0, 0, 0x00, 0x30, 0, 0], &[]);
        state.lay(
            VENDOR_SPECIFIC,
            &[0x09, 0xd0, 8, 0, 1, 2, 3, 4],
            &[0, 0, 0, 0, 0xff, 0xff, 0, 0],
        );
        state.lay(AF, &[0x13, 0, 6, 3, 0, 0], &[]);
        // A hole that belongs to nobody.
        state.lay(0xe0, &[0xaa, 0xbb], &[0xff, 0xff]);
        state.lay(PASID, &[0x1b, 0, 0x01, 0x11, 0, 0x14, 0, 0], &[0, 0, 0, 0, 0, 0, 7, 0]);
        state.lay(AER, &[0x01, 0, 0x02, 0x15], &[]);
        state.lay(AER + 8, &[0; 8], &[0xff; 8]);
        state.lay(HIDDEN_EXTENDED, &[0x19, 0, 0x01, 0x16], &[]);
        state.lay(VSEC, &[0x0b, 0, 0x01, 0, 0x34, 0x12, 0, 0x01], &[]);
        state.lay(VSEC + 8, &[1, 2, 3, 4], &[0xff; 4]);
        state.at_reset = state.config.clone();
        Arc::new(Self { controller, state: Mutex::new(state) })
    }

    /// Raises an MSI-X vector, as the function's work would.
    pub(crate) fn raise_msix(&self, vector: u16) {
        let message = {
            let mut state = self.state.lock().unwrap();
            let gate = state.gate();
            state.msix.raise(vector, gate)
        };
        self.send(message);
    }

    /// Raises an MSI vector.
    pub(crate) fn raise_msi(&self, vector: u16) {
        let message = {
            let mut state = self.state.lock().unwrap();
            let control = state.word(MSI + 2);
            let bit = 1u32 << vector;
            let masked = u32::from(state.word(MSI + 0x10)) & bit != 0;
            if control & 1 == 0 || state.word(4) & 4 == 0 {
                None
            } else if masked {
                state.config[usize::from(MSI) + 0x14] |= bit.to_le_bytes()[0];
                None
            } else {
                let address = (0..8).fold(0, |address, byte| {
                    address | u64::from(state.config[usize::from(MSI) + 4 + byte]) << (8 * byte)
                });
                let count = 1 << (control >> 4 & 7);
                let data = u32::from((state.word(MSI + 0xc) & !(count - 1)) | (vector % count));
                Some(Msi { address, data })
            }
        };
        self.send(message);
    }

    /// What software did to BARs since it was asked last.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state.lock().unwrap().seen)
    }

    pub(crate) fn resets(&self) -> u32 {
        self.state.lock().unwrap().resets
    }

    pub(crate) fn hardware16(&self, at: u16) -> u16 {
        self.state.lock().unwrap().word(at)
    }

    /// The function loses its configuration behind everybody's back.
    pub(crate) fn lose_configuration(&self) {
        let mut state = self.state.lock().unwrap();
        state.config = state.at_reset.clone();
    }

    /// A register reads 0 from now on, as a BAR after a reset.
    pub(crate) fn config_write_zero(&self, at: u16) {
        self.config_write(at, &[0; 4]);
    }

    /// Changes configuration space before anybody looks.
    pub(crate) fn lay(&self, at: u16, bytes: &[u8], writable: &[u8]) {
        let mut state = self.state.lock().unwrap();
        state.lay(at, bytes, writable);
        state.at_reset = state.config.clone();
    }

    fn send(&self, message: Option<Msi>) {
        if let Some(message) = message {
            self.controller.deliver(message);
        }
    }

    fn release(&self) {
        loop {
            let message = {
                let mut state = self.state.lock().unwrap();
                let gate = state.gate();
                state.msix.release(gate)
            };
            match message {
                Some(_) => self.send(message),
                None => return,
            }
        }
    }
}

impl State {
    fn lay(&mut self, at: u16, bytes: &[u8], writable: &[u8]) {
        let at = usize::from(at);
        self.config[at..at + bytes.len()].copy_from_slice(bytes);
        self.writable[at..at + writable.len()].copy_from_slice(writable);
    }

    fn word(&self, at: u16) -> u16 {
        let at = usize::from(at);
        u16::from_le_bytes([self.config[at], self.config[at + 1]])
    }

    fn gate(&self) -> MsixGate {
        let control = self.word(MSIX + 2);
        MsixGate {
            enabled: control & 1 << 15 != 0,
            masked: control & 1 << 14 != 0,
            bus_master: self.word(4) & 4 != 0,
        }
    }

    fn memory_enabled(&self) -> bool {
        self.word(4) & 2 != 0
    }

    fn is_table(bar: u8, at: u64) -> bool {
        bar == 0 && (TABLE..TABLE + 16 * u64::from(VECTORS)).contains(&at)
    }
}

impl PciFunction for TestFunction {
    fn name(&self) -> &str {
        "test"
    }

    fn bars(&self) -> [Option<Bar>; 6] {
        let bar = |size, kind, mappable| Some(Bar { size, kind, prefetchable: false, mappable });
        [
            bar(BAR0, BarKind::Memory64, MAPPABLE),
            None,
            bar(BAR2, BarKind::Memory32, 0),
            None,
            None,
            None,
        ]
    }

    fn config_read(&self, offset: u16, to: &mut [u8]) {
        let state = self.state.lock().unwrap();
        for (at, byte) in (usize::from(offset)..).zip(to) {
            *byte = state.config.get(at).copied().unwrap_or(0xff);
        }
    }

    fn config_write(&self, offset: u16, from: &[u8]) {
        {
            let mut state = self.state.lock().unwrap();
            for (at, byte) in (usize::from(offset)..4096).zip(from) {
                let writable = state.writable[at];
                state.config[at] = state.config[at] & !writable | byte & writable;
            }
        }
        self.release();
    }

    fn bar_read(&self, bar: u8, offset: u64, to: &mut [u8]) {
        assert_eq!(offset % to.len() as u64, 0, "accesses are naturally aligned");
        let mut state = self.state.lock().unwrap();
        if !state.memory_enabled() {
            to.fill(0xff);
        } else if State::is_table(bar, offset) {
            state.msix.read_table(offset - TABLE, to);
        } else {
            state.seen.push(Seen::Read { bar, at: offset, width: to.len() });
            for (at, byte) in (offset..).zip(to) {
                *byte = state.registers.get(&(bar, at)).copied().unwrap_or(0);
            }
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, from: &[u8]) {
        assert_eq!(offset % from.len() as u64, 0, "accesses are naturally aligned");
        {
            let mut state = self.state.lock().unwrap();
            if !state.memory_enabled() {
                return;
            }
            if State::is_table(bar, offset) {
                state.msix.write_table(offset - TABLE, from);
            } else {
                state.seen.push(Seen::Write { bar, at: offset, width: from.len() });
                for (at, byte) in (offset..).zip(from) {
                    state.registers.insert((bar, at), *byte);
                }
            }
        }
        self.release();
    }

    fn reset(&self) {
        let mut state = self.state.lock().unwrap();
        state.config = state.at_reset.clone();
        state.msix.reset();
        state.registers.clear();
        state.resets += 1;
    }

    fn service(&self) -> Service {
        Service::Asleep
    }
}

/// Vectors with an address and ascending data.
#[derive(Default)]
pub(crate) struct Controller {
    handlers: Mutex<BTreeMap<Msi2, Handler>>,
    next: AtomicU32,
    /// How many vectors may be taken at once; 0 for any number.
    pub(crate) limit: AtomicU32,
    no_blocks: bool,
    spurious: AtomicU32,
}

type Msi2 = (u64, u32);

const ADDRESS: u64 = 0x1_fee0_1000;

impl Controller {
    /// One that has no blocks of vectors.
    pub(crate) fn without_blocks() -> Self {
        Self { no_blocks: true, ..Self::default() }
    }

    pub(crate) fn deliver(&self, msi: Msi) {
        let handler = self.handlers.lock().unwrap().get(&(msi.address, msi.data)).cloned();
        match handler {
            Some(handler) => handler(),
            None => {
                self.spurious.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// Messages to vectors that nobody has: those on their way while another thread frees them.
    pub(crate) fn spurious(&self) -> u32 {
        self.spurious.load(Ordering::SeqCst)
    }

    /// How many vectors are taken.
    pub(crate) fn taken(&self) -> usize {
        self.handlers.lock().unwrap().len()
    }
}

impl Interrupts for Controller {
    fn request(&self, handler: Handler) -> Result<Msi, Errno> {
        let limit = self.limit.load(Ordering::SeqCst);
        if limit != 0 && self.taken() >= limit as usize {
            return Err(Errno::ENOSPC);
        }
        let data = self.next.fetch_add(1, Ordering::SeqCst);
        self.handlers.lock().unwrap().insert((ADDRESS, data), handler);
        Ok(Msi { address: ADDRESS, data })
    }

    fn request_block(&self, handlers: &[Handler]) -> Result<Msi, Errno> {
        if self.no_blocks {
            return Err(Errno::ENOSPC);
        }
        let len = u32::try_from(handlers.len()).unwrap();
        assert!(len.is_power_of_two());
        let first = self.next.load(Ordering::SeqCst).next_multiple_of(len);
        self.next.store(first + len, Ordering::SeqCst);
        for (data, handler) in (first..).zip(handlers) {
            self.handlers.lock().unwrap().insert((ADDRESS, data), Arc::clone(handler));
        }
        Ok(Msi { address: ADDRESS, data: first })
    }

    fn free(&self, msi: Msi) {
        let freed = self.handlers.lock().unwrap().remove(&(msi.address, msi.data));
        assert!(freed.is_some(), "a vector is freed once");
    }
}

/// A device with its function, for tests below the files.
pub(crate) struct Bench {
    pub(crate) controller: Arc<Controller>,
    pub(crate) function: Arc<TestFunction>,
    pub(crate) device: VfioPciDevice,
}

impl Bench {
    /// An open device.
    pub(crate) fn open() -> Self {
        Self::open_with(Controller::default(), |_| {})
    }

    /// An open device whose function was changed before.
    pub(crate) fn open_with(controller: Controller, change: impl FnOnce(&TestFunction)) -> Self {
        let bdf: Bdf = "0000:01:00.0".parse().unwrap();
        let mut iommu = Iommu::new();
        let id = iommu::add(&mut iommu, &Arc::default(), bdf);
        let bench = Self::closed(id, bdf, controller);
        change(&bench.function);
        bench.device.enable();
        bench.function.seen();
        bench
    }

    /// Reads configuration space as the user sees it.
    pub(crate) fn config<const N: usize>(&self, at: u16) -> [u8; N] {
        let client = TestClient::new();
        let offset = region_offset(VFIO_PCI_CONFIG_REGION_INDEX) + u64::from(at);
        let read = self.device.read_region(&client, MEMORY, N as u64, offset).unwrap();
        assert_eq!(read, N as u64);
        client.bytes(MEMORY, N).try_into().unwrap()
    }

    pub(crate) fn config16(&self, at: u16) -> u16 {
        u16::from_le_bytes(self.config(at))
    }

    pub(crate) fn config32(&self, at: u16) -> u32 {
        u32::from_le_bytes(self.config(at))
    }

    /// Writes configuration space as the user.
    pub(crate) fn set_config(&self, at: u16, bytes: &[u8]) {
        let client = TestClient::new();
        client.put(0, bytes);
        let offset = region_offset(VFIO_PCI_CONFIG_REGION_INDEX) + u64::from(at);
        let len = bytes.len() as u64;
        assert_eq!(self.device.write_region(&client, MEMORY, len, offset), Ok(len));
    }

    /// Not open yet.
    pub(crate) fn closed(id: DeviceId, bdf: Bdf, controller: Controller) -> Self {
        let controller = Arc::new(controller);
        let function = TestFunction::new(Arc::clone(&controller));
        let device = VfioPciDevice::new(Parts {
            function: Arc::clone(&function) as Arc<dyn PciFunction>,
            device: id,
            bdf,
            interrupts: Arc::clone(&controller) as Arc<dyn Interrupts>,
            regions: None,
        });
        Self { controller, function, device }
    }
}
