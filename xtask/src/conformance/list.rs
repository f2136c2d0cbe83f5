//! What is expected of each case.
//!
//! A list is lines of words. `made-from VERSION...` names the kernels it was made from, `newest VERSION`
//! the newest one of the series that it is for. `program NAME` begins the cases of a program: `pass
//! CASE`, `skip CASE REASON`, `fail CASE REASON`. Lines that begin with `#` are for people.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use anyhow::{Context, Result, bail, ensure};

use super::tap::{CaseResult, Outcome};

/// Expectations of one kernel series.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct List {
    /// `7.3`.
    pub(crate) series: String,
    pub(crate) made_from: Vec<String>,
    pub(crate) newest: Option<String>,
    pub(crate) programs: Vec<Program>,
}

/// A program and its cases, in its order.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Program {
    pub(crate) name: String,
    pub(crate) cases: Vec<Case>,
}

/// A case and what it does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) expected: Expected,
}

/// What a case does.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Expected {
    Pass,
    /// For this reason.
    Skip(String),
    /// For this reason.
    Fail(String),
}

/// A case that does something else.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Deviation {
    pub(crate) case: String,
    pub(crate) what: String,
}

impl fmt::Display for Deviation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.case, self.what)
    }
}

impl List {
    pub(crate) fn parse(series: &str, text: &str) -> Result<Self> {
        let mut list = Self {
            series: series.to_owned(),
            made_from: Vec::new(),
            newest: None,
            programs: Vec::new(),
        };
        for (number, line) in (1..).zip(text.lines()) {
            list.take(line.trim()).with_context(|| format!("line {number}: {line}"))?;
        }
        ensure!(!list.programs.is_empty(), "the list names no program");
        Ok(list)
    }

    fn take(&mut self, line: &str) -> Result<()> {
        if line.is_empty() || line.starts_with('#') {
            return Ok(());
        }
        let (word, rest) = line.split_once(' ').context("a line has at least two words")?;
        match word {
            "made-from" => self.made_from.extend(rest.split_whitespace().map(str::to_owned)),
            "newest" => self.newest = Some(rest.to_owned()),
            "program" => {
                self.programs.push(Program { name: rest.to_owned(), cases: Vec::new() });
            }
            _ => {
                let (name, reason) = rest.split_once(' ').unwrap_or((rest, ""));
                let reason = reason.trim().to_owned();
                let expected = match (word, reason.is_empty()) {
                    ("pass", true) => Expected::Pass,
                    ("skip", false) => Expected::Skip(reason),
                    ("fail", false) => Expected::Fail(reason),
                    ("skip" | "fail", true) => bail!("the reason is missing"),
                    _ => bail!("neither pass, skip nor fail"),
                };
                let program = self.programs.last_mut().context("no program is named yet")?;
                ensure!(program.cases.iter().all(|case| case.name != name), "this case is twice");
                program.cases.push(Case { name: name.to_owned(), expected });
            }
        }
        Ok(())
    }
}

impl Program {
    /// What does not do as expected, of the cases with `filter` in their name.
    pub(crate) fn deviations(&self, results: &[CaseResult], filter: &str) -> Vec<Deviation> {
        let mut deviations = Vec::new();
        let mut deviates = |case: &str, what: String| {
            deviations.push(Deviation { case: case.to_owned(), what });
        };
        let mut ran: BTreeMap<&str, usize> = BTreeMap::new();
        let expected: HashMap<&str, &Expected> =
            self.cases.iter().map(|case| (case.name.as_str(), &case.expected)).collect();
        for CaseResult { name, outcome } in results {
            *ran.entry(name).or_default() += 1;
            let Some(expected) = expected.get(name.as_str()) else {
                deviates(name, "the list does not know it".to_owned());
                continue;
            };
            match (expected, outcome) {
                (Expected::Pass, Outcome::Passed)
                | (Expected::Skip(_), Outcome::Skipped(_))
                | (Expected::Fail(_), Outcome::Failed(_)) => {}
                (_, Outcome::Failed(why)) => deviates(name, format!("failed: {why}")),
                (_, Outcome::Skipped(why)) => deviates(name, format!("skipped: {why}")),
                (Expected::Skip(reason), Outcome::Passed) => {
                    deviates(name, format!("passed, and should be skipped: {reason}"));
                }
                (Expected::Fail(reason), Outcome::Passed) => {
                    deviates(name, format!("passed, and should fail: {reason}"));
                }
            }
        }
        for case in self.cases.iter().filter(|case| case.name.contains(filter)) {
            match ran.get(case.name.as_str()) {
                None => deviates(&case.name, "did not run".to_owned()),
                Some(1) => {}
                Some(times) => deviates(&case.name, format!("ran {times} times")),
            }
        }
        deviations
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIST: &str = "\
# People read this.
made-from 7.3.4 7.3.5
newest 7.3.9

program iommufd
pass a.one
skip a.two there is none
fail a.three not yet
program other
pass b.one
";

    fn result(name: &str, outcome: Outcome) -> CaseResult {
        CaseResult { name: name.to_owned(), outcome }
    }

    fn deviations(results: &[CaseResult], filter: &str) -> Vec<String> {
        let list = List::parse("7.3", LIST).unwrap();
        let deviations = list.programs[0].deviations(results, filter);
        deviations.iter().map(Deviation::to_string).collect()
    }

    #[test]
    fn a_list_is_read() {
        let list = List::parse("7.3", LIST).unwrap();
        assert_eq!(list.made_from, ["7.3.4", "7.3.5"]);
        assert_eq!(list.newest.as_deref(), Some("7.3.9"));
        let names: Vec<_> = list.programs.iter().map(|program| program.name.as_str()).collect();
        assert_eq!(names, ["iommufd", "other"]);
        assert_eq!(list.programs[0].cases[2].expected, Expected::Fail("not yet".to_owned()));
    }

    #[test]
    fn a_list_without_reasons_or_with_a_case_twice_is_refused() {
        for text in ["program p\nskip a", "program p\npass a b", "pass a", "program p\nmaybe a x"] {
            assert!(List::parse("7.3", text).is_err(), "{text}");
        }
        assert!(List::parse("7.3", "program p\npass a\npass a").is_err());
        assert!(List::parse("7.3", "# nothing").is_err());
    }

    #[test]
    fn cases_that_do_as_expected_do_not_deviate() {
        let results = [
            result("a.one", Outcome::Passed),
            result("a.two", Outcome::Skipped("no".to_owned())),
            result("a.three", Outcome::Failed("x".to_owned())),
        ];
        assert_eq!(deviations(&results, ""), [""; 0]);
        assert_eq!(deviations(&results[..1], "a.one"), [""; 0]);
    }

    #[test]
    fn every_other_end_is_told() {
        let results = [
            result("a.one", Outcome::Skipped("hidden".to_owned())),
            result("a.two", Outcome::Passed),
            result("a.new", Outcome::Passed),
        ];
        assert_eq!(
            deviations(&results, ""),
            [
                "a.one: skipped: hidden",
                "a.two: passed, and should be skipped: there is none",
                "a.new: the list does not know it",
                "a.three: did not run",
            ]
        );
        let failed = [
            result("a.one", Outcome::Failed("x.c:1".to_owned())),
            result("a.one", Outcome::Passed),
            result("a.three", Outcome::Passed),
        ];
        assert_eq!(
            deviations(&failed, "a."),
            [
                "a.one: failed: x.c:1",
                "a.three: passed, and should fail: not yet",
                "a.one: ran 2 times",
                "a.two: did not run",
            ]
        );
    }
}
