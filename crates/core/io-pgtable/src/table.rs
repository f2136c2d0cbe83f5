//! A page table: its root, its bounds, how it grows and how it ends.

use core::fmt;
use core::ops::RangeInclusive;
use core::sync::atomic::Ordering;

use lychgate_types::sync::AtomicU64;
use lychgate_types::{Iova, Pages, PhysAddr, Prot};

use crate::error::Error;
use crate::format::{Format, LEVELS_LIMIT, item_shift, span_shift, table_bytes, table_entries};
use crate::words;

/// What a page table can hold, fixed when it is made.
#[derive(Clone, Debug)]
pub struct Config<F: Format> {
    /// Levels to start with. A format that grows may start with fewer than the aperture needs.
    pub levels: u32,
    /// IOVA bits that the root decodes beyond those of other tables, at most
    /// [`Format::ROOT_EXTRA_BITS`].
    pub root_extra_bits: u32,
    /// The IOVAs that can be mapped, both ends included.
    pub aperture: RangeInclusive<Iova>,
    /// Width of physical addresses in bits, at most [`Format::MAX_OUTPUT_BITS`].
    pub output_bits: u32,
    /// Leaf sizes to use: bit n for 2^n bytes. The lowest one of them that the format has is the
    /// granule of every range.
    pub page_sizes: u64,
    /// The format's own choices.
    pub options: F::Options,
}

impl<F: Format> Config<F> {
    /// All IOVAs of `iova_bits` bits and all the format can do. A format that grows starts with
    /// three levels, as Linux does, or fewer if those suffice; others with what `iova_bits` need.
    /// The root is no wider than it must be: see [`Config::concatenated`].
    pub fn new(iova_bits: u32, options: F::Options) -> Self {
        let last = match iova_bits {
            0 => 0,
            1..=63 => (1 << iova_bits) - 1,
            _ => u64::MAX,
        };
        let needed = levels_for::<F>(last, F::MIN_ROOT_EXTRA_BITS);
        Self {
            levels: if F::GROWS { needed.min(3) } else { needed },
            root_extra_bits: F::MIN_ROOT_EXTRA_BITS,
            aperture: Iova::new(0)..=Iova::new(last),
            output_bits: F::MAX_OUTPUT_BITS,
            page_sizes: u64::MAX,
            options,
        }
    }

    /// The same aperture with as few levels as a root of concatenated tables can make do with, for
    /// formats whose [`Format::ROOT_EXTRA_BITS`] allow it: a walk then reads fewer entries.
    #[must_use]
    pub fn concatenated(mut self) -> Self {
        let last = self.aperture.end().get();
        let fewest = levels_for::<F>(last, F::ROOT_EXTRA_BITS);
        let enough = |extra: &u32| levels_for::<F>(last, *extra) <= fewest;
        if F::ROOT_EXTRA_BITS != 0
            && let Some(extra) = (F::MIN_ROOT_EXTRA_BITS..=F::ROOT_EXTRA_BITS).find(enough)
        {
            self.levels = fewest;
            self.root_extra_bits = extra;
        }
        self
    }
}

/// Where a walk starts: what a device table entry holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Root {
    /// The table of the highest level.
    pub table: PhysAddr,
    /// Number of levels (AMD: Mode).
    pub levels: u32,
}

impl Root {
    /// The root in a root word.
    #[inline(always)]
    pub(crate) const fn of(word: u64) -> Self {
        Self { table: PhysAddr::new(word & ROOT_ADDRESS), levels: (word & ROOT_LEVELS) as u32 }
    }
}

/// An I/O page table of one format in memory of `P`.
///
/// See the [crate's rules](crate#rules-for-callers) for what callers owe. Dropping it frees all its
/// tables: by then no hardware may reach them, and no [`Gather`](crate::Gather) may wait with some.
pub struct PageTable<F: Format, P: Pages> {
    /// Address of the root, and in the low bits the number of levels: one load is a
    /// consistent snapshot.
    root: AtomicU64,
    pub(crate) first: u64,
    pub(crate) last: u64,
    pub(crate) page_sizes: u64,
    /// The bits that are 0 in every multiple of the granule.
    pub(crate) within_granule: u64,
    /// Highest physical address.
    pub(crate) output_last: u64,
    root_extra_bits: u32,
    pub(crate) options: F::Options,
    pub(crate) pages: P,
    /// What [`Format::attributes`] gives, by the bits of the permissions; 0 for none.
    attributes: [u64; 1 << PROT_BITS.len()],
}

