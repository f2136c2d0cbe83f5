//! A dma-buf whose memory can be taken away, in place of a device that has one.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use lychgate_types::{Errno, Pages, PhysAddr, PhysRun};

use super::pages::MockPages;
use super::{Selftest, TestCommand, abi};
use crate::client::Client;
use crate::dma_buf::{DmaBuf, Importer};
use crate::error::{Refusal, Result, refuse};
use crate::fault_injection;
use crate::file::{NewFile, OpenFile, Reply};
use crate::mm::PAGE_SIZE;

/// Bytes that a dma-buf has at most.
const MOST: u64 = 512 * PAGE_SIZE;

const O_CLOEXEC: u32 = 0o200_0000;

/// Memory that is mapped through a file.
struct TestDmaBuf {
    pages: MockPages,
    base: PhysAddr,
    size: u64,
    users: Mutex<Users>,
}

#[derive(Default)]
struct Users {
    revoked: bool,
    importers: Vec<Weak<dyn Importer>>,
}

impl TestDmaBuf {
    fn new(pages: &MockPages, size: u64) -> Result<Self> {
        fault_injection::allocation()?;
        let base = pages
            .alloc(size.next_power_of_two())
            .map_err(|error| Refusal::new(Errno::ENOMEM, format!("{size:#x} bytes: {error}")))?;
        Ok(Self { pages: pages.clone(), base, size, users: Mutex::default() })
    }

    /// Takes the memory away, or gives it back to those who attach from now on.
    fn set_revoked(&self, revoked: bool) {
        let importers = {
            let mut users = self.users();
            users.revoked = revoked;
            if revoked { std::mem::take(&mut users.importers) } else { Vec::new() }
        };
        importers.iter().filter_map(Weak::upgrade).for_each(|importer| importer.revoke());
    }

    fn users(&self) -> MutexGuard<'_, Users> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DmaBuf for TestDmaBuf {
    fn size(&self) -> u64 {
        self.size
    }

    fn attach(&self, importer: Weak<dyn Importer>) -> Result<PhysRun, Errno> {
        let mut users = self.users();
        if users.revoked {
            return Err(Errno::ENODEV);
        }
        users.importers.retain(|importer| importer.strong_count() > 0);
        users.importers.push(importer);
        Ok(PhysRun { start: self.base, len: self.size })
    }
}

impl Drop for TestDmaBuf {
    fn drop(&mut self) {
        self.pages.free(self.base, self.size.next_power_of_two());
    }
}

/// The file of a dma-buf. Whoever maps the memory keeps it when the file is closed.
struct DmaBufFile(Arc<TestDmaBuf>);

impl OpenFile for DmaBufFile {
    fn name(&self) -> String {
        "/dmabuf:".to_owned()
    }

    fn device_number(&self) -> Option<(u32, u32)> {
        None
    }

    fn ioctl(&self, _client: &dyn Client, _command: u32, _argument: u64) -> Result<Reply> {
        refuse(Errno::ENOTTY, "the dma-buf has no such ioctl")
    }

    fn dma_buf(&self) -> Option<Arc<dyn DmaBuf>> {
        Some(Arc::clone(&self.0) as _)
    }

    fn release(&self) {}

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Selftest {
    /// `IOMMU_TEST_OP_DMABUF_GET`. The new descriptor is the value of the call, as its callers take
    /// it; Linux 7.3 gives 0.
    pub(super) fn dma_buf_get(&self, command: &TestCommand<'_>) -> Result<Reply> {
        let member = command.argument.member::<abi::DmabufGet>();
        let size = u64::from(member.length).next_multiple_of(PAGE_SIZE);
        if size == 0 || size > MOST {
            return refuse(Errno::EINVAL, format!("the size {size:#x} is not in 1..={MOST:#x}"));
        }
        let file = Arc::new(DmaBufFile(Arc::new(TestDmaBuf::new(self.driver.pages(), size)?)));
        let cloexec = member.open_flags & O_CLOEXEC != 0;
        Ok(Reply::File(NewFile { file, cloexec }))
    }
}

/// `IOMMU_TEST_OP_DMABUF_REVOKE`.
pub(super) fn revoke(command: &TestCommand<'_>) -> Result<()> {
    let member = command.argument.member::<abi::DmabufRevoke>();
    let fd = member.dmabuf_fd;
    let Some(file) = command.client.file(fd) else {
        let errno = command.client.mem_file(fd).err().unwrap_or(Errno::EINVAL);
        return refuse(errno, format!("descriptor {fd} is no dma-buf"));
    };
    match file.as_any().downcast_ref::<DmaBufFile>() {
        Some(DmaBufFile(buffer)) => {
            buffer.set_revoked(member.revoked != 0);
            Ok(())
        }
        None if file.dma_buf().is_some() => {
            refuse(Errno::EOPNOTSUPP, format!("the dma-buf {} is not of the test", file.name()))
        }
        None => refuse(Errno::EINVAL, format!("{} is no dma-buf", file.name())),
    }
}
