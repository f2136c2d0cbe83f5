//! What the tests of the command line share.

#![allow(clippy::allow_attributes, dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// The PCI address that the tests use.
pub(crate) const BDF: &str = "0000:01:00.0";

/// The command under test.
pub(crate) fn lychgate() -> Command {
    Command::new(env!("CARGO_BIN_EXE_lychgate"))
}

/// The command under test, as a user without any privilege: as it is, or as `nobody` for root, from a
/// copy in `directory` that `nobody` can reach. `None`, with the reason printed, where that cannot be.
pub(crate) fn lychgate_as_nobody(directory: &Path) -> Option<Command> {
    if !rustix::process::geteuid().is_root() {
        return Some(lychgate());
    }
    if !have("setpriv") {
        return None;
    }
    let program = directory.join("lychgate");
    fs::copy(env!("CARGO_BIN_EXE_lychgate"), &program).expect("a copy");
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
        .args(["--bounding-set=-all", "--inh-caps=-all"])
        .arg(program)
        .current_dir(directory);
    Some(command)
}

/// A temporary directory that every user can use.
pub(crate) fn scratch() -> TempDir {
    let directory = TempDir::new().expect("a temporary directory");
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).expect("chmod");
    directory
}

/// A disk image of `bytes` bytes that differs everywhere, writable by every user.
pub(crate) fn random_image(directory: &Path, name: &str, bytes: u64) -> PathBuf {
    let path = directory.join(name);
    let mut file = fs::File::create(&path).expect("an image");
    let mut state = 0x2545_f491_4f6c_dd1d_u64 ^ bytes;
    let mut block = vec![0_u8; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        for word in block.as_chunks_mut::<8>().0 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *word = state.to_le_bytes();
        }
        let now = usize::try_from(left.min(1 << 20)).expect("at most 1 MiB");
        file.write_all(&block[..now]).expect("writing an image");
        left -= now as u64;
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).expect("chmod");
    path
}

/// The SHA-256 of a file.
pub(crate) fn sha256(path: &Path) -> String {
    use sha2::{Digest, Sha256};
    let mut hasher = Sha256::new();
    std::io::copy(&mut fs::File::open(path).expect("opening"), &mut hasher).expect("reading");
    format!("{:x}", hasher.finalize())
}

/// Says why a test is skipped, past the harness, which keeps what a passing test prints.
pub(crate) fn skipped(reason: &str) {
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    writeln!(std::io::stderr(), "skipped: {test}: {reason}").expect("standard error");
}

/// Whether `program` is on the path; prints why a test is skipped when it is not.
pub(crate) fn have(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|directory| directory.join(program).exists());
    if !found {
        skipped(&format!("{program} is not installed"));
    }
    found
}

/// Whether the test runs as root; prints why a test is skipped when it does not.
pub(crate) fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        skipped("needs root, to become another user or to change its root directory");
    }
    root
}

/// Asserts that a command succeeded, with what it printed.
#[track_caller]
pub(crate) fn assert_success(output: &Output) {
    assert!(
        output.status.success(),
        "{}\n--- stdout\n{}\n--- stderr\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
}

/// Output as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
