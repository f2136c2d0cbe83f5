//! A machine made of plain maps that check whatever is done to them and fail when asked to.

mod client;
mod dma_buf;
mod files;
mod iommu;
mod nested;

use std::sync::{Arc, Mutex};

use lychgate_iommu::{DeviceId, Iommu, PciFunctionInfo, PciKind};
use lychgate_iommufd::abi::{Argument, iommufd as abi};
use lychgate_iommufd::{
    Config, Context, ContextRef, Event, NodeKind, Observer, OpenFile, Refusal, SharedIommu,
};
use lychgate_types::{Bdf, Errno, RequesterId};

pub(crate) use client::{FakeClient, FakeFile, FakeMm, PHYS, SCRATCH, VA};
pub(crate) use dma_buf::{BAR, FakeDmaBuf, FakeDmaBufFile};
pub(crate) use files::Files;
pub(crate) use iommu::FakeDriver;
pub(crate) use nested::{BAD_REQUEST, EVENTS, FakeNested, FakeViommu, KIND, MMAP_BYTES, QUEUES};

pub(crate) const PAGE: u64 = 4096;

/// What every test starts with: a driver, a client, and an open `/dev/iommu`.
pub(crate) struct World {
    pub(crate) driver: Arc<FakeDriver>,
    pub(crate) iommu: SharedIommu,
    pub(crate) journal: Arc<Journal>,
    pub(crate) client: FakeClient,
    pub(crate) context: Arc<Context>,
    /// Files that calls gave to the client.
    pub(crate) files: Files,
}

#[derive(Default)]
pub(crate) struct Journal(pub Mutex<Vec<Event>>);

impl Observer for Journal {
    fn event(&self, event: &Event) {
        self.0.lock().unwrap().push(*event);
    }
}

