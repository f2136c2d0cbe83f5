//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use lychgate_types::Bdf;

/// Run programs that use VFIO or iommufd where neither exists: no IOMMU, root, kernel module or VM.
#[derive(Parser, Debug)]
#[command(name = "lychgate", version, max_term_width = 100, after_help = EXIT_STATUS)]
pub(crate) struct Cli {
    /// When to colour what lychgate prints.
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    pub(crate) color: Color,

    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXIT_STATUS: &str = "\
Exit status of `run` and `check`: the program's own; if a signal ended the program, lychgate ends by the same \
signal. 99 if `check` found something, 125 if lychgate itself fails, 126 if the program cannot be executed, 127 if it is not \
found, 2 for a mistake on the command line.";

#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Run a program on a machine with an IOMMU and devices behind it.
    Run(Run),

    /// Run a program and report its DMA mistakes, like valgrind for memory.
    Check(Check),

    /// Say what a kind of finding means; without a name, list them all.
    Explain {
        /// The name, as a report gives it: dma/use-after-unmap.
        id: Option<String>,
    },

    /// Show it: a small NVMe driver moves data, and then makes a mistake that gets caught.
    Demo(Demo),

    /// The program that `demo` runs.
    #[command(name = DEMO_CLIENT, hide = true)]
    DemoClient {
        /// Arguments of the program.
        arguments: Vec<String>,
    },
}

/// Name of the hidden command that is the demo's client process.
pub(crate) const DEMO_CLIENT: &str = "demo-client";

#[derive(Args, Debug)]
#[command(after_help = RUN_EXAMPLES, after_long_help = RUN_EXAMPLES)]
pub(crate) struct Run {
    #[command(flatten)]
    pub(crate) machine: MachineArgs,

    /// Print every call that lychgate answers, as strace would, with the reason of each error.
    #[arg(long)]
    pub(crate) trace: bool,

    /// Write the trace and the fault reports to FILE instead of standard error.
    #[arg(long, short = 'o', value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,

    /// Refuse DMA mappings beyond RLIMIT_MEMLOCK, as Linux does. Without it they are only counted:
    /// nothing is locked into memory.
    #[arg(long)]
    pub(crate) enforce_memlock: bool,

    /// Give the machine what the kernel's own tests of iommufd need: a mock IOMMU driven by
    /// IOMMU_TEST_CMD, fault injection by fail-nth and debugfs, and, where this may be done, huge pages.
    #[arg(long)]
    pub(crate) selftest: bool,

    /// Do not report faults.
    #[arg(long, short)]
    pub(crate) quiet: bool,

    /// The program and its arguments.
    #[arg(required = true, trailing_var_arg = true, value_name = "PROGRAM")]
    pub(crate) program: Vec<OsString>,
}

#[derive(Args, Debug)]
#[command(after_help = CHECK_EXAMPLES, after_long_help = CHECK_EXAMPLES)]
pub(crate) struct Check {
    #[command(flatten)]
    pub(crate) run: Run,

    /// Exit with CODE when there was a finding; 0 for the program's own exit status even then.
    #[arg(long, value_name = "CODE", default_value_t = 99)]
    pub(crate) error_exitcode: u8,

    /// Also report what software may live with, and what is not certain.
    #[arg(long)]
    pub(crate) advice: bool,
}

const CHECK_EXAMPLES: &str = "\
Examples:
  Check a driver on an NVMe controller with a disk in memory; 99 tells CI that there was a finding:
    lychgate check --nvme 0000:01:00.0=mem:64M -- ./my-driver
  What does it mean?
    lychgate explain dma/use-after-unmap

Each mistake is reported once, with the place in the source that mapped and unmapped the memory where
the program has debug information (-g). Under check the IOMMU caches everything that it may, forgets
nothing unless it is told to, and carries no command out before its completion is waited for.";

const RUN_EXAMPLES: &str = "\
Examples:
  Copy a disk image through an NVMe controller that the program drives itself:
    lychgate run --nvme 0000:01:00.0=disk.img -- qemu-img convert -O raw nvme://0000:01:00.0/1 copy.img
  Two namespaces, the second read-only, and every call shown:
    lychgate run --trace --nvme 0000:01:00.0=a.img,b.img,ro -- ./my-driver
  A disk in memory and the edu device for a first VFIO program:
    lychgate run --nvme 0000:01:00.0=mem:64M --edu 0000:02:00.0 -- ./my-first-driver";

/// What the machine is made of.
#[derive(Args, Debug, Default)]
pub(crate) struct MachineArgs {
    /// The IOMMU in front of the devices.
    #[arg(long, value_enum, default_value_t, value_name = "KIND")]
    pub(crate) iommu: IommuKind,

    /// How the IOMMU's caches forget: like hardware, or never unless they are told to.
    #[arg(long, value_enum, default_value_t, value_name = "POLICY")]
    pub(crate) iotlb: Iotlb,

