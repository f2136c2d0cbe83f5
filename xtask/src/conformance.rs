//! Runs the kernel's own tests of iommufd against lychgate, and holds each case against a list.
//!
//! The tests are those of `tools/testing/selftests/iommu`, fetched and built at run time, unchanged.
//! `conformance/iommufd-SERIES.txt` says of every case whether it passes, and if not, why.

mod list;
mod report;
mod suite;
mod tap;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use std::{env, fs, io};

use anyhow::{Context, Result, bail, ensure};

use crate::run;
use list::{List, Program};
use suite::{Suite, Unavailable};
use tap::Outcome;

/// Where roots, sources and programs are kept, unless somebody says otherwise.
const KEPT: &str = "/var/tmp/lychgate-conformance";

/// Kernel series with a list, the newest first.
const SERIES: [&str; 2] = ["7.3", "6.12"];

/// How long one program may take, in seconds: many times what it needs.
const PATIENCE: &str = "300";

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Where what was fetched and built is kept for the next run [default: LYCHGATE_CONFORMANCE_ROOT, or
    /// /var/tmp/lychgate-conformance].
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
    /// Only the tests of this kernel series: 7.3, 6.12.
    #[arg(long, value_name = "SERIES")]
    suite: Option<String>,
    /// Only the cases with this text in their name.
    #[arg(long, value_name = "CASE")]
    filter: Option<String>,
    /// Try this lychgate rather than a release build of the sources.
    #[arg(long, value_name = "PROGRAM")]
    lychgate: Option<PathBuf>,
}

/// Runs what was asked for. Fails when a case does not do what its list says.
pub(crate) fn check(arguments: &Arguments) -> Result<()> {
    let filter = arguments.filter.as_deref().unwrap_or_default();
    let lists = lists(arguments.suite.as_deref())?;
    let kept = kept(arguments.keep.as_deref());
    let lychgate = match &arguments.lychgate {
        Some(program) => program.clone(),
        None => build()?,
    };
    let mut tallies = Vec::new();
    for list in lists {
        let suite = Suite::fetch(&kept, &list)?.build()?;
        tallies.push((report::Tally::of(&list), compare(&list, &suite, &lychgate, filter)?));
    }
    conclude(&tallies, arguments.suite.is_none() && filter.is_empty())
}

/// As [`check`] with everything, except that tests which cannot be had are skipped, with the reason.
pub(crate) fn check_in_ci() -> Result<()> {
    let (kept, lychgate) = (kept(None), build()?);
    let mut tallies = Vec::new();
    for list in lists(None)? {
        match Suite::fetch(&kept, &list) {
            Ok(suite) => {
                let deviations = compare(&list, &suite.build()?, &lychgate, "")?;
                tallies.push((report::Tally::of(&list), deviations));
            }
            Err(Unavailable(reason)) => {
                eprintln!("xtask: skipped: the tests of Linux {}: {reason:#}", list.series);
            }
        }
    }
    let complete = tallies.len() == SERIES.len();
    conclude(&tallies, complete)
}

/// Writes the report, if it is about everything, and fails where something deviates.
fn conclude(tallies: &[(report::Tally, usize)], complete: bool) -> Result<()> {
    if complete {
        let path = repository().join("docs/conformance.md");
        let text = report::render(tallies.iter().map(|(tally, _)| tally));
        if fs::read_to_string(&path).ok().as_deref() != Some(&*text) {
            fs::write(&path, text).with_context(|| path.display().to_string())?;
            eprintln!("xtask: {} is new", path.display());
        }
    }
    let deviations: usize = tallies.iter().map(|(_, deviations)| deviations).sum();
    ensure!(deviations == 0, "{deviations} cases do not do what their list says");
    Ok(())
}

/// Runs the programs of a suite and prints what deviates from the list; gives how much does.
fn compare(list: &List, suite: &Suite, lychgate: &Path, filter: &str) -> Result<usize> {
    let version = &suite.version;
    if !list.made_from.contains(version) {
        let known = list.made_from.join(", ");
        eprintln!("xtask: this is Linux {version}; the list was made from {known}");
    }
    let mut deviations = 0;
    let asked = |program: &&Program| program.cases.iter().any(|case| case.name.contains(filter));
    for program in list.programs.iter().filter(asked) {
        let begin = Instant::now();
        let text = output(lychgate, &suite.programs, program, filter)?;
        let results = tap::parse(&text)?;
        let took = begin.elapsed().as_secs_f32();
        let count = |outcome: fn(&Outcome) -> bool| {
            results.iter().filter(|result| outcome(&result.outcome)).count()
        };
        eprintln!(
            "xtask: Linux {version}, {}: {} passed, {} skipped, {} failed of {} in {took:.1} s",
            program.name,
            count(|outcome| matches!(outcome, Outcome::Passed)),
            count(|outcome| matches!(outcome, Outcome::Skipped(_))),
            count(|outcome| matches!(outcome, Outcome::Failed(_))),
            results.len(),
        );
        for deviation in program.deviations(&results, filter) {
            deviations += 1;
            eprintln!("    {deviation}");
        }
    }
    Ok(deviations)
}

/// What a program prints: results on its standard output, and why on its standard error.
fn output(lychgate: &Path, at: &Path, program: &Program, filter: &str) -> Result<String> {
    let (mut reader, writer) = io::pipe().context("making a pipe")?;
    let mut command = Command::new("timeout");
    command.args(["--kill-after=10", PATIENCE]).arg(lychgate).args(["run", "--selftest", "--"]);
    command.arg(at.join(&program.name)).stdin(Stdio::null());
    command.stdout(writer.try_clone()?).stderr(writer);
    if !filter.is_empty() {
        for case in program.cases.iter().filter(|case| case.name.contains(filter)) {
            command.args(["-r", &case.name]);
        }
    }
    let mut child = command.spawn().context("starting lychgate")?;
    // It holds the other end of the pipe.
    drop(command);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    // The program fails when a case does; the list decides whether that is right. Lychgate's own
    // failures have codes of their own.
    match child.wait()?.code() {
        Some(code @ 125..=127) => {
            bail!("lychgate failed with {code} for {}:\n{text}", program.name)
        }
        _ => Ok(text),
    }
}

/// The lists of the series that are asked for.
fn lists(series: Option<&str>) -> Result<Vec<List>> {
    if let Some(series) = series
        && !SERIES.contains(&series)
    {
        bail!("there is no list for Linux {series}, only for {}", SERIES.join(", "));
    }
    let wanted = SERIES.iter().filter(|known| series.is_none_or(|series| series == **known));
    wanted
        .map(|series| {
            let path = repository().join(format!("conformance/iommufd-{series}.txt"));
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            List::parse(series, &text).with_context(|| path.display().to_string())
        })
        .collect()
}

fn kept(asked: Option<&Path>) -> PathBuf {
    match asked {
        Some(directory) => directory.to_owned(),
        None => env::var_os("LYCHGATE_CONFORMANCE_ROOT").unwrap_or_else(|| KEPT.into()).into(),
    }
}

/// Builds the program under test as people use it.
fn build() -> Result<PathBuf> {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    run(Command::new(cargo).args(["build", "--release", "--quiet", "--package", "lychgate"]))?;
    // This program is in the same target directory: TARGET/debug/xtask.
    let this = env::current_exe().context("finding the target directory")?;
    let target = this.parent().and_then(Path::parent).context("finding the target directory")?;
    Ok(target.join("release/lychgate"))
}

fn repository() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}
