//! Where in a program's source a call came from: the stack of a stopped thread of another process,
//! unwound from outside, and the functions and lines behind it.
//!
//! [`Origins::stack`] is for every call: it walks the frames by the program's own unwind tables, or
//! by frame pointers where there are none, and keeps addresses. [`Origins::places`] is for reports:
//! it reads symbols and debug information, and takes its time.

#![forbid(unsafe_code)]

mod module;
mod place;
mod stack;
mod target;

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use place::Place;
pub use stack::{Frame, Stack};
pub use target::{Mapping, Registers, Target};

use module::Modules;
use place::Symbols;

/// Address spaces whose modules are kept.
const MOST_SPACES: usize = 64;

/// What is known of the programs: their modules by address space, and the symbols of their files.
#[derive(Default)]
pub struct Origins {
    spaces: Mutex<HashMap<u64, Modules>>,
    symbols: Mutex<Symbols>,
}

impl Origins {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The frames of a stopped thread, innermost first; none where its registers or memory cannot be
    /// read. `space` names its address space: programs come and go under one process id.
    pub fn stack(&self, space: u64, target: &dyn Target) -> Stack {
        let Some(registers) = target.registers() else { return Stack::default() };
        let mut spaces = lock(&self.spaces);
        if spaces.len() >= MOST_SPACES && !spaces.contains_key(&space) {
            spaces.clear();
        }
        let modules = spaces.entry(space).or_default();
        stack::unwind(modules, target, registers)
    }

    /// The places in the source for the frames of a stack, innermost first. A frame has several where
    /// functions were inlined into each other.
    pub fn places(&self, stack: &Stack) -> Vec<Place> {
        let mut symbols = lock(&self.symbols);
        stack.frames().iter().flat_map(|frame| symbols.places(frame)).collect()
    }

    /// The place that a person would name: the innermost one outside of the C library, in a file with
    /// debug information if there is one.
    pub fn place(&self, stack: &Stack) -> Option<Place> {
        let places = self.places(stack);
        let outside = || places.iter().filter(|place| !place.in_runtime());
        let with_line = outside().find(|place| place.line.is_some());
        with_line.or_else(|| outside().next()).or_else(|| places.first()).cloned()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
