//! Random operations on the core against a plain model of what Linux keeps per group.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::fake::{FakeDriver, function};
use lychgate_iommu::{AllocFlags, AttachError, ClaimError, DeviceId, Domain, Iommu, Owner};
use proptest::prelude::*;

/// Six functions: three of device 1, three of device 2.
const REQUESTERS: [u16; 6] = [0x08, 0x09, 0x0a, 0x10, 0x11, 0x12];

#[derive(Clone, Copy, Debug)]
enum Op {
    Add(usize),
    Remove(usize),
    Claim(usize, u64),
    Release(usize),
    ClaimGroup(usize, u64),
    ReleaseGroup(usize),
    Use(usize),
    Unuse(usize),
    Attach(usize, u64, usize),
    Detach(usize),
    Break(usize),
    Mend(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let device = 0..REQUESTERS.len();
    let (group, owner, domain) = (0..2_usize, 1..3_u64, 0..4_usize);
    prop_oneof![
        2 => device.clone().prop_map(Op::Add),
        1 => device.clone().prop_map(Op::Remove),
        3 => (device.clone(), owner.clone()).prop_map(|(d, o)| Op::Claim(d, o)),
        2 => device.clone().prop_map(Op::Release),
        1 => (group.clone(), owner.clone()).prop_map(|(g, o)| Op::ClaimGroup(g, o)),
        1 => group.clone().prop_map(Op::ReleaseGroup),
        1 => device.clone().prop_map(Op::Use),
        1 => device.clone().prop_map(Op::Unuse),
        6 => (group.clone(), owner, domain).prop_map(|(g, o, d)| Op::Attach(g, o, d)),
        2 => group.prop_map(Op::Detach),
        2 => device.clone().prop_map(Op::Break),
        2 => device.prop_map(Op::Mend),
    ]
}

/// The core and what it should be like.
struct Pair {
    iommu: Iommu,
    driver: Arc<FakeDriver>,
    domains: [Domain; 4],
    groups: [ModelGroup; 2],
    broken: [bool; 6],
}

#[derive(Default)]
struct ModelGroup {
    /// By function, in the order of arrival: the device, and its claims and drivers.
    members: Vec<(usize, DeviceId, u32, u32)>,
    /// Index into `Pair::domains`.
    domain: usize,
    owner: Option<u64>,
    whole: bool,
    /// Functions that were blocked because they could not follow.
    stranded: BTreeMap<usize, ()>,
}

const BLOCKED: usize = 0;
const IDENTITY: usize = 1;

impl Pair {
    fn new() -> Self {
        let (mut iommu, driver) = (Iommu::new(), FakeDriver::new());
        let device = iommu.add_pci(function(0x18), driver.clone()).unwrap();
        let mut paging = || {
            let domain = iommu.alloc_paging(device, AllocFlags::default(), None);
            Domain::Paging(domain.unwrap())
        };
        let domains = [Domain::Blocked, Domain::Identity, paging(), paging()];
        Self { iommu, driver, domains, groups: Default::default(), broken: [false; 6] }
    }

    fn device(&self, function: usize) -> Option<DeviceId> {
        let members = &self.groups[function / 3].members;
        members.iter().find(|m| m.0 == function).map(|m| m.1)
    }

    /// Moves a group in the model; the error is the one that the core has to give.
    fn move_group(&mut self, group: usize, to: usize) -> Result<(), AttachError> {
        let state = &mut self.groups[group];
        if state.domain == to {
            return Ok(());
        }
        let failing = |function: usize| to != BLOCKED && self.broken[function];
        let first_failing = state.members.iter().position(|m| failing(m.0));
        let moved = first_failing.unwrap_or(state.members.len());
        if first_failing.is_some() {
            // What had moved goes back, if it can.
            for (function, ..) in &state.members[..moved] {
                assert!(!self.broken[*function]);
                state.stranded.remove(function);
            }
            return Err(AttachError::Hardware);
        }
        state.domain = to;
        state.stranded.clear();
        Ok(())
    }

    fn force_group(&mut self, group: usize, to: usize) {
        let state = &mut self.groups[group];
        for (function, ..) in &state.members {
            // A device that is there already is not asked.
            let there = state.domain == to && !state.stranded.contains_key(function);
            if to != BLOCKED && self.broken[*function] && !there {
                state.stranded.insert(*function, ());
            } else {
                state.stranded.remove(function);
            }
        }
        state.domain = to;
    }

    fn kernel_users(&self, group: usize) -> u32 {
        self.groups[group].members.iter().map(|m| m.3).sum()
    }

    fn claims(&self, group: usize) -> u32 {
        self.groups[group].members.iter().map(|m| m.2).sum()
    }

    /// After a claim or a device has gone.
    fn settle(&mut self, group: usize) {
        let state = &self.groups[group];
        if state.owner.is_some() && !state.whole && self.claims(group) == 0 {
            self.groups[group].owner = None;
            self.force_group(group, IDENTITY);
        }
    }

    fn take(&mut self, group: usize, owner: u64) -> Result<(), ClaimError> {
        if self.groups[group].domain != IDENTITY {
            return Err(ClaimError::Busy);
        }
        assert_eq!(self.move_group(group, BLOCKED), Ok(()));
        self.groups[group].owner = Some(owner);
        Ok(())
    }

    fn claim(&mut self, function: usize, owner: u64) -> Result<(), ClaimError> {
        let group = function / 3;
        match self.groups[group].owner {
            Some(held) if held == owner && !self.groups[group].whole => {}
            Some(_) => return Err(ClaimError::Owned),
            None if self.kernel_users(group) > 0 => return Err(ClaimError::Owned),
            None => {
                self.take(group, owner)?;
                self.groups[group].whole = false;
            }
        }
        self.member(function).2 += 1;
        Ok(())
    }

