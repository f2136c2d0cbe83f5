//! A dma-buf whose memory comes and goes.

use std::any::Any;
use std::sync::{Arc, Mutex, Weak};

use lychgate_iommufd::{Client, DmaBuf, Importer, OpenFile, Refusal, Reply};
use lychgate_types::{Errno, PhysAddr, PhysRun};

/// Where the memory is.
pub(crate) const BAR: u64 = 0xe000_0000;

pub(crate) struct FakeDmaBuf {
    size: u64,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    revoked: bool,
    importers: Vec<Weak<dyn Importer>>,
}

impl FakeDmaBuf {
    pub(crate) fn new(size: u64) -> Arc<Self> {
        Arc::new(Self { size, state: Mutex::default() })
    }

    /// Takes the memory away.
    pub(crate) fn revoke(&self) {
        let importers = {
            let mut state = self.state.lock().unwrap();
            state.revoked = true;
            std::mem::take(&mut state.importers)
        };
        importers.iter().filter_map(Weak::upgrade).for_each(|importer| importer.revoke());
    }

    /// Gives the memory back, to whoever attaches from now on.
    pub(crate) fn restore(&self) {
        self.state.lock().unwrap().revoked = false;
    }

    /// Whoever uses it.
    pub(crate) fn users(&self) -> usize {
        let state = self.state.lock().unwrap();
        state.importers.iter().filter(|importer| importer.strong_count() > 0).count()
    }
}

impl DmaBuf for FakeDmaBuf {
    fn size(&self) -> u64 {
        self.size
    }

    fn attach(&self, importer: Weak<dyn Importer>) -> Result<PhysRun, Errno> {
        let mut state = self.state.lock().unwrap();
        if state.revoked {
            return Err(Errno::ENODEV);
        }
        state.importers.push(importer);
        Ok(PhysRun { start: PhysAddr::new(BAR), len: self.size })
    }
}

/// Its file.
pub(crate) struct FakeDmaBufFile(pub(crate) Arc<FakeDmaBuf>);

impl OpenFile for FakeDmaBufFile {
    fn name(&self) -> String {
        "dmabuf".to_owned()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        None
    }

    fn ioctl(&self, _: &dyn Client, _: u32, _: u64) -> Result<Reply, Refusal> {
        Err(Refusal::new(Errno::ENOTTY, "a dma-buf has no ioctl here"))
    }

    fn dma_buf(&self) -> Option<Arc<dyn DmaBuf>> {
        Some(Arc::<FakeDmaBuf>::clone(&self.0))
    }

    fn release(&self) {}

    fn as_any(&self) -> &dyn Any {
        self
    }
}
