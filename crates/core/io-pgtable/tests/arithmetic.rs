//! Every size, level and address bit of every format: entries say what they were made of, and
//! ranges end where they should. Nothing here is random; what can be counted is counted through.

#![expect(clippy::unwrap_used, reason = "tests fail by panicking")]

use lychgate_io_pgtable::{
    AmdV1, AmdV1Options, ArmOptions, ArmStage1, ArmStage2, Config, Format, Gather, PageTable,
    RiscvFirstStage, RiscvOptions, RiscvSecondStage, Root, SizeChanges, VtdSecondStage,
    VtdSecondStageOptions, X86_64, X86_64Options,
};
use lychgate_types::{HeapPages, Iova, PhysAddr, Prot};

const RW: Prot = Prot::READ.union(Prot::WRITE);

const RISCV: RiscvOptions = RiscvOptions { memory_types: true, record_writes: true };
const X86: X86_64Options = X86_64Options { no_execute: true, record_writes: true };
const VTD: VtdSecondStageOptions = VtdSecondStageOptions { force_snoop: true };
const ARM: ArmOptions =
    ArmOptions { record_writes: true, force_write_back: false, break_before_make_level: 2 };

/// Runs a generic function on every format.
macro_rules! every_format {
    ($check:ident) => {{
        $check::<AmdV1>(64, AmdV1Options::default());
        $check::<AmdV1<11>>(59, AmdV1Options { force_coherent: false });
        $check::<X86_64>(56, X86);
        $check::<X86_64<47>>(47, X86);
        $check::<VtdSecondStage>(57, VTD);
        $check::<RiscvFirstStage>(56, RISCV);
        $check::<RiscvSecondStage>(59, RISCV);
        $check::<ArmStage1<12>>(48, ARM);
        $check::<ArmStage1<12, true>>(52, ARM);
        $check::<ArmStage1<14>>(48, ARM);
        $check::<ArmStage1<14, true>>(52, ARM);
        $check::<ArmStage1<16>>(48, ARM);
        $check::<ArmStage1<16, true>>(52, ARM);
        $check::<ArmStage2<12>>(48, ARM);
        $check::<ArmStage2<16, true>>(52, ARM);
    }};
}

const fn item_shift<F: Format>(level: u32) -> u32 {
    F::GRANULE_SHIFT + F::INDEX_BITS * level
}

fn bits(mask: u64) -> impl Iterator<Item = u32> {
    (0..64).filter(move |bit| mask >> bit & 1 != 0)
}

/// Addresses of 2^`shift` bytes each: none of the bits, each one alone, and all.
fn frames<F: Format>(shift: u32) -> impl Iterator<Item = u64> {
    let all = (u64::MAX >> (64 - F::MAX_OUTPUT_BITS)) & !((1 << shift) - 1);
    [0, all].into_iter().chain(bits(all).map(|bit| 1 << bit))
}

fn prots() -> impl Iterator<Item = Prot> {
    let bits = [Prot::READ, Prot::WRITE, Prot::CACHE, Prot::NOEXEC, Prot::MMIO, Prot::PRIV];
    (0..1usize << bits.len()).map(move |chosen| {
        let chosen = bits.iter().enumerate().filter(|(bit, _)| chosen >> bit & 1 != 0);
        chosen.fold(Prot::NONE, |all, (_, &bit)| all | bit)
    })
}

fn sizes_are_each_of_one_level<F: Format>(_: u32, _: F::Options) {
    let mut seen = 0;
    for level in 0..F::MAX_LEVELS {
        let sizes = F::leaf_sizes(level);
        assert_eq!(sizes & seen, 0);
        seen |= sizes;
        for shift in bits(sizes) {
            assert!(shift >= item_shift::<F>(level) && shift < item_shift::<F>(level + 1));
            assert!(shift < F::MAX_OUTPUT_BITS);
        }
    }
    assert_eq!(seen.trailing_zeros(), F::GRANULE_SHIFT);
}

#[test]
fn every_size_is_of_one_level() {
    every_format!(sizes_are_each_of_one_level);
}

fn leaves_say_what_they_are<F: Format>(_: u32, options: F::Options) {
    for level in 0..F::MAX_LEVELS {
        for shift in bits(F::leaf_sizes(level)) {
            for prot in prots() {
                let Some(attributes) = F::attributes(&options, prot) else {
                    continue;
                };
                for phys in frames::<F>(shift).map(PhysAddr::new) {
                    leaf_says_what_it_is::<F>(level, shift, phys, attributes);
                }
            }
        }
    }
}

fn leaf_says_what_it_is<F: Format>(level: u32, shift: u32, phys: PhysAddr, attributes: u64) {
    let small = F::leaf(0, F::GRANULE_SHIFT, PhysAddr::new(0), attributes);
    let item = item_shift::<F>(level);
    let copies = 1u64 << (shift - item);
    let first = F::leaf(level, shift, phys, attributes);
    for copy in [0, 1, copies / 2, copies - 1].into_iter().filter(|copy| *copy < copies) {
        let entry = first + F::replica_step(level, shift) * copy;
        let says = |entry| {
            assert!(F::is_present(entry));
            assert!(level == 0 || !F::is_table(level, entry));
            assert_eq!((F::leaf_shift(level, entry), F::leaf_address(level, entry)), (shift, phys));
            assert_eq!(F::prot(level, entry), F::prot(0, small));
        };
        says(entry);
        let (mask, value) = F::plain_leaf(level);
        assert!(
            entry & mask != value || shift == item,
            "an entry of a run is not a page by itself"
        );
        says(entry | F::ACCESSED);
        let clean = F::make_clean(entry);
        says(clean);
        assert_eq!(F::make_clean(clean), clean);
        if F::TRACKS_DIRTY && F::prot(level, entry).contains(Prot::WRITE) {
            let dirty = F::make_dirty(clean);
            says(dirty);
            assert!(F::is_dirty(dirty) && !F::is_dirty(clean));
            assert_eq!(F::make_clean(dirty), clean);
        }
    }
}

