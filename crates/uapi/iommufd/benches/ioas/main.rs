//! Nanoseconds per ioctl of iommufd, from the entry of the handler to its end, next to what Linux
//! 7.3.4 takes for the same, on the same format of page tables, the selftest's:
//! `cargo bench -p lychgate-iommufd`.
//!
//! Figures are minima over rounds; Linux's are medians on one machine, in kernel mode, without the
//! system call. Linux pins page by page, 26 ns each, unpins for 13 ns, and carries every page's number
//! to the page table, which is most of what its long rows take; here pins come as runs, and what a
//! pin itself costs is the machine's affair and not counted. `scattered` means that no two pages lie
//! next to one another in physical memory: then page tables are all the work. A word as argument
//! picks workloads by a part of their names.

#![expect(clippy::expect_used, reason = "a benchmark fails by panicking")]

mod process;

use std::sync::{Arc, Mutex};
use std::time::Instant;

use lychgate_iommu::Iommu;
use lychgate_iommufd::abi::{Argument, iommufd as abi};
use lychgate_iommufd::selftest::abi::{self as test, TestCmd, op};
use lychgate_iommufd::{Config, Context, NodeKind, OpenFile, Selftest, SharedIommu};
use lychgate_types::HeapPages;
use zerocopy::{FromBytes, IntoBytes};

use crate::process::{Process, SCRATCH, VA};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const IOVA: u64 = 1 << 30;
const BITMAP: u64 = SCRATCH + 0x1000;
const FLAGS: u32 = abi::MAP_FIXED_IOVA | abi::MAP_READABLE | abi::MAP_WRITEABLE;

/// Where a copy goes: in the aperture of the page table, as far as it is long enough.
fn copy_at(length: u64) -> u64 {
    if length <= 512 * M { 1 << 28 } else { 1 << 33 }
}

/// An open file and its caller.
struct Bench {
    process: Process,
    context: Arc<Context>,
    ioas: u32,
    device: u32,
}

impl Bench {
    fn new(scattered: bool) -> Self {
        let iommu: SharedIommu = Arc::new(Mutex::new(Iommu::new()));
        let config = Config {
            node: NodeKind::Iommu,
            device_number: (10, 127),
            allow_unsafe_interrupts: false,
        };
        let selftest = Selftest::new(Arc::new(HeapPages::new()));
        let context = Context::open_with_selftest(iommu, Arc::new(()), config, selftest);
        let mut bench = Self { process: Process::new(scattered), context, ioas: 0, device: 0 };
        bench.ioas = bench.new_ioas();
        let other = bench.new_ioas();
        // A device in an IOAS of its own, for page tables in the first one.
        let mut command = TestCmd { op: op::MOCK_DOMAIN, id: other, ..TestCmd::default() };
        let after: TestCmd = bench.call(&mut command);
        let (made, _) =
            test::MockDomain::read_from_prefix(after.union.as_bytes()).expect("a member");
        bench.device = made.out_idev_id;
        bench
    }

    /// Calls with a structure, and gives it as it came back.
    fn call<A: Argument>(&self, argument: &mut A) -> A {
        self.prepare(argument);
        assert!(self.ioctl::<A>());
        let mut after = A::new_zeroed();
        let client: &dyn lychgate_iommufd::Client = &self.process;
        client.read(SCRATCH, after.as_mut_bytes()).expect("it is there");
        after
    }

    fn prepare<A: Argument>(&self, argument: &mut A) {
        self.process.put(SCRATCH, argument.as_bytes());
        let size = u32::try_from(size_of::<A>()).unwrap_or(0);
        self.process.put(SCRATCH, &size.to_le_bytes());
    }

    fn ioctl<A: Argument>(&self) -> bool {
        self.context.ioctl(&self.process, A::COMMAND, SCRATCH).is_ok()
    }

