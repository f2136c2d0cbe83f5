//! `lychgate check` and `lychgate explain`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lychgate_interpose::Origins;
use lychgate_machine::journal::{Cause, History};
use lychgate_machine::kind::{self, Explained};
use lychgate_machine::{FaultListener, FaultStory, StaleStory};
use lychgate_types::Bdf;

use crate::cli::{Check, Color};
use crate::output::Output;
use crate::run::{self, Ended, Failure};

/// Runs a program, reports what it does wrong, and says so by the exit code.
pub(crate) fn check(check: &Check, color: Color) -> Result<Ended, Failure> {
    let output = Arc::new(Output::new(check.run.output.as_deref(), color)?);
    let origins = Arc::new(lychgate_origins::Origins::new());
    let findings = Arc::new(Findings {
        output: Arc::clone(&output),
        advice: check.advice,
        quiet: check.run.quiet,
        counts: Mutex::default(),
    });
    let builder = run::machine(&check.run)
        .checking(true)
        .origins(Arc::clone(&origins))
        .on_fault(Arc::clone(&findings) as _);
    let ended = run::start(&check.run, builder, output, Some(Origins(origins)))?;
    let found = findings.summarize();
    Ok(if found && check.error_exitcode != 0 { Ended::Code(check.error_exitcode) } else { ended })
}

/// Explains a kind of finding, or lists them.
pub(crate) fn explain(id: Option<&str>) -> ExitCode {
    let Some(id) = id else {
        for explained in kind::all() {
            println!("{:32} {}", explained.id(), title(&explained));
        }
        return ExitCode::SUCCESS;
    };
    match kind::find(id) {
        Some(explained) => {
            print!("{}", explanation(&explained));
            ExitCode::SUCCESS
        }
        None => {
            eprintln!("lychgate: there is no finding '{id}'; `lychgate explain` lists them all");
            ExitCode::from(2)
        }
    }
}

fn title(explained: &Explained) -> String {
    match explained {
        Explained::Kind(kind) => kind.rule.to_owned(),
        Explained::Rule(rule) => format!("{} without its commands", rule.change),
    }
}

fn explanation(explained: &Explained) -> String {
    match explained {
        Explained::Kind(kind) => {
            let paragraphs: Vec<String> = kind.teaches.split("\n\n").map(fill).collect();
            format!("{}: {}\n\n{}\n", kind.id, kind.rule, paragraphs.join("\n\n"))
        }
        Explained::Rule(rule) => format!(
            "{}: when {}\n\n  needs    {}\n  else     {}\n  source   {}, certainty {}{}\n",
            rule.id,
            rule.change,
            rule.needs,
            rule.consequence,
            rule.section,
            rule.certainty,
            if rule.is_strict() { "" } else { "; reported with --advice" },
        ),
    }
}

/// Breaks a paragraph into lines.
fn fill(paragraph: &str) -> String {
    const COLUMNS: usize = 96;
    let mut lines = vec![String::new()];
    for word in paragraph.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + 1 + word.len() <= COLUMNS => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines.join("\n")
}

/// What tells findings apart: the same mistake at the same place is told once.
type Key = (&'static str, Bdf, String);

/// Prints findings, each once, and counts them.
struct Findings {
    output: Arc<Output>,
    advice: bool,
    quiet: bool,
    counts: Mutex<BTreeMap<Key, u64>>,
}

impl Findings {
    /// Counts a finding, and prints it if it is the first of its kind.
    fn add(&self, key: Key, report: impl FnOnce(bool) -> String) {
        let mut counts = self.lock();
        let count = counts.entry(key).or_default();
        *count += 1;
        if *count == 1 && !self.quiet {
            self.output.write(&format!("lychgate: {}", report(self.output.color())));
        }
    }

    /// Says how many findings there were. Gives whether there was any.
    fn summarize(&self) -> bool {
        let counts = self.lock();
        if self.quiet {
            return !counts.is_empty();
        }
        let mut text = match counts.len() {
            0 => "lychgate: no findings\n".to_owned(),
            1 => "lychgate: 1 finding\n".to_owned(),
            many => format!("lychgate: {many} findings\n"),
        };
        for ((id, device, at), count) in counts.iter() {
            let times = if *count == 1 { String::new() } else { format!(", {count} times") };
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {id:28} {device}, {at}{times}");
        }
        if let Some(((id, ..), _)) = counts.iter().next() {
            let _ = writeln!(text, "  `lychgate explain {id}` says what it means");
        }
        self.output.write(&text);
        !counts.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, u64>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl FaultListener for Findings {
    fn fault(&self, story: &FaultStory) {
        let kind = story.kind();
        let at = site(&story.history).unwrap_or_else(|| story.iova.to_string());
        self.add((kind.id, story.device, at), |color| {
            let mut text = story.render(color);
            let _ = writeln!(text, "  {:13} {} ({})", "rule", kind.rule, kind.id);
            text
        });
    }

    fn faults_lost(&self) {
        self.output
            .write("lychgate: the IOMMU's event log overflowed: some faults are not reported\n");
    }

    fn stale(&self, story: &StaleStory) {
        let rule = story.finding.rule;
        if rule.is_strict() || self.advice {
            let at =
                site(&story.history).unwrap_or_else(|| format!("{:#x}", story.finding.span.start));
            self.add((rule.id, story.device, at), |color| story.render(color));
        }
    }
}

/// The place in the program that a finding is about: where memory was unmapped, else where it was
/// mapped.
fn site(history: &History) -> Option<String> {
    let mapping = history.mapping.as_ref()?;
    let place = |cause: &Cause, verb: &str| Some(format!("{verb} at {}", cause.place.as_ref()?));
    let unmapped = mapping.unmapped.as_ref().and_then(|cause| place(cause, "unmapped"));
    unmapped.or_else(|| place(&mapping.mapped, "mapped"))
}
