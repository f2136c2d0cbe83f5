//! Times: interleaved rounds, their median, and how far they are apart.

use std::time::{Duration, Instant};

/// How long one row is measured.
#[derive(Clone, Copy)]
pub(crate) struct Budget {
    /// For all its contenders together.
    pub(crate) time: Duration,
    /// But no fewer rounds than this.
    pub(crate) fewest: usize,
    /// And no more.
    pub(crate) most: usize,
}

/// Nanoseconds, with the range of a run's parts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl Cost {
    /// The cost of one of `count` alike.
    pub(crate) fn per(self, count: f64) -> Self {
        Self { median: self.median / count, min: self.min / count, max: self.max / count }
    }

    /// Whether parts of the run differ by more than a quarter.
    pub(crate) fn varies(&self) -> bool {
        self.max > self.min * 1.25
    }
}

/// Parts into which the rounds of a row are cut to see how steady they were.
const PARTS: usize = 5;

/// Runs `round`, which gives nanoseconds of each of its steps in a fixed order, again and again; gives
/// each step's cost. The first round only warms up.
pub(crate) fn rounds(budget: Budget, mut round: impl FnMut(&mut Vec<f64>)) -> Vec<Cost> {
    let clock = clock();
    let mut steps: Vec<Vec<f64>> = Vec::new();
    let mut times = Vec::new();
    round(&mut times);
    let start = Instant::now();
    for done in 0..budget.most {
        if done >= budget.fewest && start.elapsed() > budget.time {
            break;
        }
        times.clear();
        round(&mut times);
        steps.resize(times.len(), Vec::new());
        for (step, &time) in steps.iter_mut().zip(&times) {
            step.push((time - clock).max(0.0));
        }
    }
    steps.iter().map(|samples| cost(samples)).collect()
}

fn cost(samples: &[f64]) -> Cost {
    let part = samples.len().div_ceil(PARTS).max(1);
    let medians: Vec<f64> = samples.chunks(part).map(median).collect();
    Cost {
        median: median(samples),
        min: medians.iter().copied().fold(f64::INFINITY, f64::min),
        max: medians.iter().copied().fold(0.0, f64::max),
    }
}

fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Nanoseconds that `work` takes, and the clock with it.
pub(crate) fn nanoseconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e9
}

/// The least of `times` of what `measure` gives.
pub(crate) fn fastest(times: usize, mut measure: impl FnMut() -> f64) -> f64 {
    (0..times).map(|_| measure()).fold(f64::INFINITY, f64::min)
}

/// What reading the clock adds to a time.
fn clock() -> f64 {
    let samples: Vec<f64> = (0..101).map(|_| nanoseconds(|| ())).collect();
    median(&samples)
}
