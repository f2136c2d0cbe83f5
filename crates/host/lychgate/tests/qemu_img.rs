//! Debian's qemu-img, unchanged, does its I/O through our IOMMU.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::{
    BDF, assert_success, have, lychgate, lychgate_as_nobody, random_image, scratch, sha256, text,
};

const IMAGE_BYTES: u64 = 1 << 30;

fn nvme(image: &Path) -> String {
    format!("{BDF}={}", image.display())
}

fn url() -> String {
    format!("nvme://{BDF}/1")
}

fn run(image: &Path, program: &[&str]) -> Output {
    lychgate().args(["run", "--nvme", &nvme(image), "--"]).args(program).output().expect("lychgate")
}

#[test]
fn info_shows_the_size_of_the_namespace() {
    if !have("qemu-img") {
        return;
    }
    let directory = scratch();
    let image = random_image(directory.path(), "disk.img", 64 << 20);
    let output = run(&image, &["qemu-img", "info", "-f", "raw", &url()]);
    assert_success(&output);
    assert!(text(&output.stdout).contains("virtual size: 64 MiB (67108864 bytes)"));
}

#[test]
fn check_has_nothing_to_say_of_it() {
    if !have("qemu-img") {
        return;
    }
    let directory = scratch();
    let image = random_image(directory.path(), "disk.img", 64 << 20);
    let copy = directory.path().join("copy.img");
    let mut command = lychgate();
    command.args(["check", "--nvme", &nvme(&image), "--", "qemu-img", "convert", "-O", "raw"]);
    let output = command.arg(url()).arg(&copy).output().expect("lychgate");
    assert_success(&output);
    assert_eq!(text(&output.stderr), "lychgate: no findings\n");
    assert_eq!(sha256(&image), sha256(&copy));
}

#[test]
fn convert_moves_a_gibibyte_out_and_in_unchanged() {
    if !have("qemu-img") {
        return;
    }
    let directory = scratch();
    let image = random_image(directory.path(), "disk.img", IMAGE_BYTES);
    let copy = directory.path().join("copy.img");
    let output =
        run(&image, &["qemu-img", "convert", "-O", "raw", &url(), &copy.to_string_lossy()]);
    assert_success(&output);
    assert_eq!(sha256(&image), sha256(&copy));

    let back = directory.path().join("back.img");
    std::fs::File::create(&back).and_then(|file| file.set_len(IMAGE_BYTES)).expect("an empty disk");
    let output = run(
        &back,
        &["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", &copy.to_string_lossy(), &url()],
    );
    assert_success(&output);
    assert_eq!(sha256(&image), sha256(&back));
}

#[test]
fn bench_runs_at_depth_32_with_writes() {
    if !have("qemu-img") {
        return;
    }
    let directory = scratch();
    let image = random_image(directory.path(), "disk.img", 64 << 20);
    for extra in [&[][..], &["-w", "--flush-interval=512"]] {
        let mut program = vec!["qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "4000"];
        program.extend(["-d", "32", "-s", "4096"]);
        program.extend(extra);
        let url = url();
        program.push(&url);
        let output = run(&image, &program);
        assert_success(&output);
        assert!(text(&output.stdout).contains("Run completed in"));
    }
}

#[test]
fn a_user_without_any_privilege_can_do_the_same() {
    if !have("qemu-img") {
        return;
    }
    let directory = scratch();
    let image = random_image(directory.path(), "disk.img", 256 << 20);
    let (copy, url) = (directory.path().join("copy.img"), url());
    for program in [
        vec!["qemu-img", "info", "-f", "raw", &url],
        vec!["qemu-img", "convert", "-O", "raw", &url, &copy.to_string_lossy()],
        vec!["qemu-img", "convert", "-n", "-O", "raw", &copy.to_string_lossy(), &url],
        vec!["qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "1000", "-d", "32", &url],
    ] {
        let Some(mut lychgate) = lychgate_as_nobody(directory.path()) else { return };
        let output = lychgate.args(["run", "--nvme", &nvme(&image), "--"]).args(program).output();
        assert_success(&output.expect("lychgate"));
    }
    assert_eq!(sha256(&image), sha256(&copy));
}

#[test]
fn strace_works_inside_and_outside() {
    if !have("qemu-img") || !have("strace") {
        return;
    }
    let directory = scratch();
    let image = random_image(directory.path(), "disk.img", 16 << 20);
    let log = directory.path().join("strace.log");
    let strace = ["strace", "-f", "-o", &log.to_string_lossy()].map(str::to_owned);
    let info = ["qemu-img", "info", "-f", "raw", &url()].map(str::to_owned);

    let inside = strace.iter().chain(&info).map(String::as_str).collect::<Vec<_>>();
    assert_success(&run(&image, &inside));
    assert!(std::fs::read_to_string(&log).expect("a log").contains("/dev/vfio/vfio"));

    let outside = Command::new(&strace[0])
        .args(&strace[1..])
        .arg(env!("CARGO_BIN_EXE_lychgate"))
        .args(["run", "--nvme", &nvme(&image), "--"])
        .args(&info)
        .output()
        .expect("strace");
    assert_success(&outside);
    assert!(text(&outside.stdout).contains("virtual size: 16 MiB"));
}
