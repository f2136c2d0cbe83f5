//! `docs/conformance.md`: what the lists say, for people. The runs hold lychgate to them.

use std::fmt::Write;

use super::list::{Expected, List};

/// What a list expects, in numbers, and why not everything passes.
pub(crate) struct Tally {
    kernels: String,
    programs: Vec<Counts>,
    exceptions: Vec<Exception>,
}

struct Counts {
    name: String,
    passed: usize,
    skipped: usize,
    failed: usize,
}

/// Cases that do not pass for one reason.
struct Exception {
    what: &'static str,
    reason: String,
    cases: Vec<String>,
}

impl Tally {
    pub(crate) fn of(list: &List) -> Self {
        let mut exceptions: Vec<Exception> = Vec::new();
        let mut programs = Vec::new();
        for program in &list.programs {
            let mut counts =
                Counts { name: program.name.clone(), passed: 0, skipped: 0, failed: 0 };
            for case in &program.cases {
                let (count, what, reason) = match &case.expected {
                    Expected::Pass => {
                        counts.passed += 1;
                        continue;
                    }
                    Expected::Skip(reason) => (&mut counts.skipped, "skipped", reason),
                    Expected::Fail(reason) => (&mut counts.failed, "failed", reason),
                };
                *count += 1;
                let same = |exception: &&mut Exception| {
                    exception.what == what && exception.reason == *reason
                };
                match exceptions.iter_mut().find(same) {
                    Some(exception) => exception.cases.push(case.name.clone()),
                    None => {
                        let (reason, cases) = (reason.clone(), vec![case.name.clone()]);
                        exceptions.push(Exception { what, reason, cases });
                    }
                }
            }
            programs.push(counts);
        }
        Self { kernels: list.made_from.join(", "), programs, exceptions }
    }
}

/// The whole page.
pub(crate) fn render<'a>(tallies: impl Iterator<Item = &'a Tally> + Clone) -> String {
    let mut page = String::from(HEAD);
    for tally in tallies.clone() {
        for Counts { name, passed, skipped, failed } in &tally.programs {
            let cases = passed + skipped + failed;
            let kernels = &tally.kernels;
            let _ = writeln!(
                page,
                "| {kernels} | `{name}` | {cases} | {passed} | {skipped} | {failed} |"
            );
        }
    }
    for tally in tallies.filter(|tally| !tally.exceptions.is_empty()) {
        let kernels = &tally.kernels;
        let _ = write!(page, "\n## What does not pass of Linux {kernels}\n\n");
        for Exception { what, reason, cases } in &tally.exceptions {
            let cases: Vec<_> = cases.iter().map(|case| format!("  - `{case}`\n")).collect();
            let _ = write!(page, "- {what}: {reason}\n{}", cases.concat());
        }
    }
    page
}

const HEAD: &str = "\
# Conformance

The kernel tests iommufd with programs of its own, `tools/testing/selftests/iommu`. They were written against the kernel, know
nothing of lychgate, and decide what right is. `cargo xtask conformance` fetches them as Debian packages them, builds them
unchanged, and runs them as

    lychgate run --selftest -- ./iommufd
    lychgate run --selftest -- ./iommufd_fail_nth

CI does so too. Each case is held against a list in `conformance/`, which gives a reason for each one that does not pass; a case
that does better than its list is an error as well. This page is written by that command.

| Linux | program | cases | pass | skipped | fail |
|---|---|---:|---:|---:|---:|
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_counts_and_gives_reasons() {
        let text = "made-from 7.3.4\nprogram iommufd\npass a.b\nskip a.c none\nskip a.d none\n";
        let page = render([Tally::of(&List::parse("7.3", text).unwrap())].iter());
        assert!(page.contains("\n| 7.3.4 | `iommufd` | 3 | 1 | 2 | 0 |\n"), "{page}");
        assert!(page.ends_with("\n- skipped: none\n  - `a.c`\n  - `a.d`\n"), "{page}");
    }
}
