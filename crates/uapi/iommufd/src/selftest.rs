//! The selftest's side of iommufd: a mock IOMMU, and an ioctl that drives it from user space
//! (`drivers/iommu/iommufd/selftest.c`, `CONFIG_IOMMUFD_TEST`).
//!
//! The kernel's own test programs, `tools/testing/selftests/iommu`, are written against it: they make
//! mock devices with `IOMMU_TEST_CMD`, attach and map as any program does, and then look at what came
//! of it: where a page table leads, how often a page is pinned, what hardware has cached.
//!
//! The mock IOMMU is one more driver behind `lychgate_iommu`. It has page tables, of a format with
//! pages of 2 KiB that no hardware has, nested domains, PASIDs, page requests, vIOMMUs and all that
//! belongs to them; but nothing that does DMA, so its caches are a few words that tests can look at.

pub mod abi;
mod access;
mod check;
mod device;
mod dma_buf;
mod domain;
mod driver;
mod nested;
mod pages;
mod syz;
mod viommu;

use std::sync::Arc;

use lychgate_types::{Errno, Pages};

use crate::command::Command;
use crate::context::Context;
use crate::error::{Result, refuse};
use crate::file::Reply;

use abi::{TestCmd, op};
use driver::{MockDevices, MockDriver};

/// `IOMMU_TEST_CMD` on its way.
type TestCommand<'a> = Command<'a, TestCmd>;

/// The mock IOMMU of a machine, and what else its tests share.
pub struct Selftest {
    driver: Arc<MockDriver>,
}

impl Selftest {
    /// A mock IOMMU without devices, whose page tables lie in `pages`.
    pub fn new(pages: Arc<dyn Pages>) -> Arc<Self> {
        Arc::new(Self { driver: MockDriver::new(pages) })
    }

    fn devices(&self) -> &MockDevices {
        self.driver.devices()
    }
}

impl Context {
    /// `IOMMU_TEST_CMD`.
    pub(crate) fn test(&self, command: &mut TestCommand<'_>) -> Result<Reply> {
        let Some(selftest) = &self.selftest else {
            return refuse(Errno::ENOTTY, "the machine has no mock IOMMU");
        };
        let done = match command.argument.op {
            op::ADD_RESERVED => self.test_add_reserved(command),
            op::MOCK_DOMAIN => self.test_mock_domain(selftest, command, 0),
            op::MOCK_DOMAIN_FLAGS => {
                let flags = command.argument.member::<abi::MockDomain>().dev_flags;
                self.test_mock_domain(selftest, command, flags)
            }
            op::MOCK_DOMAIN_REPLACE => self.test_mock_domain_replace(command),
            op::MD_CHECK_MAP => self.test_check_map(command),
            op::MD_CHECK_REFS => check::check_refs(command),
            op::MD_CHECK_IOTLB => self.test_check_iotlb(command),
            op::CREATE_ACCESS => return self.test_create_access(command),
            op::ACCESS_REPLACE_IOAS => access::replace_ioas(command),
            op::ACCESS_PAGES => access::pages(command),
            op::DESTROY_ACCESS_PAGES => access::destroy_pages(command),
            op::ACCESS_RW => access::copy(command),
            op::SET_TEMP_MEMORY_LIMIT => set_memory_limit(command),
            op::DIRTY => self.test_dirty(command),
            op::TRIGGER_IOPF => self.test_trigger_iopf(selftest, command),
            op::DEV_CHECK_CACHE => self.test_check_cache(selftest, command),
            op::TRIGGER_VEVENT => self.test_trigger_vevent(selftest, command),
            op::PASID_ATTACH => self.test_pasid_attach(command),
            op::PASID_REPLACE => self.test_pasid_replace(command),
            op::PASID_DETACH => self.test_pasid_detach(command),
            op::PASID_CHECK_HWPT => self.test_pasid_check(command),
            op::DMABUF_GET => return selftest.dma_buf_get(command),
            op::DMABUF_REVOKE => dma_buf::revoke(command),
            other => refuse(Errno::EOPNOTSUPP, format!("there is no operation {other}")),
        };
        done.map(Reply::from)
    }
}

/// `IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT`: how much memory Linux may take to carry page numbers from
/// where they are pinned to where they are mapped. Nothing is carried here: what was pinned is mapped
/// as it is, so any limit that Linux takes is kept.
fn set_memory_limit(command: &TestCommand<'_>) -> Result<()> {
    /// One page's number, and the length of its run.
    const LEAST: u32 = 12;
    let limit = command.argument.member::<abi::MemoryLimit>().limit;
    if limit < LEAST {
        return refuse(Errno::EINVAL, format!("{limit} bytes do not hold one page's number"));
    }
    Ok(())
}
