//! What to run, and how it ended.

use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::Error;

/// A program and its arguments. It has the caller's environment, directory, terminal, process
/// group, and standard files.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Command {
    program: OsString,
    arguments: Vec<OsString>,
    variables: Vec<(OsString, OsString)>,
}

impl Command {
    /// A program, looked for on `PATH` unless its name has a slash.
    pub fn new(program: impl Into<OsString>) -> Self {
        Self { program: program.into(), arguments: Vec::new(), variables: Vec::new() }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.variables.push((name.into(), value.into()));
        self
    }

    pub(crate) fn program(&self) -> &Path {
        Path::new(&self.program)
    }

    /// The paths to try, as `execvp` does.
    pub(crate) fn candidates(&self) -> Result<Vec<CString>, Error> {
        if self.program.is_empty() {
            return Err(Error::NotFound(PathBuf::new()));
        }
        if self.program.as_bytes().contains(&b'/') {
            return Ok(vec![c_string(&self.program)?]);
        }
        let path = self.variable("PATH").unwrap_or_else(|| OsString::from("/bin:/usr/bin"));
        std::env::split_paths(&path)
            .map(|directory| {
                let directory =
                    if directory.as_os_str().is_empty() { ".".into() } else { directory };
                c_string(directory.join(&self.program).as_os_str())
            })
            .collect()
    }

    /// The arguments, the name first.
    pub(crate) fn arguments(&self) -> Result<Vec<CString>, Error> {
        std::iter::once(&self.program).chain(&self.arguments).map(|text| c_string(text)).collect()
    }

    /// `NAME=value` of each variable.
    pub(crate) fn environment(&self) -> Result<Vec<CString>, Error> {
        let kept = std::env::vars_os()
            .filter(|(name, _)| !self.variables.iter().any(|(other, _)| other == name));
        kept.chain(self.variables.iter().cloned())
            .map(|(mut text, value)| {
                text.push("=");
                text.push(value);
                c_string(&text)
            })
            .collect()
    }

    fn variable(&self, name: &str) -> Option<OsString> {
        let set = self.variables.iter().rev().find(|(other, _)| other == name);
        set.map(|(_, value)| value.clone()).or_else(|| std::env::var_os(name))
    }
}

fn c_string(text: &OsStr) -> Result<CString, Error> {
    CString::new(text.as_bytes()).map_err(|_| Error::ZeroByte(text.to_string_lossy().into_owned()))
}

/// How a program ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExitStatus {
    /// It exited with this code, 0 to 255.
    Code(u8),
    /// This signal ended it.
    Signal(i32),
}

impl ExitStatus {
    pub(crate) fn from_wait(status: i32) -> Self {
        if libc::WIFSIGNALED(status) {
            Self::Signal(libc::WTERMSIG(status))
        } else {
            Self::Code(u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(u8::MAX))
        }
    }

    /// What a shell gives as `$?`: the code, or 128 and the signal.
    pub fn code(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        }
    }
}
