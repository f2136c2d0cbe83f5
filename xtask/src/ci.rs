//! What CI checks, in the order in which a failure is cheapest to find.

use std::env;
use std::process::Command;

use anyhow::Result;

use crate::conformance;
use crate::instructions::{self, Then};
use crate::run;

/// Runs every check. `cargo test --workspace` is the test command of the README; the rest keeps the
/// sources in shape, and the kernel's own tests have the last word.
pub(crate) fn check() -> Result<()> {
    let cargo = || Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    run(cargo()
        .args(["doc", "--workspace", "--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings"))?;
    for package in NO_STD {
        run(cargo().args([
            "clippy",
            "-p",
            package,
            "--lib",
            "--no-default-features",
            "--",
            "-D",
            "warnings",
        ]))?;
    }
    run(cargo().args(["build", "--release"]))?;
    instructions::count(Then::CompareIfPossible)?;
    run(cargo().args(["test", "--workspace"]))?;
    races(&mut cargo())?;
    conformance::check_in_ci()
}

/// The races on page tables, under the model checker loom. Everything is built for it anew, so that
/// has a directory of its own.
fn races(cargo: &mut Command) -> Result<()> {
    run(cargo
        .args(["test", "-p", "lychgate-io-pgtable", "--test", "races"])
        .args(["--target-dir", "target/loom"])
        .env("RUSTFLAGS", "--cfg loom"))
}

/// Crates that a kernel or hypervisor embeds: they must build without the standard library.
const NO_STD: [&str; 4] =
    ["lychgate-types", "lychgate-io-pgtable", "lychgate-iommu", "lychgate-amd-vi"];
