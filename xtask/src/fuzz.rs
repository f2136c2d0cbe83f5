//! The fuzz targets, one after the other.
//!
//! They need the nightly compiler and `cargo install cargo-fuzz`, which CI does not have.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::run;

/// An input that takes longer than this, in seconds, is a finding: something does not end.
const TIMEOUT: u32 = 15;

/// Runs every target for `seconds` seconds. The corpora that they grow stay in `fuzz/corpus`.
pub(crate) fn all(seconds: u32) -> Result<()> {
    for target in targets()? {
        run(cargo_fuzz().args([
            "run",
            &target,
            "--",
            &format!("-max_total_time={seconds}"),
            &format!("-timeout={TIMEOUT}"),
            // Sequences are long from the start: short ones find little.
            "-len_control=0",
        ]))?;
    }
    Ok(())
}

/// The names of the targets in `fuzz/Cargo.toml`.
fn targets() -> Result<Vec<String>> {
    let listed = cargo_fuzz()
        .arg("list")
        .stderr(Stdio::inherit())
        .output()
        .context("starting cargo +nightly fuzz")?;
    ensure!(
        listed.status.success(),
        "cargo fuzz does not run: it needs 'rustup toolchain install nightly' and \
         'cargo install cargo-fuzz'"
    );
    let names = String::from_utf8(listed.stdout).context("names of fuzz targets")?;
    Ok(names.lines().map(str::to_owned).collect())
}

/// cargo-fuzz under the nightly compiler, whichever compiler runs this.
fn cargo_fuzz() -> Command {
    let mut command = Command::new("cargo");
    command.args(["+nightly", "fuzz"]);
    command
}
