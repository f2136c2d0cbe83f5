//! Nanoseconds per operation of tables of each format, next to other crates and to what the same machine
//! needs for the bare stores or loads, in the same run.
//!
//! `cargo bench -p lychgate-io-pgtable -- [--quick] [--format json] [WORD...]`: each word must be part of
//! the name of the format or of the row, as in `-- arm walk`.
//!
//! Some of the other crates are not generic, so the compiler inlines little of them; with
//! `CARGO_PROFILE_BENCH_LTO=thin` it does.
//!
//! There is no hardware, so no invalidation; an unmap does all but waiting for it. Tables come from a pool
//! without locks, in huge pages.

#![deny(unsafe_code)]

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use lychgate_io_pgtable::{Config, Format, PageTable};

use support::arguments::{self, Arguments};
use support::contender::{Contender, Own};
use support::cursor::ByCursor;
use support::dirty::Tracked;
use support::floor::{Flat, fill, primitives, scan};
use support::formats::{Visitor, visit_all};
use support::measure::{Budget, Cost, nanoseconds, rounds};
use support::pool::{Pool, memory};
use support::report::{Report, Row, Scaling};
use support::resizing::Resized;
use support::rows::{Case, Goal, Shape, by_cursor, cases, far_walks, name, near_walks};

mod support {
    pub(crate) mod arguments;
    pub(crate) mod contender;
    pub(crate) mod cursor;
    pub(crate) mod dirty;
    pub(crate) mod floor;
    pub(crate) mod formats;
    pub(crate) mod machine;
    pub(crate) mod measure;
    #[cfg(target_arch = "x86_64")]
    pub(crate) mod peers;
    pub(crate) mod pool;
    pub(crate) mod report;
    pub(crate) mod resizing;
    pub(crate) mod rows;
    pub(crate) mod threads;
}

type Peers = Vec<(&'static str, Box<dyn Contender>)>;

/// Words of the array that floors are measured in, as many as the tables of the rows that leave the caches.
const FLAT_WORDS: usize = 1 << 23;
/// Table memory: of the first thread, and of each of two more.
const LANES: [u64; 3] = [352 << 20, 16 << 20, 16 << 20];

fn main() -> ExitCode {
    let arguments = match arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("{message}");
            return ExitCode::FAILURE;
        }
    };
    let Some(pool) = Pool::new(&LANES) else {
        return ExitCode::FAILURE;
    };
    let pool = Box::leak(Box::new(pool));
    let flat = memory(FLAT_WORDS);
    let report = Report::new(arguments.style);
    report.machine(&primitives(flat));
    let mut bench = Bench { pool, flat, arguments, report };
    visit_all(&mut bench);
    if bench.report.rows == 0 {
        eprintln!("No format and no row has these words in its name.");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

struct Bench {
    pool: &'static Pool,
    flat: &'static [AtomicU64],
    arguments: Arguments,
    report: Report,
}

impl Visitor for Bench {
    fn visit<F: Format>(&mut self, name: &'static str, config: Config<F>) {
        let Some(shape) = table(name, &config, self.pool).map(|table| Shape::of(&table)) else {
            return;
        };
        let section = Section { name, config, shape };
        self.report.begin(name);
        for case in cases(&section.shape) {
            self.mapping(&section, &case);
        }
        self.stepping(&section);
        self.walking(&section);
        self.resizing(&section);
        self.tracking(&section);
        self.threads(&section);
    }
}

/// An empty table of the format called `name`, when nobody uses the pool.
fn table<F: Format>(
    name: &str,
    config: &Config<F>,
    pool: &'static Pool,
) -> Option<PageTable<F, &'static Pool>> {
    pool.reset();
    // `Config` is `Clone` only where the format itself is.
    let config = Config { aperture: config.aperture.clone(), ..*config };
    let table = PageTable::new(pool, config);
    table.inspect_err(|error| eprintln!("No table of {name}: {error}")).ok()
}

/// The tables of one format.
struct Section<F: Format> {
    name: &'static str,
    config: Config<F>,
    shape: Shape,
}

impl<F: Format> Section<F> {
    fn table(&self, pool: &'static Pool) -> Option<PageTable<F, &'static Pool>> {
        table(self.name, &self.config, pool)
    }

    fn peers(&self, pool: &'static Pool) -> Peers {
        #[cfg(target_arch = "x86_64")]
        let peers = support::peers::of(self.name, pool);
        #[cfg(not(target_arch = "x86_64"))]
        let peers = Peers::new();
        peers
    }

    fn flat(&self, words: &'static [AtomicU64]) -> Flat {
        Flat::new(words, self.shape.page, self.shape.levels)
    }
}

impl Bench {
    fn wants(&self, format: &str, row: &str) -> bool {
        self.arguments.words.iter().all(|word| format.contains(word) || row.contains(word))
    }

