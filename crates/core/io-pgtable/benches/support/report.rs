//! The table, or the same as lines of JSON.

use std::collections::HashMap;

use super::floor::Primitive;
use super::measure::Cost;
use super::rows::Goal;

/// How figures are printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Table,
    /// One object per line and row.
    Json,
}

/// One row: nanoseconds per unit.
pub(crate) struct Row<'a> {
    pub(crate) name: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) own: Cost,
    pub(crate) floor: Cost,
    pub(crate) goal: Goal,
    /// The peers that have the operation.
    pub(crate) peers: Vec<(&'static str, Cost)>,
}

/// One row of the threads: nanoseconds per operation of each.
pub(crate) struct Scaling<'a> {
    pub(crate) name: &'a str,
    pub(crate) alone: f64,
    pub(crate) together: f64,
}

/// By how much two threads should be faster than one.
const SCALING_GOAL: f64 = 1.95;

pub(crate) struct Report {
    style: Style,
    format: &'static str,
    /// What was printed last, so that a heading comes before its first row.
    heading: Heading,
    /// What peers cost, by peer and row, for the formats that have no such peer.
    seen: HashMap<(&'static str, String), f64>,
    pub(crate) rows: usize,
}

#[derive(PartialEq, Eq)]
enum Heading {
    None,
    Rows,
    Threads,
}

impl Report {
    pub(crate) fn new(style: Style) -> Self {
        Self { style, format: "", heading: Heading::None, seen: HashMap::new(), rows: 0 }
    }

    /// What the machine is made of, and what the columns are.
    pub(crate) fn machine(&self, primitives: &[Primitive]) {
        if self.style == Style::Json {
            for (name, cost) in primitives {
                println!(r#"{{"machine":"{name}","nanoseconds":{cost:.4}}}"#);
            }
            return;
        }
        let all = primitives.iter().map(|(name, cost)| format!("{name} {}", figure(*cost)));
        println!("Nanoseconds. This machine: {}.\n", all.collect::<Vec<_>>().join("; "));
        println!("{COLUMNS}");
        println!(
            "           {}",
            if option_env!("CARGO_PROFILE_BENCH_LTO").is_some() { LTO } else { NO_LTO }
        );
    }

    pub(crate) fn begin(&mut self, format: &'static str) {
        self.format = format;
        self.heading = Heading::None;
    }

    pub(crate) fn row(&mut self, row: &Row<'_>) {
        self.rows += 1;
        for &(peer, cost) in &row.peers {
            self.seen.entry((peer, row.name.to_owned())).or_insert(cost.median);
        }
        let goal = self.limit(row);
        match self.style {
            Style::Table => self.print(row, goal),
            Style::Json => self.json(row, goal),
        }
    }

    pub(crate) fn scaling(&mut self, row: &Scaling<'_>) {
        self.rows += 1;
        let factor = 2.0 * row.alone / row.together;
        let (name, alone, together) = (row.name, row.alone, row.together);
        if self.style == Style::Json {
            println!(
                r#"{{"format":"{}","row":"{name}, two threads","alone":{alone:.4},"together":{together:.4},"scaling":{factor:.3}}}"#,
                self.format,
            );
            return;
        }
        if self.heading != Heading::Threads {
            self.heading = Heading::Threads;
            println!(
                "{:<42} {:>9} {:>9} {:>8} {:>9}",
                "", "1 thread", "2 threads", "faster", "goal"
            );
        }
        let (alone, together) = (figure(alone), figure(together));
        println!("{name:<42} {alone:>9} {together:>9} {factor:>7.2}x {SCALING_GOAL:>8}x");
    }

    /// The goal of `row` in nanoseconds.
    fn limit(&self, row: &Row<'_>) -> Option<f64> {
        match row.goal {
            Goal::None => None,
            Goal::Nanoseconds(most) => Some(most),
            Goal::Floor(times) => Some(row.floor.median * times),
            Goal::Peer(peer) => self.seen.get(&(peer, row.name.to_owned())).copied(),
        }
    }

    fn print(&mut self, row: &Row<'_>, goal: Option<f64>) {
        if self.heading != Heading::Rows {
            self.heading = Heading::Rows;
            println!();
            print!(
                "{:<34} {:>7} {:>9} {:>9} {:>8}",
                self.format, "per", "lychgate", "floor", "x floor"
            );
            print!(" {:>9} {:>8}", "goal", "x goal");
            for (peer, _) in &row.peers {
                print!(" {peer:>14}");
            }
            let best = if row.peers.is_empty() { "" } else { "best peer x" };
            println!(" {best:>12}");
        }
        let own = row.own.median;
        let times = |of: f64| if of > 0.0 { format!("{:.2}", own / of) } else { "-".to_owned() };
        print!("{:<34} {:>7}", row.name, row.unit);
        print!(" {:>9} {:>9}", figure(own), figure(row.floor.median));
        print!(" {:>8}", times(row.floor.median));
        print!(
            " {:>9} {:>8}",
            goal.map_or("-".to_owned(), figure),
            goal.map_or("-".to_owned(), times)
        );
        for (_, cost) in &row.peers {
            print!(" {:>14}", figure(cost.median));
        }
        let best = row.peers.iter().map(|(_, cost)| cost.median).reduce(f64::min);
        print!(" {:>12}", best.map_or(String::new(), |best| format!("{:.2}", best / own)));
        if row.own.varies() {
            print!("  ({}..{})", figure(row.own.min), figure(row.own.max));
        }
        println!();
    }

    fn json(&self, row: &Row<'_>, goal: Option<f64>) {
        let peers = row.peers.iter().map(|(peer, cost)| format!(r#""{peer}":{:.4}"#, cost.median));
        println!(
            r#"{{"format":"{}","row":"{}","per":"{}","lychgate":{:.4},"min":{:.4},"max":{:.4},"floor":{:.4},"goal":{},"peers":{{{}}}}}"#,
            self.format,
            row.name,
            row.unit,
            row.own.median,
            row.own.min,
            row.own.max,
            row.floor.median,
            goal.map_or("null".to_owned(), |goal| format!("{goal:.4}")),
            peers.collect::<Vec<_>>().join(","),
        );
    }
}

const COLUMNS: &str = "\
per        what a figure is for: an operation, or one of its smallest (large) pages
lychgate   median of rounds, interleaved with all else in the row; (min..max) of the medians of five
           parts of the run where those are more than a quarter apart
floor      one call that only stores or loads as many words of a flat array as the leaves have entries;
           of a walk in turn, as many loads as levels, each needing the one before
goal       what the project aims at, measured on an AMD EPYC of family 26; for whole tables aarch64-paging,
           which frees them unread, and for 1G 1.05 of the floor
peers      crates that do the same; aarch64-paging in its own format of 4 levels; x86_64 and
           page_table_multiarch (multiarch) keep empty tables";

const LTO: &str = "here they have link-time optimisation";
const NO_LTO: &str = "\
with CARGO_PROFILE_BENCH_LTO=thin in the environment some are faster, and the crate's own is not";

/// Three digits or so.
fn figure(value: f64) -> String {
    match value {
        ..1.0 => format!("{value:.3}"),
        1.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}
