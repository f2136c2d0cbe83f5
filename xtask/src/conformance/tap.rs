//! What the kernel's test harness prints: version 13 of the Test Anything Protocol
//! (`Documentation/dev-tools/ktap.rst`, `kselftest_harness.h`).

use anyhow::{Context, Result, ensure};

/// How a case ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// It passed.
    Passed,
    /// It did not run to its end, and says why.
    Skipped(String),
    /// It failed; the first assertion that did, where one was printed.
    Failed(String),
}

/// One case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct CaseResult {
    /// `FIXTURE.VARIANT.TEST`, or `FIXTURE.TEST` without variants.
    pub(crate) name: String,
    pub(crate) outcome: Outcome,
}

/// Reads what a program printed. A program that was ended early has printed fewer cases than it
/// planned, which is the caller's to see.
pub(crate) fn parse(text: &str) -> Result<Vec<CaseResult>> {
    let plan =
        text.lines().find_map(plan).context("the program printed no plan: it did not start")?;
    let mut results: Vec<CaseResult> = Vec::new();
    let mut assertion = None;
    for line in text.lines() {
        if let Some(mut result) = result(line) {
            if let Outcome::Failed(why) = &mut result.outcome {
                *why = assertion.take().unwrap_or_else(|| "it says nothing".to_owned());
            }
            assertion = None;
            results.push(result);
        } else if assertion.is_none() {
            assertion = failed_assertion(line);
        }
    }
    ensure!(results.len() <= plan, "{} cases were planned, {} ran", plan, results.len());
    Ok(results)
}

/// `1..246`.
fn plan(line: &str) -> Option<usize> {
    line.strip_prefix("1..")?.split_whitespace().next()?.parse().ok()
}

/// `ok 3 NAME`, `ok 4 NAME # SKIP reason`, `not ok 5 NAME`.
fn result(line: &str) -> Option<CaseResult> {
    let (passed, rest) = match line.strip_prefix("not ok ") {
        Some(rest) => (false, rest),
        None => (true, line.strip_prefix("ok ")?),
    };
    let (number, rest) = rest.split_once(' ')?;
    number.parse::<usize>().ok()?;
    let (name, directive) = match rest.split_once(" # ") {
        Some((name, directive)) => (name, Some(directive)),
        None => (rest, None),
    };
    let skipped = directive.and_then(|directive| directive.strip_prefix("SKIP"));
    let outcome = match (passed, skipped) {
        (_, Some(reason)) => Outcome::Skipped(reason.trim().to_owned()),
        (true, None) => Outcome::Passed,
        (false, None) => Outcome::Failed(String::new()),
    };
    Some(CaseResult { name: name.trim().to_owned(), outcome })
}

/// `# iommufd.c:626:simple_close:Expected 0 (0) == ioctl(...) (-1)`, a timeout, or a signal.
fn failed_assertion(line: &str) -> Option<String> {
    let line = line.strip_prefix("# ")?.trim();
    let of_interest = ["Expected ", "timeout", "terminated by", "signal"];
    let location = line.contains(".c:") || line.contains(".h:");
    let worth =
        of_interest.iter().any(|word| line.contains(word)) && (location || !line.contains(" ... "));
    worth.then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\
TAP version 13
1..5
# Starting 5 tests from 2 test cases.
#  RUN           iommufd.cmd_fail ...
#            OK  iommufd.cmd_fail
ok 1 iommufd.cmd_fail
#  RUN           iommufd.map_cmd ...
# iommufd.c:80:map_cmd:Expected -1 (-1) == ioctl(self->fd, VFIO_IOMMU_MAP_DMA, &cmd) (0)
# iommufd.c:81:map_cmd:Expected 22 (22) == errno (0)
# map_cmd: Test failed
#          FAIL  iommufd.map_cmd
not ok 2 iommufd.map_cmd
#  RUN           iommufd_viommu.no_viommu.hw_queue ...
#      SKIP      Skipping test for variant no_viommu
#            OK  iommufd_viommu.no_viommu.hw_queue
ok 3 iommufd_viommu.no_viommu.hw_queue # SKIP Skipping test for variant no_viommu
# map: Test terminated by timeout
not ok 4 iommufd.map
";

    #[test]
    fn cases_end_as_they_are_printed() {
        let results = parse(OUTPUT).unwrap();
        let outcomes: Vec<_> =
            results.iter().map(|result| (result.name.as_str(), &result.outcome)).collect();
        let text = |text: &str| text.to_owned();
        assert_eq!(
            outcomes,
            [
                ("iommufd.cmd_fail", &Outcome::Passed),
                (
                    "iommufd.map_cmd",
                    &Outcome::Failed(text(
                        "iommufd.c:80:map_cmd:Expected -1 (-1) == ioctl(self->fd, \
                         VFIO_IOMMU_MAP_DMA, &cmd) (0)"
                    ))
                ),
                (
                    "iommufd_viommu.no_viommu.hw_queue",
                    &Outcome::Skipped(text("Skipping test for variant no_viommu"))
                ),
                ("iommufd.map", &Outcome::Failed(text("map: Test terminated by timeout"))),
            ]
        );
    }

    #[test]
    fn what_is_no_result_is_none() {
        for line in ["ok", "ok then", "okay 3 x", "not ok x y", "# ok 1 x", "1..3"] {
            assert_eq!(result(line), None, "{line}");
        }
    }

    #[test]
    fn a_program_without_a_plan_or_with_more_than_planned_is_an_error() {
        assert!(parse("").is_err());
        assert!(parse("1..1\nok 1 a\nok 2 b\n").is_err());
    }
}
