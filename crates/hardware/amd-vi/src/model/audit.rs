//! The checker: the model's copies against the tables (AMD 48882 2.4, what software must invalidate
//! after which change).

mod compare;
mod ledger;
mod resolve;
mod rules;

use std::collections::{BTreeMap, HashSet};
use std::sync::PoisonError;

use lychgate_model::{Access, Audit, CacheKind, ChangedWord, Finding, Rule, Scope, Span, StaleUse};
use lychgate_types::{Iova, PhysAddr, RequesterId};

use super::cached::{Directory, Leaf};
use super::device_table::{NoEntry, entry_at};
use super::walk::{Path, Step};
use super::{AmdVi, Settings};
use crate::spec::Dte;
use compare::{Difference, compare_device, compare_interrupt};
pub(super) use ledger::{Ledger, Origin};

/// Every rule that [`AmdVi`] can find broken.
pub fn rules() -> &'static [&'static Rule] {
    &rules::ALL
}

/// The devices whose entries name a DomainID now, with their entries.
type Users = BTreeMap<u16, Vec<(RequesterId, Dte)>>;

impl Audit for AmdVi {
    /// Nothing unless the model was built with [`super::Config::checking`].
    fn audit(&self, scope: Scope) -> Vec<Finding> {
        let Some(ledger) = &self.ledger else { return Vec::new() };
        let settings = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if !settings.control.iommu_en() {
            return Vec::new();
        }
        let mut findings = Vec::new();
        if scope == Scope::Everything {
            self.audit_devices(ledger, &settings, &mut findings);
            self.audit_interrupts(ledger, &settings, &mut findings);
        }
        let users = self.users(ledger, &settings);
        self.audit_directories(ledger, &users, scope, &mut findings);
        self.audit_leaves(ledger, &users, scope, &mut findings);
        self.tidy(ledger);
        findings
    }
}

impl AmdVi {
    /// Notes that a copied translation answered a request, if the tables say something else now.
    pub(super) fn note_use(
        &self,
        dte: Dte,
        by: (RequesterId, bool),
        span: Span,
        leaf: Leaf,
        at: u64,
    ) {
        let Some(ledger) = &self.ledger else { return };
        if self.compare_page(dte, span, leaf, at).1.is_some() {
            let access = if by.1 { Access::Write } else { Access::Read };
            let by = StaleUse { requester: by.0, at: Iova::new(at), access, times: 1 };
            ledger.used_stale((CacheKind::Leaf, domain(dte), span), by);
        }
    }

    /// Copies again what was just invalidated, as hardware may at any time.
    pub(super) fn refetch(&self, settings: &Settings) {
        let Some(ledger) = &self.ledger else { return };
        let (entries, translations) = ledger.take_invalidated();
        if !settings.control.iommu_en() {
            return;
        }
        for device in entries.into_iter().map(RequesterId::new) {
            // Fills the cache; a device beyond the table has nothing to be fetched.
            let _ = self.device_entry(settings, device);
        }
        // By the entries that are cached, as a walk would: one that is stale refills what has just
        // been dropped.
        if translations.is_empty() {
            return;
        }
        let mut users = Users::new();
        self.caches.retain_devices(|device, dte| {
            if self.translates(dte) {
                users.entry(domain(dte)).or_default().push((device, dte));
            }
            true
        });
        for (domain, at) in translations {
            for (device, dte) in users.get(&domain).into_iter().flatten() {
                self.fetch(ledger, *device, *dte, at);
            }
        }
    }

    /// Copies the translation of `at`, if there is one that needs no bit set in the tables.
    fn fetch(&self, ledger: &Ledger, device: RequesterId, dte: Dte, at: u64) {
        let resolved = self.resolve(dte, at);
        if let resolve::End::Page(span, leaf) = resolved.end
            && dte.had() == 0
        {
            self.caches.leaves.insert(domain(dte), span, leaf);
            let origin = Origin { device, root: root(dte), path: resolved.path };
            ledger.filled((CacheKind::Leaf, domain(dte), span), origin);
        }
    }

