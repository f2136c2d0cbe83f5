//! Buffers through the DMA API: an IOVA is allocated and mapped, and later unmapped and freed.

use std::collections::VecDeque;
use std::sync::Arc;

use lychgate_io_pgtable::{AmdV1, AmdV1Options, Config, Format, X86_64, X86_64Options};
use lychgate_iommu::PagingDomain;
use lychgate_iommu::dma::{DmaCache, DmaSpace, LazyDma, Reach};
use lychgate_iommu::iova::{FlushClock, Limits};
use lychgate_types::{Iova, PhysAddr, PhysRun, Prot, StdLocks};

use crate::tables::Tables;
use crate::{PAGE, median, nanoseconds};

const RW: Prot = Prot::READ.union(Prot::WRITE);
const BUFFERS: usize = 20_000;

/// Who maps and unmaps.
trait Mapper {
    fn map(&mut self, phys: u64, len: u64) -> u64;
    fn unmap(&mut self, iova: u64, len: u64);
}

impl<F: Format + 'static> Mapper for DmaCache<Tables<F>, StdLocks> {
    #[inline(never)]
    fn map(&mut self, phys: u64, len: u64) -> u64 {
        let reach = Reach::of_bits(64);
        self.map_phys(PhysAddr::new(phys), len, RW, reach).map_or(0, Iova::get)
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64) {
        assert!(self.unmap_phys(Iova::new(iova), len).is_ok());
    }
}

/// With a clock that stands still: what is left is the flush of a full queue.
struct Lazy<F: Format + 'static>(LazyDma<Tables<F>, StdLocks>);

impl<F: Format + 'static> Mapper for Lazy<F> {
    #[inline(never)]
    fn map(&mut self, phys: u64, len: u64) -> u64 {
        let reach = Reach::of_bits(64);
        self.0.map_phys(PhysAddr::new(phys), len, RW, reach).map_or(0, Iova::get)
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64) {
        assert!(self.0.unmap_phys(0, Iova::new(iova), len).is_ok());
    }
}

/// The page table without an allocator: IOVAs come round in the order in which they went.
struct Alone<F: Format + 'static> {
    tables: Tables<F>,
    free: VecDeque<u64>,
}

impl<F: Format + 'static> Mapper for Alone<F> {
    #[inline(never)]
    fn map(&mut self, phys: u64, len: u64) -> u64 {
        let iova = self.free.pop_back().unwrap_or(0);
        let run = [PhysRun { start: PhysAddr::new(phys), len }];
        assert!(self.tables.map(Iova::new(iova), &run, RW).is_ok());
        iova
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64) {
        assert_eq!(self.tables.unmap(Iova::new(iova), len), len);
        self.free.push_back(iova);
    }
}

/// Another allocator in front of the same page table.
struct RangeAlloc<F: Format + 'static> {
    tables: Tables<F>,
    ranges: range_alloc::RangeAllocator<u64>,
}

impl<F: Format + 'static> Mapper for RangeAlloc<F> {
    #[inline(never)]
    fn map(&mut self, phys: u64, len: u64) -> u64 {
        let iova = self.ranges.allocate_range(len).map_or(0, |range| range.start);
        let run = [PhysRun { start: PhysAddr::new(phys), len }];
        assert!(self.tables.map(Iova::new(iova), &run, RW).is_ok());
        iova
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64) {
        assert_eq!(self.tables.unmap(Iova::new(iova), len), len);
        self.ranges.free_range(iova..iova + len);
    }
}

/// Gives nanoseconds per buffer of `len` bytes, `count` of which are mapped at any time.
fn measured<'a>(
    mut mapper: impl Mapper + 'a,
    len: u64,
    count: usize,
) -> Box<dyn FnMut() -> f64 + 'a> {
    // No frames of which larger leaves could be made.
    let phys = |n: usize| 0x10_0000_1000 + ((n as u64 & 4095) << 17);
    let mut live: Vec<u64> = (0..count).map(|n| mapper.map(phys(n), len)).collect();
    let (mut oldest, mut next) = (0, 0);
    let mut run = move |buffers| {
        for _ in 0..buffers {
            if let Some(iova) = live.get_mut(oldest) {
                mapper.unmap(*iova, len);
                *iova = mapper.map(phys(next), len);
            }
            next += 1;
            oldest = if oldest + 1 == count { 0 } else { oldest + 1 };
        }
    };
    Box::new(move || {
        // The peer before has put out of the caches what was there.
        run(count);
        nanoseconds(|| run(BUFFERS)) / BUFFERS as f64
    })
}

fn format<F: Format + 'static>(
    config: impl Fn() -> Config<F>,
    picked: &dyn Fn(&str) -> bool,
) -> Option<()> {
    let tables = || Tables::new(config()).ok();
    let space = || DmaSpace::new(Arc::new(tables()?), &[]).ok().map(Arc::new);
    println!(
        "{:<28} {:>8} {:>8} {:>8} {:>12}   ns/buffer",
        F::NAME,
        "strict",
        "lazy",
        "tables",
        "range-alloc"
    );
    let cases = [
        ("4K, FIFO of 256", PAGE, 256),
        ("4K, FIFO of 4096", PAGE, 4096),
        ("64K, FIFO of 256", 16 * PAGE, 256),
        ("128K, FIFO of 1024", 32 * PAGE, 1024),
    ];
    for (name, len, count) in cases.into_iter().filter(|(name, ..)| picked(name)) {
        let free = (0..count as u64 + 1).map(|n| (1 << 30) + n * len).collect();
        let ranges = range_alloc::RangeAllocator::new(1 << 30..1 << 46);
        let lazy = LazyDma::new(space()?, Arc::new(FlushClock::new()), Limits::default());
        let peers = [
            measured(DmaCache::new(space()?), len, count),
            measured(Lazy(lazy), len, count),
            measured(Alone { tables: tables()?, free }, len, count),
            measured(RangeAlloc { tables: tables()?, ranges }, len, count),
        ];
        let mut peers = peers.map(|peer| (peer, vec![]));
        for _ in 0..31 {
            for (peer, samples) in &mut peers {
                samples.push(peer());
            }
        }
        let [strict, lazy, alone, range_alloc] = peers.map(|(_, samples)| median(samples));
        println!("{name:<28} {strict:>8.2} {lazy:>8.2} {alone:>8.2} {range_alloc:>12.2}");
    }
    Some(())
}

/// All lengths, on the tables of two formats.
pub(crate) fn all(picked: &dyn Fn(&str) -> bool) {
    let x86 = || Config::<X86_64>::new(47, X86_64Options::default());
    // As many levels as the other, rather than those that the first IOVAs need.
    let amd = || Config { levels: 4, ..Config::<AmdV1>::new(48, AmdV1Options::default()) };
    if format(x86, picked).is_none() || format(amd, picked).is_none() {
        println!("no memory for the tables");
    }
}
