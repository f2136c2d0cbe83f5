//! QEMU assigns our NVMe controller to a guest, whose firmware boots from it.
//!
//! The newest QEMU lives in a throw-away root (`cargo xtask qemu-root DIR`), which
//! `LYCHGATE_QEMU_ROOT` names; without it these tests skip.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use common::{BDF, is_root, lychgate, scratch, skipped, text};

/// What the boot sector says on the serial port.
const GREETING: &str = "booted from lychgate's disk";

/// The exit status of QEMU when the guest writes 0x10 to its debug exit port: `0x10 << 1 | 1`.
const GUEST_EXIT: i32 = 0x21;

#[test]
fn seabios_boots_from_our_disk_through_iommufd() {
    let args = format!("-object iommufd,id=i0 -device vfio-pci,host={BDF},iommufd=i0,bootindex=0");
    boots("iommufd", &args);
}

#[test]
fn seabios_boots_from_our_disk_through_a_container() {
    boots("container", &format!("-device vfio-pci,host={BDF},bootindex=0"));
}

#[test]
fn seabios_boots_with_guest_memory_in_a_memfd() {
    let args = format!(
        "-object memory-backend-memfd,id=m0,size=128M -machine memory-backend=m0 \
         -object iommufd,id=i0 -device vfio-pci,host={BDF},iommufd=i0,bootindex=0"
    );
    boots("memfd", &args);
}

#[test]
fn seabios_boots_under_qemus_own_sandbox() {
    let args = format!(
        "-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
         -object iommufd,id=i0 -device vfio-pci,host={BDF},iommufd=i0,bootindex=0"
    );
    boots("sandbox", &args);
}

#[test]
fn seabios_boots_under_check_without_a_finding() {
    let args = format!("-object iommufd,id=i0 -device vfio-pci,host={BDF},iommufd=i0,bootindex=0");
    boots_with("check", "checked", &args);
}

#[track_caller]
fn boots(name: &str, args: &str) {
    boots_with("run", name, args);
}

#[track_caller]
fn boots_with(command: &str, name: &str, args: &str) {
    let Some(root) = qemu_root() else { return };
    let directory = scratch();
    let image = directory.path().join("boot.img");
    fs::write(&image, boot_disk()).expect("an image");
    let serial = root.join("tmp").join(format!("serial-{name}-{}", std::process::id()));
    let output = qemu(command, &root, &image, &serial, args);
    let said = fs::read_to_string(&serial).unwrap_or_default();
    fs::remove_file(&serial).ok();
    assert!(
        said.contains(GREETING) && output.status.code() == Some(GUEST_EXIT),
        "{}\n--- serial\n{said}\n--- stdout\n{}\n--- stderr\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
}

fn qemu_root() -> Option<PathBuf> {
    let Some(root) = std::env::var_os("LYCHGATE_QEMU_ROOT") else {
        skipped("LYCHGATE_QEMU_ROOT names no root with QEMU (cargo xtask qemu-root DIR)");
        return None;
    };
    is_root().then(|| root.into())
}

fn qemu(command: &str, root: &Path, image: &Path, serial: &Path, args: &str) -> Output {
    let serial = Path::new("/").join(serial.strip_prefix(root).expect("in the root"));
    lychgate()
        .args([command, "--nvme", &format!("{BDF}={}", image.display()), "--"])
        .args(["timeout", "60", "chroot"])
        .arg(root)
        .args("qemu-system-x86_64 -M q35 -accel tcg -m 128M -nodefaults -display none".split(' '))
        .args("-device isa-debug-exit,iobase=0xf4,iosize=4 -monitor none -no-reboot".split(' '))
        .arg("-serial")
        .arg(format!("file:{}", serial.display()))
        .args(args.split_ascii_whitespace())
        .output()
        .expect("lychgate")
}

/// A disk whose boot sector writes the greeting to the first serial port and ends QEMU.
fn boot_disk() -> Vec<u8> {
    const CODE: [u8; 27] = [
        0x31, 0xc0, // xor ax, ax
        0x8e, 0xd8, // mov ds, ax
        0xbe, 0x1b, 0x7c, // mov si, 0x7c1b (the greeting, behind the code)
        0xac, // next: lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x06, // jz done
        0xba, 0xf8, 0x03, // mov dx, 0x3f8
        0xee, // out dx, al
        0xeb, 0xf5, // jmp next
        0xba, 0xf4, 0x00, // done: mov dx, 0xf4
        0xb0, 0x10, // mov al, 0x10
        0xee, // out dx, al
        0xf4, // halt: hlt
        0xeb, 0xfd, // jmp halt
    ];
    let mut disk = vec![0; 1 << 20];
    disk[..CODE.len()].copy_from_slice(&CODE);
    disk[CODE.len()..][..GREETING.len()].copy_from_slice(GREETING.as_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}
