//! Locks as the embedder has them: a kernel's spin locks, `std`'s mutexes.

/// A value behind mutual exclusion.
pub trait Lock<T>: Send + Sync {
    /// A lock around `value`, free.
    fn new(value: T) -> Self;

    /// Runs `f` with the value, alone.
    fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R;
}

/// A family of locks, so that a type can be generic over them once.
pub trait Locks: Send + Sync + 'static {
    /// The lock for values of type `T`.
    type Mutex<T: Send>: Lock<T>;
}

#[cfg(feature = "std")]
pub use std_locks::StdLocks;

#[cfg(feature = "std")]
mod std_locks {
    use std::sync::{Mutex, PoisonError};

    use super::{Lock, Locks};

    /// [`Locks`] of the standard library. A panic while one is held does not poison it.
    #[derive(Clone, Copy, Debug, Default)]
    pub struct StdLocks;

    impl Locks for StdLocks {
        type Mutex<T: Send> = Mutex<T>;
    }

    impl<T: Send> Lock<T> for Mutex<T> {
        fn new(value: T) -> Self {
            Self::new(value)
        }

        fn with<R>(&self, f: impl FnOnce(&mut T) -> R) -> R {
            f(&mut self.lock().unwrap_or_else(PoisonError::into_inner))
        }
    }
}
