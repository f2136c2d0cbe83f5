//! Where in the program a call comes from.

use std::sync::Arc;

use lychgate_iommufd::Mm;
use lychgate_origins::{Mapping, Registers, Target};

use crate::process;
use crate::space;

/// A thread that waits for its call to be answered.
pub(crate) struct Waiting {
    pub(crate) process: u32,
    pub(crate) thread: u32,
    pub(crate) mm: Arc<dyn Mm>,
}

impl Target for Waiting {
    fn registers(&self) -> Option<Registers> {
        let path = format!("/proc/{}/task/{}/syscall", self.process, self.thread);
        Registers::parse(&std::fs::read_to_string(path).ok()?)
    }

    fn mappings(&self) -> Vec<Mapping> {
        let Some(text) = process::maps(self.process) else { return Vec::new() };
        let root = format!("/proc/{}/root", self.process);
        let mapping = |line: &str| {
            let executable = line.split(' ').nth(1)?.contains('x');
            let vma = space::parse(line).filter(|vma| vma.name.starts_with('/'))?;
            Some(Mapping {
                start: vma.start,
                end: vma.end,
                offset: vma.offset,
                executable,
                path: format!("{root}{}", vma.name).into(),
                name: vma.name,
            })
        };
        text.lines().filter_map(mapping).collect()
    }

    fn read(&self, at: u64, to: &mut [u8]) -> bool {
        self.mm.read(at, to).is_ok()
    }
}
