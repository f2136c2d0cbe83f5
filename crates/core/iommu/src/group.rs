//! Groups: the smallest sets of functions that can be isolated from each other (Linux,
//! `pci_device_group`; PCIe Base 5.0 6.12).
//!
//! Every function of the topology, bridges too, belongs to one [`Set`] from the moment it is added.
//! Sets never merge: what a later function shows of an earlier one (an alias, for instance) does
//! not move the earlier one, as in Linux, where groups are formed when a device is probed.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;

use lychgate_types::{Bdf, RequesterId};

use crate::pci::{PciFunctionInfo, PciKind};

/// A set of functions that cannot be isolated from each other. Never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct Set(u32);

/// The PCI functions that are known, with the set of each.
#[derive(Default)]
pub(crate) struct Topology {
    functions: BTreeMap<Bdf, Function>,
    next_set: u32,
}

struct Function {
    info: PciFunctionInfo,
    set: Set,
    /// Named as a parent, but not described yet.
    presumed: bool,
}

/// More bridges than a segment has buses: the walk upward ends even if parents form a circle.
const MAX_DEPTH: usize = 256;

impl Topology {
    /// Adds a function and gives its set; `None` when there is a function at its address already.
    ///
    /// A parent that was not added before is presumed to be a port without ACS, so that nothing
    /// below it counts as isolated, until it is added itself.
    pub(crate) fn add(&mut self, info: PciFunctionInfo) -> Option<Set> {
        if let Some(known) = self.functions.get_mut(&info.bdf) {
            if !known.presumed {
                return None;
            }
            known.info = info;
            known.presumed = false;
            return Some(known.set);
        }
        if let Some(parent) = info.parent
            && parent != info.bdf
            && !self.functions.contains_key(&parent)
        {
            self.presume(parent);
        }
        let set = match self.find_set(&info) {
            Some(set) => set,
            None => self.new_set(),
        };
        self.functions.insert(info.bdf, Function { info, set, presumed: false });
        Some(set)
    }

    /// Takes a function away.
    pub(crate) fn remove(&mut self, bdf: Bdf) {
        self.functions.remove(&bdf);
    }

    /// The requester ids besides its own under which a function's requests may arrive, in the
    /// order in which they appear on the way up (Linux, `pci_for_each_dma_alias`).
    pub(crate) fn aliases(&self, info: &PciFunctionInfo) -> Vec<RequesterId> {
        let own = info.bdf.requester;
        let mut aliases = Vec::new();
        let bridged = self.alias_bridges(info).map(|(alias, _)| alias);
        for alias in info.quirk_aliases.iter().copied().chain(bridged) {
            if alias != own && !aliases.contains(&alias) {
                aliases.push(alias);
            }
        }
        aliases
    }

    /// The set that a new function has to join.
    fn find_set(&self, info: &PciFunctionInfo) -> Option<Set> {
        self.set_of_alias_bridge(info)
            .or_else(|| self.set_above_isolation(info))
            .or_else(|| self.set_of_aliased_sibling(info))
            .or_else(|| self.set_of_neighbour(info))
    }

    /// Below a bridge that puts another requester id on requests, nothing can be told apart.
    fn set_of_alias_bridge(&self, info: &PciFunctionInfo) -> Option<Set> {
        self.alias_bridges(info).next().map(|(_, bridge)| bridge.set)
    }

    /// Peer-to-peer traffic turns round at the first bridge above which the path to the root does
    /// not isolate.
    fn set_above_isolation(&self, info: &PciFunctionInfo) -> Option<Set> {
        let (_, bridge) = self.upstream(info).next()?;
        let isolated = isolates(&bridge.info)
            && self.upstream(&bridge.info).all(|(_, above)| isolates(&above.info));
        (!isolated).then_some(bridge.set)
    }

    /// Functions on one bus that share a requester id.
    fn set_of_aliased_sibling(&self, info: &PciFunctionInfo) -> Option<Set> {
        let carried = |function: &PciFunctionInfo| {
            let mut ids = function.quirk_aliases.clone();
            ids.push(function.bdf.requester);
            ids
        };
        let own = carried(info);
        self.functions
            .values()
            .filter(|other| same_bus(info.bdf, other.info.bdf))
            .find(|other| carried(&other.info).iter().any(|id| own.contains(id)))
            .map(|other| other.set)
    }

