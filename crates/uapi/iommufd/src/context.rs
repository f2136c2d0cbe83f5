//! One open of `/dev/iommu` or `/dev/vfio/vfio`.

use std::any::Any;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lychgate_iommu::{Iommu, Owner};

use crate::client::Client;
use crate::error::Result;
use crate::file::{MmapRequest, OpenFile, Reply};
use crate::mmap::Regions;
use crate::observer::Observer;
use crate::selftest::Selftest;
use crate::state::State;

/// The IOMMU core, shared by every open file and by whoever builds the machine.
///
/// It may be locked while no context is; a context locks it while its own lock is held.
pub type SharedIommu = Arc<Mutex<Iommu>>;

/// Through which node a context was opened.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum NodeKind {
    /// `/dev/iommu`: pinned memory counts against the user's limit.
    Iommu,
    /// `/dev/vfio/vfio`, which iommufd serves too: pinned memory counts against the limit of the
    /// address space, as VFIO's containers count it.
    VfioContainer,
}

/// What the machine decides about a context.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Config {
    /// Which node was opened.
    pub node: NodeKind,
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
    /// Whether devices may be bound whose interrupts are not isolated: the module parameter
    /// `allow_unsafe_interrupts` of iommufd.
    pub allow_unsafe_interrupts: bool,
}

/// One open of `/dev/iommu` or `/dev/vfio/vfio`: objects, IO address spaces and page tables.
///
/// Methods may be called from any thread; they run one after the other. The lock that orders them
/// is never taken on behalf of a DMA, so that an unmap may wait for one.
pub struct Context {
    me: Weak<Self>,
    pub(crate) config: Config,
    pub(crate) iommu: SharedIommu,
    pub(crate) observer: Arc<dyn Observer>,
    pub(crate) owner: Owner,
    /// What `IOMMU_TEST_CMD` drives.
    pub(crate) selftest: Option<Arc<Selftest>>,
    /// What clients can map.
    pub(crate) regions: Arc<Regions>,
    state: Mutex<State>,
}

impl Context {
    /// Opens the node that `config` names.
    pub fn open(iommu: SharedIommu, observer: Arc<dyn Observer>, config: Config) -> Arc<Self> {
        Self::new(iommu, observer, config, None)
    }

    /// As [`Context::open`], with `IOMMU_TEST_CMD` (`CONFIG_IOMMUFD_TEST`).
    pub fn open_with_selftest(
        iommu: SharedIommu,
        observer: Arc<dyn Observer>,
        config: Config,
        selftest: Arc<Selftest>,
    ) -> Arc<Self> {
        Self::new(iommu, observer, config, Some(selftest))
    }

    fn new(
        iommu: SharedIommu,
        observer: Arc<dyn Observer>,
        config: Config,
        selftest: Option<Arc<Selftest>>,
    ) -> Arc<Self> {
        static NEXT_OWNER: AtomicU64 = AtomicU64::new(1);
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            config,
            iommu,
            observer,
            owner: Owner(NEXT_OWNER.fetch_add(1, Ordering::Relaxed)),
            selftest,
            regions: Arc::new(Regions::new()),
            state: Mutex::new(State::new(config.node)),
        })
    }

    /// The context behind an open file, kept open for as long as the reference lives
    /// (`iommufd_ctx_from_file`); `None` for any other file.
    pub fn from_file(file: &dyn OpenFile) -> Option<ContextRef> {
        let context = file.as_any().downcast_ref::<Self>()?.me.upgrade()?;
        Some(ContextRef::new(context))
    }

    /// For whoever must not keep the context alive.
    pub(crate) fn weak(&self) -> Weak<Self> {
        self.me.clone()
    }

    /// The state, alone.
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The IOMMU core, alone. Taken after [`Context::lock`], never before.
    pub(crate) fn lock_iommu(&self) -> MutexGuard<'_, Iommu> {
        self.iommu.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Context {
    /// Nothing stays pinned or mapped, whether or not [`OpenFile::release`] was called.
    fn drop(&mut self) {
        self.tear_down(&mut self.lock());
    }
}

/// A reference that VFIO holds: what was mapped stays until the file is closed and the last
/// reference is gone, as with a kernel reference to the file.
pub struct ContextRef {
    context: Arc<Context>,
}

impl ContextRef {
    fn new(context: Arc<Context>) -> Self {
        context.lock().references += 1;
        Self { context }
    }

    /// Whether both refer to the same open file.
    pub fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.context, &other.context)
    }
}

impl Clone for ContextRef {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.context))
    }
}

impl Deref for ContextRef {
    type Target = Context;

    fn deref(&self) -> &Context {
        &self.context
    }
}

impl Drop for ContextRef {
    fn drop(&mut self) {
        let mut state = self.context.lock();
        state.references = state.references.saturating_sub(1);
        if state.closed && state.references == 0 {
            self.context.tear_down(&mut state);
        }
    }
}

impl OpenFile for Context {
    fn name(&self) -> String {
        match self.config.node {
            NodeKind::Iommu => "/dev/iommu",
            NodeKind::VfioContainer => "/dev/vfio/vfio",
        }
        .to_owned()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        Some(self.config.device_number)
    }

    fn ioctl(&self, client: &dyn Client, command: u32, argument: u64) -> Result<Reply> {
        self.dispatch(client, command, argument)
    }

    fn mmap(&self, request: &MmapRequest) -> Result<()> {
        self.regions.check(request)
    }

    fn backing(&self) -> Option<BorrowedFd<'_>> {
        self.regions.file()
    }

    fn describe(&self, client: &dyn Client, command: u32, argument: u64) -> Option<String> {
        crate::trace::describe(command, argument, client)
    }

    fn release(&self) {
        let mut state = self.lock();
        state.closed = true;
        if state.references == 0 {
            self.tear_down(&mut state);
        }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