    fn member(&mut self, function: usize) -> &mut (usize, DeviceId, u32, u32) {
        let members = &mut self.groups[function / 3].members;
        members.iter_mut().find(|m| m.0 == function).unwrap()
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Add(function) => self.add(function),
            Op::Remove(function) => {
                if let Some(device) = self.device(function) {
                    self.iommu.remove(device);
                    let state = &mut self.groups[function / 3];
                    state.members.retain(|m| m.0 != function);
                    state.stranded.remove(&function);
                    if state.members.is_empty() {
                        *state = ModelGroup::default();
                    } else {
                        self.settle(function / 3);
                    }
                }
            }
            Op::Claim(function, owner) => {
                if let Some(device) = self.device(function) {
                    let got = self.iommu.claim_dma_owner(device, Owner(owner));
                    assert_eq!(got, self.claim(function, owner));
                }
            }
            Op::Release(function) => {
                if let Some(device) = self.device(function) {
                    self.iommu.release_dma_owner(device);
                    let member = self.member(function);
                    if member.2 > 0 {
                        member.2 -= 1;
                        self.settle(function / 3);
                    }
                }
            }
            Op::ClaimGroup(group, owner) => self.claim_group(group, owner),
            Op::ReleaseGroup(group) => {
                if let Some(id) = self.group_id(group) {
                    self.iommu.release_group(id);
                    if self.groups[group].whole {
                        self.groups[group].whole = false;
                        self.groups[group].owner = None;
                        self.force_group(group, IDENTITY);
                    }
                }
            }
            Op::Use(function) => {
                if let Some(device) = self.device(function) {
                    let got = self.iommu.use_default_domain(device);
                    if self.groups[function / 3].owner.is_some() {
                        assert_eq!(got, Err(ClaimError::Busy));
                    } else {
                        assert_eq!(got, Ok(()));
                        self.member(function).3 += 1;
                    }
                }
            }
            Op::Unuse(function) => {
                if let Some(device) = self.device(function) {
                    self.iommu.unuse_default_domain(device);
                    let member = self.member(function);
                    member.3 = member.3.saturating_sub(1);
                }
            }
            Op::Attach(group, owner, domain) => {
                if let Some(id) = self.group_id(group) {
                    let wanted = self.domains[domain].clone();
                    let got = self.iommu.attach_group(id, Owner(owner), wanted);
                    let expected = if self.groups[group].owner == Some(owner) {
                        self.move_group(group, domain)
                    } else {
                        Err(AttachError::Busy)
                    };
                    assert_eq!(got, expected);
                }
            }
            Op::Detach(group) => {
                if let Some(id) = self.group_id(group) {
                    self.iommu.detach_group(id);
                    let owned = self.groups[group].owner.is_some();
                    self.force_group(group, if owned { BLOCKED } else { IDENTITY });
                }
            }
            Op::Break(function) => {
                self.broken[function] = true;
                self.driver.break_device(REQUESTERS[function], Some(AttachError::Hardware));
            }
            Op::Mend(function) => {
                self.broken[function] = false;
                self.driver.break_device(REQUESTERS[function], None);
            }
        }
    }

    fn add(&mut self, index: usize) {
        let known = self.device(index).is_some();
        let info = function(REQUESTERS[index]);
        let got = self.iommu.add_pci(info, self.driver.clone());
        let state = &mut self.groups[index / 3];
        if state.members.is_empty() {
            state.domain = IDENTITY;
        }
        let refused = known || (self.broken[index] && state.domain != BLOCKED);
        assert_eq!(got.is_err(), refused);
        if let Ok(device) = got {
            state.members.push((index, device, 0, 0));
        }
    }

    fn claim_group(&mut self, group: usize, owner: u64) {
        if let Some(id) = self.group_id(group) {
            let got = self.iommu.claim_group(id, Owner(owner));
            let used = self.groups[group].owner.is_some() || self.kernel_users(group) > 0;
            let expected = if used { Err(ClaimError::Owned) } else { self.take(group, owner) };
            if expected.is_ok() {
                self.groups[group].whole = true;
            }
            assert_eq!(got, expected);
        }
    }

    fn group_id(&self, group: usize) -> Option<lychgate_iommu::GroupId> {
        self.iommu.group(self.groups[group].members.first()?.1)
    }

    fn check(&self) {
        for (index, state) in self.groups.iter().enumerate() {
            let Some(id) = self.group_id(index) else {
                continue;
            };
            let devices: Vec<DeviceId> = state.members.iter().map(|m| m.1).collect();
            assert_eq!(self.iommu.group_devices(id), devices);
            let domain = &self.domains[state.domain];
            assert!(self.iommu.group_domain(id).unwrap().same(domain));
            let owned = state.owner.is_some() || self.kernel_users(index) > 0;
            assert_eq!(self.iommu.group_owned(id), owned);
            for (function, ..) in &state.members {
                let attached = self.driver.attached(REQUESTERS[*function]).unwrap();
                let expected =
                    if state.stranded.contains_key(function) { &Domain::Blocked } else { domain };
                assert!(
                    attached.same(expected),
                    "function {function}: {attached:?} instead of {expected:?}"
                );
            }
        }
    }
}

proptest! {
    #[test]
    fn the_core_does_what_the_model_does(ops in proptest::collection::vec(op(), 1..80)) {
        let mut pair = Pair::new();
        for op in ops {
            pair.apply(op);
            pair.check();
        }
    }
}
