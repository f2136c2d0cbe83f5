//! What the processor and the system are asked for, which safe Rust cannot do.

#![expect(unsafe_code, reason = "madvise(2) and LFENCE have no safe form")]

use std::mem::MaybeUninit;

use rustix::mm::{Advice, madvise};

const PAGE: usize = 4096;

/// Asks for huge pages where `memory` has not been touched yet, as a kernel's direct map has, so that no
/// row measures the processor's TLB. Where the system refuses, the pages stay small and nothing
/// else changes.
pub(crate) fn ask_for_huge_pages<T>(memory: &mut [MaybeUninit<T>]) {
    let bytes = size_of_val(memory);
    let start: *mut u8 = memory.as_mut_ptr().cast();
    let skip = start.align_offset(PAGE);
    let whole = bytes.saturating_sub(skip) / PAGE * PAGE;
    if whole != 0 {
        // SAFETY: the range lies in `memory`, and MADV_HUGEPAGE changes no contents.
        let _ = unsafe { madvise(start.wrapping_add(skip).cast(), whole, Advice::LinuxHugepage) };
    }
}

/// Waits until all earlier instructions have completed.
#[inline(always)]
pub(crate) fn wait() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86_64 processor has SSE2.
    unsafe {
        std::arch::x86_64::_mm_lfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
}
