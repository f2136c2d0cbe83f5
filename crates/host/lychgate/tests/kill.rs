//! Whoever is killed, whenever: nothing stays behind, and what a flush confirmed is on the disk.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{BDF, have, lychgate, scratch};

const ROUNDS: u64 = 100;
const BLOCK: u64 = 4096;
const BLOCKS: u64 = 4096;

/// Names every process of a round: children inherit it, and `/proc/PID/environ` shows it.
const MARK: &str = "LYCHGATE_TEST_ROUND";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Victim {
    Lychgate,
    Client,
}

#[test]
fn kill_9_at_any_moment_leaves_nothing_and_loses_no_flushed_write() {
    if !have("qemu-io") {
        return;
    }
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut confirmed = 0;
    for number in 0..ROUNDS {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let victim = if number % 2 == 0 { Victim::Lychgate } else { Victim::Client };
        confirmed += round(number, victim, Duration::from_micros(random % 120_000));
    }
    assert!(
        confirmed > ROUNDS,
        "only {confirmed} writes were confirmed: nothing was put to the test"
    );
}

/// Gives how many writes a flush had confirmed.
fn round(number: u64, victim: Victim, delay: Duration) -> u64 {
    let directory = scratch();
    let image = directory.path().join("disk.img");
    let temporary = directory.path().join("tmp");
    fs::create_dir(&temporary).expect("a directory");
    let disk = fs::File::options().read(true).write(true).create_new(true).open(&image);
    let disk = disk.expect("an image");
    disk.set_len(BLOCK * BLOCKS).expect("an empty disk");

    let mark = format!("{}-{number}", std::process::id());
    let mut child = lychgate()
        .args(["run", "--nvme", &format!("{BDF}={}", image.display()), "--"])
        .args(["qemu-io", "-f", "raw", &format!("nvme://{BDF}/1")])
        .env(MARK, &mark)
        .env("TMPDIR", &temporary)
        .env("XDG_RUNTIME_DIR", &temporary)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("lychgate");
    let writer = feed(&mut child);
    let reader = count_writes(&mut child);

    thread::sleep(delay);
    match victim {
        Victim::Lychgate => child.kill().expect("kill"),
        Victim::Client => kill_client(&mark, child.id()),
    }
    child.wait().expect("wait");
    let wrote = reader.join().expect("the reader");
    writer.join().expect("the writer");

    assert_nothing_left(number, victim, &mark, &temporary);
    // The line of write n+1 comes after the flush behind write n has returned.
    let confirmed = wrote.saturating_sub(1);
    for block in 0..confirmed {
        let mut data = vec![0; usize::try_from(BLOCK).expect("small")];
        disk.read_exact_at(&mut data, block * BLOCK).expect("reading the image");
        let want = pattern(block);
        assert!(
            data.iter().all(|byte| *byte == want),
            "round {number}, {victim:?} killed after {delay:?}: block {block} was flushed and is lost"
        );
    }
    confirmed
}

fn pattern(block: u64) -> u8 {
    u8::try_from(block % 251 + 1).expect("below 252")
}

/// Gives qemu-io a write and a flush after the other, until it ends.
fn feed(child: &mut Child) -> thread::JoinHandle<()> {
    let mut input = child.stdin.take().expect("piped");
    thread::spawn(move || {
        for block in 0..BLOCKS {
            let line = format!("write -P {} {} {BLOCK}\nflush\n", pattern(block), block * BLOCK);
            if input.write_all(line.as_bytes()).is_err() {
                return;
            }
        }
    })
}

fn count_writes(child: &mut Child) -> thread::JoinHandle<u64> {
    let output = BufReader::new(child.stdout.take().expect("piped"));
    thread::spawn(move || {
        let lines = output.lines().map_while(Result::ok);
        lines.filter(|line| line.contains("wrote 4096/4096 bytes")).count() as u64
    })
}

fn marked_processes(mark: &str) -> Vec<u32> {
    let want = format!("{MARK}={mark}");
    let is_marked = |pid: &u32| {
        let running = fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")));
        let environ = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
        running && environ.split(|byte| *byte == 0).any(|entry| entry == want.as_bytes())
    };
    let entries = fs::read_dir("/proc").expect("/proc").flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_marked).collect()
}

/// Kills the process that runs qemu-io; before its exec, the child that would become it.
fn kill_client(mark: &str, lychgate: u32) {
    let is_client = |pid: &u32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        *pid != lychgate && name.trim() == "qemu-io"
    };
    let client = marked_processes(mark).into_iter().find(is_client);
    let victim = client.unwrap_or(lychgate).to_string();
    let status = Command::new("kill").args(["-9", &victim]).stderr(Stdio::null()).status();
    status.expect("kill");
}

fn assert_nothing_left(number: u64, victim: Victim, mark: &str, temporary: &Path) {
    let start = Instant::now();
    loop {
        let processes = marked_processes(mark);
        let files = fs::read_dir(temporary).expect("a directory").flatten().collect::<Vec<_>>();
        if processes.is_empty() && files.is_empty() {
            return;
        }
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "round {number}, {victim:?} killed: left processes {processes:?} and files {files:?}"
        );
        thread::sleep(Duration::from_millis(5));
    }
}
