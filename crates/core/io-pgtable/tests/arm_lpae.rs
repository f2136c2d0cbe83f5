//! Arm tables, read by a decoder written from DDI 0487 D8.3.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod support {
    pub(crate) mod histories;
    pub(crate) mod model;
    pub(crate) mod resizing;
}

use lychgate_io_pgtable::{
    ARM_MAIR, ArmOptions, ArmStage1, ArmStage2, Config, Dirty, Error, Format, Gather, PageTable,
};
use lychgate_types::{HeapPages, Iova, Memory, PhysAddr, Prot};
use proptest::prelude::*;
use support::histories::{Decoded, RW, Reading, Subject, geometry, op};
use support::resizing;

/// What an SMMU was told of a table.
#[derive(Clone, Copy)]
struct Smmu {
    stage: u32,
    granule: u32,
    /// DS, or FEAT_LPA with 64 KiB.
    wide: bool,
    /// 64 - TxSZ.
    bits: u32,
    fwb: bool,
}

impl Smmu {
    /// Output address of an entry whose leaf or table has `low` bits of offset.
    fn output(self, entry: u64, low: u32) -> u64 {
        let field = |from: u32, to: u32| entry >> from & ((1 << (to + 1 - from)) - 1);
        match (self.wide, self.granule) {
            (false, _) => field(low, 47) << low,
            (true, 16) => field(low, 47) << low | field(12, 15) << 48,
            (true, _) => field(low, 49) << low | field(8, 9) << 50,
        }
    }

    /// Address bits between the granule and `low`, which are RES0 in blocks.
    fn stray(self, entry: u64, low: u32) -> bool {
        (self.granule..low).any(|bit| entry >> bit & 1 == 1)
    }

    /// log2 of the entries of a contiguous group at Arm's level, if there is one.
    fn group(self, level: i32) -> Option<u32> {
        Some(match (self.granule, level) {
            (12, 1..=3) => 4,
            (14, 3) => 7,
            (14, 2) | (16, 2 | 3) => 5,
            _ => return None,
        })
    }

    fn has_block(self, level: i32) -> bool {
        match (self.granule, level) {
            (12, 1 | 2) | (14 | 16, 2) => true,
            (12, 0) | (14 | 16, 1) => self.wide,
            _ => false,
        }
    }

