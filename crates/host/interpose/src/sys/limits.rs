//! `prlimit(2)`: limits of other processes.

/// The soft `RLIMIT_MEMLOCK` of a thread in bytes, `u64::MAX` for none; `None` when it may not be
/// asked for.
pub(crate) fn memlock(thread: u32) -> Option<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    let pid = libc::pid_t::try_from(thread).ok().filter(|pid| *pid > 0)?;
    // SAFETY: with no new limit the call only stores one `struct rlimit`, which lives through it.
    let r = unsafe { libc::prlimit(pid, libc::RLIMIT_MEMLOCK, std::ptr::null(), &raw mut limit) };
    // RLIM_INFINITY is the highest number.
    (r == 0).then_some(limit.rlim_cur)
}
