//! What a context holds.

use lychgate_types::Errno;

use crate::client::Client;
use crate::context::{Context, NodeKind};
use crate::error::{Result, refuse};
use crate::mm::Accounting;

/// What changes in a context, behind its lock.
pub(crate) struct State {
    /// Whose limit pins of later mappings count against.
    pub(crate) accounting: Accounting,
    /// References that VFIO holds.
    pub(crate) references: usize,
    /// Whether the file was closed.
    pub(crate) closed: bool,
}

impl State {
    pub(crate) fn new(node: NodeKind) -> Self {
        let accounting = match node {
            NodeKind::Iommu => Accounting::User,
            NodeKind::VfioContainer => Accounting::Mm,
        };
        Self { accounting, references: 0, closed: false }
    }
}

impl Context {
    pub(crate) fn tear_down(&self, state: &mut State) {
        state.closed = true;
    }

    pub(crate) fn dispatch(&self, _: &dyn Client, _: u32, _: u64) -> Result<i32> {
        refuse(Errno::ENOTTY, "no ioctl has this number")
    }
}
