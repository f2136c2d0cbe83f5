//! A machine with a mock IOMMU, and an open `/dev/iommu`.

mod process;

use std::sync::{Arc, Mutex};

use lychgate_iommu::Iommu;
use lychgate_iommufd::abi::{Argument, iommufd as linux};
use lychgate_iommufd::selftest::abi::{self, TestCmd, op};
use lychgate_iommufd::{
    Client, Config, Context, Event, NodeKind, Observer, OpenFile, Refusal, Reply, Selftest,
    SharedIommu,
};
use lychgate_types::{Errno, HeapPages};
use zerocopy::{FromBytes, Immutable, IntoBytes};

pub(crate) use process::{BASE, PAGE, PAGES, Process};

/// Where structures are put: the last page of memory.
pub(crate) const SCRATCH: u64 = BASE + (PAGES - 1) * PAGE;

pub(crate) struct World {
    pub(crate) pages: Arc<HeapPages>,
    pub(crate) iommu: SharedIommu,
    pub(crate) process: Process,
    pub(crate) context: Arc<Context>,
}

struct Silent;

impl Observer for Silent {
    fn event(&self, _: &Event) {}
}

/// What `IOMMU_TEST_OP_MOCK_DOMAIN` gives.
#[derive(Clone, Copy)]
pub(crate) struct Mock {
    pub(crate) stdev: u32,
    pub(crate) hwpt: u32,
    pub(crate) idev: u32,
}

impl World {
    pub(crate) fn new() -> Self {
        let iommu: SharedIommu = Arc::new(Mutex::new(Iommu::new()));
        let pages = Arc::new(HeapPages::new());
        let selftest = Selftest::new(Arc::<HeapPages>::clone(&pages));
        let context =
            Context::open_with_selftest(Arc::clone(&iommu), Arc::new(Silent), config(), selftest);
        Self { pages, iommu, process: Process::new(), context }
    }

    /// Calls with a structure; gives it as it came back, and the value of the call.
    pub(crate) fn call<A: Argument>(&self, argument: A) -> Result<(A, i32), Errno> {
        let size = u32::try_from(size_of::<A>()).unwrap();
        let put = |at, bytes: &[u8]| lychgate_iommufd::Mm::write(&*self.process.space, at, bytes);
        put(SCRATCH, argument.as_bytes()).unwrap();
        put(SCRATCH, &size.to_le_bytes()).unwrap();
        let value = match self.context.ioctl(&self.process, A::COMMAND, SCRATCH) {
            Ok(Reply::Value(value)) => value,
            Ok(Reply::File(new)) => self.process.give(new.file),
            Ok(Reply::FileAt { file: new, at }) => {
                let fd = self.process.give(Arc::clone(&new.file));
                put(at, &fd.to_le_bytes()).unwrap();
                new.file.given();
                0
            }
            Err(Refusal { errno, why }) => {
                println!("{errno}: {why}");
                assert!(!why.is_empty() && !why.ends_with('.'));
                return Err(errno);
            }
        };
        let mut after = A::new_zeroed();
        lychgate_iommufd::Mm::read(&*self.process.space, SCRATCH, after.as_mut_bytes()).unwrap();
        Ok((after, value))
    }

    /// An operation on `id`; gives its member of the union as it came back.
    pub(crate) fn test<M: FromBytes + IntoBytes + Immutable>(
        &self,
        op: u32,
        id: u32,
        member: M,
    ) -> Result<M, Errno> {
        self.test_value(op, id, member).map(|(member, value)| {
            assert_eq!(value, 0);
            member
        })
    }

    pub(crate) fn test_value<M: FromBytes + IntoBytes + Immutable>(
        &self,
        op: u32,
        id: u32,
        member: M,
    ) -> Result<(M, i32), Errno> {
        let mut command = TestCmd { op, id, ..TestCmd::default() };
        member.write_to_prefix(command.union.as_mut_bytes()).unwrap();
        let (after, value) = self.call(command)?;
        Ok((M::read_from_prefix(after.union.as_bytes()).unwrap().0, value))
    }

    pub(crate) fn ioas(&self) -> u32 {
        self.ioas_or().unwrap()
    }

    pub(crate) fn ioas_or(&self) -> Result<u32, Errno> {
        self.call(linux::IoasAlloc::default()).map(|(alloc, _)| alloc.out_ioas_id)
    }

    pub(crate) fn destroy(&self, id: u32) -> Result<(), Errno> {
        self.call(linux::Destroy { id, ..Default::default() }).map(drop)
    }

    pub(crate) fn mock(&self, pt_id: u32, dev_flags: u32) -> Result<Mock, Errno> {
        let member = abi::MockDomain { dev_flags, ..Default::default() };
        let after = self.test(op::MOCK_DOMAIN_FLAGS, pt_id, member)?;
        Ok(Mock { stdev: after.out_stdev_id, hwpt: after.out_hwpt_id, idev: after.out_idev_id })
    }

    pub(crate) fn map(&self, ioas_id: u32, va: u64, length: u64, iova: u64) -> Result<(), Errno> {
        let flags = linux::MAP_FIXED_IOVA | linux::MAP_READABLE | linux::MAP_WRITEABLE;
        let map =
            linux::IoasMap { flags, ioas_id, user_va: va, length, iova, ..Default::default() };
        self.call(map).map(drop)
    }

