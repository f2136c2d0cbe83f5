//! What a driver of the host keeps of a function across a reset (`pci_save_state`).

use lychgate_model::PciFunction;

use crate::config::{
    CapabilityKind, PCI_BASE_ADDRESS_0, PCI_CAP_ID_EXP, PCI_COMMAND, PCI_EXP_DEVCTL,
    PCI_EXP_DEVCTL2, PCI_ROM_ADDRESS, VirtualConfig, read16,
};

/// Registers of configuration space and what they held, in the order in which they are restored.
/// Messages are not among them: interrupts restore their own.
pub(super) struct SavedState(Vec<(u16, Vec<u8>)>);

impl SavedState {
    /// Reads the registers of a function whose capabilities `config` knows.
    pub(super) fn of(function: &dyn PciFunction, config: &VirtualConfig) -> Self {
        let mut registers: Vec<(u16, usize)> = vec![(0x0c, 2), (0x3c, 1), (PCI_ROM_ADDRESS, 4)];
        registers.extend((0..6).map(|bar| (PCI_BASE_ADDRESS_0 + 4 * bar, 4)));
        if let Some(pcie) = config.capability(PCI_CAP_ID_EXP) {
            registers.push((pcie.start + PCI_EXP_DEVCTL, 2));
            if read16(function, pcie.start + 2) & 0xf > 1 {
                registers.push((pcie.start + PCI_EXP_DEVCTL2, 2));
            }
        }
        const PCI_EXT_CAP_ID_ERR: u16 = 1;
        if let Some(aer) = config.find(CapabilityKind::Extended(PCI_EXT_CAP_ID_ERR)) {
            registers.extend([0x08, 0x0c, 0x14, 0x18].map(|register| (aer.start + register, 4)));
        }
        // Last, so that nothing moves before all is in place.
        registers.push((PCI_COMMAND, 2));
        Self(
            registers
                .into_iter()
                .map(|(at, len)| {
                    let mut bytes = vec![0; len];
                    function.config_read(at, &mut bytes);
                    (at, bytes)
                })
                .collect(),
        )
    }

    /// Writes them.
    pub(super) fn restore(&self, function: &dyn PciFunction) {
        for (at, bytes) in &self.0 {
            function.config_write(*at, bytes);
        }
    }
}
