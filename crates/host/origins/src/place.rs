//! Functions and lines.

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};

use addr2line::Loader;

use crate::stack::Frame;

/// A place in the source of a program, as far as its file tells.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Place {
    /// The function, demangled.
    pub function: Option<String>,
    /// The source file.
    pub file: Option<String>,
    /// The line in it, from 1.
    pub line: Option<u32>,
    /// The program or library.
    pub module: String,
    /// The address in it.
    pub address: u64,
}

impl Place {
    /// Whether it is in the C library or the loader, which no one wants to hear of.
    pub fn in_runtime(&self) -> bool {
        let name = Path::new(&self.module).file_name().and_then(|name| name.to_str());
        let name = name.unwrap_or_default();
        ["libc.so", "libc-", "libc.musl", "ld-linux", "ld-musl", "libpthread"]
            .iter()
            .any(|runtime| name.starts_with(runtime))
    }
}

/// `function() at file.c:12`, or what is known of it.
impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |path: &str| {
            let name = Path::new(path).file_name().and_then(|name| name.to_str());
            name.unwrap_or(path).to_owned()
        };
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "{}:{line}", name(file))?,
            (Some(file), None) => f.write_str(&name(file))?,
            (None, _) => write!(f, "{}+{:#x}", name(&self.module), self.address)?,
        }
        match &self.function {
            Some(function) if function.ends_with(')') => write!(f, " in {function}"),
            Some(function) => write!(f, " in {function}()"),
            None => Ok(()),
        }
    }
}

/// The symbols of files that were asked for.
#[derive(Default)]
pub(crate) struct Symbols(HashMap<PathBuf, Option<Loader>>);

impl Symbols {
    /// The places of a frame, innermost first.
    pub(crate) fn places(&mut self, frame: &Frame) -> Vec<Place> {
        let path = &frame.module.path;
        let loader = self.0.entry(path.clone()).or_insert_with(|| Loader::new(path).ok());
        let bare = Place {
            function: None,
            file: None,
            line: None,
            module: frame.module.name.clone(),
            address: frame.address,
        };
        let Some(loader) = loader else { return vec![bare] };
        let mut places = Vec::new();
        if let Ok(mut frames) = loader.find_frames(frame.address) {
            while let Ok(Some(found)) = frames.next() {
                let function = found.function.as_ref().and_then(|name| name.demangle().ok());
                let location = found.location.as_ref();
                places.push(Place {
                    function: function.map(|name| name.into_owned()),
                    file: location.and_then(|it| it.file).map(str::to_owned),
                    line: location.and_then(|it| it.line),
                    ..bare.clone()
                });
            }
        }
        if places.is_empty() {
            places.push(bare);
        }
        if let Some(outer) = places.last_mut()
            && outer.function.is_none()
        {
            let symbol = loader.find_symbol(frame.address);
            outer.function =
                symbol.map(|name| addr2line::demangle_auto(name.into(), None).into_owned());
        }
        places
    }
}
