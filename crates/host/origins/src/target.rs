//! The thread that is looked at.

use std::path::PathBuf;

/// A thread that does not run while it is looked at.
pub trait Target {
    /// Its registers, as far as they can be known from outside.
    fn registers(&self) -> Option<Registers>;

    /// What its address space holds of files.
    fn mappings(&self) -> Vec<Mapping>;

    /// Reads its memory; false where nothing is.
    fn read(&self, at: u64, to: &mut [u8]) -> bool;
}

/// The registers that `/proc/PID/task/TID/syscall` shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registers {
    /// Instruction pointer.
    pub ip: u64,
    /// Stack pointer.
    pub sp: u64,
}

impl Registers {
    /// From a line of `/proc/PID/task/TID/syscall`, whose last two words are the stack pointer and the
    /// instruction pointer; `None` for a thread that runs.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace().rev();
        let mut word = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
        Some(Self { ip: word()?, sp: word()? })
    }
}

/// A part of a file in an address space.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// The address behind the last one.
    pub end: u64,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// Whether code can run there.
    pub executable: bool,
    /// The file, as this process can open it.
    pub path: PathBuf,
    /// The file, as the program knows it.
    pub name: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_a_thread_in_a_call_is_read_and_that_of_a_running_one_is_not() {
        let line = "16 0x3 0x3b85 0x7ffe 0x0 0x0 0x0 0x7ffc12345678 0x7f0000401000\n";
        let registers = Registers { sp: 0x7ffc_1234_5678, ip: 0x7f00_0040_1000 };
        assert_eq!(Registers::parse(line), Some(registers));
        assert_eq!(Registers::parse("running\n"), None);
        assert_eq!(Registers::parse("-1 0x10 0x20"), Some(Registers { sp: 0x10, ip: 0x20 }));
        assert_eq!(Registers::parse(""), None);
    }
}