#[test]
fn every_leaf_says_what_it_was_made_of() {
    every_format!(leaves_say_what_they_are);
}

fn tables_say_where_they_lead<F: Format>(_: u32, options: F::Options) {
    for level in 1..F::MAX_LEVELS {
        for at in frames::<F>(F::GRANULE_SHIFT.max(12)).map(PhysAddr::new) {
            let entry = F::table(&options, level, at);
            for entry in [entry, entry | F::CLEAN_DONE] {
                assert!(F::is_present(entry) && F::is_table(level, entry));
                assert_eq!(F::table_address(entry), at);
            }
            assert!(entry & F::CLEAN_DONE == 0);
            let (mask, value) = F::plain_leaf(level);
            assert_ne!(entry & mask, value, "a table is no page");
        }
    }
}

#[test]
fn every_table_entry_leads_where_it_should() {
    every_format!(tables_say_where_they_lead);
}

/// A page of every size next to both sides of every power of two, cut at every power of two in it.
fn boundaries_are_where_they_should_be<F: Format>(iova_bits: u32, options: F::Options) {
    let pages = HeapPages::new();
    let mut config = Config::<F>::new(iova_bits, options);
    config.levels = config.levels.max(if F::GROWS { F::MAX_LEVELS } else { 1 });
    let table = PageTable::<F, _>::new(&pages, config).unwrap();
    assert_eq!(table.size_changes(), SizeChanges::IN_PLACE);
    let (last, granule) = (table.aperture().end().get(), table.granule());
    let sizes = (0..table.root().levels).fold(0, |all, level| all | F::leaf_sizes(level));
    let ends = (F::GRANULE_SHIFT + 1..iova_bits).map(|bit| (1u64 << bit) - 1).chain([last]);
    for end in ends {
        for shift in bits(sizes) {
            let size = 1u64 << shift;
            // The page that ends there, and the one that begins next to it.
            for start in [end.checked_sub(size - 1), end.checked_add(1)].into_iter().flatten() {
                if start & (size - 1) != 0 || start > last || last - start < size - 1 {
                    continue;
                }
                let phys = (u64::MAX >> (64 - F::MAX_OUTPUT_BITS)) & !(size - 1);
                page_is_where_it_should_be(&table, start, phys, shift);
            }
        }
    }
    // Beyond the ends there is nothing to do.
    let mut gather = Gather::new();
    if let Some(beyond) = last.checked_add(1) {
        assert!(table.map(Iova::new(beyond), PhysAddr::new(0), granule, RW, &mut gather).is_err());
        assert!(table.cut(Iova::new(beyond - granule), 2 * granule, &mut gather).is_err());
        assert!(table.join(Iova::new(beyond), granule, &mut gather).is_err());
    }
    assert!(gather.is_empty());
    drop(table);
    assert_eq!(pages.live(), 0);
}

fn page_is_where_it_should_be<F: Format>(
    table: &PageTable<F, &HeapPages>,
    start: u64,
    phys: u64,
    shift: u32,
) {
    let (size, granule) = (1u64 << shift, table.granule());
    let iova = Iova::new(start);
    let mut gather = Gather::new();
    table.map(iova, PhysAddr::new(phys), size, RW, &mut gather).unwrap();
    let beside = [start.checked_sub(1), start.checked_add(size)];
    for offset in [0, size - 1] {
        let there = table.walk(Iova::new(start + offset)).unwrap();
        assert_eq!((there.phys.get(), there.page_size), (phys + offset, size));
    }
    let Root { table: root, levels } = table.root();
    let mut from = root;
    for step in table.path(Iova::new(start + (size - 1))).steps() {
        assert_eq!(step.table, from);
        let wide = if step.level + 1 == levels { 4 } else { 0 };
        let index = (start + (size - 1)) >> item_shift::<F>(step.level);
        assert_eq!(step.index as u64, index & ((1 << (F::INDEX_BITS + wide)) - 1));
        from = F::table_address(step.entry);
    }
    for at in beside.into_iter().flatten() {
        assert_eq!(table.walk(Iova::new(at)), None, "{at:#x} next to {start:#x}");
    }
    gather.release(table.pages());
    // From the largest part to the smallest, so that each cut falls into what is left of the first.
    let cuts = (granule.trailing_zeros()..shift).rev();
    for cut in cuts {
        let part = 1u64 << cut;
        // Leaves may have ended there already, in a format with few sizes.
        assert!(table.cut(iova, part, &mut gather).unwrap() <= 1);
        for offset in [part - 1, part] {
            let there = table.walk(Iova::new(start + offset)).unwrap();
            assert_eq!(there.phys.get(), phys + offset);
            let within = (start + offset) & (there.page_size - 1);
            assert!(there.page_size <= part && within <= offset);
        }
        assert_eq!(table.cut(iova, part, &mut gather), Ok(0));
        gather.release(table.pages());
    }
    assert_eq!(table.walk(iova).unwrap().page_size, granule);
    let unmapped = table.unmap(iova, size, &mut gather).unwrap();
    assert_eq!((unmapped.bytes, unmapped.stop), (size, None));
    gather.release(table.pages());
}

#[test]
fn every_page_ends_at_every_boundary() {
    every_format!(boundaries_are_where_they_should_be);
}