const PROT_BITS: [Prot; 6] =
    [Prot::READ, Prot::WRITE, Prot::CACHE, Prot::NOEXEC, Prot::MMIO, Prot::PRIV];

const ROOT_LEVELS: u64 = 0x7;
const ROOT_GROWING: u64 = 0x8;
const ROOT_ADDRESS: u64 = !0xfff;

impl<F: Format, P: Pages> PageTable<F, P> {
    /// An empty page table.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a configuration beyond the format, [`Error::OutOfMemory`].
    pub fn new(pages: P, config: Config<F>) -> Result<Self, Error> {
        const {
            assert!(F::MIN_LEVELS >= 1 && F::MIN_LEVELS <= F::MAX_LEVELS);
            assert!(F::MIN_ROOT_EXTRA_BITS <= F::ROOT_EXTRA_BITS);
            assert!(F::MAX_LEVELS as usize <= LEVELS_LIMIT);
            assert!(!F::GROWS || F::ROOT_EXTRA_BITS == 0);
        }
        let (first, last) = (config.aperture.start().get(), config.aperture.end().get());
        if first > last || (F::MAX_IOVA_BITS < 64 && last >> F::MAX_IOVA_BITS != 0) {
            return Err(Error::Unsupported("aperture"));
        }
        if config.root_extra_bits > F::ROOT_EXTRA_BITS
            || config.root_extra_bits < F::MIN_ROOT_EXTRA_BITS
        {
            return Err(Error::Unsupported("concatenation of roots"));
        }
        let needed = levels_for::<F>(last, config.root_extra_bits);
        let enough = config.levels >= needed || F::GROWS;
        if config.levels < F::MIN_LEVELS || config.levels > F::MAX_LEVELS || !enough {
            return Err(Error::Unsupported("number of levels"));
        }
        if config.output_bits > F::MAX_OUTPUT_BITS || config.output_bits < F::GRANULE_SHIFT {
            return Err(Error::Unsupported("output address width"));
        }
        let page_sizes =
            (0..F::MAX_LEVELS).fold(0, |all, level| all | F::leaf_sizes(level)) & config.page_sizes;
        if page_sizes == 0 {
            return Err(Error::Unsupported("set of page sizes"));
        }
        if page_sizes & sizes_mask::<F>(config.levels) == 0 {
            return Err(Error::Unsupported("number of levels for these page sizes"));
        }
        let bytes = table_bytes::<F>(config.root_extra_bits);
        let root = pages.alloc(bytes)?;
        pages.clean(pages.words(root, table_entries::<F>() << config.root_extra_bits));
        Ok(Self {
            root: AtomicU64::new(root.get() | u64::from(config.levels)),
            first,
            last,
            page_sizes,
            within_granule: (page_sizes & page_sizes.wrapping_neg()) - 1,
            output_last: u64::MAX >> (64 - config.output_bits.clamp(1, 64)),
            root_extra_bits: config.root_extra_bits,
            attributes: all_attributes::<F>(&config.options),
            options: config.options,
            pages,
        })
    }

    /// The root and the number of levels, as one consistent pair.
    #[inline(always)]
    pub fn root(&self) -> Root {
        Root::of(self.root.load(Ordering::Acquire))
    }

    /// What [`Root::of`] takes apart, in the host's byte order; never 0.
    #[inline(always)]
    pub(crate) const fn root_word(&self) -> &AtomicU64 {
        &self.root
    }

    /// The IOVAs that can be mapped, both ends included.
    pub const fn aperture(&self) -> RangeInclusive<Iova> {
        Iova::new(self.first)..=Iova::new(self.last)
    }

    /// The leaf sizes in use: bit n for 2^n bytes.
    pub const fn page_sizes(&self) -> u64 {
        self.page_sizes
    }

    /// The smallest page in bytes, of which all ranges are multiples.
    #[inline(always)]
    pub const fn granule(&self) -> u64 {
        self.within_granule + 1
    }