    /// Walks from a root of `levels` levels; a write of a writable-clean leaf makes it dirty.
    fn decode(
        self,
        memory: &dyn Memory,
        root: u64,
        levels: u32,
        iova: u64,
        write: bool,
    ) -> Reading {
        let stride = self.granule - 3;
        if iova >> self.bits != 0 {
            return Err(format!("{iova:#x} is beyond TxSZ"));
        }
        let start = 4 - i32::try_from(levels).map_err(|error| error.to_string())?;
        let from_size = 3 - i32::try_from((self.bits - 1 - self.granule) / stride).unwrap_or(9);
        let mut tables = 0;
        if self.stage == 1 {
            if start != from_size {
                return Err(format!("start level {start} for {} bits", self.bits));
            }
        } else {
            tables = self.bits.saturating_sub(self.granule + stride * levels);
            if tables > 4 || start < from_size || root & ((1 << (tables + self.granule)) - 1) != 0 {
                return Err(format!("2^{tables} root tables of level {start} at {root:#x}"));
            }
        }
        let mut table = root;
        for level in start..=3 {
            let shift = self.granule + stride * u32::try_from(3 - level).unwrap_or(0);
            let width = if level == start { stride + tables } else { stride };
            let index = iova >> shift & ((1 << width) - 1);
            let at = PhysAddr::new(table + 8 * index);
            let entry = memory.load_u64(at).map_err(|error| error.to_string())?;
            if entry & 1 == 0 {
                return if entry == 0 { Ok(None) } else { Err(format!("leftover {entry:#x}")) };
            }
            if entry & 2 != 0 && level < 3 {
                // NSTable to PXNTable, 58:51 but for software's mark, lower attributes.
                let mark = 1 << 55;
                let mut attributes = entry >> 48 << 48 & !mark;
                if !(self.wide && self.granule == 16) {
                    attributes |= entry & ((1 << self.granule) - 1) & !3;
                }
                if self.wide && self.granule != 16 {
                    attributes &= !(0x300 | 3 << 48);
                } else {
                    attributes |= entry & 0xffc;
                }
                if attributes != 0 {
                    return Err(format!("attributes of the table entry {entry:#x}"));
                }
                table = self.output(entry, self.granule);
                continue;
            }
            if (level == 3) != (entry & 2 != 0) || (level < 3 && !self.has_block(level)) {
                return Err(format!("type of {entry:#x} at level {level}"));
            }
            let mut page = shift;
            if entry >> 52 & 1 == 1 {
                let Some(group) = self.group(level) else {
                    return Err(format!("no contiguous group at level {level}"));
                };
                page += group;
                let first = index & !((1 << group) - 1);
                let base = self.output(entry, shift) & !((1 << page) - 1);
                for n in 0..1 << group {
                    let copy = memory.load_u64(PhysAddr::new(table + 8 * (first + n)));
                    let copy = copy.map_err(|error| error.to_string())?;
                    if self.output(copy, shift) != base + (n << shift) {
                        return Err(format!("{copy:#x} is out of place in its group"));
                    }
                    // All but address and dirty state are the same.
                    if (copy ^ entry) & (0xfff8 << 48 | 0xc7f) != 0 {
                        return Err(format!("{copy:#x} and {entry:#x} differ in a group"));
                    }
                }
            }
            // In a page of 64 KiB, 15:12 are of the address, or RES0.
            let low = if self.wide && self.granule == 16 { 16 } else { self.granule.min(12) };
            let stray = (low..self.granule).any(|bit| entry >> bit & 1 == 1);
            if stray || self.stray(entry, shift) || entry >> 55 != 0 {
                return Err(format!("RES0 or software bits in {entry:#x}"));
            }
            if !self.wide && entry >> 48 & 7 != 0 {
                return Err(format!("address bits beyond 48 in {entry:#x}"));
            }
            if entry >> 10 & 1 == 0 {
                return Err(format!("AF is clear in {entry:#x}"));
            }
            let prot = if self.stage == 1 { self.stage1(entry)? } else { self.stage2(entry)? };
            let mut now = entry;
            if write {
                assert!(prot.contains(Prot::WRITE));
                now = if self.stage == 1 { entry & !(1 << 7) } else { entry | 1 << 7 };
                memory.store_u64(at, now).map_err(|error| error.to_string())?;
            }
            return Ok(Some(Decoded {
                phys: self.output(entry, shift) + (iova & ((1 << shift) - 1)),
                page: 1 << page,
                prot,
                dirty: now >> 7 & 1 != u64::from(self.stage == 1),
            }));
        }
        Err("no leaf at level 3".into())
    }

    /// SH goes with the memory type, unless the address is in its place.
    fn shareability(self, entry: u64, cached: bool) -> Result<(), String> {
        let sh = entry >> 8 & 3;
        if (self.wide && self.granule != 16) || sh == if cached { 3 } else { 2 } {
            return Ok(());
        }
        Err(format!("SH {sh} in {entry:#x}"))
    }

