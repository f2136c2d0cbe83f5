//! Mistakes get a message that says what to do, and the right exit code.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Output;

use common::{BDF, lychgate, lychgate_as_nobody, scratch, skipped, text};

fn run(args: &[&str]) -> Output {
    lychgate().arg("run").args(args).output().expect("lychgate")
}

#[track_caller]
fn assert_refused(output: &Output, code: i32, want: &[&str]) {
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for part in want {
        assert!(said.contains(part), "{said}\ndoes not say: {part}");
    }
    assert!(!said.contains("panicked"), "{said}");
}

fn nvme(path: &Path) -> String {
    format!("{BDF}={}", path.display())
}

#[test]
fn an_image_that_does_not_exist() {
    let output = run(&["--nvme", &format!("{BDF}=/no/such/disk.img"), "--", "true"]);
    assert_refused(&output, 125, &["/no/such/disk.img", "No such file"]);
}

#[test]
fn an_image_that_is_no_whole_number_of_blocks() {
    let directory = scratch();
    let image = directory.path().join("short.img");
    fs::write(&image, [0; 1000]).expect("an image");
    assert_refused(&run(&["--nvme", &nvme(&image), "--", "true"]), 125, &["short.img", "512"]);
}

#[test]
fn an_empty_image() {
    let directory = scratch();
    let image = directory.path().join("empty.img");
    fs::write(&image, []).expect("an image");
    assert_refused(&run(&["--nvme", &nvme(&image), "--", "true"]), 125, &["empty.img", "empty"]);
}

#[test]
fn an_image_that_may_not_be_written() {
    let directory = scratch();
    let image = directory.path().join("locked.img");
    fs::write(&image, [0; 4096]).expect("an image");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).expect("chmod");
    let Some(mut lychgate) = lychgate_as_nobody(directory.path()) else { return };
    let output = lychgate.args(["run", "--nvme", &nvme(&image), "--", "true"]).output();
    assert_refused(&output.expect("lychgate"), 125, &["locked.img", ",ro"]);
}

#[test]
fn an_image_that_may_not_be_written_can_be_a_read_only_disk() {
    let directory = scratch();
    let image = directory.path().join("locked.img");
    fs::write(&image, [0; 4096]).expect("an image");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).expect("chmod");
    let Some(mut lychgate) = lychgate_as_nobody(directory.path()) else { return };
    let disk = format!("{},ro", nvme(&image));
    let output = lychgate.args(["run", "--nvme", &disk, "--", "true"]).output();
    assert_eq!(output.expect("lychgate").status.code(), Some(0));
}

#[test]
fn one_image_for_two_controllers() {
    let directory = scratch();
    let image = directory.path().join("disk.img");
    fs::write(&image, [0; 4096]).expect("an image");
    let second = format!("0000:02:00.0={}", image.display());
    let output = run(&["--nvme", &nvme(&image), "--nvme", &second, "--", "true"]);
    assert_refused(&output, 125, &["disk.img", "in use"]);
}

#[test]
fn one_address_for_two_devices() {
    let memory = format!("{BDF}=mem:1M");
    let output = run(&["--nvme", &memory, "--edu", BDF, "--", "true"]);
    assert_refused(&output, 125, &[BDF, "twice"]);
}

#[test]
fn an_address_that_is_none() {
    let output = run(&["--edu", "01.0", "--", "true"]);
    assert_refused(&output, 2, &["a PCI address is written", "0000:01:00.0"]);
}

#[test]
fn no_program_at_all() {
    assert_refused(&run(&["--edu", BDF]), 2, &["<PROGRAM>"]);
}

#[test]
fn a_program_that_does_not_exist() {
    assert_refused(&run(&["--", "no-such-program"]), 127, &["no-such-program", "no such program"]);
}

#[test]
fn a_program_that_may_not_be_executed() {
    let directory = scratch();
    let file = directory.path().join("data");
    fs::write(&file, "data").expect("a file");
    let output = run(&["--", &file.to_string_lossy()]);
    assert_refused(&output, 126, &["data"]);
}

#[test]
fn lychgate_in_lychgate() {
    let lychgate = env!("CARGO_BIN_EXE_lychgate");
    let output = run(&["--", lychgate, "run", "--", "true"]);
    assert_refused(&output, 125, &["already", "under lychgate"]);
}

#[test]
fn a_static_program_works() {
    let directory = scratch();
    let source = directory.path().join("static.c");
    let program = directory.path().join("static");
    fs::write(
        &source,
        "#include <fcntl.h>\n#include <sys/stat.h>\nint main(void) { struct stat s; int fd = \
         open(\"/dev/iommu\", O_RDWR); return fd < 0 || fstat(fd, &s) || !S_ISCHR(s.st_mode); }\n",
    )
    .expect("source");
    let compiled = std::process::Command::new("cc")
        .arg("-static")
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .status();
    if !compiled.is_ok_and(|status| status.success()) {
        skipped("no C compiler that links statically");
        return;
    }
    let output = run(&["--", &program.to_string_lossy()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

#[test]
fn the_exit_code_of_the_program_is_passed_through() {
    for code in [0, 1, 42, 255] {
        let output = run(&["--", "sh", "-c", &format!("exit {code}")]);
        assert_eq!(output.status.code(), Some(code), "{}", text(&output.stderr));
    }
}

#[test]
fn the_signal_that_ends_the_program_ends_lychgate() {
    use std::os::unix::process::ExitStatusExt;
    for signal in [1, 9, 15] {
        let output = run(&["--", "sh", "-c", &format!("kill -{signal} $$")]);
        assert_eq!(output.status.signal(), Some(signal), "{}", text(&output.stderr));
    }
}

#[test]
fn nothing_is_printed_when_nothing_is_wrong() {
    let output = run(&["--edu", BDF, "--", "true"]);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!((text(&output.stdout), text(&output.stderr)), (String::new(), String::new()));
}

#[test]
fn root_is_not_needed() {
    let directory = scratch();
    let Some(mut lychgate) = lychgate_as_nobody(directory.path()) else { return };
    let output = lychgate
        .args(["run", "--edu", BDF, "--", "ls", "/dev/vfio", "/dev/iommu"])
        .output()
        .expect("lychgate");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}