impl Journal {
    pub(crate) fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl World {
    pub(crate) fn new() -> Self {
        Self::open(NodeKind::Iommu)
    }

    pub(crate) fn open(node: NodeKind) -> Self {
        let iommu: SharedIommu = Arc::new(Mutex::new(Iommu::new()));
        let journal = Arc::new(Journal::default());
        let config = Config { node, device_number: (10, 127), allow_unsafe_interrupts: false };
        let context = Context::open(Arc::clone(&iommu), Arc::<Journal>::clone(&journal), config);
        let (driver, client, files) = (FakeDriver::new(), FakeClient::new(), Files::default());
        Self { driver, iommu, journal, client, context, files }
    }

    /// Another open file on the same machine.
    pub(crate) fn another(&self, allow_unsafe_interrupts: bool) -> Arc<Context> {
        let config =
            Config { node: NodeKind::Iommu, device_number: (10, 127), allow_unsafe_interrupts };
        Context::open(Arc::clone(&self.iommu), Arc::<Journal>::clone(&self.journal), config)
    }

    pub(crate) fn reference(&self) -> ContextRef {
        Context::from_file(self.context.as_ref()).unwrap()
    }

    /// Adds a function of its own group.
    pub(crate) fn device(&self, requester: u16) -> DeviceId {
        self.add(requester, false)
    }

    /// Adds a function that shares its group with the others of its slot.
    pub(crate) fn function(&self, requester: u16) -> DeviceId {
        self.add(requester, true)
    }

    fn add(&self, requester: u16, multifunction: bool) -> DeviceId {
        let bdf = Bdf { segment: 0, requester: RequesterId::new(requester) };
        let info = PciFunctionInfo {
            bdf,
            kind: PciKind::Endpoint,
            multifunction,
            acs: None,
            parent: None,
            secondary_bus: None,
            quirk_aliases: Vec::new(),
        };
        let driver = Arc::<FakeDriver>::clone(&self.driver);
        self.iommu.lock().unwrap().add_pci(info, driver).unwrap()
    }

    /// Calls with a structure and gives it as it came back, with the answer.
    pub(crate) fn call_both<A: Argument>(&self, argument: A) -> (A, Result<(), Refusal>) {
        self.client.put(SCRATCH, argument.as_bytes());
        self.client.put(SCRATCH, &u32::try_from(size_of::<A>()).unwrap().to_le_bytes());
        let result = self.context.ioctl(&self.client, A::COMMAND, SCRATCH);
        let result = result.and_then(|reply| self.files.take(reply, &self.client));
        let after = A::read_from_bytes(&self.client.get(SCRATCH, size_of::<A>())).unwrap();
        (after, result.map(|value| assert_eq!(value, 0)))
    }

    /// Calls with a structure and gives it as it came back.
    pub(crate) fn call<A: Argument>(&self, argument: A) -> Result<A, Errno> {
        let (after, result) = self.call_both(argument);
        result.map(|()| after).map_err(|refusal| {
            assert!(!refusal.why.is_empty() && !refusal.why.ends_with('.'));
            refusal.errno
        })
    }

    /// An ioctl without a structure, or with one of VFIO's.
    pub(crate) fn raw(&self, command: u32, argument: u64) -> Result<i32, Errno> {
        let result = self.context.ioctl(&self.client, command, argument);
        let result = result.and_then(|reply| self.files.take(reply, &self.client));
        result.map_err(|refusal| refusal.errno)
    }

    pub(crate) fn ioas(&self) -> u32 {
        self.call(abi::IoasAlloc::default()).unwrap().out_ioas_id
    }

    pub(crate) fn destroy(&self, id: u32) -> Result<(), Errno> {
        self.call(abi::Destroy { id, ..Default::default() }).map(|_| ())
    }

    pub(crate) fn map_fixed(
        &self,
        ioas_id: u32,
        va: u64,
        length: u64,
        iova: u64,
    ) -> Result<u64, Errno> {
        let flags = abi::MAP_FIXED_IOVA | abi::MAP_READABLE | abi::MAP_WRITEABLE;
        let map = abi::IoasMap { flags, ioas_id, user_va: va, length, iova, ..Default::default() };
        self.call(map).map(|map| map.iova)
    }

    pub(crate) fn map_anywhere(&self, ioas_id: u32, va: u64, length: u64) -> Result<u64, Errno> {
        let flags = abi::MAP_READABLE | abi::MAP_WRITEABLE;
        let map = abi::IoasMap { flags, ioas_id, user_va: va, length, ..Default::default() };
        self.call(map).map(|map| map.iova)
    }

    pub(crate) fn unmap(&self, ioas_id: u32, iova: u64, length: u64) -> Result<u64, Errno> {
        let unmap = abi::IoasUnmap { ioas_id, iova, length, ..Default::default() };
        self.call(unmap).map(|unmap| unmap.length)
    }

    pub(crate) fn copy(&self, from: (u32, u64), to: (u32, u64), length: u64) -> Result<u64, Errno> {
        let flags = abi::MAP_FIXED_IOVA | abi::MAP_READABLE | abi::MAP_WRITEABLE;
        let copy = abi::IoasCopy {
            flags,
            dst_ioas_id: to.0,
            src_ioas_id: from.0,
            length,
            dst_iova: to.1,
            src_iova: from.1,
            ..Default::default()
        };
        self.call(copy).map(|copy| copy.dst_iova)
    }

    pub(crate) fn hwpt(&self, dev_id: u32, pt_id: u32) -> Result<u32, Errno> {
        let alloc = abi::HwptAlloc { dev_id, pt_id, ..Default::default() };
        self.call(alloc).map(|alloc| alloc.out_hwpt_id)
    }

    /// Turns large pages on or off.
    pub(crate) fn huge_pages(&self, object_id: u32, val64: u64) -> Result<(), Errno> {
        let option = abi::Option {
            option_id: abi::OPTION_HUGE_PAGES,
            op: abi::OPTION_OP_SET,
            object_id,
            val64,
            ..Default::default()
        };
        self.call(option).map(|_| ())
    }

    /// The ranges that can be mapped, and the alignment.
    pub(crate) fn ranges(&self, ioas_id: u32) -> (Vec<(u64, u64)>, u64) {
        let at = SCRATCH + 0x1000;
        let (after, result) = self.call_both(abi::IoasIovaRanges {
            ioas_id,
            num_iovas: 64,
            allowed_iovas: at,
            ..Default::default()
        });
        result.unwrap();
        let words: Vec<u64> = self
            .client
            .get(at, after.num_iovas as usize * 16)
            .chunks(8)
            .map(|bytes| u64::from_le_bytes(bytes.try_into().unwrap()))
            .collect();
        (words.chunks(2).map(|pair| (pair[0], pair[1])).collect(), after.out_iova_alignment)
    }

    pub(crate) fn allow(&self, ioas_id: u32, ranges: &[(u64, u64)]) -> Result<(), Errno> {
        let at = SCRATCH + 0x1000;
        for (index, (first, last)) in ranges.iter().enumerate() {
            self.client.put(at + 16 * index as u64, &first.to_le_bytes());
            self.client.put(at + 16 * index as u64 + 8, &last.to_le_bytes());
        }
        let num_iovas = u32::try_from(ranges.len()).unwrap();
        let allow =
            abi::IoasAllowIovas { ioas_id, num_iovas, allowed_iovas: at, ..Default::default() };
        self.call(allow).map(|_| ())
    }
}
