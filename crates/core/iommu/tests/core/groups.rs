//! Which functions share a group (Linux, `pci_device_group`).

use std::sync::Arc;

use crate::fake::{FakeDriver, bdf, below, bridge, endpoint, function, with_acs};
use lychgate_iommu::{DeviceId, GroupId, Iommu, PciFunctionInfo, PciKind, ProbeError};
use lychgate_types::RequesterId;

struct Bus {
    iommu: Iommu,
    driver: Arc<FakeDriver>,
}

impl Bus {
    fn new() -> Self {
        Self { iommu: Iommu::new(), driver: FakeDriver::new() }
    }

    fn device(&mut self, info: PciFunctionInfo) -> DeviceId {
        self.iommu.add_pci(info, self.driver.clone()).unwrap()
    }

    fn group(&mut self, info: PciFunctionInfo) -> GroupId {
        let device = self.device(info);
        self.iommu.group(device).unwrap()
    }

    fn aliases(&self, requester: u16) -> Vec<u16> {
        let state = self.driver.0.lock().unwrap();
        let aliases = &state.aliases[&RequesterId::new(requester)];
        aliases.iter().map(|alias| alias.get()).collect()
    }
}

#[test]
fn single_functions_on_the_root_bus_are_alone_even_without_acs() {
    let mut bus = Bus::new();
    let a = bus.group(endpoint(0x08));
    let b = bus.group(endpoint(0x10));
    assert_ne!(a, b);
    assert_eq!((a.get(), b.get()), (0, 1));
    assert_eq!(bus.iommu.groups(), [a, b]);
}

#[test]
fn functions_of_one_device_share_a_group_unless_acs_isolates_each() {
    let mut bus = Bus::new();
    let first = bus.group(function(0x08));
    assert_eq!(bus.group(function(0x09)), first);
    assert_ne!(bus.group(with_acs(function(0x0a))), first);
    assert_eq!(bus.group(function(0x0b)), first);
    assert_ne!(bus.group(function(0x10)), first, "another device number");
}

#[test]
fn a_function_with_acs_does_not_draw_its_neighbours_in() {
    let mut bus = Bus::new();
    let with = bus.group(with_acs(function(0x08)));
    let without = bus.group(function(0x09));
    assert_ne!(with, without);
}

#[test]
fn endpoints_below_isolating_ports_are_alone() {
    let mut bus = Bus::new();
    for (port, secondary) in [(0x08, 1), (0x10, 2)] {
        let root = bridge(port, PciKind::DownstreamPort, secondary, true);
        bus.iommu.add_bridge(root);
    }
    let a = bus.group(below(0x08, endpoint(0x0100)));
    let b = bus.group(below(0x10, endpoint(0x0200)));
    assert_ne!(a, b);
    assert_eq!(bus.aliases(0x0100), []);
}

#[test]
fn a_port_without_acs_holds_everything_below_it_together() {
    let mut bus = Bus::new();
    bus.iommu.add_bridge(bridge(0x08, PciKind::DownstreamPort, 1, false));
    let a = bus.group(below(0x08, endpoint(0x0100)));
    let b = bus.group(below(0x08, endpoint(0x0108)));
    assert_eq!(a, b);
}

#[test]
fn the_functions_of_a_multifunction_root_port_without_acs_join_what_is_below_them() {
    let mut bus = Bus::new();
    for (port, secondary) in [(0x08, 1), (0x09, 2)] {
        let mut root = bridge(port, PciKind::DownstreamPort, secondary, false);
        root.multifunction = true;
        bus.iommu.add_bridge(root);
    }
    let a = bus.group(below(0x08, endpoint(0x0100)));
    let b = bus.group(below(0x09, endpoint(0x0200)));
    assert_eq!(a, b);
}

#[test]
fn a_switch_isolates_only_if_every_downstream_port_does() {
    for downstream_acs in [true, false] {
        let mut bus = Bus::new();
        bus.iommu.add_bridge(bridge(0x08, PciKind::DownstreamPort, 1, true));
        bus.iommu.add_bridge(below(0x08, bridge(0x0100, PciKind::UpstreamPort, 2, false)));
        for (port, secondary) in [(0x0200, 3), (0x0208, 4)] {
            let port = bridge(port, PciKind::DownstreamPort, secondary, downstream_acs);
            bus.iommu.add_bridge(below(0x0100, port));
        }
        let a = bus.group(below(0x0200, endpoint(0x0300)));
        let b = bus.group(below(0x0208, endpoint(0x0400)));
        assert_eq!(a == b, !downstream_acs);
        let sibling = bus.group(below(0x0200, endpoint(0x0308)));
        assert_eq!(sibling == a, !downstream_acs);
    }
}

