//! `lychgate demo`.

use std::sync::Arc;

use lychgate_interpose as interpose;
use lychgate_machine::{Machine, NamespaceSource};
use lychgate_types::{Bdf, RequesterId};

use crate::cli::{Color, DEMO_CLIENT, Demo};
use crate::output::Output;
use crate::run::{Ended, Failure, Reporter, own_path, supervise};
use crate::trace::Printer;

/// 0000:01:00.0.
const CONTROLLER: Bdf = Bdf { segment: 0, requester: RequesterId::new(0x0100) };

/// Size of the controller's disk, in memory, in bytes.
const DISK: u64 = 128 << 20;

/// Runs the demo's client on a machine with one NVMe controller.
pub(crate) fn demo(demo: &Demo, color: Color) -> Result<Ended, Failure> {
    let output = Arc::new(Output::new(None, color)?);
    let builder = Machine::builder()
        .iommu(demo.iommu.into())
        .nvme(CONTROLLER, vec![NamespaceSource::Memory { bytes: DISK }])
        .on_fault(Arc::new(Reporter(Arc::clone(&output))));
    let command =
        interpose::Command::new(own_path()?).args([DEMO_CLIENT.to_owned(), CONTROLLER.to_string()]);
    supervise(builder, &command, Arc::new(Printer::new(output, demo.trace)), None)
}
