//! Which system calls the supervisor is asked about.

pub(crate) mod bpf;
#[cfg(test)]
mod tests;

use std::ops::Range;

use libc::sock_filter;

use bpf::{Condition, Rule};

/// The bytes that `VFIO` and `IOMMUFD` ioctls share: `_IO(';', nr)` without size or direction.
pub(crate) const IOCTL_TYPE_MASK: u32 = 0xff00;
/// `';' << 8`.
pub(crate) const IOCTL_TYPE: u32 = 0x3b00;
/// `KVM_SET_DEVICE_ATTR` (`linux/kvm.h`): how a program tells KVM of its VFIO files.
pub(crate) const KVM_SET_DEVICE_ATTR: u32 = 0x4018_aee1;

/// i386 system calls by number (`arch/x86/entry/syscalls/syscall_32.tbl`).
pub(crate) mod i386 {
    pub(crate) const OPEN: u32 = 5;
    pub(crate) const IOCTL: u32 = 54;
    pub(crate) const OPENAT: u32 = 295;
    pub(crate) const OPENAT2: u32 = 437;
}

/// What the filter depends on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Selection {
    /// The numbers that descriptors of ours have in clients.
    pub(crate) descriptors: Range<u32>,
    /// Whether eventfds are made by the supervisor, because it cannot fetch a client's.
    pub(crate) eventfds: bool,
}

/// The program for a selection.
pub(crate) fn program(selection: &Selection) -> Vec<sock_filter> {
    bpf::assemble(&native(selection), &i386())
}

fn native(selection: &Selection) -> Vec<Rule> {
    let ours = |arg| Condition::Within {
        arg,
        from: selection.descriptors.start,
        to: selection.descriptors.end,
    };
    let equal = |arg, value| Condition::Masked { arg, mask: u32::MAX, value };
    let empty_path = |arg, set| Condition::Masked {
        arg,
        mask: at_empty_path(),
        value: if set { at_empty_path() } else { 0 },
    };
    // Offsets below are in the first VFIO region of a device file, or in any other file.
    let region = |arg| Condition::HighAtLeast { arg, from: 1 << (40 - 32) };
    let at_cwd = |arg| equal(arg, libc::AT_FDCWD.cast_unsigned());

    let mut rules = Vec::new();
    let mut add = |number: libc::c_long, conditions: &[Condition]| {
        if let Ok(number) = u32::try_from(number) {
            rules.push(Rule { number, conditions: conditions.to_vec() });
        }
    };

    // By any number: an ioctl finds our files even where `dup2` or a socket put them.
    add(libc::SYS_ioctl, &[Condition::Masked { arg: 1, mask: IOCTL_TYPE_MASK, value: IOCTL_TYPE }]);
    add(libc::SYS_ioctl, &[equal(1, KVM_SET_DEVICE_ATTR)]);

    // By path.
    for number in [
        libc::SYS_open,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_creat,
        libc::SYS_stat,
        libc::SYS_lstat,
        libc::SYS_access,
        libc::SYS_faccessat,
        libc::SYS_faccessat2,
        libc::SYS_readlink,
        libc::SYS_readlinkat,
        libc::SYS_execve,
        libc::SYS_execveat,
    ] {
        add(number, &[]);
    }
    for (number, flags) in [(libc::SYS_newfstatat, 3), (libc::SYS_statx, 2)] {
        add(number, &[empty_path(flags, false)]);
        add(number, &[empty_path(flags, true), ours(0)]);
        add(number, &[empty_path(flags, true), at_cwd(0)]);
    }

    // By descriptor.
    for number in [
        libc::SYS_fstat,
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_lseek,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_dup,
    ] {
        add(number, &[ours(0)]);
    }
    for number in [
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
    ] {
        add(number, &[ours(0)]);
        add(number, &[region(3), Condition::Within { arg: 0, from: 0, to: 1 << 31 }]);
    }
    for command in [libc::F_DUPFD, libc::F_DUPFD_CLOEXEC] {
        add(libc::SYS_fcntl, &[ours(0), equal(1, command.cast_unsigned())]);
    }
    add(libc::SYS_mmap, &[ours(4)]);

    if selection.eventfds {
        add(libc::SYS_eventfd, &[]);
        add(libc::SYS_eventfd2, &[]);
    }
    rules
}

/// Enough to tell a 32-bit program that it is not served, without being in the way of one that asks
/// for nothing of ours.
fn i386() -> Vec<Rule> {
    let ioctl = Rule {
        number: i386::IOCTL,
        conditions: vec![Condition::Masked { arg: 1, mask: IOCTL_TYPE_MASK, value: IOCTL_TYPE }],
    };
    let opens = [i386::OPEN, i386::OPENAT, i386::OPENAT2]
        .map(|number| Rule { number, conditions: Vec::new() });
    opens.into_iter().chain([ioctl]).collect()
}

const fn at_empty_path() -> u32 {
    libc::AT_EMPTY_PATH.cast_unsigned()
}
