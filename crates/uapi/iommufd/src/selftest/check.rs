//! Operations that look at an IOAS and its page tables from outside.

use std::sync::Arc;

use lychgate_iommu::Domain;
use lychgate_types::{Errno, Iova, PhysAddr};

use super::domain::MockDomain;
use super::nested::MockNested;
use super::{TestCommand, abi};
use crate::context::Context;
use crate::error::{Refusal, Result, refuse};
use crate::io_pagetable::last_of;
use crate::mm::{Mm, PAGE_SIZE};
use crate::reserved::ReservedBy;

/// Bits that a bitmap of dirty pages has at most.
const MOST_DIRTY: u64 = 16 << 20 << 3;

impl Context {
    /// `IOMMU_TEST_OP_ADD_RESERVED`. What is reserved stays so for the life of the IOAS.
    pub(super) fn test_add_reserved(&self, command: &TestCommand<'_>) -> Result<()> {
        let member = command.argument.member::<abi::AddReserved>();
        let last = last_of(member.start, member.length)?;
        let mut state = self.lock();
        let ioas = state.objects.ioas_mut(command.argument.id)?;
        ioas.table.reserve(member.start..=last, ReservedBy::Selftest)
    }

    /// `IOMMU_TEST_OP_MD_CHECK_MAP`: each IOVA leads to the very frame of the caller's memory.
    pub(super) fn test_check_map(&self, command: &TestCommand<'_>) -> Result<()> {
        let member = command.argument.member::<abi::CheckMap>();
        let domain = Arc::clone(&self.lock().objects.hwpt(command.argument.id)?.domain);
        if !domain.as_any().is::<MockDomain>() {
            return refuse(Errno::EINVAL, "the page table is none of the mock IOMMU's");
        }
        let granule = domain.geometry().granule();
        if !(member.iova | member.length | member.uptr).is_multiple_of(granule)
            || member.uptr.checked_add(member.length).is_none()
            || member.iova.checked_add(member.length).is_none()
        {
            return refuse(Errno::EINVAL, format!("the range is not a multiple of {granule}"));
        }
        let mm = command.client.mm();
        let mut done = 0;
        while done < member.length {
            let (iova, at) = (member.iova + done, member.uptr + done);
            let rest = PAGE_SIZE - at % PAGE_SIZE;
            let frame = frame_of(mm.as_ref(), at - at % PAGE_SIZE)?.get() + at % PAGE_SIZE;
            for inside in (0..rest.min(member.length - done)).step_by(granule_step(granule)) {
                let leads_to = domain.iova_to_phys(Iova::new(iova + inside));
                if leads_to.map(u64::from) != Some(frame + inside) {
                    return refuse(
                        Errno::EINVAL,
                        format!(
                            "{:#x} leads to {leads_to:?}, the memory at {:#x} is {:#x}",
                            iova + inside,
                            at + inside,
                            frame + inside
                        ),
                    );
                }
            }
            done += rest;
        }
        Ok(())
    }

    /// `IOMMU_TEST_OP_MD_CHECK_IOTLB`.
    pub(super) fn test_check_iotlb(&self, command: &TestCommand<'_>) -> Result<()> {
        let member = command.argument.member::<abi::CheckIotlb>();
        let id = command.argument.id;
        let Domain::Nested(domain) = self.lock().objects.page_table(id)?.domain else {
            return refuse(Errno::ENOENT, format!("page table {id} is no nested one"));
        };
        let Some(nested) = domain.as_any().downcast_ref::<MockNested>() else {
            return refuse(Errno::EINVAL, "the page table is none of the mock IOMMU's");
        };
        match nested.cached(member.id) {
            Some(cached) if cached == member.iotlb => Ok(()),
            Some(cached) => {
                refuse(Errno::EINVAL, format!("entry {} of the IOTLB is {cached:#x}", member.id))
            }
            None => refuse(Errno::EINVAL, format!("the IOTLB has no entry {}", member.id)),
        }
    }

    /// `IOMMU_TEST_OP_DIRTY`: a device writes to the pages that a bitmap names.
    pub(super) fn test_dirty(&self, command: &mut TestCommand<'_>) -> Result<()> {
        let mut member = command.argument.member::<abi::DirtyPages>();
        let page = member.page_size;
        if page == 0 || member.length == 0 || member.uptr == 0 {
            return refuse(Errno::EINVAL, "page size, length or bitmap is 0");
        }
        if !(member.iova.is_multiple_of(page) && member.length.is_multiple_of(page)) {
            return refuse(Errno::EINVAL, format!("the range is not a multiple of {page}"));
        }
        let pages = member.length / page;
        if pages > MOST_DIRTY || member.iova.checked_add(member.length).is_none() {
            return refuse(Errno::EOVERFLOW, format!("{pages} pages are too many for a bitmap"));
        }
        let domain = Arc::clone(&self.lock().objects.hwpt(command.argument.id)?.domain);
        let mock = domain.as_any().downcast_ref::<MockDomain>();
        let Some(mock) = mock.filter(|mock| mock.tracks_dirty()) else {
            return refuse(Errno::EINVAL, "the page table does not track dirty pages");
        };
        let mut bitmap = vec![0_u8; usize::try_from(pages.div_ceil(8)).unwrap_or(usize::MAX)];
        command.read(member.uptr, &mut bitmap)?;
        member.out_nr_dirty = 0;
        for number in 0..pages {
            let byte = usize::try_from(number / 8).ok().and_then(|index| bitmap.get(index));
            if byte.is_some_and(|byte| byte >> (number % 8) & 1 != 0) {
                mock.device_writes(Iova::new(member.iova + number * page));
                member.out_nr_dirty += 1;
            }
        }
        command.argument.set_member(&member);
        command.respond()
    }
}

/// `IOMMU_TEST_OP_MD_CHECK_REFS`: each page of the caller's memory is pinned as often as told.
pub(super) fn check_refs(command: &TestCommand<'_>) -> Result<()> {
    let member = command.argument.member::<abi::CheckRefs>();
    let end = member.uptr.checked_add(member.length);
    let Some(end) = end.filter(|_| (member.uptr | member.length).is_multiple_of(PAGE_SIZE)) else {
        return refuse(Errno::EINVAL, format!("the memory is not a multiple of {PAGE_SIZE}"));
    };
    let mm = command.client.mm();
    let mut at = member.uptr;
    while at < end {
        let pins = mm.pin_count(frame_of(mm.as_ref(), at)?);
        if pins != member.refs {
            return refuse(Errno::EIO, format!("the page at {at:#x} is pinned {pins} times"));
        }
        at += PAGE_SIZE;
    }
    Ok(())
}

/// The frame of the page at `at`: `EFAULT`.
pub(super) fn frame_of(mm: &dyn Mm, at: u64) -> Result<PhysAddr> {
    let absent = |errno| Refusal::new(errno, format!("nothing is at {at:#x}"));
    let runs = mm.pin(at, PAGE_SIZE, false).map_err(absent)?;
    mm.unpin(&runs);
    match runs.first() {
        Some(run) => Ok(run.start),
        None => Err(absent(Errno::EFAULT)),
    }
}

/// A granule, never above [`PAGE_SIZE`], as a step of an iterator.
fn granule_step(granule: u64) -> usize {
    usize::try_from(granule.clamp(1, PAGE_SIZE)).unwrap_or(1)
}