    /// Nanoseconds of a call with this structure.
    fn time<A: Argument>(&self, mut argument: A) -> u64 {
        self.prepare(&mut argument);
        let start = Instant::now();
        let done = self.ioctl::<A>();
        let nanoseconds = start.elapsed().as_nanos();
        assert!(done || A::COMMAND == abi::Destroy::COMMAND);
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    fn new_ioas(&self) -> u32 {
        self.call(&mut abi::IoasAlloc::default()).out_ioas_id
    }

    fn hwpt(&self, flags: u32) -> abi::HwptAlloc {
        abi::HwptAlloc { flags, dev_id: self.device, pt_id: self.ioas, ..Default::default() }
    }

    fn map(&self, length: u64) -> abi::IoasMap {
        let ioas_id = self.ioas;
        abi::IoasMap {
            flags: FLAGS,
            ioas_id,
            user_va: VA,
            length,
            iova: IOVA,
            ..Default::default()
        }
    }

    fn unmap(&self, iova: u64, length: u64) -> abi::IoasUnmap {
        abi::IoasUnmap { ioas_id: self.ioas, iova, length, ..Default::default() }
    }

    fn copy(&self, length: u64) -> abi::IoasCopy {
        abi::IoasCopy {
            flags: FLAGS,
            dst_ioas_id: self.ioas,
            src_ioas_id: self.ioas,
            length,
            dst_iova: copy_at(length),
            src_iova: IOVA,
            ..Default::default()
        }
    }
}

/// A workload: its name, its size, what Linux takes.
struct Row {
    name: String,
    size: u64,
    linux: u64,
}

fn row(name: &str, scattered: bool, size: u64, linux: u64) -> Row {
    let name = if scattered { format!("{name}, scattered") } else { name.to_owned() };
    Row { name, size, linux }
}

/// The fewest nanoseconds of a pair of calls, over rounds that take about a third of a second.
fn fastest(mut pair: impl FnMut() -> (u64, u64)) -> (u64, u64) {
    let start = Instant::now();
    let mut best = pair();
    while start.elapsed().as_millis() < 300 {
        let (first, second) = pair();
        best = (best.0.min(first), best.1.min(second));
    }
    best
}

fn show(row: &Row, nanoseconds: u64, clock: u64) {
    let net = nanoseconds.saturating_sub(clock).max(1);
    let size = match row.size {
        0 => String::new(),
        size if size < M => format!("{}K", size / K),
        size if size < 1 << 30 => format!("{}M", size / M),
        size => format!("{}G", size >> 30),
    };
    #[expect(clippy::cast_precision_loss, reason = "figures for people")]
    let ratio = row.linux as f64 / net as f64;
    println!("{:<40} {size:>5} {net:>10} {:>10} {ratio:>6.1}x", row.name, row.linux);
}

fn main() {
    let wanted = std::env::args().skip(1).find(|word| !word.starts_with('-')).unwrap_or_default();
    let wants = |name: &str| name.contains(&wanted);
    let clock = fastest(|| {
        let start = Instant::now();
        (u64::try_from(start.elapsed().as_nanos()).unwrap_or(0), 0)
    })
    .0;
    println!("{:<40} {:>5} {:>10} {:>10}", "ioctl", "size", "ns", "Linux ns");
    if wants("other") {
        others(clock);
    }
    for domains in 0..=2 {
        for scattered in [false, true] {
            let name = ["no domain", "one domain", "two domains"].get(domains).copied();
            let name = name.unwrap_or_default();
            if (domains == 0 && scattered) || !wants(name) {
                continue;
            }
            let bench = Bench::new(scattered);
            for _ in 0..domains {
                bench.call(&mut bench.hwpt(0));
            }
            for (size, linux) in mapping_figures(domains, scattered) {
                mapping(&bench, name, scattered, size, linux, clock);
            }
        }
    }
    for scattered in [false, true] {
        let bench = Bench::new(scattered);
        if wants("page table") {
            page_tables(&bench, scattered, clock);
        }
        if wants("dirty") {
            dirty(&bench, scattered, clock);
        }
    }
}

/// Sizes, and what Linux takes for MAP, UNMAP, COPY and UNMAP of the copy; 0 where it is not known.
fn mapping_figures(domains: usize, scattered: bool) -> Vec<(u64, [u64; 4])> {
    match (domains, scattered) {
        (0, _) => vec![
            (4 * K, [270, 250, 290, 230]),
            (64 * K, [270, 250, 290, 230]),
            (2 * M, [270, 240, 300, 220]),
            (1 << 30, [270, 240, 300, 230]),
        ],
        (1, false) => vec![
            (4 * K, [781, 521, 611, 441]),
            (64 * K, [1_372, 1_132, 1_001, 481]),
            (2 * M, [18_286, 17_836, 12_118, 1_382]),
            (64 * M, [548_161, 550_994, 364_359, 27_050]),
            (256 * M, [2_203_501, 2_220_750, 1_483_736, 107_940]),
            (1 << 30, [9_019_037, 9_014_029, 0, 0]),
        ],
        (1, true) => vec![
            (4 * K, [771, 531, 631, 461]),
            (64 * K, [1_873, 1_162, 1_542, 501]),
            (2 * M, [35_914, 19_079, 29_905, 2_043]),
            (64 * M, [1_215_287, 615_270, 943_431, 48_312]),
        ],
        (_, false) => vec![
            (4 * K, [831, 571, 0, 0]),
            (64 * K, [1_502, 1_192, 0, 0]),
            (2 * M, [20_390, 18_287, 0, 0]),
            (1 << 30, [10_683_071, 9_939_921, 0, 0]),
        ],
        (_, true) => vec![(2 * M, [111_756, 20_952, 0, 0])],
    }
}

fn mapping(bench: &Bench, domains: &str, scattered: bool, size: u64, linux: [u64; 4], clock: u64) {
    let [linux_map, linux_unmap, linux_copy, linux_uncopy] = linux;
    let (map, unmap) =
        fastest(|| (bench.time(bench.map(size)), bench.time(bench.unmap(IOVA, size))));
    show(&row(&format!("{domains}: IOAS_MAP"), scattered, size, linux_map), map, clock);
    show(&row(&format!("{domains}: IOAS_UNMAP"), scattered, size, linux_unmap), unmap, clock);
    if linux_copy != 0 {
        bench.call(&mut bench.map(size));
        let (copy, uncopy) = fastest(|| {
            (bench.time(bench.copy(size)), bench.time(bench.unmap(copy_at(size), size)))
        });
        show(&row(&format!("{domains}: IOAS_COPY"), scattered, size, linux_copy), copy, clock);
        let name = format!("{domains}: IOAS_UNMAP of a copy");
        show(&row(&name, scattered, size, linux_uncopy), uncopy, clock);
        bench.call(&mut bench.unmap(IOVA, size));
    }
    assert_eq!(bench.process.space.pinned(), 0);
}

/// Filling a new page table while another one holds the areas.
fn page_tables(bench: &Bench, scattered: bool, clock: u64) {
    let figures: &[(u64, u64, u64)] = match scattered {
        false => &[
            (4 * K, 1_132, 1_422),
            (2 * M, 12_498, 2_253),
            (64 * M, 367_684, 28_041),
            (1 << 30, 6_075_581, 442_812),
        ],
        true => &[(2 * M, 31_297, 3_015), (64 * M, 985_684, 51_757)],
    };
    let first = bench.call(&mut bench.hwpt(0)).out_hwpt_id;
    for (size, linux_alloc, linux_destroy) in figures {
        bench.call(&mut bench.map(*size));
        let next = first + 1;
        let (alloc, destroy) = fastest(|| {
            let destroy = abi::Destroy { id: next, ..Default::default() };
            (bench.time(bench.hwpt(0)), bench.time(destroy))
        });
        let name = "page table: HWPT_ALLOC, filled";
        show(&row(name, scattered, *size, *linux_alloc), alloc, clock);
        show(&row("page table: DESTROY", scattered, *size, *linux_destroy), destroy, clock);
        bench.call(&mut bench.unmap(IOVA, *size));
    }
    bench.call(&mut abi::Destroy { id: first, ..Default::default() });
}

fn dirty(bench: &Bench, scattered: bool, clock: u64) {
    let figures: &[(u64, u64, u64)] = match scattered {
        false => &[(M, 751, 1_763), (64 * M, 29_614, 79_988), (1 << 30, 504_164, 1_443_426)],
        true => &[(M, 1_172, 2_894), (64 * M, 56_555, 145_000)],
    };
    let hwpt_id = bench.call(&mut bench.hwpt(abi::HWPT_ALLOC_DIRTY_TRACKING)).out_hwpt_id;
    let enable = abi::DIRTY_TRACKING_ENABLE;
    bench.call(&mut abi::HwptSetDirtyTracking { flags: enable, hwpt_id, ..Default::default() });
    for (size, linux_clean, linux_dirty) in figures {
        bench.call(&mut bench.map(*size));
        let get = abi::HwptGetDirtyBitmap {
            hwpt_id,
            iova: IOVA,
            length: *size,
            page_size: 4 * K,
            data: BITMAP,
            ..Default::default()
        };
        // All pages written: the mock's bitmap is as long as the range has pages.
        let ones = vec![0xff; usize::try_from(*size / (32 * K)).unwrap_or(0)];
        let write = || {
            bench.process.put(BITMAP, &ones);
            let mut command = TestCmd { op: op::DIRTY, id: hwpt_id, ..TestCmd::default() };
            let member = test::DirtyPages {
                iova: IOVA,
                length: *size,
                page_size: 4 * K,
                uptr: BITMAP,
                ..test::DirtyPages::default()
            };
            member.write_to_prefix(command.union.as_mut_bytes()).expect("it fits");
            bench.call(&mut command);
        };
        let (all, clean) = fastest(|| {
            write();
            (bench.time(get), bench.time(get))
        });
        let name = "dirty: GET_DIRTY_BITMAP, clean";
        show(&row(name, scattered, *size, *linux_clean), clean, clock);
        let name = "dirty: GET_DIRTY_BITMAP, all dirty";
        show(&row(name, scattered, *size, *linux_dirty), all, clock);
        bench.call(&mut bench.unmap(IOVA, *size));
    }
    bench.call(&mut abi::Destroy { id: hwpt_id, ..Default::default() });
}

fn others(clock: u64) {
    let bench = Bench::new(false);
    let (bad, _) = fastest(|| (bench.time(abi::Destroy { id: 77, ..Default::default() }), 0));
    show(&row("other: DESTROY of nothing", false, 0, 90), bad, clock);
    let next = bench.device + 10;
    let (alloc, destroy) = fastest(|| {
        let alloc = bench.time(abi::IoasAlloc::default());
        let client: &dyn lychgate_iommufd::Client = &bench.process;
        let mut made = abi::IoasAlloc::default();
        client.read(SCRATCH, made.as_mut_bytes()).expect("it is there");
        assert!(made.out_ioas_id < next);
        (alloc, bench.time(abi::Destroy { id: made.out_ioas_id, ..Default::default() }))
    });
    show(&row("other: IOAS_ALLOC", false, 0, 270), alloc, clock);
    show(&row("other: DESTROY of an IOAS", false, 0, 210), destroy, clock);
    let ranges = abi::IoasIovaRanges {
        ioas_id: bench.ioas,
        num_iovas: 8,
        allowed_iovas: BITMAP,
        ..Default::default()
    };
    let (ranges, _) = fastest(|| (bench.time(ranges), 0));
    show(&row("other: IOAS_IOVA_RANGES", false, 0, 160), ranges, clock);
}
