//! `--trace`: each served call on a line, as strace prints it, with our reason for an error.

use std::sync::Arc;

use lychgate_interpose::{Served, Tracer};

use crate::output::Output;

/// Prints warnings and, if asked to, every call.
pub(crate) struct Printer {
    output: Arc<Output>,
    calls: bool,
}

impl Printer {
    pub(crate) fn new(output: Arc<Output>, calls: bool) -> Self {
        Self { output, calls }
    }
}

impl Tracer for Printer {
    fn wants_calls(&self) -> bool {
        self.calls
    }

    fn served(&self, served: &Served<'_>) {
        if self.calls {
            self.output.write(&line(served, self.output.color()));
        }
    }

    fn warning(&self, process: u32, text: &str) {
        self.output.write(&format!("lychgate: process {process}: {text}\n"));
    }
}

fn line(served: &Served<'_>, color: bool) -> String {
    let head = format!("[{}] {}({})", served.call.thread, served.function, arguments(served));
    let micros = served.duration.as_secs_f64() * 1e6;
    let (red, dim, end) = if color { ("\x1b[31m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
    match served.result {
        Ok(value) => format!("{head} = {value} {dim}<{micros:.0} us>{end}\n"),
        Err(refusal) => {
            format!(
                "{head} = -1 {red}{}{end} ({}) {dim}<{micros:.0} us>{end}\n",
                refusal.errno, refusal.why
            )
        }
    }
}

fn arguments(served: &Served<'_>) -> String {
    let file = match served.fd {
        Some(fd) => format!("{fd}<{}>", served.file),
        None => format!("{:?}", served.file),
    };
    let rest = match (served.function, served.after) {
        ("ioctl", after) => structure(served.arguments, after),
        (_, Some(after)) => after.to_owned(),
        (_, None) => served.arguments.to_owned(),
    };
    format!("{file}, {rest}")
}

/// The structure of an ioctl: what is asked, and behind an arrow what was answered. Fields whose
/// names begin with `out_` hold nothing before.
fn structure(before: &str, after: Option<&str>) -> String {
    let Some((name, asked)) = split(before) else { return before.to_owned() };
    let is_out = |field: &&str| field.starts_with("out_");
    let shown: Vec<&str> = asked.iter().copied().filter(|field| !is_out(field)).collect();
    let shown = format!("{name}{{{}}}", shown.join(", "));
    let Some((_, answered)) = after.and_then(split) else { return shown };
    let new: Vec<&str> =
        answered.into_iter().filter(|field| is_out(field) || !asked.contains(field)).collect();
    if new.is_empty() { shown } else { format!("{shown} => {{{}}}", new.join(", ")) }
}

/// Splits `NAME {a=1, b=[2, 3]}` into what is before the brace, and the fields.
fn split(text: &str) -> Option<(&str, Vec<&str>)> {
    let (name, fields) = text.strip_suffix('}')?.split_once('{')?;
    let mut depth = 0_u32;
    let fields = fields.split(|character| {
        match character {
            '{' | '[' | '(' => depth += 1,
            '}' | ']' | ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        character == ',' && depth == 0
    });
    Some((name, fields.map(str::trim_start).collect()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use lychgate_iommufd::Refusal;
    use lychgate_machine::Call;
    use lychgate_types::Errno;

    use super::*;

    fn show(
        function: &'static str,
        (fd, file): (Option<i32>, &str),
        (arguments, after): (&str, Option<&str>),
        result: Result<i64, Refusal>,
    ) -> String {
        let name = function.to_owned();
        let call = Call { number: 1, process: 41, thread: 42, instruction: 0, name };
        let (result, duration) = (&result, Duration::from_micros(14));
        let call = &call;
        line(&Served { call, file, function, fd, arguments, after, result, duration }, false)
    }

    #[test]
    fn calls_look_as_strace_prints_them() {
        let iommu = (Some(1023), "/dev/iommu");
        let device = (Some(1022), "/dev/vfio/devices/vfio0");
        let lines = [
            show("open", (None, "/dev/iommu"), ("O_RDWR|O_CLOEXEC", None), Ok(1023)),
            show(
                "ioctl",
                iommu,
                (
                    "IOMMU_IOAS_ALLOC, {flags=0, out_ioas_id=77}",
                    Some("IOMMU_IOAS_ALLOC, {flags=0, out_ioas_id=1}"),
                ),
                Ok(0),
            ),
            show(
                "ioctl",
                device,
                (
                    "VFIO_DEVICE_GET_INFO, {argsz=24, flags=0, num_regions=0}",
                    Some("VFIO_DEVICE_GET_INFO, {argsz=24, flags=RESET|PCI, num_regions=9}"),
                ),
                Ok(0),
            ),
            show(
                "ioctl",
                iommu,
                ("IOMMU_IOAS_IOVA_RANGES, {num_iovas=2, allowed_iovas=[0x0-0x1, 0x3-0x4]}", None),
                Err(Refusal::new(Errno::ENOENT, "no such IOAS")),
            ),
            show("ioctl", device, ("VFIO_DEVICE_RESET", None), Ok(0)),
            show(
                "pread",
                device,
                ("0x7ffd0000, 2, 0x70000000004", Some("\"\\x06\\x04\", 2, 0x70000000004")),
                Ok(2),
            ),
        ];
        insta::assert_snapshot!(lines.concat(), @r#"
        [42] open("/dev/iommu", O_RDWR|O_CLOEXEC) = 1023 <14 us>
        [42] ioctl(1023</dev/iommu>, IOMMU_IOAS_ALLOC, {flags=0} => {out_ioas_id=1}) = 0 <14 us>
        [42] ioctl(1022</dev/vfio/devices/vfio0>, VFIO_DEVICE_GET_INFO, {argsz=24, flags=0, num_regions=0} => {flags=RESET|PCI, num_regions=9}) = 0 <14 us>
        [42] ioctl(1023</dev/iommu>, IOMMU_IOAS_IOVA_RANGES, {num_iovas=2, allowed_iovas=[0x0-0x1, 0x3-0x4]}) = -1 ENOENT (no such IOAS) <14 us>
        [42] ioctl(1022</dev/vfio/devices/vfio0>, VFIO_DEVICE_RESET) = 0 <14 us>
        [42] pread(1022</dev/vfio/devices/vfio0>, "\x06\x04", 2, 0x70000000004) = 2 <14 us>
        "#);
    }
}
