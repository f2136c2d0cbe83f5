//! Two threads in one table, on ranges that do not meet: how much faster than one.

use std::hint::black_box;
use std::sync::Barrier;
use std::thread;

use lychgate_io_pgtable::{Format, PageTable};
use lychgate_types::{PhysAddr, PhysRun};

use super::contender::{map, unmap, walk};
use super::measure::nanoseconds;
use super::pool::Pool;
use super::rows::{Shape, name};

/// What each thread does over and over, in a GiB of its own.
#[derive(Clone, Copy)]
enum Work {
    /// Maps and unmaps one page.
    Page,
    /// Maps and unmaps all of a lowest table, which is made and freed.
    WholeTable,
    Walk,
}

/// Each kind of work: its name, and nanoseconds per operation of one thread alone and of each of two.
pub(crate) fn measure<F: Format>(
    table: &PageTable<F, &'static Pool>,
    shape: &Shape,
    turns: usize,
    mut report: impl FnMut(&str, f64, f64),
) {
    let page = name(shape.page);
    let all = [
        (Work::Page, 2000, format!("map + unmap {page}, apart")),
        (
            Work::WholeTable,
            200,
            format!("map + unmap {} x {page}, own tables, apart", shape.entries),
        ),
        (Work::Walk, 4000, format!("walk {page}, apart")),
    ];
    for (work, loops, name) in all {
        // Whatever else the machine does makes some turns slower and none faster.
        let (mut alone, mut together) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..turns {
            alone = alone.min(turn(table, shape, work, loops, 1));
            together = together.min(turn(table, shape, work, loops, 2));
        }
        report(&name, alone, together);
    }
}

/// One turn of `threads` threads at once: nanoseconds per operation of the slowest.
fn turn<F: Format>(
    table: &PageTable<F, &'static Pool>,
    shape: &Shape,
    work: Work,
    loops: u32,
    threads: usize,
) -> f64 {
    let start = Barrier::new(threads);
    thread::scope(|scope| {
        let start = &start;
        let run = |thread: usize| {
            Pool::enter(thread + 1);
            let base = (thread as u64 + 1) << 30;
            let walked = [PhysRun { start: PhysAddr::new(base), len: 256 * shape.page }];
            if matches!(work, Work::Walk) {
                map(table, base, &walked);
            }
            repeat(table, shape, work, base, 64);
            start.wait();
            let time = nanoseconds(|| repeat(table, shape, work, base, loops));
            if matches!(work, Work::Walk) {
                unmap(table, base, 256 * shape.page);
            }
            time / f64::from(loops)
        };
        let running: Vec<_> = (0..threads).map(|n| scope.spawn(move || run(n))).collect();
        running.into_iter().filter_map(|thread| thread.join().ok()).fold(0.0, f64::max)
    })
}

#[inline(never)]
fn repeat<F: Format>(
    table: &PageTable<F, &'static Pool>,
    shape: &Shape,
    work: Work,
    base: u64,
    loops: u32,
) {
    let run =
        |pages: u64| [PhysRun { start: PhysAddr::new(base + shape.page), len: pages * shape.page }];
    let (one, whole) = (run(1), run(shape.entries));
    for n in 0..u64::from(loops) {
        let iova = base + n * 167 % 256 * shape.page;
        match work {
            Work::Page => {
                map(table, iova, &one);
                unmap(table, iova, shape.page);
            }
            Work::WholeTable => {
                map(table, base, &whole);
                unmap(table, base, shape.table());
            }
            Work::Walk => {
                black_box(walk(table, iova));
            }
        }
    }
}
