//! How programs start and end.

use lychgate_interpose::{Command, Error, ExitStatus};

use crate::support::Case;

pub(crate) const EXIT_CODES: Case = Case {
    name: "a_program_ends_as_it_would_alone",
    client: |arguments| match arguments {
        [code] if code == "abort" => std::process::abort(),
        [code] => code.parse().unwrap(),
        _ => 255,
    },
    drive: |driver| {
        assert_eq!(driver.run(&Command::new("true")).unwrap(), ExitStatus::Code(0));
        for code in [0_u8, 1, 42, 255] {
            let status = driver.run(&driver.client(&[&code.to_string()])).unwrap();
            assert_eq!(status, ExitStatus::Code(code));
            assert_eq!(status.code(), code);
        }
        let status = driver.run(&driver.client(&["abort"])).unwrap();
        assert_eq!(status, ExitStatus::Signal(libc::SIGABRT));
        assert_eq!(status.code(), 128 + 6);
    },
};

pub(crate) const NO_PROGRAM: Case = Case {
    name: "a_program_that_is_not_there_is_an_error",
    client: |_| 0,
    drive: |driver| {
        for name in ["/nonexistent/program", "no-such-program-anywhere"] {
            // A directory on PATH that cannot be searched would be the reason given.
            let command = Command::new(name).env("PATH", "/usr/bin:/bin");
            let error = driver.run(&command).unwrap_err();
            assert!(matches!(error, Error::NotFound(_)), "{error}");
            assert_eq!(error.exit_code(), 127);
        }
        let error = driver.run(&Command::new("/etc/passwd")).unwrap_err();
        assert!(matches!(error, Error::NotExecutable { .. }), "{error}");
        assert_eq!(error.exit_code(), 126);
        assert!(matches!(driver.run(&Command::new("a\0b")).unwrap_err(), Error::ZeroByte(_)));
    },
};

pub(crate) const SCRIPT: Case = Case {
    name: "a_script_without_interpreter_runs_in_sh",
    client: |_| 0,
    drive: |driver| {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let script = directory.path().join("script");
        std::fs::write(&script, "test \"$1\" = one && exit 7\n").unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        let status = driver.run(&Command::new(&script).args(["one"])).unwrap();
        assert_eq!(status, ExitStatus::Code(7));
    },
};

pub(crate) const NESTED: Case = Case {
    name: "a_run_within_a_run_is_refused_and_says_so",
    client: |_| {
        let machine = crate::support::machine::Machine::new();
        let options = lychgate_interpose::Options::default();
        let command = Command::new("true");
        match lychgate_interpose::run(&command, machine, &options, std::sync::Arc::new(())) {
            Err(Error::Nested) => 0,
            other => panic!("{other:?}"),
        }
    },
    drive: |driver| driver.succeeds(&[]),
};

#[derive(Default)]
struct Lines(std::sync::Mutex<Vec<String>>);

impl lychgate_interpose::Tracer for Lines {
    fn served(&self, served: &lychgate_interpose::Served<'_>) {
        let result = match served.result {
            Ok(value) => value.to_string(),
            Err(refusal) => refusal.to_string(),
        };
        let line = format!("{} {} = {result}", served.call.name, served.file);
        self.0.lock().unwrap().push(line);
    }
}

pub(crate) const TRACE: Case = Case {
    name: "a_tracer_hears_of_each_served_call",
    client: |_| {
        use std::os::fd::AsRawFd;
        let file = super::nodes::open("/dev/fake");
        let _ = super::descriptors::ioctl(file.as_raw_fd(), crate::support::machine::COUNT, 0);
        let _ = super::descriptors::ioctl(file.as_raw_fd(), 0x3b80, 0);
        0
    },
    drive: |driver| {
        let lines = std::sync::Arc::new(Lines::default());
        let options = lychgate_interpose::Options::default();
        let status = driver.run_with(&driver.client(&[]), &options, lines.clone()).unwrap();
        assert_eq!(status, ExitStatus::Code(0));
        let lines = lines.0.lock().unwrap();
        let number = lines.first().and_then(|line| line.strip_prefix("open /dev/fake = "));
        assert!((768..1024).contains(&number.unwrap().parse::<i32>().unwrap()));
        assert_eq!(
            lines.get(1..).unwrap(),
            ["ioctl 0x3be0 /dev/fake = 0", "IOMMU_DESTROY /dev/fake = ENOTTY (unknown)"]
        );
    },
};

pub(crate) const DEFECT: Case = Case {
    name: "a_machine_that_panics_ends_the_run",
    client: |_| {
        use std::os::fd::AsRawFd;
        let file = super::nodes::open("/dev/fake");
        let _ = super::descriptors::ioctl(file.as_raw_fd(), crate::support::machine::PANIC, 0);
        0
    },
    drive: |driver| {
        let error = driver.run(&driver.client(&[])).unwrap_err();
        assert!(matches!(error, Error::Panicked), "{error}");
    },
};
