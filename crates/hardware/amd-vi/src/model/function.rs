//! The PCI function of the IOMMU, class 08/06/00: the capability block and the MSI capability
//! (AMD 48882 3.2).

use std::sync::PoisonError;

use lychgate_model::{Bar, Capabilities, ConfigSpace, Header, MsiLayout, PciFunction, Service};

use super::registers::Registers;
use super::{AmdVi, Settings};
use crate::spec::capability::{
    BASE_ENABLE, BASE_HIGH, BASE_LOW, BASE_LOW_ADDRESS, CAP_ID, CAP_REV, CAP_TYPE_IOMMU,
    CLASS_CODE, HEADER, HEADER_CAP_EXT, HEADER_EFR_SUP, HEADER_IOTLB_SUP, MISC0, SIZE,
};

/// Where the capability block is in configuration space.
pub const CAPABILITY_OFFSET: u16 = 0x80;

const CAPABILITY_POINTER: u16 = 0x34;
const COMMAND: u16 = 0x04;
const BUS_MASTER: u8 = 1 << 2;
const VENDOR_AMD: u16 = 0x1022;
/// The IOMMU of the Zen 2 desktop and server processors.
const DEVICE_IOMMU: u16 = 0x1481;

/// Header and MSI, as the firmware leaves them: the function may send interrupts.
pub(super) fn config_space() -> ConfigSpace {
    let [base, sub, interface] = CLASS_CODE;
    let header = Header {
        vendor: VENDOR_AMD,
        device: DEVICE_IOMMU,
        class: u32::from_be_bytes([0, base, sub, interface]),
        subsystem_vendor: VENDOR_AMD,
        subsystem: DEVICE_IOMMU,
        ..Header::default()
    };
    let msi = MsiLayout { vectors_log2: 0, wide: true, maskable: false };
    let capabilities = Capabilities { msi: Some(msi), ..Capabilities::default() };
    let mut space = ConfigSpace::new(&header, &[None; 6], &capabilities);
    let _ = space.write(COMMAND, &[BUS_MASTER]);
    space
}

impl AmdVi {
    /// One byte of the capability block, which stands first in the capability list; `next` is the
    /// list as it is without.
    fn capability_byte(&self, offset: u16, next: u8) -> u8 {
        let iotlb = if self.config.iotlb_sup { HEADER_IOTLB_SUP } else { 0 };
        let word = match offset & !3 {
            HEADER => {
                u32::from(CAP_ID)
                    | u32::from(next) << 8
                    | CAP_TYPE_IOMMU << 16
                    | CAP_REV << 19
                    | iotlb
                    | HEADER_EFR_SUP
                    | HEADER_CAP_EXT
            }
            BASE_LOW => {
                let base = (self.config.mmio_base.get() & 0xffff_ffff) as u32;
                let enable = if self.config.mmio_base.get() == 0 { 0 } else { BASE_ENABLE };
                base & BASE_LOW_ADDRESS | enable
            }
            BASE_HIGH => (self.config.mmio_base.get() >> 32) as u32,
            MISC0 => {
                const GVA_48_BITS: u32 = 2;
                GVA_48_BITS << 5
                    | u32::from(self.config.pa_bits & 0x7f) << 8
                    | u32::from(self.config.va_bits & 0x7f) << 15
            }
            // The range register is 0 in IOMMUs without HyperTransport, and so is MsiNumGA.
            _ => 0,
        };
        word.to_le_bytes()[usize::from(offset & 3)]
    }
}

impl PciFunction for AmdVi {
    fn name(&self) -> &str {
        "amd-vi"
    }

    fn bars(&self) -> [Option<Bar>; 6] {
        [None; 6]
    }

    fn config_read(&self, offset: u16, to: &mut [u8]) {
        let mut next = [0];
        {
            let space = self.config_space.lock().unwrap_or_else(PoisonError::into_inner);
            space.read(offset, to);
            space.read(CAPABILITY_POINTER, &mut next);
        }
        for (at, byte) in (offset..=u16::MAX).zip(to) {
            if at == CAPABILITY_POINTER {
                *byte = (CAPABILITY_OFFSET & 0xff) as u8;
            } else if let Some(inside) = at.checked_sub(CAPABILITY_OFFSET)
                && inside < SIZE
            {
                *byte = self.capability_byte(inside, next[0]);
            }
        }
    }

    /// The capability block is read only: the firmware has set and locked the base.
    fn config_write(&self, offset: u16, from: &[u8]) {
        let mut space = self.config_space.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = space.write(offset, from);
    }

    fn bar_read(&self, _bar: u8, _offset: u64, to: &mut [u8]) {
        to.fill(0xff);
    }

    fn bar_write(&self, _bar: u8, _offset: u64, _from: &[u8]) {}

    /// A reset of the platform, the only one that an IOMMU has: registers and caches as new.
    fn reset(&self) {
        self.with_registers(|registers| {
            *registers = Registers::new(&self.config);
            let mut gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            *gate = Settings::default();
            self.caches.clear();
        });
        *self.config_space.lock().unwrap_or_else(PoisonError::into_inner) = config_space();
    }

    fn service(&self) -> Service {
        Service::Asleep
    }
}
