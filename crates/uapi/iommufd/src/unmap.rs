//! Unmapping, which may have to wait for access objects (`iopt_unmap_iova_range`).

use std::sync::MutexGuard;

use lychgate_types::Errno;

use crate::context::Context;
use crate::error::{Result, refuse};
use crate::io_pagetable::Unmap;
use crate::objects::Ioas;
use crate::observer::Event;
use crate::state::State;

/// How often access objects are asked to let go of an area.
const ROUNDS: u32 = 100;

impl Context {
    /// Unmaps the areas in `first..=last` of an IOAS and gives the sum of their lengths, also on an
    /// error: those before the one that it is about are gone then.
    ///
    /// Access objects are told without the lock, so that they can unpin: what is mapped may change
    /// meanwhile, the IOAS stays. `ENOENT` for an area that is only partly inside; `EBUSY` for one
    /// that hardware uses; `EDEADLOCK` for one that is never unpinned.
    pub(crate) fn unmap_areas<'a>(
        &'a self,
        mut state: MutexGuard<'a, State>,
        id: u32,
        first: u64,
        last: u64,
    ) -> (u64, Result<()>) {
        let mut bytes = 0_u64;
        let mut at = first;
        let mut rounds = 0;
        loop {
            let ioas = match state.objects.ioas_mut(id) {
                Ok(ioas) => ioas,
                Err(refusal) => return (bytes, Err(refusal)),
            };
            let (iova, len) = match self.unmap_next(ioas, at, last) {
                Ok(Unmap::Done) => return (bytes, Ok(())),
                Ok(Unmap::Unmapped { len, .. }) => {
                    bytes = bytes.saturating_add(len);
                    continue;
                }
                Ok(Unmap::Pinned { iova, len }) => (iova, len),
                Err(refusal) => return (bytes, Err(refusal)),
            };
            rounds = if iova == at { rounds + 1 } else { 1 };
            at = iova;
            let users = ioas.table.access_ops();
            state.objects.hold(id);
            drop(state);
            for user in users {
                user.unmap(iova, len);
            }
            state = self.lock();
            state.objects.put(id);
            if rounds > ROUNDS {
                let why = format!("the area at {iova:#x} is pinned, and nobody lets go of it");
                return (bytes, refuse(Errno::EDEADLOCK, why));
            }
        }
    }

    /// Unmaps everything from an IOAS that nobody uses any more.
    pub(crate) fn unmap_all(&self, ioas: &mut Ioas) {
        while let Ok(Unmap::Unmapped { .. }) = self.unmap_next(ioas, 0, u64::MAX) {}
    }

    fn unmap_next(&self, ioas: &mut Ioas, first: u64, last: u64) -> Result<Unmap> {
        let next = ioas.table.unmap_next(first, last)?;
        if let Unmap::Unmapped { iova, len } = next {
            self.observer.event(&Event::Unmapped { ioas: ioas.serial, iova, len });
        }
        Ok(next)
    }
}
