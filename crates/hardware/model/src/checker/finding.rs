//! One copy that the tables contradict.

use std::fmt;

use lychgate_types::{Iova, PhysAddr, RequesterId};

use crate::cache::Span;
use crate::checker::Rule;
use crate::iommu::Access;

/// What kind of copy it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum CacheKind {
    /// A device's entry: DTE, STE, context entry.
    Device,
    /// An entry that leads to a table.
    Directory,
    /// A translation.
    Leaf,
    /// An interrupt's entry.
    Interrupt,
}

/// A word of a table that was read to make the copy, and is another one now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ChangedWord {
    /// Where it is.
    pub at: PhysAddr,
    /// What it was.
    pub then: u64,
    /// What it is; `None` where no memory answers any more.
    pub now: Option<u64>,
}

/// A request that was answered from a copy after the tables had changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StaleUse {
    /// Who asked.
    pub requester: RequesterId,
    /// For which address.
    pub at: Iova,
    /// What for.
    pub access: Access,
    /// How often in all.
    pub times: u64,
}

/// A copy that the tables contradict.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The rule that was broken.
    pub rule: &'static Rule,
    /// What kind of copy it is.
    pub kind: CacheKind,
    /// A device whose requests get it.
    pub requester: RequesterId,
    /// The device whose request, or neighbourhood of a request, made the copy; the same one unless
    /// two share a tag.
    pub filled_by: Option<RequesterId>,
    /// The tag: a domain id; `None` for copies that are found by the device alone.
    pub domain: Option<u32>,
    /// The addresses that it covers: IOVAs, or an interrupt's index.
    pub span: Span,
    /// What the copy says.
    pub cached: String,
    /// What the tables say now.
    pub now: String,
    /// Which words changed since, as far as that is known.
    pub words: Vec<ChangedWord>,
    /// The first request that was answered from it after the change; `None` for a copy that waits
    /// for one.
    pub used: Option<StaleUse>,
}

impl fmt::Display for CacheKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device entry",
            Self::Directory => "directory entry",
            Self::Leaf => "translation",
            Self::Interrupt => "interrupt entry",
        })
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, requester, cached, now, rule, .. } = self;
        write!(f, "stale {kind} of {requester}: the cache says {cached}, the tables say {now}")?;
        write!(f, " [{}]", rule.id)
    }
}
