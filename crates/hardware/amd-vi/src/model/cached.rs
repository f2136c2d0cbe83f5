//! What the model keeps copies of (AMD 48882 2.4, "caching"), and by which key.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use lychgate_model::{Cache, Policy, Span};
use lychgate_types::{PhysAddr, RequesterId};

use crate::spec::size::Block;
use crate::spec::{Dte, Irte32, Irte128};

const DEVICE_ENTRIES: usize = 256;
const DIRECTORIES: usize = 512;
const LEAVES: usize = 4096;
const INTERRUPTS: usize = 1024;

/// Copies of table entries. Translations are found by DomainID and address, never by DeviceID or
/// root pointer: devices whose entries carry the same DomainID hit each other's.
pub(super) struct Caches {
    /// By DeviceID; whole entries, valid or not.
    devices: Cache<(), Dte>,
    /// By DomainID and the addresses below the entry.
    pub(super) directories: Cache<u16, Directory>,
    /// By DomainID and the addresses of the page, whole whatever its size.
    pub(super) leaves: Cache<u16, Leaf>,
    /// By DeviceID and index.
    interrupts: Cache<u16, CachedIrte>,
    /// Devices with DTE.SE that have logged a fault since their entry was fetched.
    faulted: Mutex<HashSet<u16>>,
}

/// A present directory entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Directory {
    pub(super) table: PhysAddr,
    /// Level of that table, 1 to 6.
    pub(super) level: u32,
    pub(super) allowed: Allowed,
}

/// A present page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Leaf {
    pub(super) page: PhysAddr,
    pub(super) allowed: Allowed,
    /// D is set in memory: writes need not set it.
    pub(super) dirty: bool,
}

/// IR and IW, of the device table entry and every entry down from it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Allowed {
    pub(super) read: bool,
    pub(super) write: bool,
}

impl Allowed {
    pub(super) fn and(self, read: bool, write: bool) -> Self {
        Self { read: self.read && read, write: self.write && write }
    }

    pub(super) fn permits(self, write: bool) -> bool {
        if write { self.write } else { self.read }
    }
}

/// An interrupt remapping entry as Control.GAEn had it when it was fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum CachedIrte {
    Short(Irte32),
    Long(Irte128),
}

impl Caches {
    pub(super) fn new(policy: Policy) -> Self {
        // One seed for each cache, so that they do not forget in step.
        let policy = |salt: u64| match policy {
            Policy::EvictRandom(seed) => Policy::EvictRandom(seed.rotate_left(17) ^ salt),
            other => other,
        };
        Self {
            devices: Cache::new(policy(1), DEVICE_ENTRIES),
            directories: Cache::new(policy(2), DIRECTORIES),
            leaves: Cache::new(policy(3), LEAVES),
            interrupts: Cache::new(policy(4), INTERRUPTS),
            faulted: Mutex::default(),
        }
    }

    pub(super) fn device(&self, device: RequesterId) -> Option<Dte> {
        self.devices.lookup((), u64::from(device.get())).map(|(_, dte)| dte)
    }

    pub(super) fn insert_device(&self, device: RequesterId, dte: Dte) {
        self.devices.insert((), Span::around(u64::from(device.get()), 0), dte);
        self.forget_fault(device);
    }

    pub(super) fn interrupt(&self, device: RequesterId, index: u64) -> Option<CachedIrte> {
        self.interrupts.lookup(device.get(), index).map(|(_, irte)| irte)
    }

    pub(super) fn insert_interrupt(&self, device: RequesterId, index: u64, irte: CachedIrte) {
        self.interrupts.insert(device.get(), Span::around(index, 0), irte);
    }

    /// Forgets every device table entry for which `keep` is false.
    pub(super) fn retain_devices(&self, mut keep: impl FnMut(RequesterId, Dte) -> bool) {
        self.devices.retain(|(), span, dte| match u16::try_from(span.start) {
            Ok(device) => keep(RequesterId::new(device), *dte),
            Err(_) => false,
        });
    }

    /// Forgets every interrupt entry for which `keep` is false.
    pub(super) fn retain_interrupts(
        &self,
        mut keep: impl FnMut(RequesterId, u64, CachedIrte) -> bool,
    ) {
        self.interrupts
            .retain(|device, span, irte| keep(RequesterId::new(device), span.start, *irte));
    }

    /// INVALIDATE_DEVTAB_ENTRY: the device table entry, and nothing that was found through it.
    pub(super) fn forget_device(&self, device: RequesterId) {
        let id = u64::from(device.get());
        self.devices.invalidate((), id, id);
    }

    /// INVALIDATE_IOMMU_PAGES with GN = 0. `gone` hears of the first address of each translation, if
    /// the model checks its driver.
    pub(super) fn forget_pages(
        &self,
        domain: u16,
        block: Block,
        directories: bool,
        gone: Option<&mut dyn FnMut(u64)>,
    ) {
        match gone {
            None => self.leaves.invalidate(domain, block.start, block.last()),
            Some(gone) => self.leaves.retain(|tag, span, _| {
                let goes = tag == domain && span.intersects(block.start, block.last());
                if goes {
                    gone(span.start);
                }
                !goes
            }),
        }
        if directories {
            self.directories.invalidate(domain, block.start, block.last());
        }
    }

    /// INVALIDATE_INTERRUPT_TABLE.
    pub(super) fn forget_interrupts(&self, device: RequesterId) {
        self.interrupts.invalidate(device.get(), 0, u64::MAX);
    }

    /// INVALIDATE_IOMMU_ALL.
    pub(super) fn clear(&self) {
        self.devices.clear();
        self.directories.clear();
        self.leaves.clear();
        self.interrupts.clear();
    }

    /// Whether this is the first fault of a device with DTE.SE since its entry was fetched.
    pub(super) fn first_fault(&self, device: RequesterId) -> bool {
        let mut faulted = self.faulted.lock().unwrap_or_else(PoisonError::into_inner);
        faulted.insert(device.get())
    }

    fn forget_fault(&self, device: RequesterId) {
        let mut faulted = self.faulted.lock().unwrap_or_else(PoisonError::into_inner);
        faulted.remove(&device.get());
    }
}
