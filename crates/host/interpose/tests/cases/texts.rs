//! Texts that the machine shows and takes, in `/sys` and in `/proc`.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;

use super::descriptors::ioctl;
use super::nodes::open;
use crate::support::Case;
use crate::support::machine::SPACE;

/// An attribute that can be written.
const KNOB: &str = "/sys/devices/fake0/knob";

fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

pub(crate) const ATTRIBUTES: Case = Case {
    name: "attributes_keep_what_is_written_to_them",
    client: |_| {
        assert_eq!(fs::read_to_string(KNOB).unwrap(), "1\n");
        fs::write(KNOB, "23").unwrap();
        let mut file = fs::File::options().read(true).write(true).open(KNOB).unwrap();
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "23\n");
        file.write_all_at(b"4\n", 0).unwrap();
        assert_eq!(file.seek(SeekFrom::Start(1)).unwrap(), 1);
        assert_eq!(file.seek(SeekFrom::Current(-1)).unwrap(), 0);
        assert_eq!(errno(file.seek(SeekFrom::Current(-1))), libc::EINVAL);
        assert_eq!(errno(file.seek(SeekFrom::End(0))), libc::EINVAL);
        text.clear();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "4\n");
        assert_eq!(errno(file.write(b"many")), libc::EINVAL);
        assert_eq!(errno(file.write(&[b'1'; 65])), libc::EINVAL);
        for metadata in [fs::metadata(KNOB).unwrap(), file.metadata().unwrap()] {
            assert!(metadata.is_file());
            assert_eq!(metadata.permissions().mode() & 0o777, 0o644);
        }
        // One that the machine only shows.
        assert_eq!(errno(fs::write("/sys/devices/fake0/vendor", "1")), libc::EACCES);
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const REDIRECTED: Case = Case {
    name: "what_a_shell_redirects_to_a_text_is_taken",
    client: |_| {
        let script = format!("echo 7 > {KNOB}; cat {KNOB}; cat < {KNOB}; read x < {KNOB}; echo $x");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), "7\n7\n7\n");
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const FAIL_NTH: Case = Case {
    name: "each_thread_has_a_fail_nth_of_its_own",
    client: |_| {
        let (process, thread) = (std::process::id(), rustix::thread::gettid().as_raw_nonzero());
        assert_eq!(
            fs::read_to_string("/proc/thread-self/fail-nth").unwrap(),
            format!("{thread}\n")
        );
        let path = format!("/proc/self/task/{thread}/fail-nth");
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("{thread}\n"));
        let file = fs::File::open(&path).unwrap();
        assert_eq!(
            fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file)))
                .unwrap(),
            std::path::PathBuf::from(format!("/proc/{process}/task/{thread}/fail-nth"))
        );
        let metadata = fs::metadata(&path).unwrap();
        assert!(metadata.is_file() && metadata.permissions().mode() & 0o777 == 0o644);
        let other =
            std::thread::spawn(|| fs::read_to_string("/proc/thread-self/fail-nth").unwrap());
        assert_ne!(other.join().unwrap(), format!("{thread}\n"));
        assert_eq!(errno(fs::read_to_string("/proc/self/task/1/fail-nth")), libc::ENOENT);
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const STATUS: Case = Case {
    name: "what_the_machine_pins_is_in_the_status_of_the_process",
    client: |_| {
        let value = |path: &str, name: &str| -> u64 {
            let text = fs::read_to_string(path).unwrap();
            let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
        };
        // The machine does not know the process yet.
        assert_eq!(value("/proc/self/status", "VmPin:"), 0);
        let file = open("/dev/fake");
        ioctl(std::os::fd::AsRawFd::as_raw_fd(&file), SPACE, 0).unwrap();
        let own = format!("/proc/{}/status", std::process::id());
        for path in ["/proc/self/status", "/proc/thread-self/status", &own] {
            assert_eq!(value(path, "VmPin:"), 12, "{path}");
            assert_eq!(value(path, "VmLck:"), 4, "{path}");
        }
        // As another process sees it, which has none itself.
        let script = format!("grep VmPin {own} /proc/self/status | cut -d: -f2,3");
        let output = Command::new("sh").args(["-c", &script]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let numbers: Vec<_> =
            text.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(numbers, ["12", "0"], "{text}");
        // The kernel's answer: EACCES, or EINVAL for root.
        assert!(fs::write("/proc/self/status", "x").is_err());
        0
    },
    drive: |driver| driver.succeeds(&[]),
};
