use lychgate_model::PciFunction;

use super::super::CAPABILITY_OFFSET;
use super::*;
use crate::spec::capability as cap;

pub(super) fn enable_msi(rig: &Rig, address: u64, data: u16) {
    set_up_msi(&rig.iommu, address, data);
}

/// As an operating system does: finds the MSI capability, writes the message, enables it.
pub(super) fn set_up_msi(function: &AmdVi, address: u64, data: u16) {
    let at = find(function, 5).unwrap();
    function.config_write(at + 4, &address.to_le_bytes());
    function.config_write(at + 12, &data.to_le_bytes());
    function.config_write(at + 2, &[1]);
}

fn find(function: &AmdVi, id: u8) -> Option<u16> {
    let mut at = read::<1>(function, 0x34)[0];
    for _ in 0..48 {
        let [found, next] = read::<2>(function, u16::from(at));
        if found == id {
            return Some(u16::from(at));
        }
        at = next;
    }
    None
}

fn read<const N: usize>(function: &AmdVi, offset: u16) -> [u8; N] {
    let mut bytes = [0; N];
    function.config_read(offset, &mut bytes);
    bytes
}

fn dword(function: &AmdVi, offset: u16) -> u32 {
    u32::from_le_bytes(read(function, offset))
}

#[test]
fn the_function_carries_the_capability_block_and_msi() {
    let base = PhysAddr::new(0x1_feb8_0000);
    let rig = Rig::stopped(Config { mmio_base: base, ..Config::default() });
    let iommu = &rig.iommu;
    assert_eq!(read::<3>(iommu, 9), [0x00, 0x06, 0x08]);
    let at = find(iommu, cap::CAP_ID).unwrap();
    assert_eq!(at, CAPABILITY_OFFSET);
    let header = dword(iommu, at + cap::HEADER);
    assert_eq!(header >> 16 & 7, cap::CAP_TYPE_IOMMU);
    assert_eq!(header & cap::HEADER_NP_CACHE, 0);
    assert_ne!(header & cap::HEADER_EFR_SUP, 0);
    assert_ne!(header & cap::HEADER_IOTLB_SUP, 0);
    assert_eq!(dword(iommu, at + cap::BASE_LOW), 0xfeb8_0000 | cap::BASE_ENABLE);
    assert_eq!(dword(iommu, at + cap::BASE_HIGH), 1);
    assert_eq!(dword(iommu, at + cap::MISC0), 64 << 15 | 52 << 8 | 2 << 5);
    iommu.config_write(at, &[0xff; 24]);
    assert_eq!(dword(iommu, at + cap::HEADER), header);
    assert_eq!(dword(iommu, at + cap::BASE_LOW), 0xfeb8_0000 | cap::BASE_ENABLE);
    assert!(find(iommu, 5).is_some());
}

#[test]
fn without_msi_enable_nothing_is_sent() {
    let rig = Rig::new();
    rig.command(Command::completion_wait(rig.wait, 1, true));
    assert!(rig.status().com_wait_int());
    assert_eq!(rig.take_msis(), 0);
}

#[test]
fn reset_forgets_registers_and_caches() {
    let rig = Rig::adversarial();
    let root = rig.table();
    rig.set_entry(DEVICE, translated(root, 3));
    assert!(rig.read_at(DEVICE, 0x1000).is_err());
    rig.iommu.reset();
    assert_eq!((rig.read(regs::CONTROL), rig.read(regs::STATUS)), (0, 0));
    assert_eq!(rig.read(regs::DEVICE_TABLE_BASE), 0);
    assert_eq!(rig.read_at(DEVICE, 0x1000), Ok(0x1000));
}

#[test]
fn configuration_accesses_of_any_shape_stay_inside() {
    let rig = Rig::stopped(Config::default());
    let mut bytes = vec![0; 5000];
    rig.iommu.config_read(0, &mut bytes);
    assert!(bytes[4096..].iter().all(|&byte| byte == 0xff));
    rig.iommu.config_read(u16::MAX, &mut bytes);
    rig.iommu.config_write(0, &bytes);
    rig.iommu.config_write(u16::MAX, &bytes);
}
