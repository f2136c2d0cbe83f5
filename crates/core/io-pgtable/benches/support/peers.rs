//! The crates that people use for page tables today, as contenders.
//!
//! They reach tables by pointers, so their physical addresses are pointers into the pool. Flushing the
//! TLB is left out for all. `x86_64` and `page_table_multiarch` never free a table on unmap.

#![expect(unsafe_code, reason = "x86_64 and aarch64-paging have no safe way to be given memory")]

use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use aarch64_paging::descriptor::{El1Attributes, PhysicalAddress};
use aarch64_paging::paging::{
    Constraints, El1And0, MemoryRegion, PageTable as ArmTable, RootTable, Translation, VaRange,
};
use lychgate_types::{Pages, PhysAddr, PhysRun};
use page_table_multiarch::x86_64::X64PageTable;
use page_table_multiarch::{MappingFlags, PagingHandler};
use x86_64::structures::paging::mapper::Translate;
use x86_64::structures::paging::{
    FrameAllocator, Mapper, OffsetPageTable, Page, PageSize, PageTable, PageTableFlags, PhysFrame,
    Size1GiB, Size2MiB, Size4KiB,
};

use super::contender::{Contender, Table};
use super::pool::Pool;
use super::rows::FREES_UNREAD;

const PAGE: u64 = 4096;

/// The pool as [`Multiarch`], whose allocator is a type and not a value, finds it.
static POOL: OnceLock<&'static Pool> = OnceLock::new();

/// The crates that can be compared with the tables called `format`: all three with x86_64's own
/// format, `aarch64-paging` in its own 4 levels; and that with Arm's.
pub(crate) fn of(format: &str, pool: &'static Pool) -> Vec<(&'static str, Box<dyn Contender>)> {
    let _ = POOL.set(pool);
    let mut peers: Vec<(_, Box<dyn Contender>)> = Vec::new();
    if format == "x86_64, 4 levels" {
        peers.extend(X86::new(pool).map(|peer| ("x86_64", Box::new(peer) as Box<_>)));
        peers.extend(Multiarch::new().map(|peer| ("multiarch", Box::new(peer) as Box<_>)));
    }
    if matches!(format, "x86_64, 4 levels" | "arm stage 1, 4K") {
        peers.push((FREES_UNREAD, Box::new(Arm::new(pool))));
    }
    peers
}

/// A table's worth of the pool's memory, zero, as a pointer that may be turned into a number and back.
fn take(pool: &'static Pool) -> Option<*mut u8> {
    let at = pool.alloc(PAGE).ok()?;
    let words = pool.words(at, 512);
    let pointer = words.as_ptr().cast_mut();
    pointer.expose_provenance();
    Some(pointer.cast())
}

fn give_back(pool: &'static Pool, address: usize) {
    let base = pool.words(PhysAddr::new(0), 1).as_ptr().addr();
    pool.free(PhysAddr::new((address - base) as u64), PAGE);
}

