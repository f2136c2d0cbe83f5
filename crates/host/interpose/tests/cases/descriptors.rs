//! Calls on descriptors, and their life.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::nodes::open;
use crate::support::Case;
use crate::support::machine::{ADD, COUNT, IDENTITY, LENGTH, NEW, PUSH, QUEUE, RELEASES, SIGNAL};

/// The value, or the errno.
pub(crate) fn ioctl(fd: RawFd, command: u64, argument: u64) -> Result<i32, i32> {
    // SAFETY: the machine only touches what the case gives it the address of.
    let result = unsafe { libc::ioctl(fd, command, argument) };
    if result >= 0 {
        Ok(result)
    } else {
        Err(std::io::Error::last_os_error().raw_os_error().unwrap())
    }
}

fn owned(fd: i32) -> OwnedFd {
    // SAFETY: the case got it from the machine, and nothing else has it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn flags(fd: RawFd) -> i32 {
    // SAFETY: takes no memory.
    unsafe { libc::fcntl(fd, libc::F_GETFD) }
}

pub(crate) const IOCTL: Case = Case {
    name: "ioctls_reach_the_machine_and_no_others_do",
    client: |_| {
        let file = open("/dev/fake");
        let fd = file.as_raw_fd();
        let mut word = 41_u32;
        assert_eq!(ioctl(fd, ADD, (&raw mut word).addr() as u64), Ok(0));
        assert_eq!(word, 42);
        assert_eq!(ioctl(fd, ADD, 8), Err(libc::EFAULT));
        let constant: &'static u32 = &7;
        assert_eq!(ioctl(fd, ADD, std::ptr::from_ref(constant).addr() as u64), Err(libc::EFAULT));
        assert_eq!(ioctl(fd, 0x3b01, 0), Err(libc::ENOTTY));
        let null = open("/dev/null");
        assert_eq!(ioctl(null.as_raw_fd(), COUNT, 0), Err(libc::ENOTTY));
        assert_eq!(ioctl(-1, COUNT, 0), Err(libc::EBADF));
        drop(file);
        assert_eq!(ioctl(fd, COUNT, 0), Err(libc::EBADF));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const TRANSFERS: Case = Case {
    name: "reads_and_writes_go_to_the_machine_at_their_offsets",
    client: |_| {
        use std::io::{Read, Seek, Write};
        let mut file = open("/dev/fake");
        let mut bytes = [0; 8];
        assert_eq!(file.read_at(&mut bytes, 0x10).unwrap(), 8);
        assert_eq!(bytes, [0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17]);
        assert_eq!(file.read(&mut bytes[..3]).unwrap(), 3);
        assert_eq!(file.read(&mut bytes[3..]).unwrap(), 5);
        assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 7]);
        let (mut first, mut second) = ([0; 2], [0; 3]);
        let mut pieces = [&mut first[..], &mut second[..]].map(std::io::IoSliceMut::new);
        assert_eq!(rustix::io::preadv(&file, &mut pieces, 0x20).unwrap(), 5);
        assert_eq!((first, second), ([0x20, 0x21], [0x22, 0x23, 0x24]));
        let error = |result: std::io::Result<u64>| result.unwrap_err().raw_os_error().unwrap();
        assert_eq!(error(file.seek(std::io::SeekFrom::Start(4))), libc::ESPIPE);
        assert_eq!(error(file.set_len(4).map(|()| 0)), libc::EINVAL);
        assert_eq!(error(file.write(b"x").map(|_| 0)), libc::EINVAL);
        // SAFETY: no memory is touched, the offset is refused.
        let result = unsafe { libc::pread(file.as_raw_fd(), bytes.as_mut_ptr().cast(), 8, -1) };
        assert_eq!((result, error(Err(std::io::Error::last_os_error()))), (-1, libc::EINVAL));
        let reader = std::fs::File::open("/dev/fake").unwrap();
        assert_eq!(error((&reader).write(b"x").map(|_| 0)), libc::EBADF);
        assert_eq!(reader.read_at(&mut bytes, 1).unwrap(), 8);
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const COPIES: Case = Case {
    name: "copies_of_a_descriptor_are_the_same_file",
    client: |arguments| {
        if let [inherited] = arguments {
            let good = ioctl(inherited.parse().unwrap(), COUNT, 0) == Ok(6);
            return i32::from(!good);
        }
        let file = open("/dev/fake");
        let fd = file.as_raw_fd();
        // SAFETY: take no memory.
        let (dup, at_least, low) = unsafe {
            (libc::dup(fd), libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 900), libc::dup2(fd, 60))
        };
        assert!((768..1024).contains(&dup) && dup != fd);
        assert!((900..1024).contains(&at_least));
        assert_eq!(low, 60);
        assert_eq!((flags(dup), flags(at_least)), (0, libc::FD_CLOEXEC));
        for (count, copy) in [fd, dup, at_least, low].into_iter().enumerate() {
            assert_eq!(ioctl(copy, COUNT, 0), Ok(i32::try_from(count).unwrap()));
        }
        let copy = owned(dup);
        assert_eq!(
            std::fs::File::from(copy).metadata().unwrap().rdev(),
            rustix::fs::makedev(240, 5)
        );
        drop((owned(at_least), owned(low)));
        assert_eq!(ioctl(fd, RELEASES, 0), Ok(0));
        // Both sides of a fork, and a program.
        // SAFETY: the child makes system calls alone.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let good = ioctl(fd, COUNT, 0) == Ok(4);
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!good)) };
        }
        let mut status = 1;
        // SAFETY: stores one int.
        unsafe { libc::waitpid(child, &raw mut status, 0) };
        assert_eq!(status, 0);
        assert_eq!(ioctl(fd, COUNT, 0), Ok(5));
        // SAFETY: takes no memory.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        let status = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--client", COPIES.name, &fd.to_string()])
            .status();
        assert!(status.unwrap().success());
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const PASSED: Case = Case {
    name: "a_descriptor_passed_over_a_socket_works_and_lives",
    client: |_| {
        use rustix::net::{
            RecvAncillaryBuffer, RecvAncillaryMessage, SendAncillaryBuffer, SendAncillaryMessage,
        };
        let (ours, theirs) = std::os::unix::net::UnixDatagram::pair().unwrap();
        let file = open("/dev/fake");
        let other = open("/dev/fake");
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let data = [std::io::IoSlice::new(b"x")];
        rustix::net::sendmsg(&ours, &data, &mut control, rustix::net::SendFlags::empty()).unwrap();
        drop(file);
        // In flight it is nobody's descriptor, and still not released.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(ioctl(other.as_raw_fd(), RELEASES, 0), Ok(0));
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut data = [std::io::IoSliceMut::new(&mut byte)];
        let flags = rustix::net::RecvFlags::empty();
        rustix::net::recvmsg(&theirs, &mut data, &mut control, flags).unwrap();
        let message = control.drain().next().unwrap();
        let RecvAncillaryMessage::ScmRights(mut files) = message else { panic!("no file") };
        let received = files.next().unwrap();
        assert_eq!(ioctl(received.as_raw_fd(), COUNT, 0), Ok(0));
        drop(received);
        assert_eq!(ioctl(other.as_raw_fd(), RELEASES, 0), Ok(1));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const RELEASE: Case = Case {
    name: "a_file_is_released_before_the_next_call_and_once",
    client: |_| {
        let witness = open("/dev/fake");
        let releases = || ioctl(witness.as_raw_fd(), RELEASES, 0).unwrap();
        for round in 0..300 {
            let file = open("/dev/fake");
            let copy = file.try_clone().unwrap();
            drop(file);
            assert_eq!(releases(), round);
            drop(copy);
            assert_eq!(releases(), round + 1);
        }
        // Several at once: the kernel merges what it tells of them.
        let files: Vec<_> = (0..50).map(|_| open("/dev/vfio/probe")).collect();
        drop(files);
        assert_eq!(releases(), 350);
        0
    },
    drive: |driver| {
        driver.succeeds(&[]);
        assert_eq!(driver.machine.state().releases.load(Ordering::SeqCst), 351);
    },
};

pub(crate) const SHARED_INODE: Case = Case {
    name: "files_that_share_memory_are_told_apart",
    client: |_| {
        let witness = open("/dev/fake");
        let first = owned(ioctl(witness.as_raw_fd(), NEW, 0).unwrap());
        let more: Vec<_> =
            (0..5).map(|_| owned(ioctl(first.as_raw_fd(), NEW, 0).unwrap())).collect();
        let name = |file: &OwnedFd| ioctl(file.as_raw_fd(), COUNT, 0).unwrap();
        let mut names: Vec<i32> = more.iter().chain([&first]).map(name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 6);
        let copy = first.try_clone().unwrap();
        assert_eq!(name(&copy), name(&first));
        drop(more);
        assert_eq!(ioctl(witness.as_raw_fd(), RELEASES, 0), Ok(5));
        drop(first);
        assert_eq!(ioctl(witness.as_raw_fd(), RELEASES, 0), Ok(5));
        drop(copy);
        assert_eq!(ioctl(witness.as_raw_fd(), RELEASES, 0), Ok(6));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const MAPPED: Case = Case {
    name: "a_mapping_is_the_files_memory_and_keeps_it",
    client: |_| {
        let witness = open("/dev/fake");
        let file = owned(ioctl(witness.as_raw_fd(), NEW, 1).unwrap());
        let fd = file.as_raw_fd();
        assert_eq!(flags(fd), libc::FD_CLOEXEC);
        assert_eq!(ioctl(witness.as_raw_fd(), IDENTITY, u64::try_from(fd).unwrap()), Ok(1));
        assert_eq!(ioctl(witness.as_raw_fd(), IDENTITY, 1), Err(libc::EBADF));
        let map = |fd, offset| {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping, of a file that nobody cuts.
            let memory = unsafe {
                libc::mmap(std::ptr::null_mut(), 8192, protection, libc::MAP_SHARED, fd, offset)
            };
            if memory == libc::MAP_FAILED {
                Err(std::io::Error::last_os_error().raw_os_error().unwrap())
            } else {
                Ok(memory.cast::<u8>())
            }
        };
        assert_eq!(map(fd, 1 << 40), Err(libc::EINVAL));
        assert_eq!(map(witness.as_raw_fd(), 0), Err(libc::ENODEV));
        let memory = map(fd, 4096).unwrap();
        // SAFETY: mapped, and larger.
        unsafe { memory.add(5).write_volatile(0x77) };
        assert_eq!(ioctl(fd, ADD, 4096 + 5), Ok(0x77));
        // A register by the offset of its region, also through a low number.
        // SAFETY: takes no memory.
        let low = owned(unsafe { libc::dup2(fd, 50) });
        for (copy, value) in [(&file, 3), (&low, 4)] {
            let copy = copy.as_raw_fd();
            // SAFETY: writes one byte of this frame.
            let done = unsafe { libc::pwrite(copy, (&raw const value).cast(), 1, 2 << 40) };
            assert_eq!(done, 1);
            assert_eq!(ioctl(fd, ADD, 0), Ok(0x20 | value));
        }
        drop((file, low));
        assert_eq!(ioctl(witness.as_raw_fd(), RELEASES, 0), Ok(0));
        // SAFETY: the mapping from above, not used any more.
        unsafe { libc::munmap(memory.cast(), 8192) };
        assert_eq!(ioctl(witness.as_raw_fd(), RELEASES, 0), Ok(1));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

fn readable(file: &impl AsFd, milliseconds: i64) -> bool {
    let mut polled = [PollFd::new(file, PollFlags::IN)];
    let timeout = Timespec { tv_sec: 0, tv_nsec: milliseconds * 1_000_000 };
    rustix::event::poll(&mut polled, Some(&timeout)).unwrap() == 1
}

pub(crate) const QUEUE_FILE: Case = Case {
    name: "a_queue_can_be_waited_for_and_read",
    client: |_| {
        let device = open("/dev/fake");
        let mut number = 0_u32;
        assert_eq!(ioctl(device.as_raw_fd(), QUEUE, 8), Err(libc::EFAULT));
        assert_eq!(ioctl(device.as_raw_fd(), RELEASES, 0), Ok(1));
        assert_eq!(ioctl(device.as_raw_fd(), QUEUE, (&raw mut number).addr() as u64), Ok(0));
        let queue = owned(number.cast_signed());
        assert_eq!(flags(queue.as_raw_fd()), libc::FD_CLOEXEC);
        for _ in 0..3 {
            assert!(!readable(&queue, 0));
            for _ in 0..2 {
                assert_eq!(ioctl(device.as_raw_fd(), PUSH, 0), Ok(0));
            }
            assert!(readable(&queue, 900));
            let mut record = [0; 16];
            assert_eq!(rustix::io::read(&queue, &mut record).unwrap(), 6);
            assert_eq!(&record[..6], b"record");
        }
        drop(queue);
        assert_eq!(ioctl(device.as_raw_fd(), RELEASES, 0), Ok(2));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

fn eventfds(_: &[String]) -> i32 {
    let device = open("/dev/fake");
    let plain = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let copy = plain.try_clone().unwrap();
    assert_eq!(flags(plain.as_raw_fd()), libc::FD_CLOEXEC);
    for file in [&plain, &copy] {
        let fd = u64::try_from(file.as_raw_fd()).unwrap();
        assert_eq!(ioctl(device.as_raw_fd(), SIGNAL, fd), Ok(0));
    }
    let mut value = [0; 8];
    assert_eq!(rustix::io::read(&plain, &mut value).unwrap(), 8);
    assert_eq!(u64::from_le_bytes(value), 2);
    // Full: the signal is lost and the machine does not block.
    rustix::io::write(&plain, &(u64::MAX - 1).to_le_bytes()).unwrap();
    let fd = u64::try_from(plain.as_raw_fd()).unwrap();
    assert_eq!(ioctl(device.as_raw_fd(), SIGNAL, fd), Ok(0));
    assert_eq!(ioctl(device.as_raw_fd(), SIGNAL, 1), Err(libc::EINVAL));
    assert_eq!(ioctl(device.as_raw_fd(), SIGNAL, 700), Err(libc::EBADF));
    assert_eq!(ioctl(device.as_raw_fd(), SIGNAL, u64::from(u32::MAX)), Err(libc::EBADF));
    // SAFETY: take no memory.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_eventfd2, 0, 0x10), -1);
        assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EINVAL));
        let old = libc::syscall(libc::SYS_eventfd, 3);
        assert!(old > 2);
        drop(owned(i32::try_from(old).unwrap()));
    }
    let memory = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::empty()).unwrap();
    rustix::fs::ftruncate(&memory, 12288).unwrap();
    let fd = u64::try_from(memory.as_raw_fd()).unwrap();
    assert_eq!(ioctl(device.as_raw_fd(), LENGTH, fd), Ok(12288));
    assert_eq!(ioctl(device.as_raw_fd(), LENGTH, 700), Err(libc::EBADF));
    let pipe = rustix::pipe::pipe().unwrap();
    let fd = u64::try_from(pipe.0.as_raw_fd()).unwrap();
    assert_eq!(ioctl(device.as_raw_fd(), LENGTH, fd), Err(libc::EINVAL));
    0
}

pub(crate) const EVENTFDS: Case = Case {
    name: "eventfds_and_memory_files_of_a_client_are_reached",
    client: eventfds,
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const EVENTFDS_MADE: Case = Case {
    name: "eventfds_are_reached_without_pidfd_getfd",
    client: eventfds,
    drive: |driver| {
        let mut options = lychgate_interpose::Options::default();
        options.make_eventfds = true;
        let status = driver.run_with(&driver.client(&[]), &options, std::sync::Arc::new(()));
        assert_eq!(status.unwrap().code(), 0);
        driver.all_is_released();
    },
};
