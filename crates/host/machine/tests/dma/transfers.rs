//! Data that arrives.

use std::fs::File;
use std::sync::Arc;

use lychgate_iommufd::PAGE_SIZE;
use lychgate_machine::{
    FrameOrder, Machine, MachineBuilder, MemlockPolicy, NamespaceSource, Policy, System,
};
use lychgate_types::Errno;
use rustix::fs::{MemfdFlags, SealFlags};

use crate::nvme::{DATA, Driver, wait};
use crate::process::{DmaMemory, FileMemory, PrivateMemory, Program};
use crate::vfio::{BDF, Opened, errno, halves, ioctl, open};

const IOVA: u64 = 0x10_0000;
const LEN: usize = 0x20_000;

pub(crate) fn machine(builder: MachineBuilder) -> Arc<Machine> {
    let disk = NamespaceSource::Memory { bytes: 1 << 20 };
    Arc::new(builder.nvme(BDF.parse().unwrap(), vec![disk]).build().unwrap())
}

fn page(seed: u64) -> Vec<u8> {
    let words = (1..=512_u64).map(|i| i.wrapping_mul(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1));
    words.flat_map(u64::to_le_bytes).collect()
}

/// Identify, write all over the disk, read it back elsewhere.
fn exercise(driver: &mut Driver<'_>, memory: &dyn DmaMemory) {
    assert_eq!(driver.admin(0x06, DATA, [1, 0, 0]), Some(0));
    let identify = memory.load(DATA, 4096);
    assert_eq!(&identify[4..17], b"lychgate-0100");
    driver.create_io_queues();
    for round in 0..40_u32 {
        memory.store(DATA, &page(round.into()));
        assert_eq!(driver.io(1, DATA, round * 8), Some(0), "write {round}");
    }
    for round in (0..40_u32).rev() {
        let at = DATA + 0x1000 * (1 + round as usize % 20);
        assert_eq!(driver.io(2, at, round * 8), Some(0), "read {round}");
        assert!(memory.load(at, 4096) == page(round.into()), "what was written as {round}");
    }
}

#[test]
fn private_memory_through_a_container_with_interrupts() {
    let policies = [Policy::Plain, Policy::Adversarial, Policy::EvictRandom(3)];
    let orders = [FrameOrder::Contiguous, FrameOrder::Fragmented { seed: 1 }];
    for (policy, order) in policies.into_iter().flat_map(|p| orders.map(|o| (p, o))) {
        let machine = machine(MachineBuilder::new().iotlb(policy).frames(order));
        let program = Program::new(Arc::clone(&machine) as _);
        let device = Opened::by_group(&program);
        let memory = PrivateMemory::new(LEN);
        device.map(&program, memory.address(), IOVA, LEN as u64).unwrap();
        assert_eq!(machine.memory().total_pins(), LEN as u64 / PAGE_SIZE);
        let vectors = [program.add_eventfd(), program.add_eventfd()];
        device.enable_msix(&program, &[vectors[0].0, vectors[1].0]).unwrap();
        exercise(&mut Driver::start(&device, &memory, IOVA), &memory);
        wait("interrupts", || vectors[0].1.get() == 3 && vectors[1].1.get() == 80);
        device.close();
        assert_eq!(machine.memory().total_pins(), 0);
        machine.settle();
        assert_eq!(machine.fault_count(), 0);
    }
}

#[test]
fn a_file_through_iommufd_and_the_device_node() {
    for seals in [SealFlags::SHRINK, SealFlags::GROW] {
        let machine = machine(MachineBuilder::new().iotlb(Policy::Adversarial));
        let program = Program::new(Arc::clone(&machine) as _);
        let (device, ioas) = Opened::by_cdev(&program);
        let flags = MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("guest", flags).unwrap());
        file.set_len(4 << 20).unwrap();
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        let fd = program.add_memory(file.try_clone().unwrap().into());
        // IOMMU_IOAS_MAP_FILE: fixed IOVA, readable, writable.
        let fd = u32::try_from(fd).unwrap();
        let words =
            [&[40, 7, ioas, fd][..], &halves(0), &halves(4 << 20), &halves(0x4000_0000)].concat();
        ioctl(&program, &*device.dma, 0x3b8f, &words).unwrap();
        let memory = FileMemory(file);
        exercise(&mut Driver::start(&device, &memory, 0x4000_0000), &memory);
        device.close();
        assert_eq!(machine.memory().total_pins(), 0);
        assert_eq!(machine.fault_count(), 0);
    }
}

#[test]
fn a_second_program_gets_the_device_when_the_first_has_closed_it() {
    let machine = machine(MachineBuilder::new());
    for _ in 0..3 {
        let program = Program::new(Arc::clone(&machine) as _);
        let device = Opened::by_group(&program);
        let memory = PrivateMemory::new(LEN);
        device.map(&program, memory.address(), IOVA, LEN as u64).unwrap();
        exercise(&mut Driver::start(&device, &memory, IOVA), &memory);
        device.close();
    }
}

#[test]
fn what_cannot_be_pinned_cannot_be_mapped() {
    let machine = machine(MachineBuilder::new().memlock(MemlockPolicy::Enforce));
    let program = Program::new(Arc::clone(&machine) as _);
    let device = Opened::by_group(&program);
    let memory = PrivateMemory::new(LEN);
    assert_eq!(errno(device.map(&program, 0x1000, IOVA, 0x1000)), Some(Errno::EFAULT));
    // This program's code is read-only.
    let code = (exercise as fn(&mut Driver<'_>, &dyn DmaMemory) as usize as u64) & !0xfff;
    assert_eq!(errno(device.map(&program, code, IOVA, 0x1000)), Some(Errno::EFAULT));
    device.map(&program, memory.address(), IOVA, LEN as u64).unwrap();
    assert_eq!(errno(device.map(&program, memory.address(), IOVA, 0x1000)), Some(Errno::EEXIST));
    let large = PrivateMemory::new(65 << 20);
    let refused = device.map(&program, large.address(), 1 << 32, 65 << 20);
    assert_eq!(errno(refused), Some(Errno::ENOMEM), "RLIMIT_MEMLOCK");
    device.unmap(&program, IOVA, LEN as u64).unwrap();
    assert_eq!(machine.memory().total_pins(), 0);
    device.close();
}

#[test]
fn nodes_that_are_not_there_do_not_open() {
    let machine = machine(MachineBuilder::new().edu("0000:02:00.0".parse().unwrap()));
    let program = Program::new(Arc::clone(&machine) as _);
    for path in
        ["/dev/vfio/77", "/dev/vfio/devices/vfio2", "/dev/vfio", "/dev/null", "/dev/vfio/+0"]
    {
        let opened = machine.open(path.as_ref(), &program);
        assert_eq!(errno(opened), Some(Errno::ENOENT), "{path}");
    }
    for path in
        ["/dev/iommu", "/dev/vfio/vfio", "/dev/vfio/0", "/dev/vfio/1", "/dev/vfio/devices/vfio1"]
    {
        let node = machine.node(path.as_ref()).unwrap();
        let (_, file) = open(&program, path);
        assert_eq!(file.device_number(), Some((node.major, node.minor)), "{path}");
    }
}
