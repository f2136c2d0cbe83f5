//! Instructions per page-table operation, counted by callgrind and held against a file in the repository.
//!
//! Times depend on what else a machine does, so no test asserts on them. Counts do not: the same compiler
//! makes the same ones everywhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, process};

use anyhow::{Context, Result, bail, ensure};

use crate::describe;
use counts::{Counts, Row};

mod counts;

/// The accepted counts.
const FILE: &str = "crates/core/io-pgtable/benches/instructions.txt";

/// The function of `benches/instructions.rs` in which callgrind counts. It writes a file per call.
const COUNTED: &str = "instructions::counted";

/// What to do with the counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// Fail where they exceed the accepted ones, or without valgrind.
    Compare,
    /// The same, but pass without valgrind.
    CompareIfPossible,
    /// Accept them.
    Accept,
}

/// Counts and compares, or accepts.
pub(crate) fn count(then: Then) -> Result<()> {
    if let Err(error) = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status() {
        ensure!(then == Then::CompareIfPossible, "valgrind does not run ({error}): install it");
        eprintln!("xtask: instructions are not counted: valgrind does not run ({error})");
        return Ok(());
    }
    let file = root().join(FILE);
    let compiler = compiler()?;
    if then == Then::Accept {
        let counts = Counts { compiler, rows: measure()? };
        fs::write(&file, counts.to_string()).with_context(|| format!("writing {FILE}"))?;
        eprintln!("xtask: {} counts are in {FILE}", counts.rows.len());
        return Ok(());
    }
    let text = fs::read_to_string(&file).with_context(|| format!("reading {FILE}"))?;
    let accepted: Counts = text.parse().with_context(|| format!("reading {FILE}"))?;
    if accepted.compiler != compiler {
        eprintln!(
            "xtask: instructions are not compared: those in {FILE} are of {}, this is {compiler}",
            accepted.compiler
        );
        return Ok(());
    }
    let difference = accepted.compare(&measure()?);
    eprint!("{difference}");
    ensure!(
        !difference.fails(),
        "instruction counts differ from {FILE}; if they are meant to, run \
         'cargo xtask instructions --accept' and commit the file"
    );
    Ok(())
}

/// Runs the operations under callgrind.
fn measure() -> Result<Vec<Row>> {
    let directory = env::temp_dir().join(format!("lychgate-instructions-{}", process::id()));
    fs::create_dir(&directory).with_context(|| format!("creating {}", directory.display()))?;
    let rows = measure_in(&directory);
    fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    rows
}

fn measure_in(directory: &Path) -> Result<Vec<Row>> {
    let out = directory.join("out");
    let runner = [
        "valgrind".to_owned(),
        "--quiet".to_owned(),
        "--tool=callgrind".to_owned(),
        "--collect-atstart=no".to_owned(),
        format!("--toggle-collect={COUNTED}"),
        format!("--dump-after={COUNTED}"),
        format!("--callgrind-out-file={}", out.display()),
    ];
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(root())
        .args(["bench", "--quiet", "-p", "lychgate-io-pgtable", "--bench", "instructions"])
        .arg("--config")
        .arg(format!("target.'cfg(all())'.runner = {runner:?}"))
        // What is inlined must not depend on how the crate is cut into pieces.
        .args(["--config", "profile.bench.package.lychgate-io-pgtable.codegen-units = 1"])
        .stderr(Stdio::inherit());
    eprintln!("xtask: {}", describe(&command));
    let output = command.output().context("starting cargo bench")?;
    ensure!(output.status.success(), "cargo bench failed: {}", output.status);
    let lines = String::from_utf8(output.stdout).context("output of the benchmark")?;
    let rows = (1..).zip(lines.lines()).map(|(number, line)| {
        let part = directory.join(format!("out.{number}"));
        let part = fs::read_to_string(&part)
            .with_context(|| format!("callgrind wrote no counts of call {number}, {line:?}"))?;
        row(line, &part).with_context(|| format!("counts of call {number}, {line:?}"))
    });
    let rows: Vec<Row> = rows.collect::<Result<_>>()?;
    ensure!(!rows.is_empty(), "the benchmark counted nothing");
    Ok(rows)
}

/// What a line of the benchmark and the file that callgrind wrote with it say.
fn row(line: &str, part: &str) -> Result<Row> {
    let mut words = line.split('\t');
    let (Some(format), Some(name), Some(units)) = (words.next(), words.next(), words.next()) else {
        bail!("the line has not three parts");
    };
    let units: f64 = units.parse().context("number of operations")?;
    let total = part.lines().find_map(|line| line.strip_prefix("summary: "));
    let total: f64 = total.context("no summary")?.trim().parse().context("summary")?;
    Ok(Row { format: format.to_owned(), name: name.to_owned(), count: total / units })
}

/// What the counts depend on besides the sources.
fn compiler() -> Result<String> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc).arg("--version").output().context("starting rustc")?;
    let text = String::from_utf8(output.stdout).context("version of rustc")?;
    let version = text.split_whitespace().nth(1).context("version of rustc")?;
    let minor: Vec<&str> = version.split('.').take(2).collect();
    Ok(format!("rustc {}, {}", minor.join("."), env::consts::ARCH))
}

/// The directory of the workspace.
fn root() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}
