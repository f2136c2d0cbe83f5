//! DMA that must not pass, and what is told of it.

use std::sync::{Arc, Mutex};

use lychgate_iommu::FaultReason;
use lychgate_machine::{
    Access, FaultListener, FaultStory, Machine, MachineBuilder, Policy, Reason,
};
use lychgate_types::Iova;

use crate::nvme::{DATA, Driver, wait};
use crate::process::{PrivateMemory, Program};
use crate::transfers::machine;
use crate::vfio::Opened;

const IOVA: u64 = 0x10_0000;
const QUEUES: u64 = DATA as u64;

#[derive(Default)]
struct Stories(Mutex<Vec<FaultStory>>);

impl FaultListener for Stories {
    fn fault(&self, story: &FaultStory) {
        self.0.lock().unwrap().push(story.clone());
    }
}

fn listening(builder: MachineBuilder) -> (Arc<Machine>, Arc<Stories>) {
    let stories = Arc::new(Stories::default());
    (machine(builder.on_fault(Arc::clone(&stories) as _)), stories)
}

impl Stories {
    fn first(&self) -> FaultStory {
        wait("the fault report", || !self.0.lock().unwrap().is_empty());
        self.0.lock().unwrap()[0].clone()
    }
}

#[test]
fn a_read_into_memory_that_was_unmapped_names_the_call_and_touches_nothing() {
    for policy in [Policy::Plain, Policy::Adversarial] {
        let (machine, stories) = listening(MachineBuilder::new().iotlb(policy));
        let program = Program::new(Arc::clone(&machine) as _);
        let device = Opened::by_group(&program);
        let [queues, data] = [DATA, 0x4000].map(PrivateMemory::new);
        device.map(&program, queues.address(), IOVA, QUEUES).unwrap();
        device.map(&program, data.address(), IOVA + QUEUES, 0x4000).unwrap();
        let mut driver = Driver::start(&device, &queues, IOVA);
        driver.create_io_queues();
        assert_eq!(driver.io(2, DATA, 0), Some(0), "with a warm IOTLB");
        device.unmap(&program, IOVA + QUEUES, 0x4000).unwrap();
        crate::process::DmaMemory::store(&data, 0, &[0xaa; 0x4000]);
        assert_ne!(driver.io(2, DATA + 0x1000, 8), Some(0));
        let story = stories.first();
        assert_eq!(
            (story.device.to_string().as_str(), story.name.as_str()),
            (crate::vfio::BDF, "nvme")
        );
        assert_eq!((story.access, story.iova), (Access::Write, Iova::new(IOVA + QUEUES + 0x1000)));
        assert_eq!(story.reason, Reason::Iommu(FaultReason::NotPresent));
        assert!(story.initiator.as_ref().unwrap().contains("READ lba 8+8"), "{story}");
        let gone = story.history.mapping.as_ref().unwrap();
        assert_eq!((gone.iova, gone.len), (Iova::new(IOVA + QUEUES), 0x4000));
        let unmapped = gone.unmapped.as_ref().unwrap();
        assert_eq!(unmapped.call.as_ref().unwrap().name, "VFIO_IOMMU_UNMAP_DMA");
        assert!(unmapped.time <= story.time);
        assert!(crate::process::DmaMemory::load(&data, 0, 0x4000).iter().all(|byte| *byte == 0xaa));
        let text = story.to_string();
        assert!(
            text.contains("unmapped") && text.contains("VFIO_IOMMU_UNMAP_DMA (call "),
            "{text}"
        );
        device.close();
    }
}

#[test]
fn an_address_that_never_was_mapped_is_told_with_its_neighbour() {
    let (machine, stories) = listening(MachineBuilder::new());
    let program = Program::new(Arc::clone(&machine) as _);
    let device = Opened::by_group(&program);
    let queues = PrivateMemory::new(DATA);
    device.map(&program, queues.address(), IOVA, QUEUES).unwrap();
    let mut driver = Driver::start(&device, &queues, IOVA);
    driver.create_io_queues();
    assert_ne!(driver.io(1, DATA, 0), Some(0));
    let story = stories.first();
    assert_eq!((story.access, story.iova), (Access::Read, Iova::new(IOVA + QUEUES)));
    assert_eq!(story.history.mapping, None);
    assert_eq!(story.history.below.as_ref().unwrap().last(), Iova::new(IOVA + QUEUES - 1));
    assert_eq!(driver.admin(0x06, 0x3000, [1, 0, 0]), Some(0), "the controller lives on");
    device.close();
}

