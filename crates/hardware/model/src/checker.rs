//! What a model that checks its driver says: which copy it still holds that the tables contradict,
//! and which rule of the specification asked for the command that never came.
//!
//! A model under [`Checking`] never forgets a copy unless it is told to, and is as unhelpful
//! otherwise as its architecture allows. [`Audit::audit`] compares every copy with what the tables
//! say now. Between operations of the driver there must be no difference that a request could
//! notice: each one is a [`Finding`].

mod finding;
mod rule;

pub use finding::{CacheKind, ChangedWord, Finding, StaleUse};
pub use rule::{Certainty, Rule};

use crate::cache::Span;

/// What a checking model may do to its driver, all of it legal.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Checking {
    /// Copies entries that no request asked for: those beside one that is walked, and again those
    /// that were just invalidated. What the driver clears after the invalidation instead of before
    /// it is then still there.
    pub fetch_ahead: bool,
    /// Carries commands out no sooner than the completion of a later one is asked for.
    pub late_commands: bool,
}

impl Default for Checking {
    /// All of it.
    fn default() -> Self {
        Self { fetch_ahead: true, late_commands: true }
    }
}

/// Which copies an audit compares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// All of them.
    Everything,
    /// Translations and directories that cover an address from the first to the last, inclusive: all
    /// that an operation on this range can have made stale.
    Addresses(u64, u64),
}

impl Scope {
    /// Whether a copy that covers `span` is compared.
    pub const fn covers(self, span: Span) -> bool {
        match self {
            Self::Everything => true,
            Self::Addresses(first, last) => span.intersects(first, last),
        }
    }
}

/// A model that can compare its copies with the tables.
pub trait Audit: Send + Sync {
    /// Every copy in `scope` that the tables contradict in a way that a request could notice. Each is
    /// given once: the model forgets it then, so that nothing is reported twice.
    ///
    /// The driver must have no operation under way: a copy may differ between the change of a table
    /// and the completion of the invalidation.
    fn audit(&self, scope: Scope) -> Vec<Finding>;
}
