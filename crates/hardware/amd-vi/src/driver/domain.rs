//! Paging domains on host ("v1") page tables (AMD 48882 2.2.3).

use alloc::sync::Arc;
use core::any::Any;
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};

use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Error, Gather, PageTable};
use lychgate_iommu::{AllocError, Geometry, MapError, PagingDomain};
use lychgate_types::{Iova, Lock, Locks, Pages, PhysAddr, PhysRun, Prot};

use super::blocks;
use super::device_table;
use super::hardware::{Hardware, Stalled};
use crate::spec::size::Block;
use crate::spec::{Command, Dte};

/// A paging domain of one IOMMU.
pub(super) struct V1Domain<P: Pages + 'static, L: Locks> {
    hardware: Arc<Hardware<P, L>>,
    table: PageTable<AmdV1, Arc<Hardware<P, L>>>,
    /// The tag of its translations.
    id: u16,
    /// Devices that may have translations of this domain cached: from before their entries name
    /// it until what they have cached is gone.
    attached: AtomicUsize,
    /// Whether a device was ever attached.
    used: AtomicBool,
}

impl<P: Pages + 'static, L: Locks> V1Domain<P, L> {
    pub(super) fn new(hardware: &Arc<Hardware<P, L>>) -> Result<Self, AllocError> {
        // Every leaf has FC set, as in Linux: requests snoop whatever the device asks for.
        let options = AmdV1Options { force_coherent: true };
        let mut config = Config::new(hardware.iova_bits(), options);
        config.output_bits = config.output_bits.min(hardware.config.output_bits);
        let table = PageTable::new(Arc::clone(hardware), config).map_err(|error| match error {
            Error::OutOfMemory => AllocError::OutOfMemory,
            _ => AllocError::Unsupported,
        })?;
        let id = hardware.domain_ids.with(|ids| ids.take());
        Ok(Self {
            hardware: Arc::clone(hardware),
            table,
            id: id.ok_or(AllocError::NoIdentifier)?,
            attached: AtomicUsize::new(0),
            used: AtomicBool::new(false),
        })
    }

    pub(super) fn hardware(&self) -> &Arc<Hardware<P, L>> {
        &self.hardware
    }

    /// The device table entry of an attached device, right for as long as the device table's lock
    /// is held.
    pub(super) fn dte(&self) -> Dte {
        let root = self.table.root();
        device_table::paging(root.table, root.levels, self.id)
    }

    /// A device is about to be attached.
    pub(super) fn attaching(&self) {
        self.used.store(true, Ordering::Relaxed);
        self.attached.fetch_add(1, Ordering::SeqCst);
        // Pairs with the fence in `invalidate`: either the walks of the device see what a change
        // of the tables has stored, or the change sees the device.
        fence(Ordering::SeqCst);
    }

    /// A device is not attached any more, and what it had cached was invalidated.
    pub(super) fn detached(&self) {
        self.attached.fetch_sub(1, Ordering::SeqCst);
    }

    /// Puts levels on top of the table until it reaches `last`.
    ///
    /// Under the device table's lock: nobody attaches a device with the old root meanwhile.
    fn grow(&self, last: Iova) -> Result<(), MapError> {
        self.hardware.carriers.with(|carriers| {
            let mut changed = Ok(());
            self.table
                .grow(last, |root| {
                    let new = device_table::paging(root.table, root.levels, self.id);
                    changed = self.hardware.change_root(carriers, self.id, new);
                })
                .map_err(map_error)?;
            changed.map_err(|Stalled| MapError::Hardware)
        })
    }

    /// Does what a change of the tables has left to do.
    fn finish(&self, mut gather: Gather) -> Result<(), Stalled> {
        if gather.is_empty() {
            return Ok(());
        }
        match gather.range() {
            Some(range) => {
                self.invalidate(range.start().get(), range.end().get(), gather.removed_tables())?
            }
            None => self.invalidate(0, u64::MAX, true)?,
        }
        gather.release(&*self.hardware);
        Ok(())
    }

    /// Makes hardware forget `first..=last`; `pde`: what leads to tables too.
    fn invalidate(&self, first: u64, last: u64, pde: bool) -> Result<(), Stalled> {
        if self.hardware.stalled() {
            return Err(Stalled);
        }
        fence(Ordering::SeqCst);
        if self.attached.load(Ordering::SeqCst) == 0 {
            return Ok(());
        }
        let command = |block: Block| Command::invalidate_iommu_pages(self.id, block, pde);
        match blocks::covering(first, last) {
            (whole, None) => self.hardware.run(&[command(whole)]),
            (low, Some(high)) => self.hardware.run(&[command(low), command(high)]),
        }
    }

    /// Undoes a map that hardware was not told of in time.
    fn take_back(&self, iova: Iova, len: u64) {
        let mut gather = Gather::new();
        // The range was mapped just now, so there is nothing to learn from the result. The
        // hardware has stalled: the tables in the gather stay allocated.
        let _ = self.table.unmap_mapped(iova, len, &mut gather);
    }
}