    /// Where the tables come from.
    pub const fn pages(&self) -> &P {
        &self.pages
    }

    /// Whether the present root reaches `last`, so that a map up to it needs no
    /// [`PageTable::grow`].
    pub fn reaches(&self, last: Iova) -> bool {
        self.root_reaches(self.root(), last.get())
    }

    /// Puts levels on top until the root reaches `last`, and runs `change_top` with the new root
    /// before any map can use it. Does nothing when the root reaches `last` already.
    ///
    /// `change_top` makes hardware walk from the new root and returns when no hardware
    /// remembers the old one (AMD: root and Mode in every device table entry by one store each,
    /// INVALIDATE_DEVTAB_ENTRY, COMPLETION_WAIT). Until then both roots translate alike, and the
    /// old one stays in use below the new one. Calls are serialised by the caller, who holds
    /// whatever keeps devices from being attached with the old root meanwhile.
    ///
    /// # Errors
    /// [`Error::IovaOutOfRange`], [`Error::OutOfMemory`], [`Error::Growing`]; nothing has changed
    /// and `change_top` has not run.
    pub fn grow(&self, last: Iova, change_top: impl FnOnce(Root)) -> Result<(), Error> {
        let needed = self.levels_needed(last)?;
        let old = self.root.load(Ordering::Acquire);
        let levels = (old & ROOT_LEVELS) as u32;
        if levels >= needed {
            return Ok(());
        }
        let claim = old | ROOT_GROWING;
        if old & ROOT_GROWING != 0
            || self.root.compare_exchange(old, claim, Ordering::Acquire, Ordering::Relaxed).is_err()
        {
            return Err(Error::Growing);
        }
        let old_root = PhysAddr::new(old & ROOT_ADDRESS);
        match self.stack(old_root, levels, needed) {
            Ok(table) => {
                change_top(Root { table, levels: needed });
                let new = table.get() | u64::from(needed);
                self.root.store(new, Ordering::Release);
                Ok(())
            }
            Err(error) => {
                self.root.store(old, Ordering::Release);
                Err(error)
            }
        }
    }

    /// Tables for levels `from` to `to - 1`, whose first entries lead down to `below`.
    fn stack(&self, below: PhysAddr, from: u32, to: u32) -> Result<PhysAddr, Error> {
        let bytes = table_bytes::<F>(0);
        let mut new = [PhysAddr::new(0); LEVELS_LIMIT];
        let mut top = below;
        for (made, level) in (from..to).enumerate() {
            let table = match self.pages.alloc(bytes) {
                Ok(table) => table,
                Err(error) => {
                    for &table in new.iter().take(made) {
                        self.pages.free(table, bytes);
                    }
                    return Err(error.into());
                }
            };
            let word = self.pages.words(table, 1);
            words::fill(word, F::table(&self.options, level, top) | F::CLEAN_DONE, 0);
            self.pages.clean(self.pages.words(table, table_entries::<F>()));
            if let Some(slot) = new.get_mut(made) {
                *slot = table;
            }
            top = table;
        }
        Ok(top)
    }

    /// Levels that it takes to reach `last`.
    fn levels_needed(&self, last: Iova) -> Result<u32, Error> {
        if last.get() < self.first || last.get() > self.last {
            return Err(Error::IovaOutOfRange { iova: last, last });
        }
        Ok(levels_for::<F>(last.get(), self.root_extra_bits))
    }

    /// Fails when `root` is too low for `last`, an IOVA in the aperture.
    #[inline(always)]
    pub(crate) fn check_reach(&self, root: Root, last: u64) -> Result<(), Error> {
        if self.root_reaches(root, last) {
            return Ok(());
        }
        Err(Error::BeyondTop { levels: levels_for::<F>(last, self.root_extra_bits) })
    }

    /// Whether a walk from `root` can tell `last` from smaller IOVAs. A root that cannot grow
    /// reaches the whole aperture.
    #[inline(always)]
    pub(crate) const fn root_reaches(&self, root: Root, last: u64) -> bool {
        let span = F::GRANULE_SHIFT + F::INDEX_BITS * root.levels;
        !F::GROWS || span >= 64 || last >> span == 0
    }

