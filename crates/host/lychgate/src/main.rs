//! `lychgate`: runs programs that use VFIO or iommufd where neither exists.

#![forbid(unsafe_code)]

mod check;
mod cli;
mod demo;
mod huge_pages;
mod output;
mod run;
mod trace;

use std::process::ExitCode;

use clap::Parser;
use rustix::process::{Signal, getpid, kill_process};

use crate::cli::{Cli, Command};
use crate::run::Ended;

/// Exit code of a failure of lychgate itself, as of `env(1)` and `timeout(1)`.
const OWN_FAILURE: u8 = 125;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Run(run) => run::run(&run, cli.color),
        Command::Check(check) => check::check(&check, cli.color),
        Command::Explain { id } => return check::explain(id.as_deref()),
        Command::Demo(demo) => demo::demo(&demo, cli.color),
        Command::DemoClient { arguments } => {
            return lychgate_demo_client::main(arguments.into_iter());
        }
    };
    match result {
        Ok(Ended::Code(code)) => ExitCode::from(code),
        Ok(Ended::Signal(signal)) => end_by(signal),
        Err(failure) => {
            eprintln!("lychgate: {:#}", failure.error);
            ExitCode::from(failure.code)
        }
    }
}

/// Ends as the program ended, so that a shell that waits sees the same.
fn end_by(signal: i32) -> ExitCode {
    // The program has dumped its core if it wanted to: one is enough.
    let no_core = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, no_core).ok();
    if let Some(signal) = Signal::from_named_raw(signal) {
        kill_process(getpid(), signal).ok();
    }
    ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX))
}
