//! edu: registers that are trapped, a transfer that takes its time, and INTx.

use std::sync::Arc;

use lychgate_iommufd::{Client, OpenFile};
use lychgate_machine::{MachineBuilder, System};

use crate::nvme::wait;
use crate::process::{DmaMemory, PrivateMemory, Program, UserBytes};
use crate::vfio::{halves, ioctl, open};

const EDU: &str = "0000:02:00.0";
const CONFIG_REGION: u64 = 7 << 40;

fn set(program: &Program, device: &dyn OpenFile, at: u64, bytes: &[u8]) {
    let bytes = UserBytes::new(bytes);
    device.write_at(program, bytes.address(), bytes.bytes().len() as u64, at).unwrap();
}

#[test]
fn a_transfer_ends_with_an_interrupt_on_the_pin() {
    let machine = Arc::new(MachineBuilder::new().edu(EDU.parse().unwrap()).build().unwrap());
    let program = Program::new(Arc::clone(&machine) as _);
    let (iommufd, iommu) = open(&program, "/dev/iommu");
    let (fd, _) = open(&program, "/dev/vfio/devices/vfio0");
    let device = program.file(fd).unwrap();
    let iommufd = u32::try_from(iommufd).unwrap();
    ioctl(&program, &*device, 0x3b76, &[16, 0, iommufd, 0]).unwrap();
    let (_, alloc) = ioctl(&program, &*iommu, 0x3b81, &[12, 0, 0]).unwrap();
    ioctl(&program, &*device, 0x3b77, &[12, 0, alloc[2]]).unwrap();
    set(&program, &*device, CONFIG_REGION + 4, &6_u16.to_le_bytes());

    let memory = PrivateMemory::new(0x2000);
    memory.store(0, &[0x5a; 4096]);
    let [low, high] = halves(memory.address());
    ioctl(&program, &*iommu, 0x3b85, &[40, 7, alloc[2], 0, low, high, 0x2000, 0, 0x10_0000, 0])
        .unwrap();
    let (eventfd, interrupts) = program.add_eventfd();
    let words = [24, 1 << 2 | 1 << 5, 0, 0, 1, eventfd.cast_unsigned()];
    ioctl(&program, &*device, 0x3b6e, &words).unwrap();

    // To the device, then back from it to the next page; each ends with an interrupt.
    for (count, source, destination, command) in
        [(1, 0x10_0000_u64, 0x4_0000_u64, 5_u64), (2, 0x4_0000, 0x10_1000, 7)]
    {
        for (at, value) in [(0x80, source), (0x88, destination), (0x90, 4096), (0x98, command)] {
            set(&program, &*device, at, &value.to_le_bytes());
        }
        wait("the pin", || interrupts.get() == count);
        set(&program, &*device, 0x64, &0x100_u32.to_le_bytes());
        // INTx masks itself when it is signalled: unmask.
        ioctl(&program, &*device, 0x3b6e, &[20, 1 | 1 << 4, 0, 0, 1]).unwrap();
    }
    assert!(memory.load(0x1000, 4096) == [0x5a; 4096]);
    device.release();
    iommu.release();
    assert_eq!(machine.memory().total_pins(), 0);
    assert_eq!(machine.fault_count(), 0);
}

#[test]
fn the_tree_shows_the_bars_where_they_are() {
    let machine = MachineBuilder::new().edu(EDU.parse().unwrap()).build().unwrap();
    let path = machine.tree().to_owned();
    let device = machine.tree().join("sys/bus/pci/devices").join(EDU);
    let resource = std::fs::read_to_string(device.join("resource")).unwrap();
    let first = "0x00000000e0000000 0x00000000e00fffff 0x0000000000040200";
    assert_eq!(resource.lines().next(), Some(first));
    let config = std::fs::read(device.join("config")).unwrap();
    assert_eq!(config[0x10..0x14], 0xe000_0000_u32.to_le_bytes());
    let port = std::fs::canonicalize(&device).unwrap().parent().unwrap().join("class");
    assert_eq!(std::fs::read_to_string(port).unwrap(), "0x060400\n");
    let iommu = machine.tree().join("sys/class/iommu/ivhd0/amd-iommu/features");
    assert!(std::fs::read_to_string(iommu).unwrap().contains(':'));
    drop(machine);
    assert!(!path.exists());
}
