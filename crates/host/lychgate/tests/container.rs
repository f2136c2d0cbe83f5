//! Under the system call filter of Docker's default profile, as a user without capabilities.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]
#![cfg(target_arch = "x86_64")]

mod common;

use std::collections::BTreeMap;
use std::process::{Command, Output};
use std::thread;

use common::{BDF, assert_success, have, lychgate_as_nobody, random_image, scratch, sha256};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// What Docker's default profile denies and something like lychgate might want: clone3 and unshare with
/// namespaces aside, these are the calls that need a capability there.
const DENIED: [i64; 11] = [
    libc::SYS_kcmp,
    libc::SYS_mount,
    libc::SYS_move_pages,
    libc::SYS_open_by_handle_at,
    libc::SYS_perf_event_open,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_madvise,
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// Runs a command as a container would run it.
fn contained(mut command: Command) -> Output {
    let rules = DENIED.map(|number| (number, Vec::new()));
    let filter: BpfProgram = SeccompFilter::new(
        BTreeMap::from(rules),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM.cast_unsigned()),
        TargetArch::x86_64,
    )
    .and_then(TryInto::try_into)
    .expect("a filter");
    // A filter stays with its thread and what that starts.
    thread::spawn(move || {
        seccompiler::apply_filter(&filter).expect("filtering");
        command.output().expect("lychgate")
    })
    .join()
    .expect("the thread")
}

#[test]
fn qemu_img_works_under_dockers_default_profile() {
    if !have("qemu-img") {
        return;
    }
    let directory = scratch();
    let image = random_image(directory.path(), "disk.img", 64 << 20);
    let copy = directory.path().join("copy.img");
    let Some(mut command) = lychgate_as_nobody(directory.path()) else { return };
    command
        .args(["run", "--nvme", &format!("{BDF}={}", image.display()), "--"])
        .args(["qemu-img", "convert", "-O", "raw", &format!("nvme://{BDF}/1")])
        .arg(&copy);
    assert_success(&contained(command));
    assert_eq!(sha256(&image), sha256(&copy));
}
