//! The domains that hold the areas of an IOAS.
//!
//! Pages are pinned while at least one domain is there, once per area however many domains there
//! are; every domain maps every area.

use std::sync::Arc;

use lychgate_iommu::PagingDomain;
use lychgate_types::Errno;

use super::area::{Area, map_runs};
use super::{Holder, IoPageTable};
use crate::dma_buf::Import;
use crate::error::{Result, refuse};
use crate::fault_injection::allocation;
use crate::mm::PAGE_SIZE;
use crate::reserved::ReservedBy;

impl IoPageTable {
    /// Adds a domain and maps every area into it (`iopt_table_add_domain`).
    pub(crate) fn add_domain(&mut self, id: u32, domain: &Arc<dyn PagingDomain>) -> Result<()> {
        let geometry = domain.geometry();
        let alignment = self.alignment.max(geometry.granule());
        if !(1..=PAGE_SIZE).contains(&geometry.granule()) {
            return refuse(Errno::EINVAL, "the smallest page of the domain is above 4096 bytes");
        }
        self.check_alignment(alignment)?;
        let result = self.hold(id, domain, geometry.first.get(), geometry.last.get());
        match result {
            Ok(()) => {
                self.holders.push(Holder { id, domain: Arc::clone(domain) });
                self.alignment = alignment;
            }
            Err(_) => self.unreserve(ReservedBy::PageTable(id)),
        }
        result
    }

    /// Unmaps every area from a domain and forgets it (`iopt_table_remove_domain`).
    pub(crate) fn remove_domain(&mut self, id: u32) {
        let Some(index) = self.holders.iter().position(|holder| holder.id == id) else {
            return;
        };
        let holder = self.holders.remove(index);
        for (&first, area) in &self.areas {
            area.unmap(first, holder.domain.as_ref());
            if self.holders.is_empty() {
                area.unpin(first);
            }
        }
        self.unreserve(ReservedBy::PageTable(id));
        self.alignment = self.needed_alignment(self.large_pages);
    }

    /// Takes memory of a device out of every domain, as it is about to be revoked, and tells `gone`
    /// of each area: its first IOVA and its length (`iopt_revoke_notify`).
    pub(crate) fn revoke(&mut self, import: &Import, mut gone: impl FnMut(u64, u64)) {
        for (&first, area) in &self.areas {
            if area.pages.import().is_some_and(|found| std::ptr::eq(Arc::as_ptr(found), import)) {
                for holder in &self.holders {
                    area.unmap(first, holder.domain.as_ref());
                }
                gone(first, area.len(first));
            }
        }
    }

    /// Reserves what the domain cannot hold, and maps every area into it.
    fn hold(
        &mut self,
        id: u32,
        domain: &Arc<dyn PagingDomain>,
        first: u64,
        last: u64,
    ) -> Result<()> {
        allocation()?;
        if first != 0 {
            self.reserve(0..=first - 1, ReservedBy::PageTable(id))?;
        }
        if last != u64::MAX {
            self.reserve(last + 1..=u64::MAX, ReservedBy::PageTable(id))?;
        }
        let pin = self.holders.is_empty();
        for (done, (&at, area)) in self.areas.iter().enumerate() {
            if let Err(refusal) = area.map(at, domain.as_ref(), self.large_pages, pin) {
                for (&at, area) in self.areas.iter().take(done) {
                    area.unmap(at, domain.as_ref());
                    if pin {
                        area.unpin(at);
                    }
                }
                return Err(refusal);
            }
        }
        Ok(())
    }

    /// Pins a new area and maps it into every domain, if there is any.
    pub(super) fn fill(&self, first: u64, area: &Area) -> Result<()> {
        if self.holders.is_empty() {
            return Ok(());
        }
        area.with_frames(first, true, |runs, prot| {
            for (done, holder) in self.holders.iter().enumerate() {
                let domain = holder.domain.as_ref();
                if let Err(refusal) = map_runs(domain, first, runs, prot, self.large_pages) {
                    for holder in self.holders.iter().take(done) {
                        area.unmap(first, holder.domain.as_ref());
                    }
                    return Err(refusal);
                }
            }
            Ok(())
        })
    }

    /// Unmaps an area from every domain, then unpins it.
    pub(super) fn unfill(&self, first: u64, area: &Area) {
        for holder in &self.holders {
            area.unmap(first, holder.domain.as_ref());
        }
        if !self.holders.is_empty() {
            area.unpin(first);
        }
    }
}
