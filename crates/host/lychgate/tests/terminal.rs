//! Programs on a terminal: they have it, and Ctrl-C is theirs.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Stdio};

use common::have;

/// Runs a shell command under lychgate on a terminal of its own; what is written to its standard
/// input is typed.
fn on_terminal(program: &str) -> Child {
    let lychgate = env!("CARGO_BIN_EXE_lychgate");
    Command::new("script")
        .args(["--quiet", "--return", "--command"])
        // A shell that waited in between would die of the Ctrl-C itself, as dash does.
        .arg(format!("exec {lychgate} run --edu 0000:01:00.0 -- sh -c '{program}'"))
        .arg("/dev/null")
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script")
}

#[test]
fn a_program_has_the_terminal() {
    if !have("script") {
        return;
    }
    let mut child = on_terminal("test -t 0 && test -t 1 && read line && echo \"got $line\"");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(b"hello\n").expect("typing");
    let mut output = String::new();
    child.stdout.take().expect("piped").read_to_string(&mut output).expect("reading");
    assert!(child.wait().expect("wait").success(), "{output}");
    assert!(output.contains("got hello"), "{output}");
}

#[test]
fn ctrl_c_reaches_the_program_once_and_its_answer_counts() {
    if !have("script") {
        return;
    }
    for (program, code) in [
        ("echo ready; exec sleep 60", 130),
        // A second signal would come within the second that it waits for one.
        (
            "n=0; trap \"n=\\$((n+1))\" INT; echo ready; \
             while [ $n = 0 ]; do sleep 0.1; done; sleep 1; exit $((40+n))",
            41,
        ),
    ] {
        let mut child = on_terminal(program);
        let mut input = child.stdin.take().expect("piped");
        let mut output = BufReader::new(child.stdout.take().expect("piped"));
        let mut line = String::new();
        while !line.contains("ready") {
            line.clear();
            assert_ne!(output.read_line(&mut line).expect("reading"), 0, "ended too early");
        }
        input.write_all(b"\x03").expect("typing");
        let mut rest = String::new();
        output.read_to_string(&mut rest).expect("reading");
        assert_eq!(child.wait().expect("wait").code(), Some(code), "{program}: {rest}");
    }
}