    /// What [`Format::attributes`] gives for `prot`, and 0 where it gives nothing.
    #[inline(always)]
    pub(crate) fn attributes(&self, prot: Prot) -> u64 {
        self.attributes.get(prot.bits() as usize).copied().unwrap_or(0)
    }

    /// The leaf sizes of tables below level `levels`.
    #[inline(always)]
    pub(crate) const fn sizes_below(&self, levels: u32) -> u64 {
        self.page_sizes & sizes_mask::<F>(levels)
    }

    /// The words of the root.
    #[inline(always)]
    pub(crate) fn root_words(&self, root: Root) -> &[AtomicU64] {
        let entries = table_entries::<F>() << self.root_extra_bits();
        self.pages.words(root.table, entries)
    }

    /// The words of a table below the root; empty when the allocator does not know it.
    #[inline(always)]
    pub(crate) fn table_words(&self, table: PhysAddr) -> &[AtomicU64] {
        self.pages.words(table, table_entries::<F>())
    }

    /// The index of `iova` in a table at `level` of which `root` is the root.
    #[inline(always)]
    pub(crate) fn index(&self, root: Root, level: u32, iova: u64) -> usize {
        let extra = if F::ROOT_EXTRA_BITS != 0 && level + 1 == root.levels {
            self.root_extra_bits
        } else {
            0
        };
        let mask = (1 << (F::INDEX_BITS + extra)) - 1;
        #[expect(clippy::cast_possible_truncation, reason = "masked to the entries of a table")]
        let index = (iova >> item_shift::<F>(level)) as usize & mask;
        index
    }

    const fn root_extra_bits(&self) -> u32 {
        if F::ROOT_EXTRA_BITS == 0 { 0 } else { self.root_extra_bits }
    }

    /// Frees the tables that entries of `table` at `level` lead to.
    pub(crate) fn free_below(&self, table: &[AtomicU64], level: u32) {
        if level == 0 {
            return;
        }
        for word in table {
            let entry = words::load(word);
            if F::is_present(entry) && F::is_table(level, entry) {
                let child = F::table_address(entry);
                self.free_below(self.table_words(child), level - 1);
                self.pages.free(child, table_bytes::<F>(0));
            }
        }
    }
}

impl<F: Format, P: Pages> Drop for PageTable<F, P> {
    fn drop(&mut self) {
        let root = self.root();
        self.free_below(self.root_words(root), root.levels.saturating_sub(1));
        self.pages.free(root.table, table_bytes::<F>(self.root_extra_bits()));
    }
}

impl<F: Format, P: Pages> fmt::Debug for PageTable<F, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageTable")
            .field("format", &F::NAME)
            .field("root", &self.root())
            .field("aperture", &self.aperture())
            .field("page_sizes", &format_args!("{:#x}", self.page_sizes))
            .field("output_last", &format_args!("{:#x}", self.output_last))
            .field("options", &self.options)
            .finish()
    }
}

/// [`Format::attributes`] for every combination of permissions: a load takes the place of as many
/// decisions as there are bits.
fn all_attributes<F: Format>(options: &F::Options) -> [u64; 1 << PROT_BITS.len()] {
    core::array::from_fn(|bits| {
        let chosen = PROT_BITS.iter().filter(|prot| bits & prot.bits() as usize != 0);
        let prot = chosen.fold(Prot::NONE, |all, &prot| all | prot);
        F::attributes(options, prot).unwrap_or(0)
    })
}

/// Levels that it takes to tell `last` from smaller IOVAs, at least [`Format::MIN_LEVELS`]; more
/// than [`Format::MAX_LEVELS`] when the format cannot.
fn levels_for<F: Format>(last: u64, root_extra_bits: u32) -> u32 {
    let width = 64 - last.leading_zeros() + u32::from(F::SIGN_EXTENDS);
    let mut levels = F::MIN_LEVELS;
    while span_shift::<F>(levels - 1) + root_extra_bits < width {
        levels += 1;
    }
    levels
}

/// Bits for all the page sizes that tables below level `levels` could hold.
const fn sizes_mask<F: Format>(levels: u32) -> u64 {
    match 1u64.checked_shl(item_shift::<F>(levels)) {
        Some(beyond) => beyond - 1,
        None => u64::MAX,
    }
}
