//! A small user-space NVMe driver on the published `vfio-ioctls` and `iommufd-ioctls` crates, as
//! anybody would write it: it knows nothing of lychgate.
//!
//! It writes and reads back 64 MiB, once through an iommufd and a VFIO cdev and once through a VFIO
//! container and group, and then makes the mistake that an IOMMU is there for: it lets the device
//! write to a buffer that it has just unmapped.

pub mod memory;
pub mod nvme;
pub mod way;

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};

use crate::memory::DmaBuffer;
use crate::nvme::{Controller, Status};
use crate::way::{Opened, Way};

/// Bytes written and read back each way.
const TOTAL: u64 = 64 << 20;
const MIB: u64 = 1 << 20;

/// Runs the client with its command line arguments: the PCI address of the controller.
pub fn main(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let (Some(bdf), None) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: demo-client SEGMENT:BUS:DEVICE.FUNCTION");
        return ExitCode::from(2);
    };
    match run(&bdf) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo-client: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(bdf: &str) -> Result<()> {
    for way in [Way::Iommufd, Way::Container] {
        let opened = way.open(bdf)?;
        write_and_read_back(way, &opened).with_context(|| format!("through {way}"))?;
    }
    use_after_unmap(&Way::Iommufd.open(bdf)?)
}

fn write_and_read_back(way: Way, opened: &Opened) -> Result<()> {
    let mut controller = Controller::start(opened)?;
    let namespace = controller.namespace(1)?;
    ensure!(namespace.bytes() >= TOTAL, "the namespace is smaller than {} MiB", TOTAL / MIB);

    let transfer = controller.max_transfer().min(256 << 10);
    let depth = 16;
    let memory = DmaBuffer::new(opened, transfer * depth)?;
    let bar = progress(format!("{way:<34}"));
    for pass in [Pass::Write, Pass::Read] {
        let mut offset = 0;
        while offset < TOTAL {
            let round = (TOTAL - offset).min(transfer * depth);
            if pass == Pass::Write {
                for at in (0..round).step_by(8) {
                    memory.store_u64(at, pattern(offset + at));
                }
            } else {
                memory.fill(0xa5);
            }
            let mut slot = 0;
            while slot < round {
                let len = (round - slot).min(transfer);
                controller.submit(
                    &namespace,
                    pass == Pass::Write,
                    offset + slot,
                    &memory,
                    slot,
                    len,
                )?;
                slot += len;
            }
            for (command, status) in controller.finish()? {
                ensure!(status == Status::SUCCESS, "command {command:#x} failed: {status}");
            }
            if pass == Pass::Read {
                for at in (0..round).step_by(8) {
                    let (got, want) = (memory.load_u64(at), pattern(offset + at));
                    ensure!(got == want, "byte {}: read {got:#x}, wrote {want:#x}", offset + at);
                }
            }
            offset += round;
            bar.inc(round);
        }
    }
    bar.finish_and_clear();
    println!("{way:<34}  {} MiB written, read back and compared", TOTAL / MIB);
    Ok(())
}

fn use_after_unmap(opened: &Opened) -> Result<()> {
    let mut controller = Controller::start(opened)?;
    let namespace = controller.namespace(1)?;
    let good = DmaBuffer::new(opened, 4096)?;
    let mut gone = DmaBuffer::new(opened, 4096)?;
    gone.fill(0x5a);
    gone.unmap()?;

    println!("reading a block into a buffer that was just unmapped ...");
    controller.submit(&namespace, false, 0, &gone, 0, 4096)?;
    let failed = controller.finish()?;
    ensure!(
        failed.iter().all(|(_, status)| *status == Status::DATA_TRANSFER_ERROR),
        "the controller should have failed the command: {failed:?}"
    );
    ensure!(gone.is_filled_with(0x5a), "the device wrote to memory that was not its own");

    controller.submit(&namespace, false, 0, &good, 0, 4096)?;
    ensure!(controller.finish()?.iter().all(|(_, status)| *status == Status::SUCCESS));
    println!(
        "the command failed ({}), the memory is untouched, the next command works",
        Status::DATA_TRANSFER_ERROR
    );
    Ok(())
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Write,
    Read,
}

/// What stands at `offset` of the disk: different in every word, so that a block in the wrong place
/// shows.
fn pattern(offset: u64) -> u64 {
    (offset / 8).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn progress(label: String) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg}  {bar:30} {bytes:>10} of {total_bytes}  {bytes_per_sec}",
    );
    ProgressBar::new(2 * TOTAL)
        .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        .with_message(label)
}
