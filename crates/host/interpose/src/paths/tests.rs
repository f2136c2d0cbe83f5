//! Lookups over a small tree.

use std::os::unix::fs::symlink;

use super::*;

/// A tree whose names the host does not have, but for `usr`, which both have.
fn tree() -> (tempfile::TempDir, Paths) {
    let tree = tempfile::tempdir().unwrap();
    let at = |path: &str| tree.path().join(path);
    std::fs::create_dir_all(at("zz-dev/sub")).unwrap();
    std::fs::create_dir_all(at("usr/zz-added")).unwrap();
    std::fs::write(at("zz-dev/node"), "").unwrap();
    std::fs::write(at("usr/zz-added/file"), "").unwrap();
    symlink("../node", at("zz-dev/sub/link")).unwrap();
    symlink("/zz-dev/sub", at("zz-dev/absolute")).unwrap();
    symlink("b", at("zz-dev/a")).unwrap();
    symlink("a", at("zz-dev/b")).unwrap();
    symlink("../usr/bin", at("zz-dev/bin")).unwrap();
    let paths = Paths::new(tree.path(), None).unwrap();
    (tree, paths)
}

fn find(path: &str) -> Place {
    find_from(None, path, Last::Follow)
}

fn find_from(base: Option<&str>, path: &str, last: Last) -> Place {
    let (_tree, paths) = tree();
    paths.look_up(|| base.map(PathBuf::from), OsStr::new(path), last)
}

fn machine(path: &str, kind: FileType) -> Place {
    Place::Machine(PathBuf::from(path), kind)
}

#[test]
fn links_dots_and_slashes_are_walked_as_the_kernel_walks_them() {
    let node = machine("/zz-dev/node", FileType::RegularFile);
    let directory = machine("/zz-dev/sub", FileType::Directory);
    for path in [
        "/zz-dev/node",
        "//zz-dev//./node",
        "/zz-dev/sub/link",
        "/zz-dev/sub/../node",
        "/zz-dev/absolute/link",
        "/zz-dev/absolute/../node",
        "/../zz-dev/node",
        "/usr/../zz-dev/node",
    ] {
        assert_eq!(find(path), node, "{path}");
    }
    for path in ["/zz-dev/sub", "/zz-dev/sub/", "/zz-dev/sub/.", "/zz-dev/absolute"] {
        assert_eq!(find(path), directory, "{path}");
    }
    let link = machine("/zz-dev/absolute", FileType::Symlink);
    assert_eq!(find_from(None, "/zz-dev/absolute", Last::Link), link);
    assert_eq!(find_from(None, "/zz-dev/absolute/", Last::Link), directory);
}

#[test]
fn wrong_paths_fail_as_the_kernel_fails_them() {
    assert_eq!(find("/zz-dev/missing"), Place::Wrong(Errno::ENOENT));
    assert_eq!(find("/zz-dev/missing/.."), Place::Wrong(Errno::ENOENT));
    assert_eq!(find("/zz-dev/node/"), Place::Wrong(Errno::ENOTDIR));
    assert_eq!(find("/zz-dev/node/.."), Place::Wrong(Errno::ENOTDIR));
    assert_eq!(find("/zz-dev/sub/link/x"), Place::Wrong(Errno::ENOTDIR));
    assert_eq!(find("/zz-dev/a"), Place::Wrong(Errno::new(libc::ELOOP)));
}

#[test]
fn what_the_host_has_is_left_to_the_kernel() {
    for path in ["/usr/bin/env", "/etc/passwd", "/zz-nothing", "/usr/zz-nothing", "", "/proc/1/x"] {
        assert_eq!(find(path), Place::Host, "{path}");
    }
    assert_eq!(find("/usr"), Place::Both(PathBuf::from("/usr")));
    assert_eq!(find("/usr/zz-added/file"), machine("/usr/zz-added/file", FileType::RegularFile));
    // By a link of the machine, which the kernel does not know.
    assert_eq!(find("/zz-dev/bin/env"), Place::HostBy(PathBuf::from("/usr/bin/env")));
    assert_eq!(find("/zz-dev/bin"), Place::HostBy(PathBuf::from("/usr/bin")));
}

#[test]
fn relative_paths_start_where_the_client_is() {
    let node = machine("/zz-dev/node", FileType::RegularFile);
    assert_eq!(find_from(Some("/"), "zz-dev/node", Last::Follow), node);
    assert_eq!(find_from(Some("/usr/bin"), "../../zz-dev/node", Last::Follow), node);
    assert_eq!(find_from(Some("/usr/bin"), "env", Last::Follow), Place::Host);
    assert_eq!(find_from(None, "zz-dev/node", Last::Follow), Place::Host);
    assert_eq!(find_from(Some("socket:[1]"), "zz-dev/node", Last::Follow), Place::Host);
    let (tree, paths) = tree();
    let base = tree.path().canonicalize().unwrap().join("zz-dev/sub");
    let find = |path| paths.look_up(|| Some(base.clone()), OsStr::new(path), Last::Follow);
    assert_eq!(find("link"), node);
    assert_eq!(find("../../usr/bin/env"), Place::HostBy(PathBuf::from("/usr/bin/env")));
    assert_eq!(find("../.."), Place::HostBy(PathBuf::from("/")));
}

#[test]
fn descriptors_in_proc_are_recognised() {
    assert_eq!(find("/proc/self/fd/7"), Place::Descriptor("self".into(), 7));
    assert_eq!(find("/proc/12/fd/7"), Place::Descriptor("12".into(), 7));
    assert_eq!(find("/proc/self/fd/7/x"), Place::Host);
    assert_eq!(find("/proc/self/fd"), Place::Host);
}

#[test]
fn files_of_processes_are_recognised() {
    let process = |name: &str| Who::Process(name.into());
    let thread = |name: &str| Who::Thread(name.into(), "13".into());
    for (path, who, file) in [
        ("/proc/self/status", process("self"), ProcessFile::Status),
        ("/proc/12/status", process("12"), ProcessFile::Status),
        ("/proc/12/task/13/status", thread("12"), ProcessFile::Status),
        ("/proc/thread-self/fail-nth", Who::ThisThread, ProcessFile::FailNth),
        ("/proc/self/task/13/fail-nth", thread("self"), ProcessFile::FailNth),
    ] {
        assert_eq!(find(path), Place::Process(who, file), "{path}");
    }
    for path in ["/proc/self/status/x", "/proc/self/status/", "/proc/12/task/status", "/proc/12"] {
        assert_eq!(find(path), Place::Host, "{path}");
    }
}
