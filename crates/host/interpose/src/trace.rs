//! What a run tells about itself.

use std::time::Duration;

use lychgate_iommufd::Refusal;
use lychgate_machine::Call;

/// A call that the machine served.
#[derive(Clone, Debug)]
pub struct Served<'a> {
    /// Who called what.
    pub call: &'a Call,
    /// The file it was for, as the file names itself: `/dev/iommu`.
    pub file: &'a str,
    /// Its arguments, for people.
    pub arguments: &'a str,
    /// The return value, or why it was refused.
    pub result: &'a Result<i64, Refusal>,
    /// From the notification to the answer.
    pub duration: Duration,
}

/// Hears of each call that the machine served, and of what cannot be served.
///
/// Called on the thread that serves: a slow tracer slows the program.
pub trait Tracer: Send + Sync {
    /// A call is over.
    fn served(&self, served: &Served<'_>) {
        let _ = served;
    }

    /// Something about a program keeps it from seeing the machine; said once for each process and
    /// reason, as a sentence without a full stop.
    fn warning(&self, process: u32, text: &str) {
        let _ = (process, text);
    }
}

/// Hears nothing.
impl Tracer for () {}
