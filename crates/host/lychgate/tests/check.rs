//! `lychgate check` on programs with one mistake each, and on their twins without it.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::have;

/// A program of the corpus.
struct Bug {
    source: PathBuf,
    /// The finding that its comment names.
    finds: String,
    /// The line that the report must name.
    line: Option<usize>,
}

fn corpus() -> Vec<Bug> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../conformance/bugs");
    let mut bugs: Vec<Bug> = fs::read_dir(directory)
        .expect("the corpus")
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "c"))
        .map(|source| {
            let text = fs::read_to_string(&source).expect("a program");
            let finds = text.split_once("finds: ").expect("a `finds:` in the comment").1;
            let finds = finds.split_whitespace().next().expect("a name").to_owned();
            let line = text.lines().position(|line| line.contains("/* HERE */"));
            Bug { source, finds, line: line.map(|line| line + 1) }
        })
        .collect();
    bugs.sort_by(|a, b| a.source.cmp(&b.source));
    bugs
}

impl Bug {
    fn compile(&self, to: &Path, options: &[&str]) {
        let mut compiler = Command::new("cc");
        compiler.args(["-g", "-O1", "-Wall", "-Werror"]).args(options).arg(&self.source);
        assert!(compiler.arg("-o").arg(to).status().expect("cc").success(), "{:?}", self.source);
    }
}

fn check(options: &[&str], program: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lychgate"))
        .args(["check", "--edu", "0000:01:00.0"])
        .args(options)
        .arg("--")
        .arg(program)
        .output()
        .expect("lychgate")
}

#[test]
fn each_mistake_is_found_with_its_line_and_no_twin_is_blamed() {
    if !have("cc") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let bugs = corpus();
    assert!(bugs.len() >= 8);
    for bug in bugs {
        let name = bug.source.file_name().and_then(|name| name.to_str()).expect("a name");
        let (program, twin) = (directory.path().join("bug"), directory.path().join("twin"));
        bug.compile(&program, &[]);
        bug.compile(&twin, &["-DFIXED_TWIN"]);

        // Some mistakes are races with a device that takes 100 ms: on a busy machine a program may
        // lose one and do no harm.
        let mut found = check(&[], &program);
        for _ in 0..4 {
            if found.status.code() != Some(0) {
                break;
            }
            found = check(&[], &program);
        }
        let text = String::from_utf8_lossy(&found.stderr);
        assert_eq!(found.status.code(), Some(99), "{name}: {text}");
        assert!(text.contains(&format!("({})", bug.finds)), "{name}: {text}");
        assert!(text.contains("lychgate: 1 finding\n"), "{name}: {text}");
        if let Some(line) = bug.line {
            assert!(text.contains(&format!("{name}:{line} in ")), "{name}: {text}");
        }

        let clean = check(&[], &twin);
        let text = String::from_utf8_lossy(&clean.stderr);
        assert_eq!(clean.status.code(), Some(0), "the twin of {name}: {text}");
        assert_eq!(text, "lychgate: no findings\n", "the twin of {name}");
    }
}

#[test]
fn the_exit_code_of_a_finding_can_be_chosen() {
    if !have("cc") {
        return;
    }
    let directory = tempfile::tempdir().expect("a directory");
    let program = directory.path().join("bug");
    let bug = corpus().into_iter().find(|bug| bug.finds == "dma/no-right").expect("one of these");
    bug.compile(&program, &[]);
    assert_eq!(check(&["--error-exitcode", "7"], &program).status.code(), Some(7));
    let own = check(&["--error-exitcode", "0", "--quiet"], &program);
    assert_eq!((own.status.code(), own.stderr.len()), (Some(0), 0));
}

#[test]
fn the_demo_has_its_one_planted_mistake() {
    let demo = Command::new(env!("CARGO_BIN_EXE_lychgate"))
        .args(["check", "--nvme", "0000:01:00.0=mem:64M", "--"])
        .arg(env!("CARGO_BIN_EXE_lychgate"))
        .args(["demo-client", "0000:01:00.0"])
        .output()
        .expect("lychgate");
    let text = String::from_utf8_lossy(&demo.stderr);
    assert_eq!(demo.status.code(), Some(99), "{text}");
    assert!(text.contains("lychgate: 1 finding\n  dma/use-after-unmap"), "{text}");
}

#[test]
fn every_finding_is_explained() {
    let explain = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lychgate"));
        command.arg("explain").args(arguments).output().expect("lychgate")
    };
    let list = String::from_utf8(explain(&[]).stdout).expect("text");
    assert!(list.lines().count() > 20, "{list}");
    for line in list.lines() {
        let id = line.split_whitespace().next().expect("a name");
        let text = String::from_utf8(explain(&[id]).stdout).expect("text");
        assert!(text.starts_with(&format!("{id}: ")), "{text}");
        let long = text.lines().skip(1).find(|line| id.starts_with("dma/") && line.len() > 96);
        assert_eq!(long, None, "{id}");
    }
    let unknown = explain(&["dma/nothing"]);
    assert_eq!(unknown.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("lists them all"));
}
