//! `lychgate run`.

use std::ffi::OsString;
use std::sync::Arc;

use anyhow::Context;
use lychgate_interpose::{self as interpose, ExitStatus, Options, Origins, Scratch};
use lychgate_machine::{
    BuildError, FaultListener, FaultStory, FrameOrder, IommuKind, Machine, MachineBuilder,
    MemlockPolicy, NamespaceSource, Policy,
};

use crate::OWN_FAILURE;
use crate::cli::{self, Color, MachineArgs, NamespaceArg, Run};
use crate::huge_pages::HugePages;
use crate::output::Output;
use crate::trace::Printer;

/// How the program ended.
pub(crate) enum Ended {
    /// It exited.
    Code(u8),
    /// A signal ended it.
    Signal(i32),
}

/// The program did not run, or not to its end.
pub(crate) struct Failure {
    /// What lychgate exits with.
    pub(crate) code: u8,
    /// Why.
    pub(crate) error: anyhow::Error,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { code: OWN_FAILURE, error }
    }
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        Self { code: OWN_FAILURE, error: error.into() }
    }
}

impl From<interpose::Error> for Failure {
    fn from(error: interpose::Error) -> Self {
        Self { code: error.exit_code(), error: error.into() }
    }
}

/// Runs a program on a machine of its own.
pub(crate) fn run(run: &Run, color: Color) -> Result<Ended, Failure> {
    let output = Arc::new(Output::new(run.output.as_deref(), color)?);
    let mut builder = machine(run);
    if !run.quiet {
        builder = builder.on_fault(Arc::new(Reporter(Arc::clone(&output))));
    }
    start(run, builder, output, None)
}

/// The machine that the options describe.
pub(crate) fn machine(run: &Run) -> MachineBuilder {
    let builder = builder(&run.machine).selftest(run.selftest);
    if run.enforce_memlock { builder.memlock(MemlockPolicy::Enforce) } else { builder }
}

/// Runs the program that the options name.
pub(crate) fn start(
    run: &Run,
    builder: MachineBuilder,
    output: Arc<Output>,
    origins: Option<Origins>,
) -> Result<Ended, Failure> {
    // Dropped at the end of the run.
    let _pages = run.selftest.then(HugePages::lend);
    let (program, arguments) =
        run.program.split_first().ok_or_else(|| anyhow::anyhow!("no program to run"))?;
    let command = interpose::Command::new(program).args(arguments);
    supervise(builder, &command, Arc::new(Printer::new(output, run.trace)), origins)
}

/// Builds the machine, runs the program on it, and lets every fault be reported.
pub(crate) fn supervise(
    builder: MachineBuilder,
    command: &interpose::Command,
    printer: Arc<Printer>,
    origins: Option<Origins>,
) -> Result<Ended, Failure> {
    // Dropped last, and made before there is another thread.
    let scratch = Scratch::new().context("making a directory for temporary files")?;
    let machine = Arc::new(builder.scratch(scratch.path()).build()?);
    let mut options = Options::default();
    options.scratch = Some(scratch.path().to_owned());
    options.origins = origins;
    let status = interpose::run(command, Arc::clone(&machine) as _, &options, printer);
    machine.settle();
    Ok(match status? {
        ExitStatus::Code(code) => Ended::Code(code),
        ExitStatus::Signal(signal) => Ended::Signal(signal),
    })
}

fn builder(args: &MachineArgs) -> MachineBuilder {
    let mut builder = Machine::builder()
        .iommu(args.iommu.into())
        .iotlb(args.iotlb.into())
        .frames(args.frames.into());
    for nvme in &args.nvme {
        let namespaces = nvme.namespaces.iter().cloned().map(NamespaceSource::from).collect();
        builder = builder.nvme(nvme.bdf, namespaces);
    }
    args.edu.iter().fold(builder, |builder, bdf| builder.edu(*bdf))
}

impl From<cli::IommuKind> for IommuKind {
    fn from(kind: cli::IommuKind) -> Self {
        match kind {
            cli::IommuKind::Amd => Self::Amd,
        }
    }
}

impl From<cli::Iotlb> for Policy {
    fn from(policy: cli::Iotlb) -> Self {
        match policy {
            cli::Iotlb::Plain => Self::Plain,
            cli::Iotlb::Adversarial => Self::Adversarial,
        }
    }
}

impl From<cli::Frames> for FrameOrder {
    fn from(frames: cli::Frames) -> Self {
        match frames {
            cli::Frames::Contiguous => Self::Contiguous,
            cli::Frames::Fragmented => Self::Fragmented { seed: 1 },
        }
    }
}

impl From<NamespaceArg> for NamespaceSource {
    fn from(argument: NamespaceArg) -> Self {
        match argument {
            NamespaceArg::File { path, read_only } => Self::File { path, read_only },
            NamespaceArg::Memory { bytes } => Self::Memory { bytes },
        }
    }
}

/// Prints fault reports.
pub(crate) struct Reporter(pub(crate) Arc<Output>);

impl FaultListener for Reporter {
    fn fault(&self, story: &FaultStory) {
        self.0.write(&format!("lychgate: {}", story.render(self.0.color())));
    }

    fn faults_lost(&self) {
        self.0.write("lychgate: the IOMMU's event log overflowed: some faults are not reported\n");
    }
}

/// The path of this program, for starting it again.
pub(crate) fn own_path() -> anyhow::Result<OsString> {
    Ok(std::env::current_exe().context("finding this program")?.into_os_string())
}
