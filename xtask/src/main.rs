//! The project's own tasks.

mod ci;
mod conformance;
mod fuzz;
mod instructions;
mod qemu_root;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use instructions::Then;

/// The project's own tasks.
#[derive(Parser)]
enum Task {
    /// Everything that must hold before a change lands: format, lints, documentation, tests.
    Ci,
    /// Runs the kernel's own tests of iommufd against lychgate, as root: fetches and builds them too.
    Conformance(conformance::Arguments),
    /// Runs every fuzz target for a while.
    Fuzz {
        /// How long each one runs, in seconds.
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Counts the instructions of page-table operations with valgrind, and fails where they have become
    /// more.
    Instructions {
        /// Write the counts to the file that later ones are held against.
        #[arg(long)]
        accept: bool,
    },
    /// Builds a throw-away Debian root with the newest QEMU, for the tests that boot it.
    QemuRoot {
        /// A directory that does not exist yet, or that an earlier run has filled.
        directory: PathBuf,
    },
}

fn main() -> Result<()> {
    match Task::parse() {
        Task::Ci => ci::check(),
        Task::Conformance(arguments) => conformance::check(&arguments),
        Task::Fuzz { seconds } => fuzz::all(seconds),
        Task::Instructions { accept: true } => instructions::count(Then::Accept),
        Task::Instructions { accept: false } => instructions::count(Then::Compare),
        Task::QemuRoot { directory } => qemu_root::build(&directory),
    }
}

/// Runs a command and fails when it does.
fn run(command: &mut Command) -> Result<()> {
    eprintln!("xtask: {}", describe(command));
    let status = command.status().with_context(|| format!("starting {}", describe(command)))?;
    ensure!(status.success(), "{} failed: {status}", describe(command));
    Ok(())
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
