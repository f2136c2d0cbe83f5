//! Structures in the memory of a client.

use lychgate_iommufd::error::{Result, refuse};
use lychgate_iommufd::{Client, Refusal};
use lychgate_types::Errno;

use crate::abi::Abi;

/// Copies the first `min` bytes of a structure in; the rest is zero. `EFAULT`.
pub(crate) fn copy_in<T: Abi>(client: &dyn Client, from: u64, min: usize) -> Result<T> {
    let mut value = T::new_zeroed();
    let bytes = value.as_mut_bytes();
    let len = min.min(bytes.len());
    if let Some(prefix) = bytes.get_mut(..len) {
        read(client, from, prefix)?;
    }
    Ok(value)
}

/// Copies the first `len` bytes of a structure out. `EFAULT`.
pub(crate) fn copy_out<T: Abi>(client: &dyn Client, to: u64, value: &T, len: usize) -> Result<()> {
    let bytes = value.as_bytes();
    write(client, to, bytes.get(..len).unwrap_or(bytes))
}

/// Copies bytes in. `EFAULT`.
pub(crate) fn read(client: &dyn Client, from: u64, to: &mut [u8]) -> Result<()> {
    client.read(from, to).map_err(|errno| Refusal::new(errno, "the argument cannot be read"))
}

/// Copies bytes out. `EFAULT`.
pub(crate) fn write(client: &dyn Client, to: u64, from: &[u8]) -> Result<()> {
    client.write(to, from).map_err(|errno| Refusal::new(errno, "the argument cannot be written"))
}

/// `offset` bytes behind `base`; `EFAULT` past the end of the address space.
pub(crate) fn at(base: u64, offset: u64) -> Result<u64> {
    match base.checked_add(offset) {
        Some(address) => Ok(address),
        None => refuse(Errno::EFAULT, "the argument passes the end of the address space"),
    }
}

/// `argsz` against the smallest structure: `EINVAL`.
pub(crate) fn check_argsz(argsz: u32, min: usize) -> Result<()> {
    if usize::try_from(argsz).is_ok_and(|argsz| argsz >= min) {
        Ok(())
    } else {
        refuse(Errno::EINVAL, format!("argsz is below {min}"))
    }
}

/// Why a descriptor is not a file of ours: not open, or another kind (`EBADF`, else `other`).
pub(crate) fn foreign_descriptor(client: &dyn Client, fd: i32, other: Errno) -> Refusal {
    match client.eventfd(fd) {
        Err(Errno::EBADF) => Refusal::new(Errno::EBADF, format!("descriptor {fd} is not open")),
        _ => Refusal::new(other, format!("descriptor {fd} is another kind of file")),
    }
}