    /// Functions of one multifunction device may exchange requests inside it, and so may the
    /// downstream ports of one switch, unless ACS says that each of them does not.
    fn set_of_neighbour(&self, info: &PciFunctionInfo) -> Option<Set> {
        if isolates(info) {
            return None;
        }
        self.functions
            .values()
            .filter(|other| same_bus(info.bdf, other.info.bdf) && !isolates(&other.info))
            .find(|other| {
                self.same_device(info, &other.info) || self.same_switch(info, &other.info)
            })
            .map(|other| other.set)
    }

    fn same_device(&self, a: &PciFunctionInfo, b: &PciFunctionInfo) -> bool {
        a.multifunction && a.bdf.requester.device() == b.bdf.requester.device()
    }

    /// Linux asks this of the functions of one device only, and so keeps apart what two ports of a
    /// switch let talk to each other.
    fn same_switch(&self, a: &PciFunctionInfo, b: &PciFunctionInfo) -> bool {
        let below_upstream_port = a
            .parent
            .and_then(|parent| self.functions.get(&parent))
            .is_some_and(|parent| parent.info.kind == PciKind::UpstreamPort);
        below_upstream_port
            && a.parent == b.parent
            && [a.kind, b.kind] == [PciKind::DownstreamPort; 2]
    }

    /// The bridges above a function that give its requests another requester id, with that id.
    fn alias_bridges<'a>(
        &'a self,
        info: &'a PciFunctionInfo,
    ) -> impl Iterator<Item = (RequesterId, &'a Function)> {
        self.upstream(info).filter_map(|(below, bridge)| match bridge.info.kind {
            // PCI Express to PCI/PCI-X Bridge 1.0 2.3: requests get the secondary bus number,
            // device 0, function 0.
            PciKind::PcieToPciBridge => {
                let bus = bridge.info.secondary_bus.unwrap_or(below.requester.bus());
                Some((RequesterId::new(u16::from(bus) << 8), bridge))
            }
            PciKind::Conventional => Some((bridge.info.bdf.requester, bridge)),
            PciKind::Endpoint | PciKind::DownstreamPort | PciKind::UpstreamPort => None,
        })
    }

    /// The bridges above a function, nearest first, each with the address of what is below it.
    fn upstream<'a>(
        &'a self,
        info: &'a PciFunctionInfo,
    ) -> impl Iterator<Item = (Bdf, &'a Function)> {
        let mut below = info;
        core::iter::from_fn(move || {
            let bridge = self.functions.get(&below.parent?)?;
            let from = below.bdf;
            below = &bridge.info;
            Some((from, bridge))
        })
        .take(MAX_DEPTH)
    }

    fn presume(&mut self, bdf: Bdf) {
        let set = self.new_set();
        let info = PciFunctionInfo {
            bdf,
            kind: PciKind::DownstreamPort,
            multifunction: false,
            acs: None,
            parent: None,
            secondary_bus: None,
            quirk_aliases: Vec::new(),
        };
        let presumed = true;
        self.functions.insert(bdf, Function { info, set, presumed });
    }

    fn new_set(&mut self) -> Set {
        let set = Set(self.next_set);
        self.next_set = self.next_set.wrapping_add(1);
        set
    }
}

/// Whether a function keeps its requests from its neighbours (Linux, `pci_acs_enabled`): ports must
/// say so by ACS, endpoints and upstream ports only if they have neighbours in the same device, and
/// conventional PCI never does.
fn isolates(info: &PciFunctionInfo) -> bool {
    let by_acs = info.acs.is_some_and(|acs| acs.isolates);
    match info.kind {
        PciKind::Conventional | PciKind::PcieToPciBridge => false,
        PciKind::DownstreamPort => by_acs,
        PciKind::Endpoint | PciKind::UpstreamPort => !info.multifunction || by_acs,
    }
}

fn same_bus(a: Bdf, b: Bdf) -> bool {
    a.segment == b.segment && a.requester.bus() == b.requester.bus()
}
