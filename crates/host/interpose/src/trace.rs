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
    /// The system call: `ioctl`, `pread`.
    pub function: &'static str,
    /// The descriptor it was for; `None` for an `open`.
    pub fd: Option<i32>,
    /// The other arguments, for people: of an ioctl its name and structure. Empty unless
    /// [`Tracer::wants_calls`].
    pub arguments: &'a str,
    /// The same when the call had succeeded, where that shows something else.
    pub after: Option<&'a str>,
    /// The return value, or why it was refused.
    pub result: &'a Result<i64, Refusal>,
    /// From the notification to the answer.
    pub duration: Duration,
}

/// Hears of each call that the machine served, and of what cannot be served.
///
/// Called on the thread that serves: a slow tracer slows the program.
pub trait Tracer: Send + Sync {
    /// Whether [`Served::arguments`] are of interest, asked once for a run: to describe them takes
    /// more time than most calls.
    fn wants_calls(&self) -> bool {
        false
    }

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
