//! What the machine needs for the bare stores and loads, and for a call.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};

use lychgate_types::PhysRun;

use super::contender::Table;
use super::measure::{fastest, nanoseconds};
use super::rows::shuffled;

/// A flat array as a page table of one level: no walk, no check, one call that stores or loads as many
/// words as the leaves of the operation have.
pub(crate) struct Flat {
    words: &'static [AtomicU64],
    page_shift: u32,
    levels: u32,
}

impl Flat {
    /// `words` are a power of two; addresses beyond them wrap around.
    pub(crate) const fn new(words: &'static [AtomicU64], page: u64, levels: u32) -> Self {
        Self { words, page_shift: page.trailing_zeros(), levels }
    }

    #[inline(always)]
    fn slots(&self, iova: u64, len: u64, leaf: u64) -> &[AtomicU64] {
        // Division would be the most expensive part.
        let shift = leaf.trailing_zeros();
        let from = self.index(iova >> shift);
        let count = usize::try_from(len >> shift).unwrap_or(usize::MAX);
        self.words.get(from..from + count).unwrap_or(&[])
    }

    #[inline(always)]
    fn index(&self, number: u64) -> usize {
        usize::try_from(number).unwrap_or(usize::MAX) & (self.words.len() - 1)
    }
}

impl Table for Flat {
    #[inline(never)]
    fn map(&mut self, iova: u64, runs: &[PhysRun], leaf: u64) {
        if let [run] = runs {
            store::<4096>(self.slots(iova, run.len, leaf), run.start.get() | 1);
            return;
        }
        let slots = self.slots(iova, leaf * runs.len() as u64, leaf);
        for (word, run) in slots.iter().zip(runs) {
            word.store(run.start.get() | 1, Ordering::Relaxed);
        }
    }

    #[inline(never)]
    fn unmap(&mut self, iova: u64, len: u64, leaf: u64) {
        store::<0>(self.slots(iova, len, leaf), 0);
    }

    #[inline(never)]
    fn walk(&mut self, iova: u64) -> u64 {
        let word = self.words.get(self.index(iova >> self.page_shift));
        word.map_or(0, |word| word.load(Ordering::Relaxed))
    }

    #[inline(never)]
    fn dependent_walk(&mut self, iova: u64) -> u64 {
        let zero = ZERO.load(Ordering::Relaxed);
        let start = self.index(iova >> self.page_shift);
        let mut found = 0;
        for _ in 0..self.levels {
            let at = start + self.index(found & zero);
            found = self.words.get(at).map_or(0, |word| word.load(Ordering::Relaxed));
        }
        found
    }
}

/// 0, which the compiler does not know.
static ZERO: AtomicU64 = AtomicU64::new(0);

/// Stores `first` and what comes after it, `STEP` apart.
#[inline(always)]
fn store<const STEP: u64>(words: &[AtomicU64], first: u64) {
    if let [word] = words {
        return word.store(first, Ordering::Relaxed);
    }
    let mut entry = first;
    let (chunks, rest) = words.as_chunks::<8>();
    for chunk in chunks {
        for (word, n) in chunk.iter().zip(0..) {
            word.store(entry + STEP * n, Ordering::Relaxed);
        }
        entry += 8 * STEP;
    }
    for word in rest {
        word.store(entry, Ordering::Relaxed);
        entry += STEP;
    }
}

/// Stores to all of `words`.
#[inline(never)]
pub(crate) fn fill(words: &[AtomicU64]) {
    store::<4096>(words, 0);
}

/// Reads `words` for one bit that none has.
#[inline(never)]
pub(crate) fn scan(words: &[AtomicU64]) -> bool {
    let (chunks, rest) = words.as_chunks::<8>();
    let mut lanes = [0; 8];
    for chunk in chunks {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane |= word.load(Ordering::Relaxed);
        }
    }
    let all = rest.iter().fold(0, |all, word| all | word.load(Ordering::Relaxed));
    lanes.iter().fold(all, |all, lane| all | lane) >> 63 != 0
}

/// One figure of the machine: what, and nanoseconds.
pub(crate) type Primitive = (&'static str, f64);

/// What this machine is made of, in `words` of at least 32 MiB.
pub(crate) fn primitives(words: &'static [AtomicU64]) -> Vec<Primitive> {
    const LOOPS: usize = 4096;
    let per_loop = |mut once: Box<dyn FnMut()>| {
        fastest(9, || nanoseconds(|| (0..LOOPS).for_each(|_| once()))) / LOOPS as f64
    };
    let mut all = vec![
        ("empty call", fastest(9, || nanoseconds(calls)) / CALLS as f64),
        ("locked add", {
            let word = AtomicU64::new(0);
            per_loop(Box::new(move || {
                word.fetch_add(1, Ordering::Relaxed);
            }))
        }),
    ];
    for (name, count) in [("store, of 4K", 512), ("store, of 2M", 1 << 18)] {
        let slots = words.get(..count).unwrap_or(words);
        let again = (1 << 18) / count;
        let fill = || (0..again).for_each(|n| store::<4096>(black_box(slots), n as u64));
        all.push((name, fastest(9, || nanoseconds(fill)) / (again * count) as f64));
    }
    let chases = [("load, of 16K", 14), ("load, of 512K", 19), ("load, of 32M", 25)];
    for (name, shift) in chases {
        all.push((name, chase(words.get(..1 << (shift - 3)).unwrap_or(words))));
    }
    all
}

const CALLS: u64 = 4096;

fn calls() {
    for n in 0..CALLS {
        empty(n);
    }
}

#[inline(never)]
fn empty(n: u64) -> u64 {
    black_box(n)
}

/// Nanoseconds of a load that needs the one before it, in a ring of the cache lines of `words`.
fn chase(words: &[AtomicU64]) -> f64 {
    const LINE: u64 = 8;
    let lines: Vec<u64> = shuffled(words.len() as u64 / LINE).map(|line| line * LINE).collect();
    let followers = lines.iter().skip(1).chain(lines.first());
    let at = |index: u64| usize::try_from(index).ok().and_then(|index| words.get(index));
    for (&line, &next) in lines.iter().zip(followers) {
        if let Some(word) = at(line) {
            word.store(next, Ordering::Relaxed);
        }
    }
    let loads = lines.len().clamp(1 << 12, 1 << 18);
    let mut line = 0;
    let cost = fastest(3, || {
        nanoseconds(|| {
            for _ in 0..loads {
                line = at(line).map_or(0, |word| word.load(Ordering::Relaxed));
            }
        })
    });
    black_box(line);
    cost / loads as f64
}
