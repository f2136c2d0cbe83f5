//! `process_vm_readv(2)` and `process_vm_writev(2)`: memory of another process, its protection
//! respected.

use std::io;

use libc::iovec;
use lychgate_machine::Span;

/// The most remote ranges that one call takes (`UIO_MAXIOV`).
pub(crate) const MAX_SPANS: usize = 1024;

/// Gathers what `spans` hold, in order; gives how many bytes could be read. Up to [`MAX_SPANS`].
pub(crate) fn read(process: u32, spans: &[Span], to: &mut [u8]) -> io::Result<usize> {
    let local = iovec { iov_base: to.as_mut_ptr().cast(), iov_len: to.len() };
    let (one, many);
    let remote = if let [span] = spans {
        one = [remote(span)];
        &one[..]
    } else {
        many = spans.iter().map(remote).collect::<Vec<_>>();
        &many[..]
    };
    // SAFETY: the local range is `to`, exclusively borrowed and of that length; the remote ranges
    // are addresses of another process, which the kernel checks.
    let r = unsafe {
        libc::process_vm_readv(
            pid(process)?,
            &raw const local,
            1,
            remote.as_ptr(),
            count(remote),
            0,
        )
    };
    usize::try_from(r).map_err(|_| io::Error::last_os_error())
}

/// Scatters `from` over `spans`, in order; gives how many bytes could be written. Up to
/// [`MAX_SPANS`].
pub(crate) fn write(process: u32, spans: &[Span], from: &[u8]) -> io::Result<usize> {
    let local = iovec { iov_base: from.as_ptr().cast_mut().cast(), iov_len: from.len() };
    let (one, many);
    let remote = if let [span] = spans {
        one = [remote(span)];
        &one[..]
    } else {
        many = spans.iter().map(remote).collect::<Vec<_>>();
        &many[..]
    };
    // SAFETY: the local range is `from`, which process_vm_writev only reads, borrowed and of that
    // length; the remote ranges are addresses of another process, which the kernel checks.
    let r = unsafe {
        libc::process_vm_writev(
            pid(process)?,
            &raw const local,
            1,
            remote.as_ptr(),
            count(remote),
            0,
        )
    };
    usize::try_from(r).map_err(|_| io::Error::last_os_error())
}

fn remote(span: &Span) -> iovec {
    let start = usize::try_from(span.start).unwrap_or(usize::MAX);
    iovec { iov_base: std::ptr::without_provenance_mut(start), iov_len: span.len }
}

fn count(spans: &[iovec]) -> libc::c_ulong {
    libc::c_ulong::try_from(spans.len()).unwrap_or(libc::c_ulong::MAX)
}

fn pid(process: u32) -> io::Result<libc::pid_t> {
    libc::pid_t::try_from(process).map_err(io::Error::other)
}
