//! The file of accepted counts, and how new ones differ from it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail};

/// A count may exceed the accepted one by this factor.
const TOLERANCE: f64 = 1.03;

/// Counts, and what they depend on.
#[derive(Debug, PartialEq)]
pub(super) struct Counts {
    /// Version of the compiler and architecture.
    pub(super) compiler: String,
    pub(super) rows: Vec<Row>,
}

/// Instructions per operation, or per page of one.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) format: String,
    pub(super) name: String,
    pub(super) count: f64,
}

/// How counts differ from the accepted ones.
#[derive(Debug, Default)]
pub(super) struct Difference {
    /// Rows, from what, to what.
    risen: Vec<(String, f64, f64)>,
    fallen: Vec<(String, f64, f64)>,
    /// Rows that nobody has accepted.
    new: Vec<String>,
    /// Rows that were accepted and are not there.
    gone: Vec<String>,
    same: usize,
}

impl Counts {
    /// How `rows` differ from these.
    pub(super) fn compare(&self, rows: &[Row]) -> Difference {
        let mut accepted: BTreeMap<String, f64> =
            self.rows.iter().map(|row| (row.title(), row.count)).collect();
        let mut difference = Difference::default();
        for row in rows {
            let title = row.title();
            match accepted.remove(&title) {
                None => difference.new.push(title),
                Some(old) if row.count > old * TOLERANCE => {
                    difference.risen.push((title, old, row.count));
                }
                Some(old) if row.count * TOLERANCE < old => {
                    difference.fallen.push((title, old, row.count));
                }
                Some(_) => difference.same += 1,
            }
        }
        difference.gone = accepted.into_keys().collect();
        difference
    }
}

impl Row {
    fn title(&self) -> String {
        format!("{}: {}", self.format, self.name)
    }
}

impl Difference {
    /// Whether something has got worse, or is not what was accepted.
    pub(super) const fn fails(&self) -> bool {
        !(self.risen.is_empty() && self.new.is_empty() && self.gone.is_empty())
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (what, rows) in [("ROSE", &self.risen), ("fell", &self.fallen)] {
            for (title, old, new) in rows {
                let (old, new, change) = (figure(*old), figure(*new), (new / old - 1.0) * 100.0);
                writeln!(f, "{what}  {title:<50} {old:>8} -> {new:>8}  {change:+.1} %")?;
            }
        }
        for title in &self.new {
            writeln!(f, "NEW   {title}")?;
        }
        for title in &self.gone {
            writeln!(f, "GONE  {title}")?;
        }
        writeln!(
            f,
            "instructions: {} rose by more than 3 %, {} fell, {} are as they were",
            self.risen.len(),
            self.fallen.len(),
            self.same
        )
    }
}

const HEAD: &str = "\
# Instructions per operation, or per page where an operation takes many, as callgrind counts them.
# 'cargo xtask instructions' fails where one has risen by more than 3 %; with --accept it writes them anew.
";

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{HEAD}\n{}\n", self.compiler)?;
        let mut format = None;
        for row in &self.rows {
            if format != Some(&row.format) {
                format = Some(&row.format);
                write!(f, "\n[{}]\n", row.format)?;
            }
            writeln!(f, "{:<36} {:>9}", row.name, figure(row.count))?;
        }
        Ok(())
    }
}

impl FromStr for Counts {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut lines =
            text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
        let compiler = lines.next().context("nothing in it")?.to_owned();
        let mut rows = Vec::new();
        let mut format = None;
        for line in lines {
            if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
                format = Some(name);
                continue;
            }
            let (Some(format), Some((name, count))) = (format, line.rsplit_once(' ')) else {
                bail!("{line:?} is no count");
            };
            let count = count.parse().with_context(|| format!("{line:?} is no count"))?;
            rows.push(Row { format: format.to_owned(), name: name.trim_end().to_owned(), count });
        }
        Ok(Self { compiler, rows })
    }
}

/// Four digits: many counts are far below one instruction per page.
fn figure(count: f64) -> String {
    match count {
        ..1.0 => format!("{count:.4}"),
        1.0..10.0 => format!("{count:.3}"),
        10.0..100.0 => format!("{count:.2}"),
        _ => format!("{count:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(rows: &[(&str, f64)]) -> Counts {
        let row = |&(name, count): &(&str, f64)| Row {
            format: "amdv1, 4 levels".to_owned(),
            name: name.to_owned(),
            count,
        };
        Counts { compiler: "rustc 1.95, x86_64".to_owned(), rows: rows.iter().map(row).collect() }
    }

    #[test]
    fn what_is_written_is_read() {
        let mut some = counts(&[("map 4K", 61.25), ("unmap 1G as 4K", 0.0123)]);
        some.rows.push(Row { format: "vtdss".to_owned(), name: "map 4K".to_owned(), count: 312.5 });
        assert_eq!(some.to_string().parse::<Counts>().unwrap(), some);
    }

    #[test]
    fn a_rise_fails_and_a_fall_does_not() {
        let accepted = counts(&[("map", 100.0), ("unmap", 100.0), ("walk", 100.0)]);
        let fine =
            accepted.compare(&counts(&[("map", 102.9), ("unmap", 50.0), ("walk", 97.5)]).rows);
        assert!(!fine.fails());
        assert_eq!(fine.fallen.len(), 1);
        let worse =
            accepted.compare(&counts(&[("map", 103.1), ("unmap", 100.0), ("walk", 9.0)]).rows);
        assert!(worse.fails());
        assert_eq!(worse.risen, [("amdv1, 4 levels: map".to_owned(), 100.0, 103.1)]);
    }

    #[test]
    fn rows_that_come_or_go_fail() {
        let accepted = counts(&[("map", 100.0), ("walk", 30.0)]);
        let gone = accepted.compare(&counts(&[("map", 100.0)]).rows);
        assert!(gone.fails());
        assert_eq!(gone.gone, ["amdv1, 4 levels: walk"]);
        let rows = counts(&[("map", 100.0), ("walk", 30.0), ("unmap", 1.0)]).rows;
        let new = accepted.compare(&rows);
        assert!(new.fails());
        assert_eq!(new.new, ["amdv1, 4 levels: unmap"]);
    }

    #[test]
    fn a_broken_file_is_an_error() {
        assert!("".parse::<Counts>().is_err());
        assert!("rustc 1.95, x86_64\nmap 4K 61.0\n".parse::<Counts>().is_err());
        assert!("rustc 1.95, x86_64\n[amdv1]\nmap 4K much\n".parse::<Counts>().is_err());
    }
}