impl<P: Pages + 'static, L: Locks> PagingDomain for V1Domain<P, L> {
    fn geometry(&self) -> Geometry {
        let aperture = self.table.aperture();
        Geometry {
            first: *aperture.start(),
            last: *aperture.end(),
            page_sizes: self.table.page_sizes(),
        }
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], prot: Prot) -> Result<(), MapError> {
        if self.hardware.stalled() {
            return Err(MapError::Hardware);
        }
        let mut gather = Gather::new();
        let mut mapped = self.table.map_batch(iova, runs, prot, &mut gather);
        if let Err(Error::BeyondTop { .. }) = mapped {
            // The sum was checked: the table said what is missing.
            let len = runs.iter().fold(0, |sum: u64, run| sum.wrapping_add(run.len));
            self.grow(iova.wrapping_add(len.wrapping_sub(1)))?;
            mapped = self.table.map_batch(iova, runs, prot, &mut gather);
        }
        // Not-present entries are not cached, so a new mapping needs no command; what had to go
        // for it does (AMD 48882 3.2, NpCache).
        let finished = self.finish(gather);
        let len = mapped.map_err(map_error)?;
        let visible = finished.and_then(|()| {
            if self.hardware.config.np_cache {
                self.invalidate(iova.get(), iova.get().wrapping_add(len - 1), true)
            } else {
                Ok(())
            }
        });
        visible.map_err(|Stalled| {
            self.take_back(iova, len);
            MapError::Hardware
        })
    }

    /// As [`PagingDomain::unmap`] says. When the hardware has stalled, so that nobody can say that
    /// it does not reach the frames any more, the answer is 0.
    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        let mut gather = Gather::new();
        let Ok(bytes) = self.table.unmap_whole_leaves(iova, len, &mut gather) else {
            return 0;
        };
        match self.finish(gather) {
            Ok(()) => bytes,
            Err(Stalled) => 0,
        }
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        self.table.walk(iova).map(|translation| translation.phys)
    }

    fn enforce_cache_coherency(&self) -> bool {
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl<P: Pages + 'static, L: Locks> Drop for V1Domain<P, L> {
    fn drop(&mut self) {
        // No entry carries the id: a device holds its domain until it has left it. Whatever was
        // cached since goes now, before the tables and the id can serve another domain.
        let clean = !*self.used.get_mut() || {
            let everything = Command::invalidate_iommu_pages(self.id, Block::ALL, true);
            self.hardware.run(&[everything]).is_ok()
        };
        if clean {
            self.hardware.domain_ids.with(|ids| ids.give_back(self.id));
        }
    }
}

fn map_error(error: Error) -> MapError {
    match error {
        Error::Empty | Error::Misaligned { .. } => MapError::Misaligned,
        Error::AlreadyMapped { at } => MapError::AlreadyMapped { at },
        Error::OutOfMemory => MapError::OutOfMemory,
        Error::Growing | Error::Corrupt => MapError::Hardware,
        _ => MapError::OutOfRange,
    }
}