    fn budget(&self) -> Budget {
        let milliseconds = if self.arguments.quick { 10 } else { 80 };
        Budget { time: Duration::from_millis(milliseconds), fewest: 5, most: 1 << 16 }
    }

    fn mapping<F: Format>(&mut self, section: &Section<F>, case: &Case) {
        if self.wants_either(section.name, case)
            && let Some(table) = section.table(self.pool)
        {
            let peers = section.peers(self.pool);
            self.compare(section, case, &mut Own(table), peers);
        }
    }

    fn stepping<F: Format>(&mut self, section: &Section<F>) {
        let case = by_cursor(&section.shape);
        if self.wants_either(section.name, &case)
            && let Some(table) = section.table(self.pool)
        {
            self.compare(section, &case, &mut ByCursor(table), Peers::new());
        }
        let walks = near_walks(&section.shape, [Goal::None; 2]);
        let name = format!("walk, {}, by a cursor", name(section.shape.page));
        if self.wants(section.name, &name)
            && let Some(table) = section.table(self.pool)
        {
            let (mut flat, mut own) = (section.flat(self.flat), ByCursor(table));
            own.map_all(&walks.mapped);
            let same = own.walk_with_one(&walks.iovas) == walks.sum;
            assert!(same, "{}: walks lead elsewhere", section.name);
            let costs = rounds(self.budget(), |times| {
                times.push(nanoseconds(|| {
                    black_box(flat.walk_all(&walks.iovas));
                }));
                times.push(nanoseconds(|| {
                    black_box(own.walk_with_one(&walks.iovas));
                }));
            });
            let costs = costs.iter().map(|cost| cost.per(walks.iovas.len() as f64)).collect();
            self.row(section.name, &name, "op", Goal::None, &Peers::new(), costs);
        }
    }

    fn wants_either(&self, format: &str, case: &Case) -> bool {
        case.names().iter().any(|row| self.wants(format, row))
    }

    /// Times maps and unmaps of `case` by `own` and `peers`, next to the bare stores.
    fn compare<F: Format>(
        &mut self,
        section: &Section<F>,
        case: &Case,
        own: &mut dyn Contender,
        mut peers: Peers,
    ) {
        let words = self.flat;
        let mut flat = section.flat(words);
        let costs = rounds(self.budget(), |times| {
            for contender in contenders(&mut flat, own, &mut peers) {
                if !case.cold {
                    // Brings back to the caches what the one before has put out.
                    contender.map_all(case);
                    contender.unmap_all(case);
                }
                chill(case.cold, words);
                times.push(nanoseconds(|| contender.map_all(case)));
                chill(case.cold, words);
                times.push(nanoseconds(|| contender.unmap_all(case)));
            }
        });
        for (step, (name, goal)) in case.names().iter().zip(case.goals).enumerate() {
            let costs = costs.iter().skip(step).step_by(2).map(|cost| cost.per(case.total()));
            self.row(section.name, name, case.unit, goal, &peers, costs.collect());
        }
    }

    fn walking<F: Format>(&mut self, section: &Section<F>) {
        let shape = &section.shape;
        let page = name(shape.page);
        let near = near_walks(shape, [Goal::Nanoseconds(2.5), Goal::Nanoseconds(7.5)]);
        let far = far_walks(shape, [Goal::None, Goal::None]);
        for (walks, place) in [(near, "walk"), (far, "walk at random")] {
            let names = [format!("{place}, {page}"), format!("{place}, {page}, in turn")];
            if !names.iter().any(|row| self.wants(section.name, row)) {
                continue;
            }
            let Some(table) = section.table(self.pool) else {
                return;
            };
            let (words, cold) = (self.flat, walks.mapped.cold);
            let (mut flat, mut own) = (section.flat(words), Own(table));
            let mut peers = section.peers(self.pool);
            let mut sums = Vec::new();
            for contender in contenders(&mut flat, &mut own, &mut peers) {
                contender.map_all(&walks.mapped);
                sums.push(contender.walk_all(&walks.iovas));
            }
            // All but the flat array lead to the same places.
            let same = sums.iter().skip(1).all(|&sum| sum == walks.sum);
            assert!(same, "{}: walks lead elsewhere", section.name);
            let costs = rounds(self.budget(), |times| {
                for contender in contenders(&mut flat, &mut own, &mut peers) {
                    contender.walk_in_turn(&walks.iovas);
                    chill(cold, words);
                    times.push(nanoseconds(|| {
                        black_box(contender.walk_all(&walks.iovas));
                    }));
                    chill(cold, words);
                    times.push(nanoseconds(|| contender.walk_in_turn(&walks.iovas)));
                }
            });
            for (step, (name, goal)) in names.iter().zip(walks.goals).enumerate() {
                let count = walks.iovas.len() as f64;
                let costs = costs.iter().skip(step).step_by(2).map(|cost| cost.per(count));
                self.row(section.name, name, "op", goal, &peers, costs.collect());
            }
        }
    }

