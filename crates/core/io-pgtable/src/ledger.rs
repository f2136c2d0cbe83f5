//! A list of tables that are out of use and must not be touched yet.

use core::sync::atomic::Ordering;

use lychgate_types::{OutOfMemory, Pages, PhysAddr};

/// A table in whose place there is a leaf now.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Displaced {
    pub(crate) at: PhysAddr,
    pub(crate) bytes: u64,
    /// Of the entry that led to it, at least 1.
    pub(crate) level: u32,
    /// First byte that it translates.
    pub(crate) iova: u64,
}

/// Displaced tables, in pages of memory: word 0 leads to the page before, two words each are a
/// table.
#[derive(Debug)]
pub(crate) struct Ledger {
    page: u64,
    /// Words of the page that are taken.
    used: usize,
}

const PAGE_BYTES: u64 = 4096;
const PAGE_WORDS: usize = 512;
const ADDRESS: u64 = 0x03ff_ffff_ffff_f000;
const SIZE_SHIFT: u32 = 58;
/// Below the first bit that IOVAs of tables have set.
const LEVEL: u64 = 0x7;

impl Ledger {
    pub(crate) const fn new() -> Self {
        Self { page: 0, used: 0 }
    }

    pub(crate) const fn is_empty(&self) -> bool {
        self.page == 0
    }

    /// Makes sure of room for one more.
    pub(crate) fn make_room<P: Pages>(&mut self, pages: &P) -> Result<(), OutOfMemory> {
        if self.page == 0 || self.used + 2 > PAGE_WORDS {
            let page = pages.alloc_uninit(PAGE_BYTES)?;
            if let Some(word) = pages.words(page, 1).first() {
                word.store(self.page, Ordering::Relaxed);
            }
            self.page = page.get();
            self.used = 1;
        }
        Ok(())
    }

    /// Lists one more; the caller has made room.
    pub(crate) fn push<P: Pages>(&mut self, pages: &P, table: &Displaced) {
        let words = pages.words(PhysAddr::new(self.page), PAGE_WORDS);
        if let Some([at, iova]) = words.get(self.used..).and_then(|rest| rest.first_chunk()) {
            let size = u64::from(table.bytes.trailing_zeros());
            at.store(table.at.get() | size << SIZE_SHIFT, Ordering::Relaxed);
            iova.store(table.iova | u64::from(table.level), Ordering::Relaxed);
            self.used += 2;
        }
    }

    pub(crate) fn each<P: Pages + ?Sized>(&self, pages: &P, mut f: impl FnMut(Displaced)) {
        let (mut page, mut used) = (self.page, self.used);
        while page != 0 {
            let words = pages.words(PhysAddr::new(page), PAGE_WORDS);
            let taken = words.get(1..used).unwrap_or(&[]);
            for [at, iova] in taken.as_chunks::<2>().0 {
                let (at, iova) = (at.load(Ordering::Relaxed), iova.load(Ordering::Relaxed));
                f(Displaced {
                    at: PhysAddr::new(at & ADDRESS),
                    bytes: 1 << (at >> SIZE_SHIFT),
                    level: (iova & LEVEL) as u32,
                    iova: iova & !LEVEL,
                });
            }
            page = words.first().map_or(0, |word| word.load(Ordering::Relaxed));
            used = PAGE_WORDS;
        }
    }

    /// Frees the tables and the list.
    pub(crate) fn release<P: Pages + ?Sized>(&mut self, pages: &P) {
        self.each(pages, |table| pages.free(table.at, table.bytes));
        while self.page != 0 {
            let page = PhysAddr::new(self.page);
            self.page = pages.words(page, 1).first().map_or(0, |word| word.load(Ordering::Relaxed));
            pages.free(page, PAGE_BYTES);
        }
    }
}
