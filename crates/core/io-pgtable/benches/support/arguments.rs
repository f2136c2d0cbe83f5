//! The command line.

use super::report::Style;

pub(crate) struct Arguments {
    /// Measure each row an eighth of the time.
    pub(crate) quick: bool,
    pub(crate) style: Style,
    /// All must be part of the name of a row or its format.
    pub(crate) words: Vec<String>,
}

/// Reads the arguments behind the program's name.
///
/// # Errors
/// What is wrong with them, and what is known.
pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Arguments, String> {
    let mut parsed = Arguments { quick: false, style: Style::Table, words: Vec::new() };
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // From Cargo.
            "--bench" => {}
            "--quick" => parsed.quick = true,
            "--format" => {
                parsed.style = match arguments.next().as_deref() {
                    Some("json") => Style::Json,
                    Some("table") => Style::Table,
                    _ => return Err("--format is json or table".to_owned()),
                }
            }
            option if option.starts_with('-') => return Err(format!("{option}? {USAGE}")),
            _ => parsed.words.push(argument),
        }
    }
    Ok(parsed)
}

const USAGE: &str = "Arguments: [--quick] [--format json] [WORD...], each word part of the name of a \
                     format or row, as in 'x86_64 unmap'";
