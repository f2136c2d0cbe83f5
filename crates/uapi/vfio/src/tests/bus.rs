//! Functions, groups and a client with descriptors: what a program sees.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex};

use lychgate_iommu::Iommu;
use lychgate_iommufd::error::Result;
use lychgate_iommufd::{Config, Context, NodeKind, OpenFile, Reply, SharedIommu};
use lychgate_types::{Bdf, Errno};
use zerocopy::{Immutable, IntoBytes};

use super::client::TestClient;
use super::function::{Bench, Controller, TestFunction};
use super::iommu::{self, TestDriver};
use crate::{Vfio, VfioPciDevice};

/// A machine with functions, and one client of it.
pub(crate) struct Bus {
    pub(crate) driver: Arc<TestDriver>,
    pub(crate) iommu: SharedIommu,
    pub(crate) vfio: Vfio,
    pub(crate) functions: Vec<Arc<TestFunction>>,
    pub(crate) client: TestClient,
    next_fd: AtomicI32,
}

impl Bus {
    /// Functions at these addresses.
    pub(crate) fn with(addresses: &[&str]) -> Self {
        Self::with_driver(addresses, TestDriver::default())
    }

    pub(crate) fn with_driver(addresses: &[&str], driver: TestDriver) -> Self {
        let driver = Arc::new(driver);
        let iommu: SharedIommu = Arc::new(Mutex::new(Iommu::new()));
        let vfio = Vfio::new(Arc::clone(&iommu));
        let mut functions = Vec::new();
        for address in addresses {
            let bdf: Bdf = address.parse().unwrap();
            let id = iommu::add(&mut iommu.lock().unwrap(), &driver, bdf);
            let Bench { function, device, .. } = Bench::closed(id, bdf, Controller::default());
            functions.push(function);
            vfio.add(Arc::<VfioPciDevice>::new(device)).unwrap();
        }
        Self {
            driver,
            iommu,
            vfio,
            functions,
            client: TestClient::new(),
            next_fd: AtomicI32::new(100),
        }
    }

    /// The number of the only group.
    pub(crate) fn group_number(&self) -> u32 {
        self.vfio.groups().first().unwrap().number
    }

    pub(crate) fn install(&self, file: Arc<dyn OpenFile>) -> i32 {
        let fd = self.next_fd.fetch_add(1, Ordering::SeqCst);
        self.client.open_file(fd, file);
        fd
    }

    pub(crate) fn open_context(&self, node: NodeKind) -> i32 {
        let config = Config { node, device_number: (10, 196), allow_unsafe_interrupts: false };
        self.install(Context::open(Arc::clone(&self.iommu), Arc::new(()), config))
    }

    pub(crate) fn open_group(&self, number: u32) -> Result<i32, Errno> {
        let file = self.vfio.open_group(number).map_err(|refusal| refusal.errno)?;
        Ok(self.install(file))
    }

    pub(crate) fn open_cdev(&self, index: u32) -> i32 {
        self.install(self.vfio.open_cdev(index).unwrap())
    }

    pub(crate) fn file(&self, fd: i32) -> Arc<dyn OpenFile> {
        self.client.files.lock().unwrap().get(&fd).cloned().unwrap()
    }

    /// The last reference to a descriptor goes.
    pub(crate) fn close(&self, fd: i32) {
        let file = self.client.files.lock().unwrap().remove(&fd).unwrap();
        file.release();
    }

    /// An ioctl with a plain argument: its value, or the new descriptor.
    pub(crate) fn ioctl(&self, fd: i32, command: u32, argument: u64) -> Result<i32, Errno> {
        match self.file(fd).ioctl(&self.client, command, argument) {
            Ok(Reply::Value(value)) => Ok(value),
            Ok(Reply::File(new)) => {
                assert!(new.cloexec);
                Ok(self.install(new.file))
            }
            Ok(Reply::FileAt { .. }) => panic!("no call here answers so"),
            Err(refusal) => Err(refusal.errno),
        }
    }

    /// An ioctl with a structure, which is at the start of the client's memory afterwards.
    pub(crate) fn call<T: IntoBytes + Immutable>(
        &self,
        fd: i32,
        command: u32,
        argument: &T,
    ) -> Result<i32, Errno> {
        let argument = self.client.argument(argument);
        self.ioctl(fd, command, argument)
    }
}