    fn resizing<F: Format>(&mut self, section: &Section<F>) {
        let Some(block) = section.shape.block.map(name) else {
            return;
        };
        let page = name(section.shape.page);
        let names = [format!("cut {block} into {page}"), format!("join {page} into {block}")];
        if !names.iter().any(|row| self.wants(section.name, row)) {
            return;
        }
        let table = section.table(self.pool);
        let Some(resized) = table.and_then(|table| Resized::new(table, &section.shape)) else {
            return;
        };
        let pages = usize::try_from(resized.pages()).unwrap_or(0);
        let words = self.flat.get(..pages).unwrap_or(self.flat);
        let costs = rounds(self.budget(), |times| {
            times.push(nanoseconds(|| fill(words)));
            times.push(nanoseconds(|| resized.cut()));
            times.push(nanoseconds(|| assert!(!scan(words))));
            times.push(nanoseconds(|| resized.join()));
        });
        let costs: Vec<Cost> = costs.iter().map(|cost| cost.per(pages as f64)).collect();
        for (name, costs) in names.iter().zip(costs.chunks(2)) {
            self.row(section.name, name, "page", Goal::None, &Peers::new(), costs.to_vec());
        }
    }

    fn tracking<F: Format>(&mut self, section: &Section<F>) {
        if !F::TRACKS_DIRTY {
            return;
        }
        for (every, what) in [(u64::MAX, "one written"), (8, "an eighth written")] {
            let name = format!("read_dirty 1G as {}, {what}", name(section.shape.page));
            if !self.wants(section.name, &name) {
                continue;
            }
            let Some(tracked) = section.table(self.pool).map(Tracked::new) else {
                return;
            };
            let pages = usize::try_from(tracked.pages()).unwrap_or(0);
            let words = self.flat.get(..pages).unwrap_or(self.flat);
            let costs = rounds(self.budget(), |times| {
                times.push(nanoseconds(|| assert!(!scan(words))));
                tracked.write(every);
                times.push(nanoseconds(|| assert!(tracked.read() != 0)));
            });
            let costs = costs.iter().map(|cost| cost.per(pages as f64)).collect();
            self.row(section.name, &name, "page", Goal::None, &Peers::new(), costs);
        }
    }

    /// Prints one row, of which `costs` are those of the floor, the crate's own and the peers'.
    fn row(
        &mut self,
        format: &str,
        name: &str,
        unit: &str,
        goal: Goal,
        peers: &Peers,
        costs: Vec<Cost>,
    ) {
        if !self.wants(format, name) {
            return;
        }
        let mut costs = costs.into_iter();
        if let Some((floor, own)) = costs.next().zip(costs.next()) {
            let peers = peers.iter().map(|(peer, _)| *peer).zip(costs).collect();
            self.report.row(&Row { name, unit, own, floor, goal, peers });
        }
    }

    fn threads<F: Format>(&mut self, section: &Section<F>) {
        let processors = thread::available_parallelism().map_or(1, usize::from);
        if processors < 2 || !self.wants(section.name, "two threads") {
            return;
        }
        let Some(table) = section.table(self.pool) else {
            return;
        };
        let turns = if self.arguments.quick { 5 } else { 25 };
        let report = &mut self.report;
        support::threads::measure(&table, &section.shape, turns, |name, alone, together| {
            report.scaling(&Scaling { name, alone, together });
        });
    }
}

/// Fills the caches with `words` for what must find them `cold`.
fn chill(cold: bool, words: &[AtomicU64]) {
    if cold {
        black_box(scan(words));
    }
}

fn contenders<'a>(
    flat: &'a mut dyn Contender,
    own: &'a mut dyn Contender,
    peers: &'a mut Peers,
) -> impl Iterator<Item = &'a mut dyn Contender> {
    let peers = peers.iter_mut().map(|(_, peer)| -> &mut dyn Contender { &mut **peer });
    [flat, own].into_iter().chain(peers)
}
