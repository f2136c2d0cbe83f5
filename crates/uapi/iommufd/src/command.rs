//! Structures on their way in and out of a call (`iommufd_fops_ioctl`, `copy_struct_from_user`).

use zerocopy::{FromBytes, Immutable, IntoBytes};

use lychgate_types::Errno;

use crate::abi::Argument;
use crate::client::Client;
use crate::error::{Refusal, Result, refuse};

/// One ioctl with its structure.
pub(crate) struct Command<'a, A> {
    /// Who calls.
    pub(crate) client: &'a dyn Client,
    /// The structure, zero where the caller's was shorter.
    pub(crate) argument: A,
    at: u64,
    user_size: usize,
}

impl<'a, A: Argument> Command<'a, A> {
    /// Takes the structure at `at` from the caller: sizes first, then what is in it.
    pub(crate) fn take(client: &'a dyn Client, command: u32, at: u64) -> Result<Self> {
        let mut size = 0_u32;
        read(client, at, size.as_mut_bytes())?;
        if command != A::COMMAND {
            return refuse(Errno::ENOTTY, format!("no ioctl has the number {command:#x}"));
        }
        let user_size = usize::try_from(size).unwrap_or(usize::MAX);
        if user_size < A::MIN_SIZE {
            return refuse(
                Errno::EINVAL,
                format!("the structure has {user_size} bytes, fewer than {}", A::MIN_SIZE),
            );
        }
        check_tail(client, at, size_of::<A>(), user_size)?;
        let mut argument = A::new_zeroed();
        let known = user_size.min(size_of::<A>());
        if let Some(bytes) = argument.as_mut_bytes().get_mut(..known) {
            read(client, at, bytes)?;
        }
        Ok(Self { client, argument, at, user_size })
    }

    /// Where the member `offset` bytes into the structure is.
    pub(crate) fn member_at(&self, offset: usize) -> u64 {
        self.at.wrapping_add(offset as u64)
    }

    /// Copies the structure back, as much of it as the caller knows (`iommufd_ucmd_respond`).
    pub(crate) fn respond(&self) -> Result<()> {
        let known = self.user_size.min(size_of::<A>());
        let bytes = self.argument.as_bytes().get(..known).unwrap_or_default();
        write(self.client, self.at, bytes)
    }

    /// Reads what a member of the structure points to.
    pub(crate) fn read(&self, at: u64, to: &mut [u8]) -> Result<()> {
        read(self.client, at, to)
    }

    /// Writes what a member of the structure points to.
    pub(crate) fn write(&self, at: u64, from: &[u8]) -> Result<()> {
        write(self.client, at, from)
    }
}

/// Reads a value of the caller's: `EFAULT`.
pub(crate) fn read_value<T: FromBytes + IntoBytes>(client: &dyn Client, at: u64) -> Result<T> {
    let mut value = T::new_zeroed();
    read(client, at, value.as_mut_bytes())?;
    Ok(value)
}

/// Writes the first `len` bytes of a value to the caller: `EFAULT`.
pub(crate) fn write_value<T: IntoBytes + Immutable>(
    client: &dyn Client,
    at: u64,
    value: &T,
    len: usize,
) -> Result<()> {
    write(client, at, value.as_bytes().get(..len).unwrap_or_default())
}

/// `copy_from_user`.
pub(crate) fn read(client: &dyn Client, at: u64, to: &mut [u8]) -> Result<()> {
    let len = to.len();
    client
        .read(at, to)
        .map_err(|errno| Refusal::new(errno, format!("{len} bytes at {at:#x} cannot be read")))
}

/// `copy_to_user`.
pub(crate) fn write(client: &dyn Client, at: u64, from: &[u8]) -> Result<()> {
    let len = from.len();
    client
        .write(at, from)
        .map_err(|errno| Refusal::new(errno, format!("{len} bytes at {at:#x} cannot be written")))
}

/// The address `offset` bytes behind `at`: `EFAULT` beyond the address space.
pub(crate) fn offset(at: u64, offset: u64) -> Result<u64> {
    match at.checked_add(offset) {
        Some(at) => Ok(at),
        None => refuse(Errno::EFAULT, "the structure passes the end of the address space"),
    }
}

/// What a caller knows beyond us must be zero: `E2BIG`.
fn check_tail(client: &dyn Client, at: u64, known: usize, size: usize) -> Result<()> {
    let mut chunk = [0_u8; 256];
    let mut done = known;
    while done < size {
        let len = chunk.len().min(size - done);
        let bytes = chunk.get_mut(..len).unwrap_or_default();
        read(client, offset(at, done as u64)?, bytes)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return refuse(
                Errno::E2BIG,
                format!("the structure has more than the {known} bytes that are known"),
            );
        }
        done += len;
    }
    Ok(())
}
