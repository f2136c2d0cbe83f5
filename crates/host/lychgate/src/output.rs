//! Where lychgate's own words go, and whether they are coloured.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::cli::Color;

/// A place for lines, shared by the threads that have something to say.
pub(crate) struct Output {
    to: Mutex<Box<dyn Write + Send>>,
    color: bool,
}

impl Output {
    /// A file, or standard error.
    pub(crate) fn new(file: Option<&Path>, color: Color) -> Result<Self> {
        let (to, terminal): (Box<dyn Write + Send>, bool) = match file {
            Some(path) => {
                let file = File::create(path).with_context(|| path.display().to_string())?;
                (Box::new(file), false)
            }
            None => (Box::new(io::stderr()), io::stderr().is_terminal()),
        };
        let color = match color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()),
        };
        Ok(Self { to: Mutex::new(to), color })
    }

    /// Whether to colour.
    pub(crate) fn color(&self) -> bool {
        self.color
    }

    /// Writes text that ends with a newline, in one piece. A reader that went away does not stop the
    /// program.
    pub(crate) fn write(&self, text: &str) {
        let mut to = self.to.lock().unwrap_or_else(PoisonError::into_inner);
        to.write_all(text.as_bytes()).and_then(|()| to.flush()).ok();
    }
}
