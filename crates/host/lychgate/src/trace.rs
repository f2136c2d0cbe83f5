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
    let call = served.call;
    let head = format!("[{}] {}({}, {})", call.thread, call.name, served.file, served.arguments);
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
