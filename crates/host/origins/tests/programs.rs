//! Programs as compilers make them, stopped in a system call.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lychgate_origins::{Mapping, Origins, Place, Registers, Target};

const SOURCE: &str = r#"#include <unistd.h>
#include <stdlib.h>
__attribute__((noinline)) int take(char *to) {
    return (int)read(0, to, 1) + 1;
}
__attribute__((noinline)) int alloc_ring(int n) {
    volatile char buffer[64 + n];
    int got = take((char *)buffer);
    return got + buffer[0];
}
int main(int argc, char **argv) {
    write(1, "r", 1);
    int got = alloc_ring(argc * 8);
    return got > 1000;
}
"#;

struct Stopped(Child);

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Target for Stopped {
    fn registers(&self) -> Option<Registers> {
        let line = fs::read_to_string(format!("/proc/{}/syscall", self.0.id())).ok()?;
        Registers::parse(&line)
    }

    fn mappings(&self) -> Vec<Mapping> {
        let maps = fs::read_to_string(format!("/proc/{}/maps", self.0.id())).unwrap();
        let mapping = |line: &str| {
            let mut words = line.split_whitespace();
            let (start, end) = words.next()?.split_once('-')?;
            let executable = words.next()?.contains('x');
            let number = |word: &str| u64::from_str_radix(word, 16).ok();
            let offset = number(words.next()?)?;
            let path = words.nth(2).filter(|path| path.starts_with('/'))?;
            Some(Mapping {
                start: number(start)?,
                end: number(end)?,
                offset,
                executable,
                path: path.into(),
                name: path.to_owned(),
            })
        };
        maps.lines().filter_map(mapping).collect()
    }

    fn read(&self, at: u64, to: &mut [u8]) -> bool {
        let memory = fs::File::open(format!("/proc/{}/mem", self.0.id())).unwrap();
        memory.read_exact_at(to, at).is_ok()
    }
}

/// A program that waits in `read`, made with these options; `None` without a compiler.
fn stopped(directory: &Path, options: &[&str]) -> Option<Stopped> {
    let (source, program) = (directory.join("ring.c"), directory.join("ring"));
    fs::write(&source, SOURCE).unwrap();
    let made = Command::new("cc").args(options).arg(&source).arg("-o").arg(&program).status();
    if !made.is_ok_and(|made| made.success()) {
        let _ =
            writeln!(std::io::stderr(), "skipped: there is no C compiler, or not for {options:?}");
        return None;
    }
    let mut child =
        Command::new(&program).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut ready = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    let stopped = Stopped(child);
    for _ in 0..2000 {
        // The number of read(2), not yet that of the write before.
        let line = fs::read_to_string(format!("/proc/{}/syscall", stopped.0.id())).unwrap();
        if line.starts_with("0 ") {
            return Some(stopped);
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    panic!("the program does not read");
}

fn functions(places: &[Place]) -> Vec<&str> {
    places.iter().filter_map(|place| place.function.as_deref()).collect()
}

#[test]
fn a_call_is_followed_to_main_however_the_program_was_compiled() {
    let variants: [&[&str]; 6] = [
        &["-O0", "-g"],
        &["-O2", "-g"],
        &["-O2", "-g", "-fno-omit-frame-pointer"],
        &["-O0", "-g", "-static"],
        &["-O2", "-g", "-no-pie"],
        &["-O2"],
    ];
    for options in variants {
        let directory = tempfile::tempdir().unwrap();
        let Some(target) = stopped(directory.path(), options) else { continue };
        let origins = Origins::new();
        let stack = origins.stack(1, &target);
        let places = origins.places(&stack);
        let functions = functions(&places);
        let ours: Vec<&str> = functions
            .iter()
            .copied()
            .filter(|name| ["take", "alloc_ring", "main"].contains(name))
            .collect();
        assert_eq!(ours, ["take", "alloc_ring", "main"], "{options:?}: {functions:?}");
        let place = origins.place(&stack).unwrap();
        if options.contains(&"-g") && !options.contains(&"-static") {
            assert_eq!(place.to_string(), "ring.c:4 in take()", "{options:?}");
            let caller =
                places.iter().find(|place| place.function.as_deref() == Some("alloc_ring"));
            assert_eq!(caller.unwrap().line, Some(8), "{options:?}");
        }
    }
}

#[test]
fn a_stripped_program_has_addresses() {
    let directory = tempfile::tempdir().unwrap();
    let Some(target) = stopped(directory.path(), &["-O2", "-s"]) else { return };
    let origins = Origins::new();
    let stack = origins.stack(1, &target);
    let place = origins.place(&stack).unwrap();
    assert!(place.to_string().starts_with("ring+0x"), "{place}");
    assert!(stack.frames().len() >= 4, "{stack:?}");
}

#[test]
fn a_process_that_is_gone_has_no_stack() {
    struct Gone;
    impl Target for Gone {
        fn registers(&self) -> Option<Registers> {
            Some(Registers { ip: 0x1000, sp: 0x2000 })
        }
        fn mappings(&self) -> Vec<Mapping> {
            let path = PathBuf::from("/nowhere/at/all");
            let name = "all".to_owned();
            vec![Mapping { start: 0x1000, end: 0x2000, offset: 0, executable: true, path, name }]
        }
        fn read(&self, _: u64, _: &mut [u8]) -> bool {
            false
        }
    }
    assert!(Origins::new().stack(1, &Gone).frames().is_empty());
}