#[test]
fn memory_that_vanished_under_its_mapping_is_told() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let (machine, stories) = listening(MachineBuilder::new());
    let program = Program::new(Arc::clone(&machine) as _);
    let (device, ioas) = Opened::by_cdev(&program);
    let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, 0x10_0000).unwrap();
    let fd = u32::try_from(program.add_memory(file.try_clone().unwrap())).unwrap();
    let [low, high] = crate::vfio::halves(IOVA);
    crate::vfio::ioctl(
        &program,
        &*device.dma,
        0x3b8f,
        &[40, 7, ioas, fd, 0, 0, 0x10_0000, 0, low, high],
    )
    .unwrap();
    let memory = crate::process::FileMemory(file.try_clone().unwrap().into());
    let mut driver = Driver::start(&device, &memory, IOVA);
    driver.create_io_queues();
    ftruncate(&file, 0x8_0000).unwrap();
    assert_ne!(driver.io(2, 0x9_0000, 0), Some(0));
    let story = stories.first();
    assert_eq!((story.reason, story.iova), (Reason::MemoryGone, Iova::new(IOVA + 0x9_0000)));
    assert_eq!(story.raw, None);
    assert_eq!(driver.io(2, DATA, 0), Some(0), "what is left is reached");
    device.close();
}

#[test]
fn a_write_to_memory_that_is_mapped_for_reading_touches_nothing() {
    const READ_ONLY: u32 = 1;
    for policy in [Policy::Plain, Policy::Adversarial] {
        let (machine, stories) = listening(MachineBuilder::new().iotlb(policy));
        let program = Program::new(Arc::clone(&machine) as _);
        let device = Opened::by_group(&program);
        let [queues, data] = [DATA, 0x1000].map(PrivateMemory::new);
        device.map(&program, queues.address(), IOVA, QUEUES).unwrap();
        let ([va_low, va_high], [low, high]) =
            (crate::vfio::halves(data.address()), crate::vfio::halves(IOVA + QUEUES));
        let map = [32, READ_ONLY, va_low, va_high, low, high, 0x1000, 0];
        crate::vfio::ioctl(&program, &*device.dma, 0x3b71, &map).unwrap();
        let mut driver = Driver::start(&device, &queues, IOVA);
        driver.create_io_queues();
        crate::process::DmaMemory::store(&data, 0, &[0xaa; 0x1000]);
        assert_eq!(driver.io(1, DATA, 0), Some(0), "the device may read it");
        assert_ne!(driver.io(2, DATA, 0), Some(0));
        let story = stories.first();
        assert_eq!((story.access, story.iova), (Access::Write, Iova::new(IOVA + QUEUES)));
        assert_eq!(story.reason, Reason::Iommu(FaultReason::Permission));
        assert_eq!(story.history.mapping.as_ref().unwrap().unmapped, None);
        assert!(crate::process::DmaMemory::load(&data, 0, 0x1000).iter().all(|byte| *byte == 0xaa));
        assert_eq!(driver.io(1, DATA, 0), Some(0), "the controller lives on");
        device.close();
    }
}

#[test]
fn an_address_beyond_all_page_tables_is_refused() {
    let (machine, stories) = listening(MachineBuilder::new());
    let program = Program::new(Arc::clone(&machine) as _);
    let device = Opened::by_group(&program);
    let queues = PrivateMemory::new(DATA);
    device.map(&program, queues.address(), IOVA, QUEUES).unwrap();
    let mut driver = Driver::start(&device, &queues, IOVA);
    driver.create_io_queues();
    assert_ne!(driver.io(2, 1 << 60, 0), Some(0));
    let story = stories.first();
    assert_eq!((story.access, story.iova), (Access::Write, Iova::new(IOVA + (1 << 60))));
    assert!(story.raw.is_some(), "the IOMMU has logged it");
    assert_eq!(driver.admin(0x06, 0x3000, [1, 0, 0]), Some(0), "the controller lives on");
    device.close();
}