fn narrow(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// The crate `x86_64`. It maps single pages only.
struct X86 {
    table: OffsetPageTable<'static>,
    frames: Frames,
}

struct Frames(&'static Pool);

// SAFETY: the pool gives each page out once until it is freed or the pool reset, which happens only when
// no contender is left.
unsafe impl FrameAllocator<Size4KiB> for Frames {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let address = take(self.0)?.addr() as u64;
        Some(PhysFrame::containing_address(x86_64::PhysAddr::new(address)))
    }
}

impl X86 {
    fn new(pool: &'static Pool) -> Option<Self> {
        let root: *mut PageTable = take(pool)?.cast();
        // SAFETY: a page of the pool is aligned, zero, which is an empty table, and nobody else's.
        let root = unsafe { root.as_mut()? };
        // SAFETY: physical addresses are pointers, and no entry leads anywhere yet.
        let table = unsafe { OffsetPageTable::new(root, x86_64::VirtAddr::zero()) };
        Some(Self { table, frames: Frames(pool) })
    }

    fn map_pages<S: PageSize>(&mut self, iova: u64, run: &PhysRun)
    where
        OffsetPageTable<'static>: Mapper<S>,
    {
        let flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE;
        for done in (0..run.len).step_by(narrow(S::SIZE)) {
            let page = Page::<S>::containing_address(x86_64::VirtAddr::new(iova + done));
            let phys = x86_64::PhysAddr::new(run.start.get() + done);
            let frame = PhysFrame::containing_address(phys);
            // SAFETY: no processor walks the table, so no memory changes its meaning.
            let mapped = unsafe { self.table.map_to(page, frame, flags, &mut self.frames) };
            assert!(mapped.is_ok_and(|flush| {
                flush.ignore();
                true
            }));
        }
    }

    fn unmap_pages<S: PageSize>(&mut self, iova: u64, len: u64)
    where
        OffsetPageTable<'static>: Mapper<S>,
    {
        for done in (0..len).step_by(narrow(S::SIZE)) {
            let page = Page::<S>::containing_address(x86_64::VirtAddr::new(iova + done));
            assert!(self.table.unmap(page).is_ok_and(|(_, flush)| {
                flush.ignore();
                true
            }));
        }
    }
}

impl Table for X86 {
    #[inline(never)]
    fn map(&mut self, iova: u64, runs: &[PhysRun], leaf: u64) {
        let mut iova = iova;
        for run in runs {
            match leaf {
                PAGE => self.map_pages::<Size4KiB>(iova, run),
                Size2MiB::SIZE => self.map_pages::<Size2MiB>(iova, run),
                _ => self.map_pages::<Size1GiB>(iova, run),
            }
            iova += run.len;
        }
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64, leaf: u64) {
        match leaf {
            PAGE => self.unmap_pages::<Size4KiB>(iova, len),
            Size2MiB::SIZE => self.unmap_pages::<Size2MiB>(iova, len),
            _ => self.unmap_pages::<Size1GiB>(iova, len),
        }
    }

    #[inline(never)]
    fn walk(&mut self, iova: u64) -> u64 {
        let phys = self.table.translate_addr(x86_64::VirtAddr::new(iova));
        phys.map_or(0, x86_64::PhysAddr::as_u64)
    }
}

/// The crate `page_table_multiarch`.
struct Multiarch(X64PageTable<Handler>);

struct Handler;

impl PagingHandler for Handler {
    fn alloc_frames(count: usize, _align: usize) -> Option<memory_addr::PhysAddr> {
        let pool = POOL.get().filter(|_| count == 1)?;
        Some(take(pool)?.addr().into())
    }

    fn dealloc_frames(at: memory_addr::PhysAddr, _count: usize) {
        if let Some(pool) = POOL.get() {
            give_back(pool, at.as_usize());
        }
    }

    fn phys_to_virt(at: memory_addr::PhysAddr) -> memory_addr::VirtAddr {
        at.as_usize().into()
    }
}

impl Multiarch {
    fn new() -> Option<Self> {
        X64PageTable::try_new().ok().map(Self)
    }
}

impl Table for Multiarch {
    #[inline(never)]
    fn map(&mut self, iova: u64, runs: &[PhysRun], _leaf: u64) {
        let flags = MappingFlags::READ | MappingFlags::WRITE;
        let mut cursor = self.0.cursor();
        let mut iova = narrow(iova);
        for run in runs {
            let apart = narrow(run.start.get()).wrapping_sub(iova);
            let phys = |at: memory_addr::VirtAddr| at.as_usize().wrapping_add(apart).into();
            let mapped = cursor.map_region(iova.into(), phys, narrow(run.len), flags, true);
            assert!(mapped.is_ok());
            iova += narrow(run.len);
        }
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64, _leaf: u64) {
        let unmapped = self.0.cursor().unmap_region(narrow(iova).into(), narrow(len));
        assert!(unmapped.is_ok());
    }

    #[inline(never)]
    fn walk(&mut self, iova: u64) -> u64 {
        let found = self.0.query(narrow(iova).into());
        found.map_or(0, |(phys, _, _)| phys.as_usize() as u64)
    }
}

/// The crate `aarch64-paging`.
struct Arm(RootTable<El1And0, Memory>);

struct Memory(&'static Pool);

impl Translation<El1Attributes> for Memory {
    fn allocate_table(&mut self) -> (NonNull<ArmTable<El1Attributes>>, PhysicalAddress) {
        let table = take(self.0).and_then(NonNull::new);
        assert!(table.is_some(), "the pool is empty");
        let table = table.unwrap_or(NonNull::dangling());
        (table.cast(), PhysicalAddress(table.addr().get()))
    }

    // SAFETY: what the trait asks of callers is more than this needs.
    unsafe fn deallocate_table(&mut self, table: NonNull<ArmTable<El1Attributes>>) {
        give_back(self.0, table.addr().get());
    }

    fn physical_to_virtual(&self, at: PhysicalAddress) -> NonNull<ArmTable<El1Attributes>> {
        NonNull::new(ptr::with_exposed_provenance_mut(at.0)).unwrap_or(NonNull::dangling())
    }
}

impl Arm {
    fn new(pool: &'static Pool) -> Self {
        Self(RootTable::with_va_range(Memory(pool), 0, El1And0, VaRange::Lower))
    }

    fn set(&mut self, iova: u64, len: u64, phys: u64, attributes: El1Attributes) {
        let region = MemoryRegion::new(narrow(iova), narrow(iova + len));
        let phys = PhysicalAddress(narrow(phys));
        let set = self.0.map_range(&region, phys, attributes, Constraints::empty());
        assert!(set.is_ok());
    }
}

impl Table for Arm {
    #[inline(never)]
    fn map(&mut self, iova: u64, runs: &[PhysRun], _leaf: u64) {
        let attributes = El1Attributes::VALID
            | El1Attributes::ACCESSED
            | El1Attributes::INNER_SHAREABLE
            | El1Attributes::NON_GLOBAL;
        let mut iova = iova;
        for run in runs {
            self.set(iova, run.len, run.start.get(), attributes);
            iova += run.len;
        }
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64, _leaf: u64) {
        // Any physical address as aligned as the IOVA will do.
        self.set(iova, len, iova, El1Attributes::empty());
    }

    #[inline(never)]
    fn walk(&mut self, iova: u64) -> u64 {
        let at = narrow(iova);
        let mut phys = 0;
        let region = MemoryRegion::new(at, at + 1);
        let walked = self.0.walk_range(&region, &mut |_, entry, _| {
            if entry.is_valid() {
                phys = entry.output_address().0 + at % narrow(PAGE);
            }
            Ok(())
        });
        if walked.is_ok() { phys as u64 } else { 0 }
    }
}
