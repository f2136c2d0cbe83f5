//! What a trapped call costs its caller, beside the same call by the kernel alone.
//!
//! Each figure is the median of batches. The supervisor is a process of its own, and it is the
//! client that measures.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    reason = "a benchmark that cannot start has nothing else to do, and its numbers are its own"
)]

#[path = "../tests/support/machine.rs"]
#[expect(dead_code, reason = "a part of the test machine is enough")]
mod machine;

use std::fs::File;
use std::hint::black_box;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lychgate_interpose::{Command, Options};

const BATCHES: usize = 41;
const CALLS: u32 = 500;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.iter().any(|argument| argument == "--client") {
        return measure(true);
    }
    println!("without a supervisor");
    measure(false);
    println!("under the supervisor");
    let own = std::env::current_exe().expect("this program");
    let command = Command::new(own).args(["--client"]);
    let status = lychgate_interpose::run(
        &command,
        machine::Machine::new(),
        &Options::default(),
        Arc::new(()),
    );
    println!("{status:?}");
}

fn measure(supervised: bool) {
    let null = File::open("/dev/null").expect("/dev/null");
    let ioctl = |fd: i32, command: u64, argument: u64| {
        // SAFETY: the argument is an address of this process or nothing.
        black_box(unsafe { libc::ioctl(fd, command, argument) });
    };
    report("getppid", || {
        // SAFETY: takes nothing.
        black_box(unsafe { libc::getppid() });
    });
    report("ioctl that is not ours", || ioctl(null.as_raw_fd(), 0x5401, 0));
    report("ioctl ';' on a foreign file", || ioctl(null.as_raw_fd(), machine::COUNT, 0));
    report("open and close a file of the host", || drop(File::open("/etc/passwd")));
    report("open and close a missing file", || drop(File::open("/usr/lib/missing")));
    if !supervised {
        return;
    }
    let device = File::open("/dev/fake").expect("the machine's node");
    let fd = device.as_raw_fd();
    let mut word = 0_u32;
    let address = (&raw mut word).addr() as u64;
    report("ioctl of the machine", || ioctl(fd, machine::COUNT, 0));
    report("ioctl that reads and writes 4 bytes", || ioctl(fd, machine::ADD, address));
    let mut bytes = [0; 4];
    report("pread", || drop(black_box(device.read_at(&mut bytes, 0))));
    report("fstat", || drop(black_box(device.metadata())));
    report("open and close a node", || drop(File::open("/dev/vfio/probe")));
}

/// Prints the median time of a call.
fn report(what: &str, mut call: impl FnMut()) {
    let mut batches: Vec<Duration> = (0..BATCHES)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..CALLS {
                call();
            }
            begin.elapsed() / CALLS
        })
        .collect();
    batches.sort_unstable();
    println!("  {what:36} {:>9.2?}", batches[BATCHES / 2]);
}
