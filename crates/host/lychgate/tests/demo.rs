//! The demo does what the README says.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use common::{assert_success, lychgate, text};

#[test]
fn the_demo_moves_data_both_ways_and_explains_the_mistake() {
    let output = lychgate().arg("demo").output().expect("lychgate");
    assert_success(&output);
    let (said, reported) = (text(&output.stdout), text(&output.stderr));
    for want in [
        "/dev/iommu, /dev/vfio/devices/",
        "/dev/vfio/vfio, /dev/vfio/GROUP",
        "64 MiB written, read back and compared",
        "the command failed (NVMe status 0x4, Data Transfer Error), the memory is untouched",
    ] {
        assert!(said.contains(want), "{said}\n{reported}\ndoes not say: {want}");
    }
    for want in ["0000:01:00.0 (nvme)", "queue 1, command", "READ lba 0+8", "IOMMU_IOAS_UNMAP"] {
        assert!(reported.contains(want), "{reported}\ndoes not say: {want}");
    }
    assert!(!reported.contains('\x1b'), "no colour in a pipe");
}
