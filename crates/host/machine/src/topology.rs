//! The PCI topology: bus 0 with the host bridge and the IOMMU, and a root port with access control
//! above every other bus, so that each device on one gets a group of its own.

use std::collections::{BTreeMap, BTreeSet};

use lychgate_iommu::{Acs, PciFunctionInfo, PciKind};
use lychgate_types::{Bdf, RequesterId};

use crate::builder::BuildError;

/// The host bridge.
pub(crate) const HOST_BRIDGE: Bdf = Bdf { segment: 0, requester: RequesterId::new(0) };

/// The IOMMU, where AMD's processors have it.
pub(crate) const IOMMU: Bdf = Bdf { segment: 0, requester: RequesterId::new(2) };

/// Where the functions of a machine are.
#[derive(Debug)]
pub(crate) struct Topology {
    endpoints: BTreeSet<Bdf>,
    /// The root port of each bus but 0.
    ports: BTreeMap<u8, Bdf>,
}

impl Topology {
    /// Finds a root port for every bus that `endpoints` need.
    pub(crate) fn new(endpoints: &[Bdf]) -> Result<Self, BuildError> {
        let mut seen = BTreeSet::new();
        for &bdf in endpoints {
            if bdf.segment != 0 {
                return Err(BuildError::Segment { bdf });
            }
            if bdf.requester.bus() == 0 && bdf.requester.device() == 0 {
                return Err(BuildError::Reserved { bdf });
            }
            if !seen.insert(bdf) {
                return Err(BuildError::Twice { bdf });
            }
        }
        let on_bus_0 = |device: u16| {
            seen.iter()
                .any(|bdf| bdf.requester.bus() == 0 && u16::from(bdf.requester.device()) == device)
        };
        let mut free = (1..32).filter(|device| !on_bus_0(*device));
        let mut ports = BTreeMap::new();
        let buses: BTreeSet<u8> = seen.iter().map(|bdf| bdf.requester.bus()).collect();
        for bus in buses.into_iter().filter(|bus| *bus != 0) {
            let device = free.next().ok_or(BuildError::TooManyBuses)?;
            ports.insert(bus, Bdf { segment: 0, requester: RequesterId::new(device << 3) });
        }
        Ok(Self { endpoints: seen, ports })
    }

    /// The root port above a function; `None` on bus 0.
    pub(crate) fn port_of(&self, bdf: Bdf) -> Option<Bdf> {
        self.ports.get(&bdf.requester.bus()).copied()
    }

    /// The root ports.
    pub(crate) fn ports(&self) -> impl Iterator<Item = PciFunctionInfo> {
        self.ports.iter().map(|(bus, port)| PciFunctionInfo {
            bdf: *port,
            kind: PciKind::DownstreamPort,
            multifunction: false,
            acs: Some(Acs { isolates: true }),
            parent: None,
            secondary_bus: Some(*bus),
            quirk_aliases: Vec::new(),
        })
    }

    /// An endpoint as the IOMMU core must know it.
    pub(crate) fn endpoint(&self, bdf: Bdf) -> PciFunctionInfo {
        let slot = bdf.requester.get() >> 3;
        let in_slot = |other: &&Bdf| other.requester.get() >> 3 == slot;
        PciFunctionInfo {
            bdf,
            kind: PciKind::Endpoint,
            multifunction: self.endpoints.iter().filter(in_slot).count() > 1,
            acs: None,
            parent: self.port_of(bdf),
            secondary_bus: None,
            quirk_aliases: Vec::new(),
        }
    }
}

/// Configuration space of a host bridge, as sysfs shows it.
pub(crate) fn host_bridge_config() -> Vec<u8> {
    header(0x1022, 0x1480, 0x06_0000)
}

/// Configuration space of a root port above `bus`, as sysfs shows it.
pub(crate) fn port_config(bus: u8) -> Vec<u8> {
    let mut config = header(0x1022, 0x1483, 0x06_0400);
    // Type 1 header: secondary and subordinate bus numbers (PCIe Base 5.0 7.5.1.3).
    for (at, value) in [(0x0e, 1), (0x19, bus), (0x1a, bus)] {
        if let Some(byte) = config.get_mut(at) {
            *byte = value;
        }
    }
    config
}

fn header(vendor: u16, device: u16, class: u32) -> Vec<u8> {
    let mut config = Vec::with_capacity(4096);
    config.extend(vendor.to_le_bytes());
    config.extend(device.to_le_bytes());
    config.extend([0; 4]);
    config.extend((class << 8).to_le_bytes());
    config.resize(4096, 0);
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bdfs(texts: &[&str]) -> Vec<Bdf> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn ports_keep_clear_of_devices_on_bus_0() {
        let all = bdfs(&["0000:00:01.0", "0000:03:00.0", "0000:01:00.0", "0000:01:00.1"]);
        let topology = Topology::new(&all).unwrap();
        let ports: Vec<_> =
            topology.ports().map(|port| (port.bdf.to_string(), port.secondary_bus)).collect();
        assert_eq!(ports, [("0000:00:02.0".into(), Some(1)), ("0000:00:03.0".into(), Some(3))]);
        assert_eq!(topology.port_of(all[0]), None);
        assert!(topology.endpoint(all[2]).multifunction && topology.endpoint(all[3]).multifunction);
        assert!(!topology.endpoint(all[1]).multifunction);
    }

    #[test]
    fn addresses_that_cannot_be_are_refused_by_name() {
        let refused = |texts: &[&str]| Topology::new(&bdfs(texts)).unwrap_err().to_string();
        assert!(refused(&["0000:01:00.0", "01:00.0"]).contains("0000:01:00.0 is used twice"));
        assert!(refused(&["0001:01:00.0"]).contains("segment"));
        assert!(refused(&["0000:00:00.2"]).contains("the IOMMU"));
        let many: Vec<String> = (1..=32).map(|bus| format!("0000:{bus:02x}:00.0")).collect();
        assert!(refused(&many.iter().map(String::as_str).collect::<Vec<_>>()).contains("31 buses"));
    }
}
