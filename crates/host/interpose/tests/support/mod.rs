//! Starts each case in a process of its own, and its client under the supervisor there.

pub(crate) mod machine;

use std::process::{Command as Process, ExitCode};
use std::sync::Arc;

use lychgate_interpose::{Command, Error, ExitStatus, Options, Scratch, Tracer};

use machine::Machine;

/// A case: `drive` starts `client` under the supervisor.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) client: fn(&[String]) -> i32,
    pub(crate) drive: fn(&Driver),
}

/// What a case starts clients with.
pub(crate) struct Driver {
    name: &'static str,
    pub(crate) machine: Arc<Machine>,
    scratch: Option<Scratch>,
}

/// Set for a driver whose files are in a [`Scratch`].
pub(crate) const SCRATCH: &str = "LYCHGATE_TEST_SCRATCH";

impl Driver {
    fn new(name: &'static str) -> Self {
        let scratch = std::env::var_os(SCRATCH).map(|_| Scratch::new().unwrap());
        let machine = match &scratch {
            Some(scratch) => Machine::new_in(scratch.path()),
            None => Machine::new(),
        };
        Self { name, machine, scratch }
    }

    /// The command of the case's client.
    pub(crate) fn client(&self, arguments: &[&str]) -> Command {
        Command::new(std::env::current_exe().unwrap())
            .args(["--client", self.name])
            .args(arguments.iter().copied())
    }

    pub(crate) fn run(&self, command: &Command) -> Result<ExitStatus, Error> {
        let mut options = Options::default();
        options.scratch = self.scratch.as_ref().map(|scratch| scratch.path().to_owned());
        self.run_with(command, &options, Arc::new(()))
    }

    pub(crate) fn run_with(
        &self,
        command: &Command,
        options: &Options,
        tracer: Arc<dyn Tracer>,
    ) -> Result<ExitStatus, Error> {
        lychgate_interpose::run(command, self.machine.clone(), options, tracer)
    }

    /// Runs the client, which must end well and leave no file open.
    pub(crate) fn succeeds(&self, arguments: &[&str]) {
        assert_eq!(self.run(&self.client(arguments)).unwrap(), ExitStatus::Code(0));
        self.all_is_released();
    }

    pub(crate) fn all_is_released(&self) {
        let state = self.machine.state();
        let load =
            |value: &std::sync::atomic::AtomicU64| value.load(std::sync::atomic::Ordering::SeqCst);
        assert!(load(&state.releases) >= load(&state.opens), "a file was not released");
        assert_eq!(load(&state.begun), load(&state.ended));
    }
}

/// The harness: without arguments it runs all cases; with one those whose name contains it.
pub(crate) fn main(cases: &[Case]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let find = |name: &String| cases.iter().find(|case| case.name == name.as_str());
    match arguments.as_slice() {
        [role, name, rest @ ..] if role == "--client" => {
            let code = find(name).map_or(255, |case| (case.client)(rest));
            return ExitCode::from(u8::try_from(code).unwrap_or(255));
        }
        [role, name] if role == "--drive" => {
            let case = find(name).expect("a case");
            (case.drive)(&Driver::new(case.name));
            return ExitCode::SUCCESS;
        }
        _ => {}
    }
    let wanted: Vec<&String> = arguments.iter().filter(|text| !text.starts_with('-')).collect();
    let mut failed = 0;
    for case in cases {
        if !wanted.is_empty() && !wanted.iter().any(|part| case.name.contains(part.as_str())) {
            continue;
        }
        for mut way in ways(case.name) {
            let output = way.1.output().unwrap();
            let good = output.status.success();
            println!("test {}{} ... {}", case.name, way.0, if good { "ok" } else { "FAILED" });
            if !good {
                failed += 1;
                println!("{}", String::from_utf8_lossy(&output.stdout));
                println!("{}", String::from_utf8_lossy(&output.stderr));
            }
        }
    }
    let _ = std::fs::remove_dir_all(copies());
    if failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// As whoever runs the tests, and if that is root, as nobody too.
fn ways(name: &str) -> Vec<(&'static str, Process)> {
    let own = std::env::current_exe().unwrap();
    let limited = |mut process: Process| {
        process.env("RUST_BACKTRACE", "1");
        process
    };
    let mut plain = Process::new("timeout");
    plain.args(["-k", "2", "60"]).arg(&own).args(["--drive", name]);
    let mut ways = vec![("", limited(plain))];
    if rustix::process::geteuid().is_root() && std::path::Path::new("/usr/bin/setpriv").exists() {
        let mut nobody = Process::new("timeout");
        nobody
            .args(["-k", "2", "60", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
            .args(["--bounding-set=-all", "--inh-caps=-all"])
            .arg(reachable(&own))
            .args(["--drive", name]);
        ways.push((" (as nobody)", limited(nobody)));
    }
    ways
}

/// A copy of the executable that others than its owner can reach.
fn reachable(own: &std::path::Path) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let directory = copies();
    let copy = directory.join("interpose");
    if !copy.exists() {
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::copy(own, &copy).unwrap();
        for path in [&directory, &copy] {
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
    }
    copy
}

fn copies() -> std::path::PathBuf {
    std::path::Path::new("/tmp").join(format!("lychgate-interpose-{}", std::process::id()))
}
