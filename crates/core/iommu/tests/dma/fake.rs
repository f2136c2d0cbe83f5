//! A domain that fails when asked to, and an IOTLB that caches all it can.

use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard};

use lychgate_iommu::dma::LazyDomain;
use lychgate_iommu::{Geometry, MapError, PagingDomain};
use lychgate_types::{Iova, PhysAddr, PhysRun, Prot};

pub(crate) const PAGE: u64 = 1 << 12;

#[derive(Default)]
pub(crate) struct State {
    pub(crate) pages: BTreeMap<u64, u64>,
    /// Every page, from when it was mapped until an invalidation.
    pub(crate) iotlb: BTreeMap<u64, u64>,
    /// Maps that shall still succeed.
    pub(crate) maps_left: Option<usize>,
    /// Hardware does not answer.
    pub(crate) stalled: bool,
    pub(crate) flushes: usize,
    /// Tables that wait, and those that were freed.
    pub(crate) dead: usize,
    pub(crate) freed: usize,
}

pub(crate) struct FakeDomain {
    last: u64,
    state: Mutex<State>,
}

impl FakeDomain {
    pub(crate) fn new(last: u64) -> Self {
        Self { last, state: Mutex::default() }
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    fn take_out(&self, iova: Iova, len: u64) -> u64 {
        let mut state = self.state();
        let pages = (0..len).step_by(4096);
        let taken = pages.take_while(|at| state.pages.remove(&(iova.get() + at)).is_some());
        taken.count() as u64 * PAGE
    }
}

impl PagingDomain for FakeDomain {
    fn geometry(&self) -> Geometry {
        Geometry { first: Iova::new(0), last: Iova::new(self.last), page_sizes: 0x1000 }
    }

    fn map(&self, iova: Iova, runs: &[PhysRun], _: Prot) -> Result<(), MapError> {
        let mut state = self.state();
        if state.maps_left == Some(0) {
            return Err(MapError::OutOfMemory);
        }
        state.maps_left = state.maps_left.map(|left| left - 1);
        let mut at = iova.get();
        for run in runs {
            assert!(run.len % PAGE == 0 && run.start.is_aligned(PAGE));
            for offset in (0..run.len).step_by(4096) {
                let phys = run.start.get() + offset;
                assert_eq!(state.pages.insert(at, phys), None, "{at:#x} was mapped");
                assert_eq!(state.iotlb.insert(at, phys), None, "{at:#x} is still cached");
                at = at.wrapping_add(PAGE);
            }
        }
        Ok(())
    }

    fn unmap(&self, iova: Iova, len: u64) -> u64 {
        if self.state().stalled {
            return 0;
        }
        let bytes = self.take_out(iova, len);
        self.state().iotlb.retain(|at, _| *at < iova.get() || *at - iova.get() >= len);
        bytes
    }

    fn iova_to_phys(&self, iova: Iova) -> Option<PhysAddr> {
        let page = self.state().pages.get(&iova.align_down(PAGE).get()).copied()?;
        Some(PhysAddr::new(page + iova.get() % PAGE))
    }

    fn enforce_cache_coherency(&self) -> bool {
        true
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// One table that was taken out.
pub(crate) struct Dead;

impl LazyDomain for FakeDomain {
    type Dead = Dead;

    fn unmap_lazily(&self, iova: Iova, len: u64) -> (u64, Dead) {
        let bytes = self.take_out(iova, len);
        self.state().dead += 1;
        (bytes, Dead)
    }

    fn flush(&self) -> Result<(), MapError> {
        let mut state = self.state();
        if state.stalled {
            return Err(MapError::Hardware);
        }
        state.flushes += 1;
        state.iotlb = state.pages.clone();
        Ok(())
    }

    fn free(&self, _: Dead) {
        self.state().freed += 1;
    }
}
