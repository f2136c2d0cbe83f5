//! Which special address range an address lies in (AMD 48882 2.1.2 Table 3).

use std::ops::RangeInclusive;

use crate::spec::ranges;

/// What the addresses around one are for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Purpose {
    /// Memory: translated by the page tables.
    Ordinary,
    /// Interrupts.
    Interrupt,
    /// System management messages: DTE.SysMgt decides.
    SystemManagement,
    /// Port I/O: DTE.IoCtl decides.
    PortIo,
    /// Nothing that a device may reach this way.
    Reserved,
}

/// The ranges that have a purpose of their own, in the order of their addresses.
const HT: [(RangeInclusive<u64>, Purpose); 3] = [
    (ranges::HT_INTERRUPT, Purpose::Interrupt),
    (ranges::HT_SYSTEM_MANAGEMENT, Purpose::SystemManagement),
    (ranges::HT_PORT_IO, Purpose::PortIo),
];

/// The purpose of `at`, and the last address with the same. `ht`: the HyperTransport ranges count.
pub(super) fn purpose(at: u64, ht: bool) -> (Purpose, u64) {
    let msi = ranges::MSI;
    let reserved = ranges::HT;
    if at < *msi.start() {
        (Purpose::Ordinary, msi.start() - 1)
    } else if at <= *msi.end() {
        (Purpose::Interrupt, *msi.end())
    } else if !ht || at > *reserved.end() {
        (Purpose::Ordinary, u64::MAX)
    } else if at < *reserved.start() {
        (Purpose::Ordinary, reserved.start() - 1)
    } else {
        for (range, purpose) in HT {
            if at < *range.start() {
                return (Purpose::Reserved, range.start() - 1);
            }
            if at <= *range.end() {
                return (purpose, *range.end());
            }
        }
        (Purpose::Reserved, *reserved.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranges_tile_the_address_space() {
        let mut at = 0u64;
        let mut seen = Vec::new();
        loop {
            let (purpose, last) = purpose(at, true);
            assert!(last >= at);
            seen.push((at, purpose));
            let Some(next) = last.checked_add(1) else { break };
            at = next;
        }
        assert_eq!(
            seen,
            [
                (0, Purpose::Ordinary),
                (0xfee0_0000, Purpose::Interrupt),
                (0xfef0_0000, Purpose::Ordinary),
                (0xfd_0000_0000, Purpose::Reserved),
                (0xfd_f800_0000, Purpose::Interrupt),
                (0xfd_f900_0000, Purpose::Reserved),
                (0xfd_f910_0000, Purpose::SystemManagement),
                (0xfd_f920_0000, Purpose::Reserved),
                (0xfd_fc00_0000, Purpose::PortIo),
                (0xfd_fe00_0000, Purpose::Reserved),
                (0x100_0000_0000, Purpose::Ordinary),
            ]
        );
        assert_eq!(purpose(0xfd_0000_0000, false), (Purpose::Ordinary, u64::MAX));
    }
}
