//! The same operations for callgrind to count: `cargo xtask instructions`, which says how.
//!
//! Each line of output is one call of [`counted`], in their order: format, row, and over how many
//! operations, or pages of one, the call goes.

#![deny(unsafe_code)]

use std::hint::black_box;

use lychgate_io_pgtable::{Config, Format, PageTable};

use support::contender::{Contender, Own};
use support::cursor::ByCursor;
use support::dirty::Tracked;
use support::formats::{Visitor, visit_all};
use support::pool::Pool;
use support::resizing::Resized;
use support::rows::{Case, Goal, Shape, by_cursor, cases, name, near_walks};

mod support {
    #[expect(dead_code, reason = "walks in turn are measured in time only")]
    pub(crate) mod contender;
    pub(crate) mod cursor;
    pub(crate) mod dirty;
    pub(crate) mod formats;
    pub(crate) mod machine;
    #[expect(dead_code, reason = "there is one thread here")]
    pub(crate) mod pool;
    pub(crate) mod resizing;
    #[expect(dead_code, reason = "goals are nanoseconds")]
    pub(crate) mod rows;
}

/// Table memory in bytes.
const BYTES: u64 = 32 << 20;

fn main() {
    if let Some(pool) = Pool::new(&[BYTES]) {
        visit_all(&mut Counts { pool: Box::leak(Box::new(pool)) });
    }
}

/// What callgrind counts: it starts and stops with this function.
#[inline(never)]
fn counted(work: &mut dyn FnMut()) {
    work();
    black_box(());
}

/// Counts maps and unmaps of `case`.
fn count(format: &str, case: &Case, own: &mut dyn Contender) {
    // Makes the tables that stay.
    own.map_all(case);
    own.unmap_all(case);
    counted(&mut || own.map_all(case));
    counted(&mut || own.unmap_all(case));
    for name in case.names() {
        println!("{format}\t{name}\t{}", case.total());
    }
}

struct Counts {
    pool: &'static Pool,
}

impl Visitor for Counts {
    fn visit<F: Format>(&mut self, format: &'static str, config: Config<F>) {
        if !GATED.contains(&format) {
            return;
        }
        let table = || {
            self.pool.reset();
            let config = Config { aperture: config.aperture.clone(), ..config };
            PageTable::new(self.pool, config)
                .inspect_err(|error| eprintln!("No table of {format}: {error}"))
        };
        let Ok(shape) = table().map(|table| Shape::of(&table)) else {
            return;
        };
        // What waits, or finds nothing in the caches, takes no more instructions for it.
        for case in cases(&shape).iter().filter(|case| !case.isolated && !case.cold) {
            let Ok(table) = table() else {
                return;
            };
            count(format, case, &mut Own(table));
        }
        if let Ok(table) = table() {
            count(format, &by_cursor(&shape), &mut ByCursor(table));
        }
        let page = name(shape.page);
        if let Ok(mut own) = table().map(Own) {
            let walks = near_walks(&shape, [Goal::None; 2]);
            own.map_all(&walks.mapped);
            counted(&mut || {
                black_box(own.walk_all(&walks.iovas));
            });
            println!("{format}\twalk, {page}\t{}", walks.iovas.len());
        }
        if let Some(resized) = table().ok().and_then(|table| Resized::new(table, &shape)) {
            // Makes the list of displaced tables, if that is kept.
            resized.cut();
            resized.join();
            counted(&mut || resized.cut());
            counted(&mut || resized.join());
            println!("{format}\tcut into {page}\t{}", resized.pages());
            println!("{format}\tjoin {page}\t{}", resized.pages());
        }
        if F::TRACKS_DIRTY
            && let Ok(tracked) = table().map(Tracked::new)
        {
            tracked.write(8);
            counted(&mut || {
                black_box(tracked.read());
            });
            println!("{format}\tread_dirty 1G as {page}\t{}", tracked.pages());
        }
    }
}

/// The formats to watch: of those that differ only in how many levels they have, one.
const GATED: [&str; 8] = [
    "x86_64, 4 levels",
    "amdv1, 4 levels",
    "vtdss, 4 levels",
    "riscv Sv48",
    "riscv Sv39x4",
    "arm stage 1, 4K",
    "arm stage 1, 64K",
    "arm stage 2, 16K",
];
