//! Device table entries and how they change (AMD 48882 2.2.2).

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};

use lychgate_types::{Lock, Locks, Pages, PhysAddr, RequesterId};

use super::domain_ids;
use super::hardware::{Hardware, Stalled};
use crate::spec::size::Block;
use crate::spec::{Command, Dte};

/// Words of an entry.
const WORDS: usize = BLOCKED.0.len();

/// Every request is terminated. Zero would be the opposite: V = 0 lets requests pass.
pub(super) const BLOCKED: Dte = Dte([0; 4]).with_v(true);

/// Every request passes untranslated.
pub(super) const IDENTITY: Dte = Dte([0; 4])
    .with_v(true)
    .with_tv(true)
    .with_ir(true)
    .with_iw(true)
    .with_domain_id(domain_ids::IDENTITY as u64);

/// The entry of a device whose requests the page table at `root` translates.
pub(super) const fn paging(root: PhysAddr, levels: u32, domain_id: u16) -> Dte {
    Dte([0; 4])
        .with_v(true)
        .with_tv(true)
        .with_ir(true)
        .with_iw(true)
        .with_mode(levels as u64)
        .with_host_root(root)
        .with_domain_id(domain_id as u64)
}

/// The requester ids whose entries translate, with their DomainIDs. Who holds the lock around it may
/// change the device table.
pub(super) struct Carriers(BTreeMap<RequesterId, u16>);

impl Carriers {
    pub(super) const fn new() -> Self {
        Self(BTreeMap::new())
    }
}

/// An entry that is about to change.
struct Change {
    id: RequesterId,
    old: Dte,
}

/// Makes every entry of a table that hardware does not use yet a blocking one.
pub(super) fn block_all(table: &[AtomicU64]) {
    for entry in table.chunks_exact(WORDS) {
        store_words(entry, BLOCKED, 0..WORDS);
    }
}

impl<P: Pages, L: Locks> Hardware<P, L> {
    /// Makes the entries of `ids` what `entry` gives, and returns when hardware has forgotten what
    /// they were. `entry` runs under the device table's lock.
    ///
    /// Only words 0 and 1 change: the interrupt half stays. A requester id whose entry changes from
    /// one translation to another is blocked in between. One 64-bit store cannot change both the
    /// root and the DomainID, and while they do not match, hardware would tag translations of one
    /// domain with the id of the other, where an unmap of the one does not find them.
    ///
    /// On an error the entries are as before, except that a device which was to be blocked is
    /// blocked in memory at least.
    pub(super) fn program(
        &self,
        ids: &[RequesterId],
        entry: impl Fn() -> Dte,
    ) -> Result<(), Stalled> {
        self.carriers.with(|carriers| {
            let new = entry();
            let changes: Vec<Change> = ids
                .iter()
                .map(|&id| Change { id, old: self.dte(id) })
                .filter(|change| change.old.0[..2] != new.0[..2])
                .collect();
            if changes.is_empty() {
                return Ok(());
            }
            let result = self.change(&changes, new);
            if result.is_err() {
                for change in &changes {
                    let settled = if new.tv() { change.old } else { new };
                    self.store_dte(change.id, BLOCKED, 0);
                    self.store_dte(change.id, settled, 1);
                    self.store_dte(change.id, settled, 0);
                }
                if new.tv() {
                    return result;
                }
            }
            for change in &changes {
                carriers.0.remove(&change.id);
                if new.tv() {
                    carriers.0.insert(change.id, domain_id(new));
                }
            }
            result
        })
    }

    /// Changes the root of every entry that carries `id` to `new`, and returns when hardware has
    /// forgotten the old root. To be called under the lock around `carriers`.
    ///
    /// The old root stays valid below the new one, so that one store of word 0 does it, and nothing
    /// of what is cached under the DomainID is wrong.
    pub(super) fn change_root(
        &self,
        carriers: &Carriers,
        id: u16,
        new: Dte,
    ) -> Result<(), Stalled> {
        let mut commands = Vec::new();
        for (&requester, _) in carriers.0.iter().filter(|(_, carried)| **carried == id) {
            self.store_dte(requester, new, 0);
            commands.push(Command::invalidate_devtab_entry(requester));
        }
        if commands.is_empty() {
            return Ok(());
        }
        self.run(&commands)
    }

    /// The entry of a requester id; a blocking one beyond the table.
    pub(super) fn dte(&self, id: RequesterId) -> Dte {
        let mut dte = BLOCKED;
        for (to, word) in dte.0.iter_mut().zip(self.dte_words(id)) {
            *to = u64::from_le(word.load(Ordering::Relaxed));
        }
        dte
    }

    fn change(&self, changes: &[Change], new: Dte) -> Result<(), Stalled> {
        let mut commands: Vec<Command> = Vec::new();
        let mut old_ids: Vec<u16> = Vec::new();
        for change in changes.iter().filter(|change| change.old.tv()) {
            self.store_dte(change.id, BLOCKED, 0);
            commands.push(Command::invalidate_devtab_entry(change.id));
            if !old_ids.contains(&domain_id(change.old)) {
                old_ids.push(domain_id(change.old));
            }
        }
        if !commands.is_empty() {
            // An entry that is still cached could refill what is dropped next.
            self.run(&commands)?;
            commands.clear();
        }
        // What was cached through the old entries goes too: hardware exists that would go on using
        // it (Xen XSA-442), and an old DomainID must be clean before it can be given back.
        for id in old_ids {
            commands.push(Command::invalidate_iommu_pages(id, Block::ALL, true));
        }
        for change in changes {
            self.store_dte(change.id, new, 1);
            self.store_dte(change.id, new, 0);
            commands.push(Command::invalidate_devtab_entry(change.id));
        }
        self.run(&commands)
    }

    /// Stores one word of an entry, after all that was stored before.
    fn store_dte(&self, id: RequesterId, dte: Dte, word: usize) {
        store_words(self.dte_words(id), dte, word..word + 1);
    }

    fn dte_words(&self, id: RequesterId) -> &[AtomicU64] {
        let first = usize::from(id.get()) * WORDS;
        let words = self.device_table.words().get(first..);
        words.and_then(|words| words.get(..WORDS)).unwrap_or(&[])
    }
}

/// The DomainID that an entry carries.
fn domain_id(dte: Dte) -> u16 {
    dte.0[1].to_le_bytes().first_chunk().map_or(0, |low| u16::from_le_bytes(*low))
}

fn store_words(entry: &[AtomicU64], dte: Dte, which: core::ops::Range<usize>) {
    let (from, to) = (dte.0.get(which.clone()), entry.get(which));
    for (word, value) in to.into_iter().flatten().zip(from.into_iter().flatten()) {
        word.store(value.to_le(), Ordering::Release);
    }
}
