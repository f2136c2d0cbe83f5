//! The address space of a client.

use std::os::fd::AsRawFd;

use super::descriptors::ioctl;
use super::nodes::open;
use crate::support::Case;
use crate::support::machine::{KEEP, POKE, RIGHTS, SPACE};

static TARGET: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

fn target() -> u64 {
    TARGET.as_ptr().addr() as u64
}

pub(crate) const EXEC: Case = Case {
    name: "memory_of_a_program_is_not_that_of_the_next_in_its_process",
    client: |arguments| {
        use std::os::unix::process::CommandExt;
        let again = || {
            let mut again = std::process::Command::new(std::env::current_exe().unwrap());
            again.args(["--client", EXEC.name]);
            again
        };
        if let [fd, address, space] = arguments {
            // The same address may be mapped here too, and must not be touched.
            let fd: i32 = fd.parse().unwrap();
            assert_eq!(ioctl(fd, POKE, address.parse().unwrap()), Err(libc::EFAULT));
            assert_eq!(ioctl(fd, POKE, target()), Err(libc::EFAULT));
            assert_ne!(ioctl(fd, SPACE, 0).unwrap().to_string(), *space);
            ioctl(fd, KEEP, 0).unwrap();
            ioctl(fd, POKE, target()).unwrap();
            assert_eq!(TARGET.load(std::sync::atomic::Ordering::SeqCst), 0x5a);
            return 0;
        }
        let file = open("/dev/fake");
        let fd = file.as_raw_fd();
        let space = ioctl(fd, SPACE, 0).unwrap();
        ioctl(fd, KEEP, 0).unwrap();
        ioctl(fd, POKE, target()).unwrap();
        assert_eq!(TARGET.load(std::sync::atomic::Ordering::SeqCst), 0x5a);
        assert_eq!(ioctl(fd, POKE, 8), Err(libc::EFAULT));
        // A failed exec changes nothing.
        let error = std::process::Command::new("/nonexistent").exec();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
        assert_eq!(ioctl(fd, SPACE, 0), Ok(space));
        // SAFETY: takes no memory.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        let error = again().args([fd.to_string(), target().to_string(), space.to_string()]).exec();
        panic!("{error}")
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const SPACES: Case = Case {
    name: "each_process_has_its_address_space_and_threads_share_it",
    client: |_| {
        let file = open("/dev/fake");
        let fd = file.as_raw_fd();
        let space = ioctl(fd, SPACE, 0).unwrap();
        assert_eq!(ioctl(fd, SPACE, 0), Ok(space));
        assert_eq!(std::thread::spawn(move || ioctl(fd, SPACE, 0)).join().unwrap(), Ok(space));
        // SAFETY: the child makes system calls alone.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let other = ioctl(fd, SPACE, 0).is_ok_and(|other| other != space);
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!other)) };
        }
        let mut status = 1;
        // SAFETY: stores one int.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0);
        assert_eq!(ioctl(fd, SPACE, 0), Ok(space));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const ARGUMENTS: Case = Case {
    name: "rights_and_limits_are_those_of_the_caller",
    client: |_| {
        let file = open("/dev/fake");
        let rights = || ioctl(file.as_raw_fd(), RIGHTS, 0).unwrap();
        let root = rustix::process::geteuid().is_root();
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        // SAFETY: fill and read one structure.
        unsafe {
            libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit);
            limit.rlim_cur = limit.rlim_max.min(65536);
            libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit);
        }
        let capable = std::fs::read_to_string("/proc/self/status").unwrap();
        let capable = capable.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
        let capable = u64::from_str_radix(capable.trim(), 16).unwrap() >> 14 & 1 != 0;
        assert!(capable || !root);
        assert_eq!(rights(), 2 | i32::from(capable));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};
