//! Device nodes and the tree of attributes.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use crate::support::Case;

pub(crate) fn open(path: &str) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

pub(crate) const OPENS_AND_STATS: Case = Case {
    name: "a_device_node_opens_and_is_a_character_device",
    client: |_| {
        let file = open("/dev/fake");
        assert!((768..1024).contains(&file.as_raw_fd()));
        let by_path = std::fs::metadata("/dev/fake").unwrap();
        for metadata in [&by_path, &file.metadata().unwrap()] {
            assert!(metadata.file_type().is_char_device());
            assert_eq!(metadata.rdev(), rustix::fs::makedev(240, 5));
            assert_eq!(metadata.mode() & 0o777, 0o666);
        }
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.err().expect("an error").raw_os_error().unwrap()
}

fn c(path: &str) -> std::ffi::CString {
    std::ffi::CString::new(path).unwrap()
}

pub(crate) const PATHS: Case = Case {
    name: "attributes_are_found_by_every_way_to_them",
    client: |_| {
        use rustix::fs::{AtFlags, Mode, OFlags};
        let read = |path: &str| std::fs::read_to_string(path).unwrap();
        assert_eq!(read("/sys/bus/fake/devices/fake0/vendor"), "0x1b36\n");
        assert_eq!(read("//sys/./bus/fake/../fake/devices/fake0/sub/../vendor"), "0x1b36\n");
        assert_eq!(read("/sys/bus/fake/devices/fake0/subsystem/devices/fake0/sub/dev"), "511:7\n");
        let real = std::fs::canonicalize("/sys/bus/fake/devices/fake0/subsystem").unwrap();
        assert_eq!(real.to_str(), Some("/sys/bus/fake"));
        let link = std::fs::read_link("/sys/bus/fake/devices/fake0").unwrap();
        assert_eq!(link.to_str(), Some("../../../devices/fake0"));
        let names: Vec<_> = std::fs::read_dir("/sys/bus/fake/devices")
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["fake0"]);
        assert!(std::fs::symlink_metadata("/sys/bus/fake/devices/fake0").unwrap().is_symlink());
        assert!(std::fs::metadata("/sys/bus/fake/devices/fake0/").unwrap().is_dir());

        // From a directory of the machine, and up out of it.
        let directory = File::open("/sys/bus/fake/devices").unwrap();
        let at = |path: &str| {
            rustix::fs::openat(&directory, path, OFlags::RDONLY, Mode::empty()).map(drop)
        };
        at("fake0/vendor").unwrap();
        at("../../../../dev/fake").unwrap();
        at("../../../../etc/passwd").unwrap();
        assert_eq!(at("nothing").unwrap_err().raw_os_error(), libc::ENOENT);
        let stat =
            rustix::fs::statat(&directory, "../../../../dev/fake", AtFlags::empty()).unwrap();
        assert_eq!(stat.st_rdev, rustix::fs::makedev(240, 5));
        let statx = rustix::fs::statx(
            &directory,
            "fake0/vendor",
            AtFlags::empty(),
            rustix::fs::StatxFlags::BASIC_STATS,
        );
        assert_eq!(statx.unwrap().stx_size, 7);
        rustix::process::fchdir(&directory).unwrap();
        assert_eq!(read("fake0/vendor"), "0x1b36\n");
        rustix::process::chdir("/dev").unwrap();
        drop(open("fake"));
        drop(open("./vfio/../fake"));
        rustix::process::chdir("/").unwrap();
        drop(open("dev/vfio/probe"));

        // What the host has stays the host's, listed too.
        assert!(std::fs::metadata("/dev/null").unwrap().file_type().is_char_device());
        assert!(std::fs::read_dir("/dev").unwrap().count() > 3);
        assert!(
            std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").is_ok()
                || std::fs::metadata("/sys/kernel").is_ok()
        );
        let listed = File::open("/dev").unwrap();
        let (by_file, by_path) = (listed.metadata().unwrap(), std::fs::metadata("/dev").unwrap());
        assert_eq!((by_file.dev(), by_file.ino()), (by_path.dev(), by_path.ino()));
        let names: Vec<_> = std::fs::read_dir("/dev").unwrap().map(Result::unwrap).collect();
        for name in ["fake", "vfio", "null"] {
            assert_eq!(names.iter().filter(|entry| entry.file_name() == name).count(), 1, "{name}");
        }
        let stat = rustix::fs::statat(&listed, "fake", AtFlags::empty()).unwrap();
        assert_eq!(stat.st_rdev, rustix::fs::makedev(240, 5));
        let stat = rustix::fs::statat(&listed, "null", AtFlags::empty()).unwrap();
        assert_eq!(stat.st_rdev, rustix::fs::makedev(1, 3));
        rustix::fs::openat(&listed, "vfio/probe", OFlags::RDWR, Mode::empty()).unwrap();
        for (path, mode, expected) in [
            ("/dev/fake", libc::R_OK | libc::W_OK, 0),
            ("/dev/fake", libc::X_OK, libc::EACCES),
            ("/dev/missing", libc::F_OK, libc::ENOENT),
            ("/sys/bus/fake", libc::F_OK, 0),
            ("/sys/devices/fake0/missing", libc::F_OK, libc::ENOENT),
            ("/etc/passwd", libc::R_OK, 0),
        ] {
            // SAFETY: a string that lives through the call.
            let result = unsafe { libc::access(c(path).as_ptr(), mode) };
            let result =
                if result == 0 { 0 } else { errno(Err::<(), _>(std::io::Error::last_os_error())) };
            assert_eq!(result, expected, "{path}");
        }
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const ERRORS: Case = Case {
    name: "wrong_opens_fail_as_the_kernel_fails_them",
    client: |_| {
        use rustix::fs::{CWD, Mode, OFlags};
        let open = |path: &str, flags| {
            rustix::fs::openat(CWD, path, flags, Mode::empty())
                .map(drop)
                .map_err(|e| e.raw_os_error())
        };
        let rdwr = OFlags::RDWR;
        assert_eq!(open("/dev/fake", rdwr | OFlags::DIRECTORY), Err(libc::ENOTDIR));
        assert_eq!(open("/dev/fake/", rdwr), Err(libc::ENOTDIR));
        assert_eq!(open("/dev/fake/x", rdwr), Err(libc::ENOTDIR));
        assert_eq!(open("/dev/fake", rdwr | OFlags::CREATE | OFlags::EXCL), Err(libc::EEXIST));
        assert_eq!(open("/sys/bus/fake", rdwr), Err(libc::EISDIR));
        assert_eq!(open("/sys/bus/fake/devices/new", rdwr | OFlags::CREATE), Err(libc::EACCES));
        assert_eq!(open("/sys/devices/fake0/vendor", rdwr), Err(libc::EACCES));
        assert_eq!(open("/sys/bus/fake/devices/fake0", OFlags::NOFOLLOW), Err(libc::ELOOP));
        assert_eq!(open("", rdwr), Err(libc::ENOENT));
        assert_eq!(open("/dev/nothing-here", rdwr), Err(libc::ENOENT));
        // SAFETY: an address that is not mapped; the kernel says so.
        let result = unsafe { libc::openat(libc::AT_FDCWD, std::ptr::without_provenance(1), 0) };
        assert_eq!(result, -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));

        let place = rustix::fs::open("/dev/fake", OFlags::PATH, Mode::empty()).unwrap();
        let stat = rustix::fs::fstat(&place).unwrap();
        assert_eq!(stat.st_rdev, rustix::fs::makedev(240, 5));
        assert_eq!(super::descriptors::ioctl(place.as_raw_fd(), 0x3be0, 0), Err(libc::ENOTTY));
        // From there the node can be opened, as from any descriptor of it.
        let file = super::nodes::open(&format!("/proc/self/fd/{}", place.as_raw_fd()));
        assert_eq!(file.metadata().unwrap().rdev(), rustix::fs::makedev(240, 5));
        assert_eq!(super::descriptors::ioctl(file.as_raw_fd(), 0x3be0, 0), Ok(0));
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        assert_eq!(std::fs::read_link(&link).unwrap().to_str(), Some("/dev/fake"));
        drop(super::nodes::open(&link));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const LINKS_OF_THE_HOST: Case = Case {
    name: "links_of_the_host_lead_into_the_machine",
    client: |_| {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::os::unix::fs::symlink("/dev/fake", at("node")).unwrap();
        std::os::unix::fs::symlink("/sys/bus", at("bus")).unwrap();
        std::os::unix::fs::symlink("loop", at("loop")).unwrap();
        std::fs::write(at("plain"), "plain").unwrap();
        std::os::unix::fs::symlink("plain", at("link")).unwrap();
        drop(open(at("node").to_str().unwrap()));
        assert!(std::fs::metadata(at("node")).unwrap().file_type().is_char_device());
        assert!(std::fs::symlink_metadata(at("node")).unwrap().is_symlink());
        assert_eq!(
            std::fs::read_to_string(at("bus/fake/devices/fake0/vendor")).unwrap(),
            "0x1b36\n"
        );
        assert_eq!(std::fs::read_to_string(at("link")).unwrap(), "plain");
        assert_eq!(errno(std::fs::read(at("loop"))), libc::ELOOP);
        std::os::unix::fs::symlink(directory.path(), at("self")).unwrap();
        assert_eq!(std::fs::read_to_string(at("self/self/plain")).unwrap(), "plain");
        0
    },
    drive: |driver| driver.succeeds(&[]),
};
