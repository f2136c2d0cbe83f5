//! What `--selftest` adds for the kernel's own tests. Those run with `cargo xtask conformance`.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::{assert_success, lychgate, lychgate_as_nobody, scratch, text};

/// What a script says under `lychgate run` with some options.
#[track_caller]
fn says(options: &[&str], script: &str) -> String {
    let mut command = lychgate();
    command.arg("run").args(options).args(["--", "sh", "-c", script]);
    let output = command.output().expect("lychgate");
    assert_success(&output);
    text(&output.stdout)
}

#[test]
fn knobs_of_fault_injection_keep_what_is_written() {
    let script = "D=/sys/kernel/debug/failslab; echo N > $D/ignore-gfp-wait; \
                  cat $D/ignore-gfp-wait $D/verbose";
    assert_eq!(says(&["--selftest"], script), "N\n2\n");
}

#[test]
fn knobs_are_listed_beside_what_the_host_has_in_debugfs() {
    let listed = says(&["--selftest"], "ls /sys/kernel/debug");
    for name in ["failslab", "fail_page_alloc", "fail_iommufd"] {
        assert!(listed.lines().any(|line| line == name), "{listed}");
    }
}

#[test]
fn each_process_has_its_own_fail_nth() {
    let script = "echo 5 > /proc/$$/fail-nth; cat /proc/$$/fail-nth /proc/$$/task/$$/fail-nth \
                  /proc/self/fail-nth";
    assert_eq!(says(&["--selftest"], script), "5\n5\n0\n");
}

#[test]
fn nobody_can_use_them_too() {
    let directory = scratch();
    let Some(mut command) = lychgate_as_nobody(directory.path()) else { return };
    let script =
        "ls -d /sys/kernel/debug/failslab; echo 3 > /proc/$$/fail-nth; cat /proc/$$/fail-nth";
    let output = command.args(["run", "--selftest", "--", "sh", "-c", script]).output();
    let output = output.expect("lychgate");
    assert_success(&output);
    assert_eq!(text(&output.stdout), "/sys/kernel/debug/failslab\n3\n");
}

#[test]
fn other_machines_have_none_of_it() {
    let script = "for f in /proc/self/fail-nth /sys/kernel/debug/fail_iommufd; do \
                  test -e $f && echo $f; done; true";
    let host = std::path::Path::new("/proc/self/fail-nth").exists();
    assert!(host || says(&[], script).is_empty());
}