#[test]
fn an_isolating_port_below_one_that_is_not_does_not_help() {
    let mut bus = Bus::new();
    bus.iommu.add_bridge(bridge(0x08, PciKind::DownstreamPort, 1, false));
    bus.iommu.add_bridge(below(0x08, bridge(0x0100, PciKind::UpstreamPort, 2, false)));
    for (port, secondary) in [(0x0200, 3), (0x0208, 4)] {
        let port = bridge(port, PciKind::DownstreamPort, secondary, true);
        bus.iommu.add_bridge(below(0x0100, port));
    }
    let a = bus.group(below(0x0200, endpoint(0x0300)));
    let b = bus.group(below(0x0208, endpoint(0x0400)));
    assert_eq!(a, b);
}

#[test]
fn everything_behind_a_pcie_to_pci_bridge_shares_its_alias_and_its_group() {
    let mut bus = Bus::new();
    bus.iommu.add_bridge(bridge(0x08, PciKind::DownstreamPort, 1, true));
    bus.iommu.add_bridge(below(0x08, bridge(0x0100, PciKind::PcieToPciBridge, 2, false)));
    let conventional =
        |requester| PciFunctionInfo { kind: PciKind::Conventional, ..endpoint(requester) };
    let a = bus.group(below(0x0100, conventional(0x0208)));
    let b = bus.group(below(0x0100, conventional(0x0210)));
    assert_eq!(a, b);
    assert_eq!(bus.aliases(0x0208), [0x0200]);
    assert_eq!(bus.aliases(0x0210), [0x0200]);
    // The function whose own id is the alias does not list it.
    assert_eq!(bus.group(below(0x0100, conventional(0x0200))), a);
    assert_eq!(bus.aliases(0x0200), []);
}

#[test]
fn a_conventional_bridge_lends_its_own_requester_id() {
    let mut bus = Bus::new();
    bus.iommu.add_bridge(bridge(0x08, PciKind::Conventional, 1, false));
    bus.device(below(0x08, endpoint(0x0108)));
    assert_eq!(bus.aliases(0x0108), [0x08]);
}

#[test]
fn a_quirk_alias_ties_a_function_to_the_one_it_names() {
    let mut bus = Bus::new();
    let named = bus.group(endpoint(0x08));
    let other = bus.group(endpoint(0x18));
    let mut info = endpoint(0x10);
    info.quirk_aliases = vec![RequesterId::new(0x08), RequesterId::new(0x10)];
    let device = bus.device(info);
    assert_eq!(bus.iommu.group(device), Some(named));
    assert_ne!(named, other);
    assert_eq!(bus.aliases(0x10), [0x08]);
    assert_eq!(bus.iommu.group_devices(named).len(), 2);
}

#[test]
fn a_parent_that_nobody_added_isolates_nothing() {
    let mut bus = Bus::new();
    let a = bus.group(below(0x08, endpoint(0x0100)));
    let b = bus.group(below(0x08, endpoint(0x0108)));
    assert_eq!(a, b);
    // Named at last: what is added from now on is isolated by it, what is there stays.
    bus.iommu.add_bridge(bridge(0x08, PciKind::DownstreamPort, 1, true));
    assert_ne!(bus.group(below(0x08, endpoint(0x0110))), a);
}

#[test]
fn parents_in_a_circle_end_the_walk() {
    let mut bus = Bus::new();
    bus.iommu.add_bridge(below(0x10, bridge(0x08, PciKind::DownstreamPort, 1, true)));
    bus.iommu.add_bridge(below(0x08, bridge(0x10, PciKind::DownstreamPort, 1, true)));
    bus.device(below(0x08, endpoint(0x0100)));
    bus.device(below(0x0200, endpoint(0x0200)));
}

#[test]
fn a_second_function_at_an_address_is_refused_and_a_gone_one_makes_room() {
    let mut bus = Bus::new();
    let first = bus.device(endpoint(0x08));
    let again = bus.iommu.add_pci(endpoint(0x08), bus.driver.clone());
    assert_eq!(again, Err(ProbeError::Exists));
    let group = bus.iommu.group(first).unwrap();
    bus.iommu.remove(first);
    assert_eq!(bus.iommu.find(bdf(0x08)), None);
    assert_eq!(bus.iommu.groups(), []);
    let second = bus.device(endpoint(0x08));
    assert_ne!(first, second);
    assert_ne!(bus.iommu.group(second), Some(group));
}

#[test]
fn a_device_whose_driver_refuses_it_leaves_nothing_behind() {
    let mut bus = Bus::new();
    bus.driver.0.lock().unwrap().probe_error = Some(ProbeError::NoIommu);
    let refused = bus.iommu.add_pci(endpoint(0x08), bus.driver.clone());
    assert_eq!(refused, Err(ProbeError::NoIommu));
    assert_eq!(bus.iommu.groups(), []);
    bus.driver.0.lock().unwrap().probe_error = None;
    bus.device(endpoint(0x08));
}
