//! Gives an unmodified program the machine's devices by seccomp user notification.
