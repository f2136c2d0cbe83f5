//! A small NVMe user: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    lychgate_demo_client::main(std::env::args().skip(1))
}
