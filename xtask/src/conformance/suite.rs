//! Where the tests come from: the kernel's source as Debian packages it, in a throw-away root.
//!
//! The root is of the machine's own release, so that what is built in it runs on the machine. Other
//! releases are asked for sources alone: their lists are kept apart, and nothing of theirs is
//! installed.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::{fmt, fs};

use anyhow::{Context, Result, bail, ensure};

use super::list::List;
use crate::qemu_root::{in_root, mirror};
use crate::run;

/// Where Debian keeps kernels: stable, what is backported to it, and what is to come.
const RELEASES: [&str; 4] = ["trixie", "trixie-backports", "sid", "experimental"];

/// What compiles the tests.
const TOOLS: &str = "gcc,libc6-dev,libcap-dev,make,xz-utils";

/// The lists of those releases, in the root.
const FOREIGN: &str = "etc/apt/foreign.list";

/// Where packages are put that are fetched, in the root.
const FETCHED: &str = "fetched";

/// What `make headers` and the tests need of a kernel's source.
const NEEDED: [&str; 15] = [
    "Kbuild",
    "Makefile",
    "arch/x86",
    "drivers/iommu/iommufd/iommufd_test.h",
    "include",
    "scripts",
    "tools/arch/x86",
    "tools/build",
    "tools/include",
    "tools/scripts",
    "tools/testing/selftests/iommu",
    "tools/testing/selftests/kselftest",
    "tools/testing/selftests/kselftest.h",
    "tools/testing/selftests/kselftest_harness.h",
    "tools/testing/selftests/lib.mk",
];

/// The tests of a kernel, as programs once they are built.
pub(crate) struct Suite {
    /// `7.3.4`.
    pub(crate) version: String,
    /// Where the programs are.
    pub(crate) programs: PathBuf,
    /// What is still to be built, and in which root.
    source: Option<Source>,
    names: Vec<String>,
}

struct Source {
    root: PathBuf,
    /// As the root sees it.
    tree: String,
}

/// The tests cannot be had here, whatever state lychgate is in.
#[derive(Debug)]
pub(crate) struct Unavailable(pub(crate) anyhow::Error);

impl fmt::Display for Unavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Unavailable {}

impl Suite {
    /// Those of a list, as an earlier run built them, or their source.
    pub(crate) fn fetch(kept: &Path, list: &List) -> Result<Self, Unavailable> {
        let programs = kept.join(&list.series);
        let names = list.programs.iter().map(|program| program.name.clone()).collect();
        if let Ok(version) = fs::read_to_string(programs.join("version")) {
            let version = version.trim().to_owned();
            return Ok(Self { version, programs, source: None, names });
        }
        let (version, source) = fetch(kept, list).map_err(Unavailable)?;
        Ok(Self { version, programs, source: Some(source), names })
    }

    /// Builds the programs, unchanged, if that is still to be done.
    pub(crate) fn build(mut self) -> Result<Self> {
        let Some(Source { root, tree }) = self.source.take() else { return Ok(self) };
        let jobs = thread::available_parallelism().map_or(1, |processors| processors.get());
        let make = |at: &str, target: &[&str]| {
            run(in_root(&root)
                .args(["make", "--silent", "--jobs", &jobs.to_string(), "--directory", at])
                .args(target))
        };
        let tests = format!("{tree}/tools/testing/selftests/iommu");
        make(&tree, &["headers"])?;
        make(&tests, &[])?;
        fs::create_dir_all(&self.programs)?;
        for name in &self.names {
            let built = root.join(tests.trim_start_matches('/')).join(name);
            fs::copy(&built, self.programs.join(name))
                .with_context(|| built.display().to_string())?;
        }
        // Last: it says that the rest is there.
        fs::write(self.programs.join("version"), format!("{}\n", self.version))?;
        fs::remove_dir_all(root.join(tree.trim_start_matches('/')))?;
        Ok(self)
    }
}

/// Fetches the newest kernel that a list is for, and unpacks what is needed of it.
fn fetch(kept: &Path, list: &List) -> Result<(String, Source)> {
    let root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    ensure!(root, "fetching and building them takes root");
    let root = kept.join("root");
    make_root(&root)?;
    for package in offered(&root, list)? {
        let version = package.version();
        let tree = format!("/linux/{version}");
        if let Err(error) = package.unpack(&root, &tree) {
            // A mirror may list what it does not have any more.
            eprintln!("xtask: Linux {} cannot be had: {error:#}", package.full_version);
            continue;
        }
        return Ok((version.to_owned(), Source { root, tree }));
    }
    bail!("the mirror has no Linux {}", list.series)
}

fn make_root(root: &Path) -> Result<()> {
    // The last thing that is written to it.
    if root.join(FOREIGN).exists() {
        return Ok(());
    }
    let mirror = mirror()?;
    let release = fs::read_to_string("/etc/os-release").context("reading /etc/os-release")?;
    let codename = release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="));
    let codename = codename.context("the machine is of no Debian release")?;
    if root.exists() {
        fs::remove_dir_all(root).context("removing half a root")?;
    }
    fs::create_dir_all(root)?;
    run(Command::new("debootstrap")
        .args(["--variant=minbase", &format!("--include={TOOLS}"), codename])
        .arg(root)
        .arg(&mirror))?;
    let lines =
        RELEASES.map(|name| format!("deb {mirror} {name} main\ndeb-src {mirror} {name} main\n"));
    fs::write(root.join(FOREIGN), lines.concat())?;
    Ok(())
}

