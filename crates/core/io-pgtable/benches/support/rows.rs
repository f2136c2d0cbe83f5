//! What is measured: each row an operation and its inverse, in terms of a format's own page sizes.

use lychgate_io_pgtable::{Format, PageTable};
use lychgate_types::{Pages, PhysAddr, PhysRun};

/// The page sizes of a table, in bytes, and how far it reaches.
pub(crate) struct Shape {
    /// The smallest page.
    pub(crate) page: u64,
    /// Entries of a table.
    pub(crate) entries: u64,
    /// The page that one entry of a table of tables spans, if it can be one.
    pub(crate) block: Option<u64>,
    /// The page one level further up.
    giant: Option<u64>,
    /// A page of several entries of a lowest table: 1 MiB where there is one.
    contiguous: Option<u64>,
    /// Bytes that can be mapped, from IOVA 0.
    reach: u64,
    /// Loads of a walk to the smallest page.
    pub(crate) levels: u32,
}

impl Shape {
    pub(crate) fn of<F: Format, P: Pages>(table: &PageTable<F, P>) -> Self {
        let page = table.granule();
        let entries = 1 << F::INDEX_BITS;
        let sizes = table.page_sizes();
        let offered = |size: u64| (sizes & size != 0).then_some(size);
        let contiguous = sizes & !page & (page * entries - 1);
        let smallest = contiguous & contiguous.wrapping_neg();
        Self {
            page,
            entries,
            block: offered(page * entries),
            giant: (page * entries).checked_mul(entries).and_then(offered),
            contiguous: offered(1 << 20)
                .filter(|size| contiguous & size != 0)
                .or(offered(smallest)),
            reach: table.aperture().end().get().saturating_add(1),
            levels: table.root().levels,
        }
    }

    /// Bytes that a lowest table maps.
    pub(crate) const fn table(&self) -> u64 {
        self.page * self.entries
    }
}

/// What a cost is held against, by the project's own aims.
#[derive(Clone, Copy)]
pub(crate) enum Goal {
    None,
    /// No more nanoseconds per unit.
    Nanoseconds(f64),
    /// No more than this multiple of the bare stores.
    Floor(f64),
    /// No more than this crate.
    Peer(&'static str),
}

/// The crate to which unmapping of whole tables is held: it frees them unread.
pub(crate) const FREES_UNREAD: &str = "aarch64-paging";

/// One operation and its inverse, over `places`.
pub(crate) struct Case {
    pub(crate) name: String,
    /// What costs are per.
    pub(crate) unit: &'static str,
    pub(crate) places: Vec<u64>,
    /// The frames that are mapped at each place.
    pub(crate) runs: Vec<PhysRun>,
    /// Bytes per entry: the page size that the frames allow, or what one entry of several that make a
    /// page spans.
    pub(crate) leaf: u64,
    /// Units at each place.
    pub(crate) units: u64,
    /// Whether each operation waits for the one before it to retire.
    pub(crate) isolated: bool,
    /// Whether the tables are out of the caches each time.
    pub(crate) cold: bool,
    /// For a map, for an unmap.
    pub(crate) goals: [Goal; 2],
}

impl Case {
    /// What the rows of the map and of the unmap are called.
    pub(crate) fn names(&self) -> [String; 2] {
        ["map", "unmap"].map(|what| format!("{what} {}", self.name))
    }

    /// Bytes at each place.
    pub(crate) fn len(&self) -> u64 {
        self.runs.iter().map(|run| run.len).sum()
    }