    pub(crate) fn unmap(&self, ioas_id: u32, iova: u64, length: u64) -> Result<(), Errno> {
        let unmap = linux::IoasUnmap { ioas_id, iova, length, ..Default::default() };
        self.call(unmap).map(drop)
    }

    pub(crate) fn hwpt(&self, dev_id: u32, pt_id: u32, flags: u32) -> Result<u32, Errno> {
        let alloc = linux::HwptAlloc { dev_id, pt_id, flags, ..Default::default() };
        self.call(alloc).map(|(alloc, _)| alloc.out_hwpt_id)
    }

    /// A page table of the mock's own description.
    pub(crate) fn hwpt_with(
        &self,
        dev_id: u32,
        pt_id: u32,
        flags: u32,
        data: abi::HwptData,
    ) -> Result<u32, Errno> {
        let at = SCRATCH + 0x800;
        lychgate_iommufd::Mm::write(&*self.process.space, at, data.as_bytes()).unwrap();
        let alloc = linux::HwptAlloc {
            dev_id,
            pt_id,
            flags,
            data_type: abi::HWPT_DATA,
            data_len: u32::try_from(size_of::<abi::HwptData>()).unwrap(),
            data_uptr: at,
            ..Default::default()
        };
        self.call(alloc).map(|(alloc, _)| alloc.out_hwpt_id)
    }

    /// A nested page table whose cache holds `iotlb`.
    pub(crate) fn nested(&self, dev: u32, pt: u32, flags: u32, iotlb: u32) -> Result<u32, Errno> {
        self.hwpt_with(dev, pt, flags, abi::HwptData { iotlb, pagetable_type: 0 })
    }

    /// Attaches a mock device to something else.
    pub(crate) fn replace(&self, stdev: u32, pt_id: u32) -> Result<u32, Errno> {
        self.test(op::MOCK_DOMAIN_REPLACE, stdev, abi::MockDomainReplace { pt_id })
            .map(|member| member.pt_id)
    }

    /// Sends `requests`, structures of `len` bytes; gives how many were handled, and the result.
    pub(crate) fn invalidate(
        &self,
        id: u32,
        requests: &[u32],
        len: u32,
        data_type: u32,
    ) -> (u32, Result<(), Errno>) {
        let at = SCRATCH + 0x800;
        lychgate_iommufd::Mm::write(&*self.process.space, at, requests.as_bytes()).unwrap();
        let invalidate = linux::HwptInvalidate {
            hwpt_id: id,
            data_uptr: at,
            data_type,
            entry_len: len,
            entry_num: u32::try_from(size_of_val(requests)).unwrap() / len,
            ..Default::default()
        };
        let result = self.call(invalidate).map(drop);
        let mut after = linux::HwptInvalidate::default();
        lychgate_iommufd::Mm::read(&*self.process.space, SCRATCH, after.as_mut_bytes()).unwrap();
        (after.entry_num, result)
    }

    /// Writes a structure into the process, and gives where it is.
    pub(crate) fn put<T: IntoBytes + Immutable>(&self, value: &T) -> u64 {
        let at = SCRATCH + 0x800;
        lychgate_iommufd::Mm::write(&*self.process.space, at, value.as_bytes()).unwrap();
        at
    }

    /// Reads the structure that [`World::put`] wrote.
    pub(crate) fn get<T: FromBytes + IntoBytes>(&self) -> T {
        let mut value = T::new_zeroed();
        let at = SCRATCH + 0x800;
        lychgate_iommufd::Mm::read(&*self.process.space, at, value.as_mut_bytes()).unwrap();
        value
    }

    /// `read` of a descriptor; gives the bytes.
    pub(crate) fn read(&self, fd: u32, count: u64) -> Result<Vec<u8>, Errno> {
        let file = self.process.file(i32::try_from(fd).unwrap()).unwrap();
        let at = SCRATCH + 0x800;
        let len = file.read_at(&self.process, at, count, 0).map_err(|refusal| refusal.errno)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        lychgate_iommufd::Mm::read(&*self.process.space, at, &mut bytes).unwrap();
        Ok(bytes)
    }

    pub(crate) fn close(&self, fd: u32) {
        self.process.close(i32::try_from(fd).unwrap());
    }

    pub(crate) fn check_map(
        &self,
        hwpt: u32,
        iova: u64,
        length: u64,
        uptr: u64,
    ) -> Result<(), Errno> {
        self.test(op::MD_CHECK_MAP, hwpt, abi::CheckMap { iova, length, uptr }).map(drop)
    }

    pub(crate) fn check_refs(&self, uptr: u64, length: u64, refs: u32) -> Result<(), Errno> {
        self.test(op::MD_CHECK_REFS, 0, abi::CheckRefs { length, uptr, refs, padding: 0 }).map(drop)
    }

    /// A read-only process: replies cannot be stored.
    pub(crate) fn set_read_only(&self, read_only: bool) {
        *self.process.read_only.lock().unwrap() = read_only;
    }
}

pub(crate) fn config() -> Config {
    Config { node: NodeKind::Iommu, device_number: (10, 125), allow_unsafe_interrupts: false }
}

impl Drop for World {
    /// When the file is closed, nothing stays pinned, and the mock hardware's tables are gone.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.context.release();
            assert_eq!(self.process.space.pinned(), 0);
            assert_eq!(self.pages.live(), 0);
            assert!(self.iommu.lock().unwrap().groups().is_empty());
        }
    }
}
