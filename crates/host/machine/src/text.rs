//! Texts that files show and may take: attributes of `/sys`, files of `/proc`.

use lychgate_iommufd::error::{Refusal, Result, refuse};
use lychgate_types::Errno;

/// What a file shows and takes.
pub trait Text: Send + Sync {
    /// The whole text now.
    fn show(&self) -> Result<String>;

    /// Takes what was written in one call, without the line's end. `EACCES` for a file that is there
    /// to be read.
    fn store(&self, text: &str) -> Result<()> {
        let _ = text;
        refuse(Errno::EACCES, "this file is there to be read")
    }
}

/// A number as Linux reads it: decimal, `0x` hexadecimal or `0` octal (`kstrtouint` with base 0).
/// `EINVAL` for anything else, `ERANGE` beyond 32 bits.
pub(crate) fn number(text: &str) -> Result<u32> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    let (digits, radix) = match digits.as_bytes() {
        [b'0', b'x' | b'X', ..] => (digits.get(2..).unwrap_or_default(), 16),
        [b'0', _, ..] => (digits.get(1..).unwrap_or_default(), 8),
        _ => (digits, 10),
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return refuse(Errno::EINVAL, "this is no number");
    }
    u32::from_str_radix(digits, radix)
        .map_err(|_| Refusal::new(Errno::new(libc::ERANGE), "the number has more than 32 bits"))
}

/// A switch as Linux reads it (`kstrtobool`): `EINVAL` for anything else.
pub(crate) fn switch(text: &str) -> Result<bool> {
    match text.as_bytes() {
        [b'y' | b'Y' | b't' | b'T' | b'1', ..] | [b'o' | b'O', b'n' | b'N', ..] => Ok(true),
        [b'n' | b'N' | b'f' | b'F' | b'0', ..] | [b'o' | b'O', b'f' | b'F', ..] => Ok(false),
        _ => refuse(Errno::EINVAL, "neither Y nor N"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_linux_reads_them() {
        for (text, value) in [("0", 0), ("17", 17), ("0x1F", 31), ("017", 15), ("+3", 3)] {
            assert_eq!(number(text), Ok(value), "{text}");
        }
        for text in ["", "-1", "08", "0x", "3 4", "one", "1\n\n", "++1"] {
            assert_eq!(number(text).map_err(|refusal| refusal.errno), Err(Errno::EINVAL), "{text}");
        }
        let refusal = number("4294967296").unwrap_err();
        assert_eq!(refusal.errno, Errno::new(libc::ERANGE));
    }

    #[test]
    fn switches_are_read_as_linux_reads_them() {
        for text in ["Y", "yes", "1", "on", "true"] {
            assert_eq!(switch(text), Ok(true), "{text}");
        }
        for text in ["N", "no", "0", "off", "false"] {
            assert_eq!(switch(text), Ok(false), "{text}");
        }
        assert!(["", "maybe", "2"].iter().all(|text| switch(text).is_err()));
    }
}