    /// The entries as they are in memory, of every device that is known, by DomainID.
    fn users(&self, ledger: &Ledger, settings: &Settings) -> Users {
        let mut users = Users::new();
        for device in ledger.known() {
            if let Ok(dte) = self.entry_in_memory(settings, device)
                && self.translates(dte)
            {
                users.entry(domain(dte)).or_default().push((device, dte));
            }
        }
        users
    }

    /// Remembers where a copy of a table's entry came from.
    pub(super) fn note_fill(
        &self,
        kind: CacheKind,
        device: RequesterId,
        dte: Dte,
        span: Span,
        path: &Path,
    ) {
        if let Some(ledger) = &self.ledger {
            let origin = Origin { device, root: root(dte), path: *path };
            ledger.filled((kind, domain(dte), span), origin);
        }
    }

    /// Copies what lies beside the last entry of a walk, as hardware may.
    pub(super) fn fetch_beside(&self, device: RequesterId, dte: Dte, at: u64) {
        let Some(ledger) = self.ledger.as_ref().filter(|ledger| ledger.checking.fetch_ahead) else {
            return;
        };
        // The entries of one cache line.
        let line = at & !0x7fff;
        for neighbour in (line..=line | 0x7fff).step_by(0x1000) {
            if neighbour != at & !0xfff {
                self.fetch(ledger, device, dte, neighbour);
            }
        }
    }

    /// Remembers a copy of a device table entry.
    pub(super) fn note_device(&self, settings: &Settings, device: RequesterId, dte: Dte) {
        let Some(ledger) = &self.ledger else { return };
        ledger.saw(device);
        let Some(at) = entry_at(settings, device) else { return };
        let mut path = Path::default();
        for (word, at) in dte.0.iter().zip((at.get()..).step_by(8)) {
            path.push(Step { at, word: *word });
        }
        let span = Span::around(u64::from(device.get()), 0);
        let origin = Origin { device, root: (0, 0), path };
        ledger.filled((CacheKind::Device, device.get(), span), origin);
    }

    fn audit_devices(&self, ledger: &Ledger, settings: &Settings, findings: &mut Vec<Finding>) {
        self.caches.retain_devices(|device, cached| {
            let difference = match self.entry_in_memory(settings, device) {
                Ok(now) => compare_device(cached, now),
                Err(NoEntry::BeyondTable | NoEntry::Memory(_)) => Some(Difference {
                    rule: &rules::DEVICE_TABLE,
                    cached: "an entry".to_owned(),
                    now: "the device table has none".to_owned(),
                }),
            };
            let Some(difference) = difference else { return true };
            let span = Span::around(u64::from(device.get()), 0);
            let key = (CacheKind::Device, device.get(), span);
            let finding = self.finding(ledger, key, device, difference);
            findings.push(Finding { domain: None, ..finding.finding });
            false
        });
    }

    fn audit_directories(
        &self,
        ledger: &Ledger,
        users: &Users,
        scope: Scope,
        findings: &mut Vec<Finding>,
    ) {
        self.caches.directories.retain(|tag, span, cached: &Directory| {
            if !scope.covers(span) {
                return true;
            }
            let key = (CacheKind::Directory, tag, span);
            let compare = |dte| self.compare_directory(dte, span, *cached);
            self.judge(ledger, users, key, compare, findings)
        });
    }

    fn audit_leaves(
        &self,
        ledger: &Ledger,
        users: &Users,
        scope: Scope,
        findings: &mut Vec<Finding>,
    ) {
        self.caches.leaves.retain(|tag, span, cached: &Leaf| {
            if !scope.covers(span) {
                return true;
            }
            let key = (CacheKind::Leaf, tag, span);
            let compare = |dte| self.compare_leaf(dte, span, *cached);
            self.judge(ledger, users, key, compare, findings)
        });
    }

    /// Whether requests by this entry go through page tables.
    fn translates(&self, dte: Dte) -> bool {
        dte.v() && dte.tv() && dte.mode() != 0 && self.check_translation_half(dte).is_ok()
    }