/// `apt-get` or `apt-cache` in the root, for the lists of other releases. A mirror that lags is good
/// enough: what it has is signed all the same.
fn foreign(root: &Path, program: &str) -> Command {
    let mut command = in_root(root);
    command.args(["env", &format!("--chdir=/{FETCHED}"), program, "-qq"]);
    for option in [
        &format!("Dir::Etc::sourcelist=/{FOREIGN}"),
        "Dir::Etc::sourceparts=-",
        "Acquire::Check-Valid-Until=false",
        "Acquire::Languages=none",
        "APT::Sandbox::User=root",
    ] {
        command.args(["-o", option]);
    }
    command
}

/// A package with a kernel's source.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Package {
    /// `linux-source-7.3`, which holds a tarball, or `linux`, the source package.
    name: String,
    /// `7.3.4-1~bpo13+1`.
    full_version: String,
}

/// What the mirror offers of a series, the best first: the newest, and packages before source
/// packages.
fn offered(root: &Path, list: &List) -> Result<Vec<Package>> {
    run(foreign(root, "apt-get").arg("update"))?;
    let package = format!("linux-source-{}", list.series);
    let output = foreign(root, "apt-cache").args(["madison", &package, "linux"]).output()?;
    ensure!(output.status.success(), "apt-cache madison failed: {}", output.status);
    let offered = select(&String::from_utf8(output.stdout)?, list);
    ensure!(!offered.is_empty(), "none of {} has Linux {}", RELEASES.join(", "), list.series);
    Ok(offered)
}

/// Those of a list's series, no newer than it is for, from lines like
/// `linux-source-7.3 | 7.3.4-1~bpo13+1 | MIRROR trixie-backports/main amd64 Packages`.
fn select(madison: &str, list: &List) -> Vec<Package> {
    let newest =
        list.newest.as_deref().map_or(Some(i64::MAX), |newest| patch(newest, &list.series));
    let packages = madison.lines().filter_map(|line| {
        let mut fields = line.split('|').map(str::trim);
        let (name, full_version) = (fields.next()?.to_owned(), fields.next()?.to_owned());
        let package = Package { name, full_version };
        let patch = patch(package.version(), &list.series)?;
        (Some(patch) <= newest).then_some((patch, package))
    });
    let mut packages: Vec<_> = packages.collect();
    packages.sort_by(|(a, first), (b, second)| b.cmp(a).then(second.name.cmp(&first.name)));
    packages.dedup();
    packages.into_iter().map(|(_, package)| package).collect()
}

/// The third number of a version of a series; below 0 for release candidates.
fn patch(version: &str, series: &str) -> Option<i64> {
    let rest = version.strip_prefix(series)?;
    if rest.is_empty() {
        return Some(0);
    }
    match rest.strip_prefix("~rc") {
        Some(candidate) => candidate.parse::<i64>().ok().map(|candidate| candidate - 1000),
        None => rest.strip_prefix('.')?.parse().ok(),
    }
}

impl Package {
    /// That of the kernel.
    fn version(&self) -> &str {
        self.full_version.split_once('-').map_or(&self.full_version, |(version, _)| version)
    }

    /// Unpacks what is needed into `tree`, a path in the root.
    fn unpack(&self, root: &Path, tree: &str) -> Result<()> {
        let fetched = root.join(FETCHED);
        if fetched.exists() {
            fs::remove_dir_all(&fetched)?;
        }
        fs::create_dir_all(&fetched)?;
        let asked = format!("{}={}", self.name, self.full_version);
        let (get, from, top): (&[&str], _, _) = if self.name == "linux" {
            let from = "cat /fetched/linux_*.orig.tar.xz".to_owned();
            (
                &["--download-only", "source"],
                from,
                format!("linux-{}", self.version().replace('~', "-")),
            )
        } else {
            let member = format!("./usr/src/{}.tar.xz", self.name);
            let from = format!(
                "dpkg-deb --fsys-tarfile /fetched/*.deb | tar --extract --to-stdout {member}"
            );
            (&["download"], from, self.name.clone())
        };
        run(foreign(root, "apt-get").args(get).arg(&asked))?;
        let members = NEEDED.map(|path| format!("{top}/{path}")).join(" ");
        let script = format!(
            "set -e; mkdir --parents {tree}; {from} | \
             tar --extract --xz --strip-components=1 --directory {tree} {members}"
        );
        run(in_root(root).args(["sh", "-c", &script]))?;
        // What is left of it is an empty place for the next one.
        fs::remove_dir_all(&fetched)?;
        fs::create_dir_all(&fetched)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select_from(text: &str, series: &str, newest: Option<&str>) -> Vec<String> {
        let list = List {
            series: series.to_owned(),
            made_from: Vec::new(),
            newest: newest.map(str::to_owned),
            programs: Vec::new(),
        };
        let packages = select(text, &list).into_iter();
        packages.map(|package| format!("{} {}", package.name, package.version())).collect()
    }

    #[test]
    fn the_newest_kernel_of_a_series_comes_first() {
        let text = "\
linux-source-7.3 | 7.3~rc7-1~exp1 | m experimental/main amd64 Packages
linux-source-7.3 | 7.3.4-1~bpo13+1 | m trixie-backports/main amd64 Packages
     linux | 7.3.4-1~bpo13+1 | m trixie-backports/main Sources
     linux | 7.30.1-1 | m sid/main Sources
     linux | 6.12.38-1 | m trixie/main Sources
     linux |   6.12.8-1 | m trixie/main Sources
     linux | 6.12.107-1 | m trixie/main Sources
";
        assert_eq!(
            select_from(text, "7.3", None),
            ["linux-source-7.3 7.3.4", "linux 7.3.4", "linux-source-7.3 7.3~rc7"]
        );
        assert_eq!(select_from(text, "6.12", Some("6.12.57")), ["linux 6.12.38", "linux 6.12.8"]);
    }
}
