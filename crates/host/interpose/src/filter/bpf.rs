//! An assembler for the classic BPF that seccomp runs over `struct seccomp_data`
//! (`linux/filter.h`, `linux/seccomp.h`).

use libc::sock_filter;

/// `AUDIT_ARCH_X86_64`.
pub(crate) const ARCH_X86_64: u32 = 0xc000_003e;
/// `AUDIT_ARCH_I386`.
pub(crate) const ARCH_I386: u32 = 0x4000_0003;
/// `__X32_SYSCALL_BIT`.
const X32: u32 = 0x4000_0000;

const RET_ALLOW: u32 = 0x7fff_0000;
const RET_USER_NOTIF: u32 = 0x7fc0_0000;
const RET_ERRNO_ENOSYS: u32 = 0x0005_0000 | 38;

const LOAD_WORD: u16 = 0x20;
const JUMP: u16 = 0x05;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const AND: u16 = 0x54;
const RETURN: u16 = 0x06;

const OFFSET_NR: u32 = 0;
const OFFSET_ARCH: u32 = 4;
const OFFSET_ARGS: u32 = 16;

/// What an argument of a call must be for a rule to apply. Words are the low 32 bits, as the kernel
/// takes them for descriptors, commands and flags.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Condition {
    /// The low word, masked.
    Masked { arg: u32, mask: u32, value: u32 },
    /// The low word is at least `from` and below `to`.
    Within { arg: u32, from: u32, to: u32 },
    /// The high word is at least `from`.
    HighAtLeast { arg: u32, from: u32 },
}

/// The supervisor is notified of a call `number` to which all conditions apply.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Rule {
    /// The number of the system call.
    pub(crate) number: u32,
    /// All must hold; none is always.
    pub(crate) conditions: Vec<Condition>,
}

/// A program that notifies of what the rules say and lets everything else go on. Calls by the x32
/// ABI get `ENOSYS`: their numbers would pass by the rules.
pub(crate) fn assemble(native: &[Rule], i386: &[Rule]) -> Vec<sock_filter> {
    let mut native_part = vec![
        statement(LOAD_WORD, OFFSET_NR),
        // A tracer skips a call by the number -1.
        jump(JUMP_EQUAL, u32::MAX, 0, 1),
        statement(RETURN, RET_ALLOW),
        jump(JUMP_AT_LEAST, X32, 0, 1),
        statement(RETURN, RET_ERRNO_ENOSYS),
    ];
    native_part.extend(search(&bodies(native)));
    let mut i386_part = vec![statement(LOAD_WORD, OFFSET_NR)];
    i386_part.extend(search(&bodies(i386)));

    let mut program = vec![
        statement(LOAD_WORD, OFFSET_ARCH),
        jump(JUMP_EQUAL, ARCH_X86_64, 0, 1),
        statement(JUMP, length(&i386_part) + 2),
        jump(JUMP_EQUAL, ARCH_I386, 1, 0),
        statement(RETURN, RET_ALLOW),
    ];
    program.extend(i386_part);
    program.extend(native_part);
    program
}

/// For each number the code that decides, ascending.
fn bodies(rules: &[Rule]) -> Vec<(u32, Vec<sock_filter>)> {
    let mut numbers: Vec<u32> = rules.iter().map(|rule| rule.number).collect();
    numbers.sort_unstable();
    numbers.dedup();
    numbers
        .into_iter()
        .map(|number| {
            let mut code = Vec::new();
            for rule in rules.iter().filter(|rule| rule.number == number) {
                code.extend(decide(&rule.conditions));
            }
            code.push(statement(RETURN, RET_ALLOW));
            (number, code)
        })
        .collect()
}

/// Returns a notification if all conditions hold, else falls through.
fn decide(conditions: &[Condition]) -> Vec<sock_filter> {
    // Built from the end, so that the way to the end is known.
    let mut code = vec![statement(RETURN, RET_USER_NOTIF)];
    for condition in conditions.iter().rev() {
        let end = u8::try_from(code.len()).unwrap_or(u8::MAX);
        let mut test = match *condition {
            Condition::Masked { arg, mask: u32::MAX, value } => {
                vec![low(arg), jump(JUMP_EQUAL, value, 0, end)]
            }
            Condition::Masked { arg, mask, value } => {
                vec![low(arg), statement(AND, mask), jump(JUMP_EQUAL, value, 0, end)]
            }
            Condition::Within { arg, from, to } => vec![
                low(arg),
                jump(JUMP_AT_LEAST, from, 0, end.saturating_add(1)),
                jump(JUMP_AT_LEAST, to, end, 0),
            ],
            Condition::HighAtLeast { arg, from } => {
                vec![high(arg), jump(JUMP_AT_LEAST, from, 0, end)]
            }
        };
        test.append(&mut code);
        code = test;
    }
    code
}

/// A binary search by the number in the accumulator.
fn search(bodies: &[(u32, Vec<sock_filter>)]) -> Vec<sock_filter> {
    match bodies {
        [] => vec![statement(RETURN, RET_ALLOW)],
        [(number, body)] => {
            let mut code = vec![jump(JUMP_EQUAL, *number, 1, 0), statement(RETURN, RET_ALLOW)];
            code.extend_from_slice(body);
            code
        }
        _ => {
            let (below, above) = bodies.split_at(bodies.len() / 2);
            let middle = above.first().map_or(0, |(number, _)| *number);
            let below = search(below);
            let mut code = vec![jump(JUMP_AT_LEAST, middle, 0, 1), statement(JUMP, length(&below))];
            code.extend(below);
            code.extend(search(above));
            code
        }
    }
}

fn length(code: &[sock_filter]) -> u32 {
    u32::try_from(code.len()).unwrap_or(u32::MAX)
}

fn low(arg: u32) -> sock_filter {
    statement(LOAD_WORD, OFFSET_ARGS + 8 * arg)
}

fn high(arg: u32) -> sock_filter {
    statement(LOAD_WORD, OFFSET_ARGS + 8 * arg + 4)
}

const fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

const fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}