    /// How the physical frames of consecutive pages lie: as on a fresh machine, or as on an old one.
    #[arg(long, value_enum, default_value_t, value_name = "ORDER")]
    pub(crate) frames: Frames,

    /// An NVMe controller at a PCI address, with a namespace for each FILE. `,ro` behind a file
    /// makes its namespace read-only; `mem:SIZE` in place of a file is a disk in memory. Repeatable.
    #[arg(long, value_name = "BDF=FILE[,ro][,FILE...]")]
    pub(crate) nvme: Vec<NvmeArg>,

    /// An edu device (1234:11e8), the smallest DMA engine, at a PCI address. Repeatable.
    #[arg(long, value_name = "BDF")]
    pub(crate) edu: Vec<Bdf>,
}

#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// The IOMMU in front of the device.
    #[arg(long, value_enum, default_value_t, value_name = "KIND")]
    pub(crate) iommu: IommuKind,

    /// Print every call that lychgate answers.
    #[arg(long)]
    pub(crate) trace: bool,
}

/// When to colour.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Color {
    /// On a terminal, unless NO_COLOR is set.
    #[default]
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

/// Which IOMMU.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum IommuKind {
    /// AMD-Vi with version 1 page tables.
    #[default]
    Amd,
}

/// How the IOMMU's caches forget.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Iotlb {
    /// Set-associative, with eviction, as in hardware.
    #[default]
    Plain,
    /// Everything that may be cached is, until an invalidation.
    Adversarial,
}

/// How the frames of consecutive pages lie.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Frames {
    /// One behind the other, and aligned as the pages are: large leaves happen.
    #[default]
    Contiguous,
    /// Scattered page by page: no leaf is larger than a page.
    Fragmented,
}

/// An NVMe controller with its namespaces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NvmeArg {
    pub(crate) bdf: Bdf,
    pub(crate) namespaces: Vec<NamespaceArg>,
}

/// Where a namespace's data is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum NamespaceArg {
    /// A disk image.
    File { path: PathBuf, read_only: bool },
    /// Memory that ends with the machine, of a size in bytes.
    Memory { bytes: u64 },
}

impl FromStr for NvmeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (bdf, items) = text
            .split_once('=')
            .ok_or("an NVMe controller needs a disk: BDF=FILE, like 0000:01:00.0=disk.img")?;
        let bdf = bdf.parse::<Bdf>().map_err(|error| error.to_string())?;
        let mut namespaces = Vec::new();
        for item in items.split(',') {
            match item {
                "" => return Err("a file name is empty".to_owned()),
                "ro" => match namespaces.last_mut() {
                    Some(NamespaceArg::File { read_only, .. }) => *read_only = true,
                    _ => return Err("'ro' belongs behind a file: BDF=FILE,ro".to_owned()),
                },
                _ => namespaces.push(match item.strip_prefix("mem:") {
                    Some(size) => NamespaceArg::Memory { bytes: parse_size(size)? },
                    None => NamespaceArg::File { path: item.into(), read_only: false },
                }),
            }
        }
        Ok(Self { bdf, namespaces })
    }
}

/// A size in bytes, with an optional binary suffix.
fn parse_size(text: &str) -> Result<u64, String> {
    let error = || format!("'{text}' is not a size: write a number of bytes, or 64M, 1G");
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number = digits.parse::<u64>().map_err(|_| error())?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes > 0).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_controller_takes_files_memory_and_read_only() {
        let arg: NvmeArg = "0000:01:00.0=a.img,ro,mem:64M,b.img".parse().unwrap();
        assert_eq!(arg.bdf, "0000:01:00.0".parse().unwrap());
        assert_eq!(
            arg.namespaces,
            [
                NamespaceArg::File { path: "a.img".into(), read_only: true },
                NamespaceArg::Memory { bytes: 64 << 20 },
                NamespaceArg::File { path: "b.img".into(), read_only: false },
            ]
        );
    }

    #[test]
    fn a_malformed_controller_is_told_what_to_write() {
        for (text, want) in [
            ("0000:01:00.0", "needs a disk"),
            ("01.0=x", "a PCI address is written"),
            ("0000:01:00.0=", "a file name is empty"),
            ("0000:01:00.0=ro", "belongs behind a file"),
            ("0000:01:00.0=mem:0", "is not a size"),
            ("0000:01:00.0=mem:99999999999G", "is not a size"),
        ] {
            let error = text.parse::<NvmeArg>().unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn options_behind_the_program_belong_to_the_program() {
        let cli = Cli::try_parse_from(["lychgate", "run", "ls", "--color", "-l"]).unwrap();
        let Command::Run(run) = cli.command else { panic!("not run") };
        assert_eq!(run.program, ["ls", "--color", "-l"]);
    }
}
