//! Steps that fail on purpose (`Documentation/fault-injection/fault-injection.rst`).
//!
//! Linux can be told to let the n-th allocation of a task fail, so that a test may walk through every
//! way in which a call ends halfway. Here each such step asks whoever answers for the thread that
//! serves the call: nobody, on a machine without fault injection.
//!
//! A handler asks [`allocation`] where Linux allocates, with `?`, before it changes anything that the
//! error would have to undo otherwise; and [`should_fail`] where Linux asks `iommufd_should_fail`.

use std::cell::RefCell;
use std::sync::Arc;

use lychgate_types::Errno;

use crate::error::{Result, refuse};

/// What is about to be done, by the capability of Linux that lets it fail.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    /// An object of the kernel is allocated: `failslab`.
    Slab,
    /// Pages are allocated, 2 to the power of `order` of them: `fail_page_alloc`.
    Pages {
        /// 0 for one page.
        order: u32,
    },
    /// A step of iommufd itself that its authors chose (`iommufd_should_fail`): `fail_iommufd`.
    Iommufd,
}

/// Decides for one thread of a client.
pub trait FaultInjection: Send + Sync {
    /// Whether this step fails. Each question counts as a step.
    fn should_fail(&self, step: Step) -> bool;
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<dyn FaultInjection>>> = const { RefCell::new(None) };
}

/// Says who decides from now on for the calls that this thread of the machine serves.
pub fn decide_by(faults: Option<Arc<dyn FaultInjection>>) {
    CURRENT.with_borrow_mut(|current| *current = faults);
}

/// Whether a step of the call that this thread serves fails.
pub fn should_fail(step: Step) -> bool {
    CURRENT.with_borrow(|current| current.as_ref().is_some_and(|faults| faults.should_fail(step)))
}

/// An allocation of the call that this thread serves: `ENOMEM` when it is to fail.
pub fn allocation() -> Result<()> {
    if should_fail(Step::Slab) {
        return refuse(Errno::ENOMEM, "this allocation is to fail (fail-nth)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    struct Nth(AtomicU32);

    impl FaultInjection for Nth {
        fn should_fail(&self, _: Step) -> bool {
            self.0.fetch_sub(1, Ordering::Relaxed) == 1
        }
    }

    #[test]
    fn steps_of_a_thread_ask_whoever_decides_for_it() {
        assert!(allocation().is_ok());
        decide_by(Some(Arc::new(Nth(AtomicU32::new(2)))));
        assert!(!should_fail(Step::Iommufd));
        assert_eq!(allocation().map_err(|refusal| refusal.errno), Err(Errno::ENOMEM));
        assert!(allocation().is_ok());
        let other = std::thread::spawn(|| should_fail(Step::Pages { order: 0 }));
        assert!(!other.join().unwrap());
        decide_by(None);
        assert!(allocation().is_ok());
    }
}
