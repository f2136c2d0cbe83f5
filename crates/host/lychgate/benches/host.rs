//! What a program pays on lychgate, measured from inside of unmodified programs.
//!
//! `cargo bench -p lychgate --bench host`. Each row stands next to its peer of the same run: the
//! native system call, or the same I/O on the image file without NVMe, VFIO and IOMMU.

use std::env;
use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use iommufd_ioctls::IommuFd;
use lychgate_demo_client::memory::DmaBuffer;
use lychgate_demo_client::way::Way;
use rustix::time::{ClockId, clock_gettime};

const BDF: &str = "0000:01:00.0";
const IMAGE_BYTES: u64 = 1 << 30;

fn main() -> ExitCode {
    let arguments = env::args().collect::<Vec<_>>();
    let result = match arguments.get(1).map(String::as_str) {
        Some("client") => client(arguments.get(2).map_or("", String::as_str)),
        _ => harness(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("host: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn harness() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let image = directory.path().join("disk.img");
    fill(&image)?;

    println!("{:<44} {:>12} {:>12} {:>8}", "row", "lychgate", "peer", "ratio");
    let native = measure_client("native-ioctl", &image, false)?;
    row(
        "trapped ioctl, us (peer: native)",
        measure_client("ioctl", &image, true)? / 1e3,
        native / 1e3,
    );
    row("MAP+UNMAP of a page, attached, us", measure_client("map", &image, true)? / 1e3, f64::NAN);
    row("start to first ioctl, ms", measure_client("first", &image, true)? / 1e6, f64::NAN);

    let url = format!("nvme://{BDF}/1");
    let raw = image.to_string_lossy();
    for (name, count, depth, size) in [
        ("NVMe 4 KiB reads, depth 1, kIOPS", 100_000, 1, 4096),
        ("NVMe 4 KiB reads, depth 32, kIOPS", 400_000, 32, 4096),
        ("NVMe 4 KiB writes, depth 32, kIOPS", 200_000, 32, 4096),
        ("NVMe 1 MiB reads, depth 4, GiB/s", 10_000, 4, 1 << 20),
    ] {
        let write = name.contains("writes");
        let ours = qemu_img(Some(&image), &url, count, depth, size, write)?;
        let peer = qemu_img(None, &raw, count, depth, size, write)?;
        let scale = if size == 4096 { 1e3 } else { 1024.0 };
        row(name, ours / scale, peer / scale);
    }
    Ok(())
}

fn row(name: &str, ours: f64, peer: f64) {
    if peer.is_nan() {
        println!("{name:<44} {ours:>12.2} {:>12} {:>8}", "-", "-");
    } else {
        println!("{name:<44} {ours:>12.2} {peer:>12.2} {:>8.2}", ours / peer);
    }
}

fn fill(image: &Path) -> Result<()> {
    use std::io::Write;
    let mut file = File::create(image)?;
    let block = (0..1 << 20).map(|at: u32| at.to_le_bytes()[1] ^ 0x5a).collect::<Vec<_>>();
    for _ in 0..IMAGE_BYTES >> 20 {
        file.write_all(&block)?;
    }
    Ok(())
}

/// Operations per second of `qemu-img bench`.
fn qemu_img(
    image: Option<&Path>,
    url: &str,
    count: u32,
    depth: u32,
    size: u32,
    write: bool,
) -> Result<f64> {
    let mut command = match image {
        Some(image) => lychgate(image),
        None => Command::new("env"),
    };
    command.args(["qemu-img", "bench", "-f", "raw"]);
    command.args(["-c", &count.to_string(), "-d", &depth.to_string(), "-s", &size.to_string()]);
    if write {
        command.arg("-w");
    }
    let output = command.arg(url).stderr(Stdio::inherit()).output()?;
    ensure!(output.status.success(), "qemu-img bench failed: {}", output.status);
    let text = String::from_utf8(output.stdout)?;
    let seconds = text
        .lines()
        .find_map(|line| line.strip_prefix("Run completed in ")?.strip_suffix(" seconds."))
        .context("qemu-img bench printed no time")?;
    Ok(f64::from(count) / seconds.parse::<f64>()?)
}

fn lychgate(image: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lychgate"));
    command.args(["run", "--nvme", &format!("{BDF}={}", image.display()), "--"]);
    command
}

/// The median of what the client prints in five runs, in nanoseconds.
fn measure_client(mode: &str, image: &Path, trapped: bool) -> Result<f64> {
    let mut times = Vec::new();
    for _ in 0..5 {
        let mut command = if trapped { lychgate(image) } else { Command::new("env") };
        command
            .arg(env::current_exe()?)
            .args(["client", mode])
            .env("BENCH_START", now().to_string());
        let output = command.stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "the client failed: {}", output.status);
        times.push(String::from_utf8(output.stdout)?.trim().parse::<f64>()?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn client(mode: &str) -> Result<()> {
    let nanoseconds = match mode {
        "native-ioctl" => {
            let null = File::open("/dev/null")?;
            // Not a terminal: the cheapest ioctl that fails.
            per_call(100_000, || assert!(!std::io::IsTerminal::is_terminal(&null)))
        }
        "ioctl" => {
            let iommufd = IommuFd::new()?;
            per_call(20_000, || assert!(iommufd.destroy_iommu_object(0x7fff).is_err()))
        }
        "map" => {
            let opened = Way::Iommufd.open(BDF)?;
            let mut page = DmaBuffer::new(&opened, 4096)?;
            let mut failed = false;
            let time = per_call(10_000, || failed |= page.map(&opened).is_err());
            ensure!(!failed, "mapping failed");
            time
        }
        "first" => {
            let iommufd = IommuFd::new()?;
            assert!(iommufd.destroy_iommu_object(0x7fff).is_err());
            now() - env::var("BENCH_START")?.parse::<f64>()?
        }
        _ => anyhow::bail!("no such client: {mode}"),
    };
    println!("{nanoseconds}");
    Ok(())
}

fn per_call(count: u32, mut call: impl FnMut()) -> f64 {
    for _ in 0..count / 10 {
        call();
    }
    let start = Instant::now();
    for _ in 0..count {
        call();
    }
    start.elapsed().as_nanos() as f64 / f64::from(count)
}

/// Nanoseconds of the clock that all processes share.
fn now() -> f64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}