    fn stage1(self, entry: u64) -> Result<Prot, String> {
        if entry >> 11 & 1 == 0 || entry >> 5 & 1 == 1 {
            return Err(format!("a global or non-secure leaf: {entry:#x}"));
        }
        let (ap, dbm) = (entry >> 6 & 3, entry >> 51 & 1 == 1);
        let (uxn, pxn) = (entry >> 54 & 1 == 1, entry >> 53 & 1 == 1);
        let mut prot = Prot::READ;
        if ap & 2 == 0 || dbm {
            prot |= Prot::WRITE;
        }
        if ap & 1 == 0 {
            prot |= Prot::PRIV;
            if !uxn {
                return Err(format!("the unprivileged may execute by {entry:#x}"));
            }
        }
        if pxn && uxn {
            prot |= Prot::NOEXEC;
        } else if pxn {
            return Err(format!("PXN alone in {entry:#x}"));
        } else if uxn && ap & 1 == 1 {
            return Err(format!("UXN alone in {entry:#x}"));
        }
        let attribute = ARM_MAIR >> (8 * (entry >> 2 & 7)) & 0xff;
        match attribute {
            0xff => prot |= Prot::CACHE,
            0x04 => prot |= Prot::MMIO,
            0x44 => {}
            _ => return Err(format!("attribute {attribute:#x}")),
        }
        // Device memory is outer shareable whatever SH says.
        if attribute != 0x04 {
            self.shareability(entry, attribute == 0xff)?;
        }
        Ok(prot)
    }

    fn stage2(self, entry: u64) -> Result<Prot, String> {
        if entry >> 11 & 1 == 1 {
            return Err(format!("bit 11 of stage 2: {entry:#x}"));
        }
        let mut prot = Prot::NONE;
        if entry >> 6 & 1 == 1 {
            prot |= Prot::READ;
        }
        if entry >> 7 & 1 == 1 || entry >> 51 & 1 == 1 {
            prot |= Prot::WRITE;
        }
        match entry >> 53 & 3 {
            0 => {}
            2 => prot |= Prot::NOEXEC,
            other => return Err(format!("XN {other:#b}")),
        }
        let attribute = entry >> 2 & 0xf;
        match (self.fwb, attribute) {
            (_, 1) => return Ok(prot | Prot::MMIO),
            (_, 5) => {}
            (false, 0xf) | (true, 6) => prot |= Prot::CACHE,
            _ => return Err(format!("MemAttr {attribute:#x}")),
        }
        self.shareability(entry, prot.contains(Prot::CACHE))?;
        Ok(prot)
    }
}

fn typed(prot: Prot) -> Prot {
    if prot.contains(Prot::MMIO) { Prot::MMIO } else { prot & Prot::CACHE }
}

/// W implies R.
fn allows_stage1(prot: Prot) -> Option<Prot> {
    let access = match (prot.contains(Prot::READ), prot.contains(Prot::WRITE)) {
        (_, true) => RW,
        (true, false) => Prot::READ,
        (false, false) => return None,
    };
    Some(access | prot & (Prot::NOEXEC | Prot::PRIV) | typed(prot))
}

fn allows_stage2(prot: Prot) -> Option<Prot> {
    let access = prot & RW;
    (access != Prot::NONE).then_some(access | prot & Prot::NOEXEC | typed(prot))
}

const PLAIN: ArmOptions =
    ArmOptions { record_writes: false, force_write_back: false, break_before_make_level: 0 };
const RECORD: ArmOptions = ArmOptions { record_writes: true, ..PLAIN };
const FWB: ArmOptions = ArmOptions { force_write_back: true, ..PLAIN };

fn stage1<const G: u32, const WIDE: bool>(
    bits: u32,
    options: ArmOptions,
) -> Subject<'static, ArmStage1<G, WIDE>> {
    let smmu = Smmu { stage: 1, granule: G, wide: WIDE, bits, fwb: false };
    Subject {
        config: Config::new(bits, options),
        read: Box::leak(Box::new(move |memory: &dyn Memory, root, levels, iova, write| {
            smmu.decode(memory, root, levels, iova, write)
        })),
        allows: allows_stage1,
    }
}

