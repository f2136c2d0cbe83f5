//! Huge pages for programs that map them, which most hosts have none of.

use std::fs;
use std::path::Path;

/// How many a run may have beyond those that are set aside: as many as the kernel's selftest of
/// iommufd maps at once, 128 MiB, and some for its files.
const PAGES: u64 = 80;

/// Pages that the host makes as they are mapped and takes back when they are unmapped, so that
/// nothing is set aside (`Documentation/admin-guide/mm/hugetlbpage.rst`).
const LIMIT: &str = "/proc/sys/vm/nr_overcommit_hugepages";

/// More huge pages than the host allows otherwise, as long as this value lives.
pub(crate) struct HugePages {
    /// What the limit was.
    before: Option<u64>,
}

impl HugePages {
    /// Raises the host's limit, where that may be done and it is lower.
    pub(crate) fn lend() -> Self {
        let limit = Path::new(LIMIT);
        let before = fs::read_to_string(limit).ok().and_then(|text| text.trim().parse().ok());
        let lower = before.filter(|before| *before < PAGES);
        Self { before: lower.filter(|_| fs::write(limit, PAGES.to_string()).is_ok()) }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            fs::write(LIMIT, before.to_string()).ok();
        }
    }
}