    /// Compares a copy with the tables of everybody who would hit it. Gives whether it may stay.
    fn judge(
        &self,
        ledger: &Ledger,
        users: &Users,
        key: ledger::Key,
        compare: impl Fn(Dte) -> Option<Difference>,
        findings: &mut Vec<Finding>,
    ) -> bool {
        let users = users.get(&key.1).map_or(&[][..], Vec::as_slice);
        let different = users.iter().find_map(|(device, dte)| {
            let difference = compare(*dte)?;
            Some((*device, *dte, difference))
        });
        let Some((device, dte, difference)) = different else { return true };
        let Traced { mut finding, origin } = self.finding(ledger, key, device, difference);
        if let Some(origin) = origin
            && let Some(rule) = self.rule_of_origin(users, &origin, (device, dte))
        {
            finding.rule = rule;
        }
        findings.push(finding);
        false
    }

    /// The rule about DomainIDs that was broken, where the copy came from other tables than those
    /// of `user`.
    fn rule_of_origin(
        &self,
        users: &[(RequesterId, Dte)],
        origin: &Origin,
        user: (RequesterId, Dte),
    ) -> Option<&'static Rule> {
        let (device, dte) = user;
        // A root that grew has the old one below it, with copies that are still true.
        let grown = || self.resolve(dte, 0).tables.iter().any(|t| t.table.get() == origin.root.0);
        if origin.root == root(dte) || grown() {
            return None;
        }
        if users.iter().any(|(_, other)| root(*other) == origin.root) {
            return Some(&rules::DOMAIN_SHARED);
        }
        Some(if origin.device == device { &rules::DOMAIN_LEFT } else { &rules::DOMAIN_REUSED })
    }

    fn audit_interrupts(&self, ledger: &Ledger, settings: &Settings, findings: &mut Vec<Finding>) {
        self.caches.retain_interrupts(|device, index, cached| {
            let entry = self.entry_in_memory(settings, device).ok().filter(|dte| dte.iv());
            let now = entry.and_then(|dte| self.interrupt_in_memory(settings, dte, index).ok());
            let Some(difference) = now.and_then(|now| compare_interrupt(cached, now)) else {
                return true;
            };
            let key = (CacheKind::Interrupt, device.get(), Span::around(index, 0));
            let finding = self.finding(ledger, key, device, difference);
            findings.push(Finding { domain: None, ..finding.finding });
            false
        });
    }

    fn finding(
        &self,
        ledger: &Ledger,
        key: ledger::Key,
        requester: RequesterId,
        difference: Difference,
    ) -> Traced {
        let (origin, used) = ledger.take(&key);
        let steps = origin.as_ref().map_or(&[][..], |origin| origin.path.steps());
        let words = steps.iter().filter_map(|step| self.changed(*step)).collect();
        let finding = Finding {
            rule: difference.rule,
            kind: key.0,
            requester,
            filled_by: origin.map(|origin| origin.device),
            domain: Some(u32::from(key.1)),
            span: key.2,
            cached: difference.cached,
            now: difference.now,
            words,
            used,
        };
        Traced { finding, origin }
    }

    fn changed(&self, step: Step) -> Option<ChangedWord> {
        let now = self.word(step.at);
        let at = PhysAddr::new(step.at);
        (now != Some(step.word)).then_some(ChangedWord { at, then: step.word, now })
    }

    /// Forgets the origins of copies that have gone.
    fn tidy(&self, ledger: &Ledger) {
        let caches = &self.caches;
        if ledger.origins() <= 2 * (caches.directories.len() + caches.leaves.len()) + 1024 {
            return;
        }
        let mut there = HashSet::new();
        caches.directories.retain(|tag, span, _| {
            there.insert((CacheKind::Directory, tag, span));
            true
        });
        caches.leaves.retain(|tag, span, _| {
            there.insert((CacheKind::Leaf, tag, span));
            true
        });
        ledger.retain(|key| there.contains(key));
    }
}

/// A finding and where the copy came from.
struct Traced {
    finding: Finding,
    origin: Option<Origin>,
}

/// Root table and Mode.
pub(super) fn root(dte: Dte) -> (u64, u64) {
    (dte.host_root().get(), dte.mode())
}

fn domain(dte: Dte) -> u16 {
    (dte.domain_id() & 0xffff) as u16
}