    /// Units in all.
    pub(crate) fn total(&self) -> f64 {
        (self.places.len() as u64 * self.units) as f64
    }
}

const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
/// Where most rows map: no table on the way is the first of its kind.
const BASE: u64 = GIB;
/// Physical addresses begin here.
const FRAMES: u64 = 4 * GIB;
/// Places of rows that are long enough to be measured few at a time.
const FEW: u64 = 8;
/// Lowest tables of the rows whose tables are out of the caches, in bytes.
const FAR_BYTES: u64 = 64 << 20;

/// The rows that map and unmap.
pub(crate) fn cases(shape: &Shape) -> Vec<Case> {
    use Goal::{Floor, Nanoseconds, None, Peer};

    let (page, table) = (shape.page, shape.table());
    let frames = |start, len| vec![PhysRun { start: PhysAddr::new(start), len }];
    let few = |stride: u64| (0..FEW).map(|n| BASE + n * stride).collect::<Vec<_>>();
    let single = |size: u64, goals| Case {
        name: name(size),
        unit: "op",
        places: shuffled(256.min((shape.reach - BASE) / size)).map(|n| BASE + n * size).collect(),
        runs: frames(FRAMES, size),
        leaf: size,
        units: 1,
        isolated: false,
        cold: false,
        goals,
    };
    // Frames one page off what a larger page would need.
    let pages = |title: String, places, count: u64, goals| Case {
        name: title,
        unit: "page",
        places,
        runs: frames(FRAMES + page, count * page),
        leaf: page,
        units: count,
        isolated: false,
        cold: false,
        goals,
    };

    let mut cases = vec![
        single(page, [Nanoseconds(5.0), Nanoseconds(5.5)]),
        Case {
            name: format!("{}, isolated", name(page)),
            isolated: true,
            ..single(page, [None, None])
        },
    ];
    let large = [Nanoseconds(7.5), Nanoseconds(6.0)];
    cases.extend(shape.block.map(|size| single(size, large)));
    cases.extend(shape.giant.map(|size| single(size, large)));
    cases.extend(shape.contiguous.map(|size| {
        let goals = match size {
            0x10_0000 => [Nanoseconds(75.0), Nanoseconds(32.0)],
            _ => [None, None],
        };
        Case {
            name: format!("{} contiguous", name(size)),
            places: few(table),
            leaf: page,
            ..single(size, goals)
        }
    }));
    let title = |count, what: &str| format!("{count} x {}{what}", name(page));
    let run = [Nanoseconds(0.35), Nanoseconds(0.23)];
    cases.push(pages(title(256, ""), few(table), 256, run));
    let entries = shape.entries;
    let own = [Nanoseconds(0.18), Peer(FREES_UNREAD)];
    cases.push(pages(title(entries, ", own table"), few(table), entries, own));
    let halves = few(2 * table).iter().map(|place| place + table / 2).collect();
    cases.push(pages(title(entries, ", two tables"), halves, entries, run));
    cases.push(Case {
        runs: shuffled(512)
            .map(|n| PhysRun { start: PhysAddr::new(FRAMES + 2 * n * page), len: page })
            .collect(),
        ..pages(
            title(512, " scattered, a batch"),
            vec![BASE + table - 256 * page],
            512,
            [Nanoseconds(0.45), Nanoseconds(0.23)],
        )
    });
    let whole = [Floor(1.05), Peer(FREES_UNREAD)];
    cases.push(pages(format!("1G as {}", name(page)), vec![BASE], GIB / page, whole));
    if let Some(block) = shape.block.filter(|block| GIB / block >= FEW) {
        cases.push(Case {
            name: format!("1G as {}", name(block)),
            runs: frames(FRAMES + block, GIB),
            leaf: block,
            ..pages(String::new(), vec![BASE], GIB / block, [Nanoseconds(0.39), Nanoseconds(0.22)])
        });
    }
    let (places, span) = far(shape);
    cases.push(Case {
        name: format!("{} at random in {}", name(page), name(span)),
        places,
        cold: true,
        ..single(page, [None, None])
    });
    cases
}

/// What a cursor maps and unmaps page after page.
pub(crate) fn by_cursor(shape: &Shape) -> Case {
    let count = 256;
    let frames = PhysRun { start: PhysAddr::new(FRAMES + shape.page), len: count * shape.page };
    Case {
        name: format!("{count} x {}, by a cursor", name(shape.page)),
        ..mapped(shape, (0..FEW).map(|n| BASE + n * shape.table()).collect(), frames)
    }
}

/// Walks, and what must be mapped before.
pub(crate) struct Walks {
    pub(crate) mapped: Case,
    pub(crate) iovas: Vec<u64>,
    /// Where they lead, added up.
    pub(crate) sum: u64,
    /// For walks independent of each other, for one after the other.
    pub(crate) goals: [Goal; 2],
}

/// Walks to all pages of a table that is in the caches, in no order.
pub(crate) fn near_walks(shape: &Shape, goals: [Goal; 2]) -> Walks {
    let count = 256;
    let start = FRAMES + shape.page;
    let frames = PhysRun { start: PhysAddr::new(start), len: count * shape.page };
    let within = |n| n * shape.page + 8 * n;
    Walks {
        mapped: mapped(shape, vec![BASE], frames),
        iovas: shuffled(count).map(|n| BASE + within(n)).collect(),
        sum: (0..count).map(|n| start + within(n)).sum(),
        goals,
    }
}

/// Walks to pages far apart, with tables that are not in the caches.
pub(crate) fn far_walks(shape: &Shape, goals: [Goal; 2]) -> Walks {
    let (places, _) = far(shape);
    let iovas: Vec<u64> = places.iter().map(|place| place + 8).collect();
    let frame = PhysRun { start: PhysAddr::new(FRAMES), len: shape.page };
    let sum = (FRAMES + 8) * iovas.len() as u64;
    let mapped = Case { cold: true, ..mapped(shape, places, frame) };
    Walks { mapped, iovas, sum, goals }
}

fn mapped(shape: &Shape, places: Vec<u64>, frames: PhysRun) -> Case {
    Case {
        name: String::new(),
        unit: "page",
        places,
        units: frames.len / shape.page,
        runs: vec![frames],
        leaf: shape.page,
        isolated: false,
        cold: false,
        goals: [Goal::None; 2],
    }
}

/// A page in each of many tables, in no order; and how far they spread.
fn far(shape: &Shape) -> (Vec<u64>, u64) {
    let span = TIB.min(shape.reach);
    let count = FAR_BYTES / (shape.entries * 8);
    // Odd, so that all fall in different parts of an array of as many words.
    let apart = (span / shape.table() / count).saturating_sub(1) | 1;
    let page = |n: u64| (n * 167 + n / 64) % shape.entries * shape.page;
    let places = shuffled(count).map(|n| n * apart * shape.table() + page(n)).collect();
    (places, span)
}

/// All numbers below `count`, always in the same order, in which none follows its neighbour.
pub(crate) fn shuffled(count: u64) -> impl Iterator<Item = u64> {
    let mut numbers: Vec<u64> = (0..count).collect();
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    for left in (1..numbers.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let other = usize::try_from(random % (left as u64 + 1)).unwrap_or(0);
        numbers.swap(left, other);
    }
    numbers.into_iter()
}

/// A size as people write it: `4K`, `2M`, `1G`.
pub(crate) fn name(bytes: u64) -> String {
    match bytes {
        TIB.. => format!("{}T", bytes / TIB),
        GIB.. => format!("{}G", bytes / GIB),
        0x10_0000.. => format!("{}M", bytes >> 20),
        _ => format!("{}K", bytes >> 10),
    }
}
