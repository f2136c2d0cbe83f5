//! The filter against what it is to select, run by an interpreter of its own.

use super::bpf::{ARCH_I386, ARCH_X86_64, Condition, Rule, assemble};
use super::*;

const ALLOW: u32 = 0x7fff_0000;
const NOTIFY: u32 = 0x7fc0_0000;
const NO_CALL: u32 = 0x0005_0000 | 38;

/// Runs a program over `struct seccomp_data`.
fn run(program: &[sock_filter], arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(arch.to_le_bytes());
    data.extend(0_u64.to_le_bytes());
    args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut at, mut accumulator) = (0_usize, 0_u32);
    for _ in 0..program.len() {
        let instruction = program[at];
        at += 1;
        let k = instruction.k;
        let mut branch = |taken: bool| {
            at += usize::from(if taken { instruction.jt } else { instruction.jf });
        };
        match instruction.code {
            0x20 => {
                let offset = k as usize;
                accumulator = u32::from_le_bytes(data[offset..offset + 4].try_into().unwrap());
            }
            0x54 => accumulator &= k,
            0x15 => branch(accumulator == k),
            0x35 => branch(accumulator >= k),
            0x05 => at += k as usize,
            0x06 => return k,
            other => panic!("instruction {other:#x}"),
        }
    }
    panic!("no end");
}

fn selection(eventfds: bool) -> Selection {
    Selection { descriptors: 768..1024, eventfds }
}

fn native_call(number: libc::c_long, args: [u64; 6]) -> u32 {
    run(&program(&selection(false)), ARCH_X86_64, u32::try_from(number).unwrap(), args)
}

#[test]
fn ioctls_are_selected_by_their_type_on_any_descriptor() {
    for fd in [0, 5, 800, 5000] {
        assert_eq!(native_call(libc::SYS_ioctl, [fd, 0x3b81, 0, 0, 0, 0]), NOTIFY);
        assert_eq!(native_call(libc::SYS_ioctl, [fd, 0xffff_ffff_0000_3bff, 0, 0, 0, 0]), NOTIFY);
        assert_eq!(native_call(libc::SYS_ioctl, [fd, 0x5401, 0, 0, 0, 0]), ALLOW);
        assert_eq!(native_call(libc::SYS_ioctl, [fd, 0x4018_aee1, 0, 0, 0, 0]), NOTIFY);
        assert_eq!(native_call(libc::SYS_ioctl, [fd, 0xaee1, 0, 0, 0, 0]), ALLOW);
    }
}

#[test]
fn calls_on_descriptors_are_selected_by_their_numbers() {
    for (fd, expected) in
        [(0, ALLOW), (767, ALLOW), (768, NOTIFY), (1023, NOTIFY), (1024, ALLOW), (u64::MAX, ALLOW)]
    {
        for number in [libc::SYS_read, libc::SYS_write, libc::SYS_fstat, libc::SYS_dup] {
            assert_eq!(native_call(number, [fd, 1, 2, 3, 4, 5]), expected, "{number} {fd}");
        }
        assert_eq!(native_call(libc::SYS_pread64, [fd, 1, 2, 3, 4, 5]), expected);
        assert_eq!(native_call(libc::SYS_mmap, [0, 1, 2, 3, fd, 5]), expected);
        assert_eq!(native_call(libc::SYS_fcntl, [fd, 0, 0, 0, 0, 0]), expected);
        assert_eq!(native_call(libc::SYS_fcntl, [fd, 1030, 0, 0, 0, 0]), expected);
        assert_eq!(native_call(libc::SYS_fcntl, [fd, 1, 0, 0, 0, 0]), ALLOW);
    }
    let far = 7 << 40;
    assert_eq!(native_call(libc::SYS_pread64, [5, 1, 2, far, 0, 0]), NOTIFY);
    assert_eq!(native_call(libc::SYS_pwritev, [5, 1, 2, (1 << 40) - 1, 0, 0]), ALLOW);
}

#[test]
fn calls_by_path_are_all_selected_and_those_by_descriptor_are_not() {
    let empty = 0x1000;
    let cwd = u64::from(libc::AT_FDCWD.cast_unsigned());
    for (number, flags) in [(libc::SYS_newfstatat, 3), (libc::SYS_statx, 2)] {
        for (fd, flag, expected) in [
            (cwd, 0, NOTIFY),
            (4, 0x100, NOTIFY),
            (4, empty, ALLOW),
            (800, empty, NOTIFY),
            (cwd, empty, NOTIFY),
        ] {
            let mut args = [fd, 0, 0, 0, 0, 0];
            args[flags] = flag;
            assert_eq!(native_call(number, args), expected, "{number} {fd} {flag:#x}");
        }
    }
    for number in [libc::SYS_open, libc::SYS_openat, libc::SYS_readlink, libc::SYS_execve] {
        assert_eq!(native_call(number, [0; 6]), NOTIFY);
    }
}

#[test]
fn eventfds_are_selected_when_they_are_made_here() {
    for (eventfds, expected) in [(true, NOTIFY), (false, ALLOW)] {
        let program = program(&selection(eventfds));
        let number = u32::try_from(libc::SYS_eventfd2).unwrap();
        assert_eq!(run(&program, ARCH_X86_64, number, [0; 6]), expected);
    }
}

#[test]
fn every_other_number_of_every_abi_goes_on_or_is_refused() {
    let program = program(&selection(true));
    assert!(program.len() < 1024);
    let known: Vec<u32> = native(&selection(true)).iter().map(|rule| rule.number).collect();
    for number in (0..600).filter(|number| !known.contains(number)) {
        assert_eq!(run(&program, ARCH_X86_64, number, [800; 6]), ALLOW, "{number}");
        assert_eq!(run(&program, ARCH_X86_64, 0x4000_0000 | number, [800; 6]), NO_CALL);
    }
    assert_eq!(run(&program, ARCH_X86_64, u32::MAX, [0; 6]), ALLOW);
    for (number, expected) in [(5, NOTIFY), (295, NOTIFY), (3, ALLOW), (54, ALLOW), (16, ALLOW)] {
        assert_eq!(run(&program, ARCH_I386, number, [0; 6]), expected);
    }
    assert_eq!(run(&program, ARCH_I386, 54, [3, 0x3b64, 0, 0, 0, 0]), NOTIFY);
    assert_eq!(run(&program, 0x1234, 16, [3, 0x3b64, 0, 0, 0, 0]), ALLOW);
}

#[test]
fn conditions_of_a_rule_all_hold_and_rules_are_alternatives() {
    let rule = |conditions: &[Condition]| Rule { number: 7, conditions: conditions.to_vec() };
    let rules = [
        rule(&[
            Condition::Within { arg: 0, from: 10, to: 20 },
            Condition::HighAtLeast { arg: 1, from: 2 },
            Condition::Masked { arg: 2, mask: 0xf0, value: 0x30 },
        ]),
        rule(&[Condition::Masked { arg: 3, mask: u32::MAX, value: 9 }]),
    ];
    let program = assemble(&rules, &[]);
    for a in [9, 10, 19, 20] {
        for b in [0, (2 << 32) - 1, 2 << 32] {
            for c in [0x30, 0x3f, 0x13f, 0x40] {
                for d in [8, 9, 9 | 1 << 32] {
                    let first = (10..20).contains(&a) && b >= 2 << 32 && c & 0xf0 == 0x30;
                    let expected = if first || d & 0xffff_ffff == 9 { NOTIFY } else { ALLOW };
                    assert_eq!(run(&program, ARCH_X86_64, 7, [a, b, c, d, 0, 0]), expected);
                }
            }
        }
    }
}
