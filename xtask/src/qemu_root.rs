//! A throw-away Debian root with the newest QEMU that Debian packages.
//!
//! The machine's own package sources stay as they are: a foreign suite there would break it.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::run;

/// Debian suite of the root; QEMU comes from its backports.
const SUITE: &str = "trixie";

/// Fills `directory` with a minimal Debian and QEMU for x86. An earlier complete result is kept.
pub(crate) fn build(directory: &Path) -> Result<()> {
    if directory.join("usr/bin/qemu-system-x86_64").exists() {
        eprintln!("xtask: {} has QEMU already", directory.display());
        return Ok(());
    }
    let mirror = mirror()?;
    run(Command::new("debootstrap")
        .arg("--variant=minbase")
        .arg(SUITE)
        .arg(directory)
        .arg(&mirror))?;
    let apt = directory.join("etc/apt");
    fs::write(
        apt.join("sources.list.d/backports.list"),
        format!("deb {mirror} {SUITE}-backports main\n"),
    )?;
    // A mirror that lags is good enough: what it has is signed all the same.
    let options = "APT::Install-Recommends \"false\";\nAcquire::Check-Valid-Until \"false\";\n";
    fs::write(apt.join("apt.conf.d/99minimal"), options)?;
    run(in_root(directory).args(["apt-get", "-qq", "update"]))?;
    run(in_root(directory)
        .args(["apt-get", "-qq", "-y", "-t", &format!("{SUITE}-backports"), "install"])
        .args(["qemu-system-x86", "qemu-utils"])
        .env("DEBIAN_FRONTEND", "noninteractive"))
}

/// A command that is to run in a root.
pub(crate) fn in_root(directory: &Path) -> Command {
    let mut command = Command::new("chroot");
    command.arg(directory);
    command
}

/// The mirror that the machine itself uses.
pub(crate) fn mirror() -> Result<String> {
    let output = Command::new("apt-get")
        .args(["indextargets", "--format", "$(SITE) $(ORIGIN) $(LABEL)", "Created-By: Packages"])
        .output()
        .context("asking apt for its mirror")?;
    ensure!(output.status.success(), "apt-get indextargets failed: {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    text.lines()
        .find_map(|line| line.strip_suffix(" Debian Debian"))
        .map(str::to_owned)
        .context("apt knows no Debian mirror; run 'apt-get update' first")
}
