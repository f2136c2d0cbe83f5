//! Threads, signals, and the end of processes.

use std::os::fd::AsRawFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command as Process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use lychgate_interpose::ExitStatus;

use super::descriptors::ioctl;
use super::nodes::open;
use crate::support::machine::{ADD, COUNT, SLEEP};
use crate::support::{Case, SCRATCH};

pub(crate) const THREADS: Case = Case {
    name: "calls_of_many_threads_are_all_served_once",
    client: |_| {
        let file = open("/dev/fake");
        let fd = file.as_raw_fd();
        let threads: Vec<_> = (0..8)
            .map(|_| {
                std::thread::spawn(move || {
                    let mut word = 0_u32;
                    for round in 0..200 {
                        assert_eq!(ioctl(fd, ADD, (&raw mut word).addr() as u64), Ok(0));
                        assert_eq!(word, round + 1);
                        ioctl(fd, COUNT, 0).unwrap();
                        drop(open("/dev/vfio/probe"));
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        0
    },
    drive: |driver| {
        driver.succeeds(&[]);
        assert_eq!(driver.machine.state().count.load(Ordering::SeqCst), 1600);
        assert_eq!(driver.machine.state().releases.load(Ordering::SeqCst), 1601);
    },
};

static ALARMS: AtomicU32 = AtomicU32::new(0);

extern "C" fn on_alarm(_: libc::c_int) {
    ALARMS.fetch_add(1, Ordering::SeqCst);
}

pub(crate) const INTERRUPTED: Case = Case {
    name: "an_interrupted_call_is_served_exactly_once",
    client: |_| {
        let file = open("/dev/fake");
        // SAFETY: a handler that is signal-safe, and a timer; both structures live through the calls.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_alarm as extern "C" fn(_) as *const () as usize;
            libc::sigaction(libc::SIGALRM, &raw const action, std::ptr::null_mut());
            let often = libc::timeval { tv_sec: 0, tv_usec: 300 };
            let timer = libc::itimerval { it_interval: often, it_value: often };
            libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
        }
        for round in 0..500 {
            // A signal before the supervisor has taken the call ends it, as if it had never been.
            let result = loop {
                match ioctl(file.as_raw_fd(), SLEEP, 200) {
                    Err(libc::EINTR) => {}
                    other => break other,
                }
            };
            assert_eq!(result, Ok(round));
        }
        assert!(ALARMS.load(Ordering::SeqCst) > 50);
        0
    },
    drive: |driver| {
        driver.succeeds(&[]);
        assert_eq!(driver.machine.state().count.load(Ordering::SeqCst), 500);
    },
};

pub(crate) const OWN_FILTER: Case = Case {
    name: "a_client_with_a_filter_of_its_own_is_served",
    client: |_| {
        // Everything is allowed, but getppid is an error.
        let statement = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
        let getppid = u32::try_from(libc::SYS_getppid).unwrap();
        let code = [
            statement(0x20, 0),
            libc::sock_filter { code: 0x15, jt: 0, jf: 1, k: getppid },
            statement(0x06, 0x0005_0000 | 42),
            statement(0x06, 0x7fff_0000),
        ];
        let program = libc::sock_fprog { len: 4, filter: code.as_ptr().cast_mut() };
        // SAFETY: a program of four instructions that lives through the call.
        unsafe {
            assert_eq!(libc::syscall(libc::SYS_seccomp, 1, 0, &raw const program), 0);
            assert_eq!(libc::syscall(libc::SYS_getppid), -1);
        }
        let file = open("/dev/fake");
        assert_eq!(ioctl(file.as_raw_fd(), COUNT, 0), Ok(0));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const VFORK: Case = Case {
    name: "a_child_that_shares_its_parents_memory_is_served",
    client: |arguments| {
        if let [fd] = arguments {
            return i32::from(ioctl(fd.parse().unwrap(), COUNT, 0) != Ok(1));
        }
        let file = open("/dev/fake");
        let fd = file.as_raw_fd();
        // SAFETY: takes no memory.
        unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        assert_eq!(ioctl(fd, COUNT, 0), Ok(0));
        // posix_spawn starts by CLONE_VM | CLONE_VFORK.
        let status = Process::new(std::env::current_exe().unwrap())
            .args(["--client", VFORK.name, &fd.to_string()])
            .status();
        assert!(status.unwrap().success());
        let space = ioctl(fd, crate::support::machine::SPACE, 0);
        assert!(Process::new("true").status().unwrap().success());
        assert_eq!(ioctl(fd, crate::support::machine::SPACE, 0), space);
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

/// Starts a process that is nobody's child and in a session of its own.
fn daemonise(work: fn()) {
    // SAFETY: a process with one thread; the children only run `work`.
    unsafe {
        if libc::fork() == 0 {
            libc::setsid();
            if libc::fork() == 0 {
                work();
            }
            libc::_exit(0);
        }
    }
}

pub(crate) const DAEMON: Case = Case {
    name: "a_run_lasts_as_long_as_its_daemons",
    client: |_| {
        daemonise(|| {
            std::thread::sleep(Duration::from_millis(200));
            let file = open("/dev/fake");
            ioctl(file.as_raw_fd(), COUNT, 0).unwrap();
        });
        3
    },
    drive: |driver| {
        let status = driver.run(&driver.client(&[])).unwrap();
        assert_eq!(status, ExitStatus::Code(3));
        assert_eq!(driver.machine.state().count.load(Ordering::SeqCst), 1);
        driver.all_is_released();
    },
};

pub(crate) const CLIENT_KILLED: Case = Case {
    name: "a_killed_client_leaves_nothing_open",
    client: |_| {
        let file = open("/dev/fake");
        let _more: Vec<_> = (0..10).map(|_| open("/dev/vfio/probe")).collect();
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            // SAFETY: ends this process.
            unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
        });
        loop {
            let _ = ioctl(file.as_raw_fd(), SLEEP, 5000);
        }
    },
    drive: |driver| {
        let status = driver.run(&driver.client(&[])).unwrap();
        assert_eq!(status, ExitStatus::Signal(libc::SIGKILL));
        assert_eq!(driver.machine.state().releases.load(Ordering::SeqCst), 11);
    },
};

/// The processes that have this text in their environment.
fn marked(text: &str) -> Vec<i32> {
    let entries = std::fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse::<i32>().ok())
        .filter(|process| {
            std::fs::read(format!("/proc/{process}/environ")).is_ok_and(|environ| {
                environ.windows(text.len()).any(|part| part == text.as_bytes())
            })
        })
        .collect()
}

fn wait_until(mut true_: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_secs(20);
    while Instant::now() < end {
        if true_() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    false
}

pub(crate) const SUPERVISOR_KILLED: Case = Case {
    name: "a_killed_supervisor_leaves_no_process",
    client: |_| {
        for _ in 0..3 {
            daemonise(|| {
                // SAFETY: changes what a signal of this process does.
                unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
                loop {
                    drop(open("/dev/fake"));
                    std::thread::sleep(Duration::from_millis(5));
                }
            });
        }
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    },
    drive: |driver| {
        let mark = format!("LYCHGATE_TEST_MARK={}", std::process::id());
        let (name, value) = mark.split_once('=').unwrap();
        // The supervisor is a process of its own, so that it can be killed.
        if std::env::var_os("LYCHGATE_TEST_MARK").is_some() {
            let _ = driver.run(&driver.client(&[]));
            return;
        }
        let mut supervisor = Process::new(std::env::current_exe().unwrap())
            .args(["--drive", SUPERVISOR_KILLED.name])
            .env(name, value)
            .spawn()
            .unwrap();
        // The supervisor, the guardian, the client and three daemons.
        assert!(wait_until(|| marked(&mark).len() >= 6), "{:?}", marked(&mark));
        supervisor.kill().unwrap();
        supervisor.wait().unwrap();
        assert!(wait_until(|| marked(&mark).is_empty()), "{:?}", marked(&mark));
    },
};

/// Rounds of the next case.
const ROUNDS: u64 = 60;

pub(crate) const KILLED_ANY_TIME: Case = Case {
    name: "a_supervisor_killed_at_any_moment_leaves_neither_process_nor_file",
    client: |_| {
        // Each makes the supervisor list a directory that the host has too.
        for _ in 0..5 {
            assert!(std::fs::read_dir("/dev").unwrap().count() > 1);
            drop(open("/dev/fake"));
        }
        0
    },
    drive: |driver| {
        const MARK: &str = "LYCHGATE_TEST_MARK";
        if std::env::var_os(MARK).is_some() {
            let _ = driver.run(&driver.client(&[]));
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let mut ended_by_itself = 0;
        for round in 0..ROUNDS {
            let value = format!("{}-{round}", std::process::id());
            let mut supervisor = Process::new(std::env::current_exe().unwrap())
                .args(["--drive", KILLED_ANY_TIME.name])
                .env(MARK, &value)
                .env(SCRATCH, "1")
                .env("TMPDIR", place.path())
                .env("XDG_RUNTIME_DIR", place.path())
                .spawn()
                .unwrap();
            std::thread::sleep(Duration::from_micros(round * 40_000 / ROUNDS));
            ended_by_itself += u32::from(supervisor.try_wait().unwrap().is_some());
            supervisor.kill().unwrap();
            supervisor.wait().unwrap();
            let mark = format!("{MARK}={value}");
            let left = || std::fs::read_dir(place.path()).unwrap().count();
            assert!(
                wait_until(|| marked(&mark).is_empty() && left() == 0),
                "round {round}: {:?}, {} files",
                marked(&mark),
                left()
            );
        }
        assert!(u64::from(ended_by_itself) < ROUNDS, "no round was killed");
    },
};

pub(crate) const OTHER_ABIS: Case = Case {
    name: "calls_by_other_abis_are_refused_where_they_want_the_machine",
    client: |_| {
        // A path below 4 GiB, where an i386 call can name it.
        // SAFETY: a new mapping.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED);
        let open = |path: &std::ffi::CStr| {
            let bytes = path.to_bytes_with_nul();
            // SAFETY: the page is larger than the path.
            unsafe { page.cast::<u8>().copy_from(bytes.as_ptr(), bytes.len()) };
            let mut result = 5_i64;
            // SAFETY: open(path, O_RDONLY) of the i386 ABI; rbx is the compiler's and is restored.
            unsafe {
                std::arch::asm!(
                    "xchg rbx, {path}",
                    "int 0x80",
                    "xchg rbx, {path}",
                    path = inout(reg) page.addr() => _,
                    inout("rax") result,
                    in("rcx") 0,
                    in("rdx") 0,
                    out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                );
            }
            result as i32
        };
        let by_i386 = open(c"/etc/passwd");
        if by_i386 != -libc::ENOSYS {
            // The kernel has the ABI.
            assert!(by_i386 > 2);
            assert_eq!(open(c"/dev/fake"), -libc::ENOSYS);
            assert_eq!(open(c"/dev/nothing"), -libc::ENOENT);
        }
        // SAFETY: getpid of the x32 ABI.
        let x32 = unsafe { libc::syscall(0x4000_0000 | libc::SYS_getpid) };
        assert_eq!((x32, std::io::Error::last_os_error().raw_os_error()), (-1, Some(libc::ENOSYS)));
        0
    },
    drive: |driver| driver.succeeds(&[]),
};

pub(crate) const SIGNALS: Case = Case {
    name: "signals_to_the_supervisor_reach_the_client",
    client: |arguments| match arguments {
        [wait] if wait == "wait" => {
            let file = open("/dev/fake");
            ioctl(file.as_raw_fd(), COUNT, 0).unwrap();
            loop {
                std::thread::sleep(Duration::from_secs(1));
            }
        }
        _ => 255,
    },
    drive: |driver| {
        if std::env::var_os("LYCHGATE_TEST_SIGNAL").is_some() {
            let state = driver.machine.clone();
            std::thread::spawn(move || {
                while state.state().count.load(Ordering::SeqCst) == 0 {
                    std::thread::sleep(Duration::from_millis(1));
                }
                println!("ready");
            });
            let status = driver.run(&driver.client(&["wait"])).unwrap();
            println!("{status:?}");
            return;
        }
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGUSR1] {
            let mut process = Process::new(std::env::current_exe().unwrap());
            process
                .args(["--drive", SIGNALS.name])
                .env("LYCHGATE_TEST_SIGNAL", "1")
                .stdout(std::process::Stdio::piped());
            if signal == libc::SIGHUP {
                // As `nohup` starts it.
                // SAFETY: a signal-safe call.
                unsafe {
                    process.pre_exec(|| {
                        libc::signal(libc::SIGHUP, libc::SIG_IGN);
                        Ok(())
                    })
                };
            }
            let mut supervisor = process.spawn().unwrap();
            let mut lines =
                std::io::BufRead::lines(std::io::BufReader::new(supervisor.stdout.take().unwrap()));
            assert_eq!(lines.next().unwrap().unwrap(), "ready");
            let pid = i32::try_from(supervisor.id()).unwrap();
            let expected = if signal == libc::SIGHUP {
                // SAFETY: takes no memory.
                unsafe { libc::kill(pid, signal) };
                std::thread::sleep(Duration::from_millis(100));
                libc::SIGTERM
            } else {
                signal
            };
            // SAFETY: takes no memory.
            unsafe { libc::kill(pid, expected) };
            assert_eq!(lines.next().unwrap().unwrap(), format!("Signal({expected})"));
            let status = supervisor.wait().unwrap();
            assert_eq!((status.code(), status.signal()), (Some(0), None));
        }
    },
};
