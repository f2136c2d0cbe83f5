//! Texts that the machine shows and takes: attributes of `/sys`, and files in `/proc` that tell what a
//! client has pinned and what is to fail.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lychgate_iommufd::{Charged, Mm, NewFile, Refusal};
use lychgate_machine::Text;
use lychgate_types::Errno;
use rustix::fs::OFlags;

use super::path::{KEPT, attributes_at};
use super::{Answer, Called, Outcome, Server, guard};
use crate::attributes::Attributes;
use crate::names;
use crate::paths::{ProcessFile, Who};
use crate::process;
use crate::sys::notify::Notification;
use crate::text_file::TextFile;

/// KiB of a page, as `/proc` counts.
const PAGE_KIB: u64 = 4;

impl Server {
    /// The machine's version of a file in `/proc`, with its path there; `None` where the kernel's own
    /// is right.
    pub(super) fn process_file(
        &self,
        n: &Notification,
        who: &Who,
        file: ProcessFile,
    ) -> Option<(PathBuf, Arc<dyn Text>)> {
        let number = |name: &OsString| match name.to_str()? {
            "self" | "thread-self" => Some(self.process_of(n.pid)),
            number => number.parse().ok(),
        };
        let thread = match who {
            Who::ThisThread => n.pid,
            Who::Process(name) | Who::Thread(_, name) => number(name)?,
        };
        let process = self.process_of(thread);
        if let Who::Thread(name, _) = who
            && self.process_of(number(name)?) != process
        {
            return None;
        }
        let directory = match who {
            Who::Process(_) => format!("/proc/{thread}"),
            Who::ThisThread | Who::Thread(..) => format!("/proc/{process}/task/{thread}"),
        };
        match file {
            ProcessFile::Status => {
                let mm = self.known_mm(process)?;
                let path = format!("{directory}/status");
                Some((path.clone().into(), Arc::new(Status { path, mm })))
            }
            ProcessFile::FailNth if process::has_thread(process, thread) => {
                Some((format!("{directory}/fail-nth").into(), self.system.fail_nth(thread)?))
            }
            ProcessFile::FailNth => None,
        }
    }

    /// The address space of a process, if it has used the machine and is still the same program.
    fn known_mm(&self, process: u32) -> Option<Arc<dyn Mm>> {
        let spaces = guard(&self.spaces);
        let (space, mm) = spaces.get(&process)?;
        space.is_of_process().then(|| mm.clone())
    }

    /// Opens a text at `path`.
    pub(super) fn open_text(
        &self,
        n: &Notification,
        path: &Path,
        text: Arc<dyn Text>,
        flags: OFlags,
    ) -> Answer {
        if flags.contains(OFlags::DIRECTORY) {
            return Answer::Value(Err(Errno::ENOTDIR));
        }
        if flags.contains(OFlags::CREATE | OFlags::EXCL) {
            return Answer::Value(Err(Errno::EEXIST));
        }
        let name = path.to_string_lossy().into_owned();
        let called = Called { name: "open".to_owned(), function: "open", fd: None, file: &name };
        self.served(
            n,
            called,
            |_, _| names::open_flags(flags.bits()),
            |_| {
                let file = Arc::new(TextFile::open(name.clone(), text, flags)?);
                let new = NewFile { file, cloexec: flags.contains(OFlags::CLOEXEC) };
                Ok(Outcome::File(new, Some(path.to_owned()), flags & KEPT))
            },
        )
    }

    /// Whether what was opened at a path is a text rather than a device.
    pub(super) fn is_text(&self, path: &Path) -> bool {
        self.system.node(path).is_none()
    }

    /// Those of a text, which only the machine may have. Then they are those of a file beside it that
    /// the process owns and may write too.
    pub(super) fn attributes_of_text(&self, path: &Path) -> Result<Attributes, Errno> {
        if path.starts_with("/proc") {
            attributes_at(path).or_else(|_| attributes_at(&path.with_file_name("comm")))
        } else {
            attributes_at(&self.paths.in_tree(path))
        }
    }
}

/// `/proc/PID/status` with what the machine has pinned.
struct Status {
    path: String,
    mm: Arc<dyn Mm>,
}

impl Text for Status {
    fn show(&self) -> Result<String, Refusal> {
        let text = fs::read(&self.path)
            .map_err(|_| Refusal::new(Errno::new(libc::ESRCH), "the process is gone"))?;
        Ok(add(&String::from_utf8_lossy(&text), self.mm.charged()))
    }
}

/// The text of `/proc/PID/status` with pages added to what is pinned and locked.
fn add(status: &str, charged: Charged) -> String {
    let mut text = String::with_capacity(status.len());
    for line in status.split_inclusive('\n') {
        let more = match line.split_once(':') {
            Some(("VmPin", rest)) => Some(("VmPin", rest, charged.pinned)),
            Some(("VmLck", rest)) => Some(("VmLck", rest, charged.locked)),
            _ => None,
        };
        match more.and_then(|(name, rest, pages)| {
            let kib = rest.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
            let kib = kib.saturating_add(pages.saturating_mul(PAGE_KIB));
            Some(format!("{name}:\t{kib:>8} kB\n"))
        }) {
            Some(line) => text.push_str(&line),
            None => text.push_str(line),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_added_to_what_the_kernel_counts() {
        let status =
            "Name:\tVmPin: x\nVmLck:\t      64 kB\nVmPin:\t       0 kB\nVmHWM:\t     960 kB\n";
        let charged = Charged { pinned: 25_000, locked: 2 };
        assert_eq!(
            add(status, charged),
            "Name:\tVmPin: x\nVmLck:\t      72 kB\nVmPin:\t  100000 kB\nVmHWM:\t     960 kB\n"
        );
    }

    #[test]
    fn the_status_of_a_process_without_memory_stays_as_it_is() {
        let status = "Name:\tkthreadd\nState:\tS (sleeping)\n";
        assert_eq!(add(status, Charged { pinned: 1, locked: 1 }), status);
    }
}