fn stage2<const G: u32, const WIDE: bool>(
    bits: u32,
    options: ArmOptions,
) -> Subject<'static, ArmStage2<G, WIDE>> {
    let fwb = options.force_write_back;
    let smmu = Smmu { stage: 2, granule: G, wide: WIDE, bits, fwb };
    Subject {
        config: Config::new(bits, options).concatenated(),
        read: Box::leak(Box::new(move |memory: &dyn Memory, root, levels, iova, write| {
            smmu.decode(memory, root, levels, iova, write)
        })),
        allows: allows_stage2,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn stage_1_of_4k_holds_what_the_model_has(ops in prop::collection::vec(op(9, 27), 1..12)) {
        stage1::<12, false>(39, PLAIN).run(&ops);
    }

    #[test]
    fn stage_1_of_4k_and_48_bits_holds_what_the_model_has(
        ops in prop::collection::vec(op(9, 36), 1..12),
    ) {
        stage1::<12, false>(48, RECORD).run(&ops);
    }

    #[test]
    fn stage_1_of_4k_and_52_bits_holds_what_the_model_has(
        ops in prop::collection::vec(op(9, 40), 1..12),
    ) {
        stage1::<12, true>(52, PLAIN).run(&ops);
    }

    #[test]
    fn stage_1_of_16k_holds_what_the_model_has(ops in prop::collection::vec(op(11, 34), 1..8)) {
        stage1::<14, false>(48, PLAIN).run(&ops);
        stage1::<14, true>(48, RECORD).run(&ops);
    }

    #[test]
    fn stage_1_of_64k_holds_what_the_model_has(ops in prop::collection::vec(op(13, 26), 1..6)) {
        stage1::<16, false>(42, RECORD).run(&ops);
        stage1::<16, true>(42, PLAIN).run(&ops);
    }

    #[test]
    fn stage_2_of_4k_holds_what_the_model_has(ops in prop::collection::vec(op(9, 28), 1..12)) {
        stage2::<12, false>(40, PLAIN).run(&ops);
        stage2::<12, true>(40, FWB).run(&ops);
    }

    #[test]
    fn stage_2_of_16k_holds_what_the_model_has(ops in prop::collection::vec(op(11, 34), 1..8)) {
        stage2::<14, false>(48, FWB).run(&ops);
    }

    #[test]
    fn stage_2_of_64k_holds_what_the_model_has(ops in prop::collection::vec(op(13, 30), 1..6)) {
        stage2::<16, false>(46, RECORD).run(&ops);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn leaves_of_4k_are_cut_and_joined_as_bbml_allows(
        ops in resizing::history(9, 27, 20),
        break_before_make_level in 0..3u32,
    ) {
        let options = ArmOptions { break_before_make_level, ..RECORD };
        stage1::<12, false>(39, options).run_resizing(&ops);
        stage2::<12, true>(40, options).run_resizing(&ops);
    }

    #[test]
    fn leaves_of_16k_are_cut_and_joined_as_bbml_allows(
        ops in resizing::history(11, 34, 12),
        break_before_make_level in 0..3u32,
    ) {
        stage1::<14, true>(48, ArmOptions { break_before_make_level, ..PLAIN }).run_resizing(&ops);
        stage2::<14, false>(48, ArmOptions { break_before_make_level, ..RECORD }).run_resizing(&ops);
    }

    #[test]
    fn leaves_of_64k_are_cut_and_joined_as_bbml_allows(
        ops in resizing::history(13, 26, 12),
        break_before_make_level in 0..3u32,
    ) {
        let options = ArmOptions { break_before_make_level, ..RECORD };
        stage1::<16, true>(42, options).run_resizing(&ops);
        stage2::<16, false>(42, options).run_resizing(&ops);
    }
}

/// Runs a method of [`Subject`] for both stages of every granule and width, with concatenated
/// roots for stage 2 where the size allows.
macro_rules! everywhere {
    ($options:expr, $method:ident($($argument:expr),*)) => {{
        for bits in [39, 48] {
            stage1::<12, false>(bits, $options).$method($($argument),*);
            stage1::<14, false>(bits, $options).$method($($argument),*);
            stage1::<16, false>(bits, $options).$method($($argument),*);
        }
        for bits in [48, 52] {
            stage1::<12, true>(bits, $options).$method($($argument),*);
            stage1::<14, true>(bits, $options).$method($($argument),*);
            stage1::<16, true>(bits, $options).$method($($argument),*);
            stage2::<12, true>(bits, $options).$method($($argument),*);
            stage2::<14, true>(bits, $options).$method($($argument),*);
            stage2::<16, true>(bits, $options).$method($($argument),*);
        }
        for bits in [40, 42, 48] {
            stage2::<12, false>(bits, $options).$method($($argument),*);
            stage2::<14, false>(bits, $options).$method($($argument),*);
            stage2::<16, false>(bits, $options).$method($($argument),*);
        }
    }};
}

#[test]
fn every_permission_that_has_an_encoding_comes_back() {
    for options in [PLAIN, RECORD, FWB] {
        everywhere!(options, every_permission_comes_back());
    }
}

#[test]
fn memory_may_end_at_every_allocation() {
    everywhere!(PLAIN, memory_may_end_at_every_allocation());
}

#[test]
fn memory_may_end_while_leaves_change() {
    let options = ArmOptions { break_before_make_level: 2, ..PLAIN };
    stage1::<12, false>(48, options).memory_may_end_while_leaves_change();
    stage2::<14, false>(48, options).memory_may_end_while_leaves_change();
    stage1::<16, true>(52, options).memory_may_end_while_leaves_change();
}

#[test]
fn hardware_records_writes_by_dbm() {
    everywhere!(RECORD, writes_are_recorded(false));
}

#[test]
fn what_cannot_be_recorded_counts_as_written_every_time() {
    fn check<F: Format<Options = ArmOptions>>() {
        let pages = HeapPages::new();
        let table = PageTable::<F, _>::new(&pages, Config::new(39, PLAIN)).unwrap();
        let (size, mut gather) = (1 << F::GRANULE_SHIFT, Gather::new());
        table.map(Iova::new(0), PhysAddr::new(0), size, RW, &mut gather).unwrap();
        table.map(Iova::new(size), PhysAddr::new(0), size, Prot::READ, &mut gather).unwrap();
        for _ in 0..2 {
            let mut seen = Vec::new();
            let mut record = |at, size| seen.push((at, size));
            table
                .read_dirty(Iova::new(0), 4 * size, Dirty::Clear, &mut gather, &mut record)
                .unwrap();
            assert_eq!(seen, [(Iova::new(0), size)]);
            assert_eq!(table.walk(Iova::new(0)).unwrap().prot & RW, RW);
        }
        gather.release(&pages);
    }
    check::<ArmStage1>();
    check::<ArmStage2<16>>();
}

#[test]
fn runs_may_cross_the_seam_of_the_address_field() {
    fn check<F: Format<Options = ArmOptions> + Clone>(subject: &Subject<'_, F>, seam: u32) {
        let pages = HeapPages::new();
        let table = PageTable::<F, _>::new(&pages, subject.config.clone()).unwrap();
        let granule = 1u64 << F::GRANULE_SHIFT;
        let mut gather = Gather::new();
        for n in 1..4 {
            let (iova, phys) = (n << 36, (n << seam) - 3 * granule);
            let (at, frame) = (Iova::new(iova), PhysAddr::new(phys));
            table.map(at, frame, 7 * granule, RW, &mut gather).unwrap();
            let root = table.root();
            for offset in (0..7 * granule).step_by(1 << (F::GRANULE_SHIFT - 1)) {
                let at = iova + offset;
                let there = (subject.read)(&pages, root.table.get(), root.levels, at, false);
                assert_eq!(there.unwrap().unwrap().phys, phys + offset);
                assert_eq!(table.walk(Iova::new(at)).unwrap().phys.get(), phys + offset);
            }
            assert_eq!(table.unmap(at, 7 * granule, &mut gather).unwrap().bytes, 7 * granule);
        }
        gather.release(&pages);
    }
    check(&stage1::<12, true>(48, PLAIN), 50);
    check(&stage1::<14, true>(48, PLAIN), 50);
    check(&stage1::<16, true>(48, PLAIN), 48);
    check(&stage2::<12, true>(48, PLAIN), 50);
    check(&stage2::<16, true>(48, PLAIN), 48);
}

#[test]
fn leaf_sizes_are_those_of_the_granule() {
    let bits = |bits: &[u32]| bits.iter().fold(0, |all, bit| all | 1u64 << bit);
    let sizes = |subject: Result<(u64, u32, u32), Error>| subject.unwrap().0;
    let four = bits(&[12, 16, 21, 25, 30, 34]);
    let sixteen = bits(&[14, 21, 25, 30]);
    let sixty_four = bits(&[16, 21, 29, 34]);
    assert_eq!(sizes(geometry(&stage1::<12, false>(48, PLAIN).config)), four);
    assert_eq!(sizes(geometry(&stage1::<12, true>(48, PLAIN).config)), four | 1 << 39);
    assert_eq!(sizes(geometry(&stage2::<14, false>(48, PLAIN).config)), sixteen);
    assert_eq!(sizes(geometry(&stage2::<14, true>(48, PLAIN).config)), sixteen | 1 << 36);
    assert_eq!(sizes(geometry(&stage1::<16, false>(48, PLAIN).config)), sixty_four);
    assert_eq!(sizes(geometry(&stage1::<16, true>(48, PLAIN).config)), sixty_four | 1 << 42);
}

#[test]
fn levels_and_root_tables_are_those_of_the_size() {
    let shape =
        |subject: Result<(u64, u32, u32), Error>| subject.map(|(_, levels, wide)| (levels, wide));
    let small = |bits| shape(geometry(&stage1::<12, false>(bits, PLAIN).config));
    assert_eq!(small(25), Ok((2, 0)));
    assert_eq!(small(31), Ok((3, 0)));
    assert_eq!(small(40), Ok((4, 0)));
    assert_eq!(small(48), Ok((4, 0)));
    assert_eq!(small(49), Err(Error::Unsupported("aperture")));
    assert_eq!(shape(geometry(&stage1::<12, true>(52, PLAIN).config)), Ok((5, 0)));
    assert_eq!(shape(geometry(&stage1::<14, false>(25, PLAIN).config)), Ok((1, 0)));
    assert_eq!(shape(geometry(&stage1::<14, true>(52, PLAIN).config)), Ok((4, 0)));
    assert_eq!(shape(geometry(&stage1::<16, false>(42, PLAIN).config)), Ok((2, 0)));
    assert_eq!(shape(geometry(&stage1::<16, true>(52, PLAIN).config)), Ok((3, 0)));
    let second = |bits| shape(geometry(&stage2::<12, false>(bits, PLAIN).config));
    assert_eq!(second(39), Ok((3, 0)));
    assert_eq!(second(40), Ok((3, 1)));
    assert_eq!(second(42), Ok((3, 3)));
    assert_eq!(second(43), Ok((3, 4)));
    assert_eq!(second(44), Ok((4, 0)));
    assert_eq!(shape(geometry(&stage2::<14, false>(40, PLAIN).config)), Ok((2, 4)));
    assert_eq!(shape(geometry(&stage2::<14, false>(48, PLAIN).config)), Ok((3, 1)));
    assert_eq!(shape(geometry(&stage2::<16, false>(46, PLAIN).config)), Ok((2, 4)));
    // Stage 1 has one root table.
    let wide = Config { root_extra_bits: 1, ..stage1::<12, false>(39, PLAIN).config };
    assert_eq!(geometry(&wide), Err(Error::Unsupported("concatenation of roots")));
    let wider = Config { root_extra_bits: 5, ..stage2::<12, false>(39, PLAIN).config };
    assert_eq!(geometry(&wider), Err(Error::Unsupported("concatenation of roots")));
}
