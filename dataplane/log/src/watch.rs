//! Wakes a thread of the broker when a batch is committed, at the cost of one load per batch while it is awake.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::Waker;

/// The thread that waits for batches of a log, if any.
#[derive(Default)]
pub(super) struct CommitWatch {
    waker: OnceLock<Waker>,
    /// The thread sleeps, or is about to.
    is_armed: AtomicBool,
}

impl CommitWatch {
    /// Names the thread; the first call counts.
    pub(super) fn set(&self, waker: Waker) {
        let _ = self.waker.set(waker);
    }

    /// Asks for one wake-up. The caller then looks for batches once more before it sleeps.
    pub(super) fn arm(&self) {
        self.is_armed.store(true, Ordering::Relaxed);
        // Pairs with the fence in `committed`: either this thread sees the batch, or the writer sees the flag.
        fence(Ordering::SeqCst);
    }

    /// Called after the frontier has moved.
    #[inline]
    pub(super) fn committed(&self) {
        let Some(waker) = self.waker.get() else {
            return;
        };
        fence(Ordering::SeqCst);
        if self.is_armed.load(Ordering::Relaxed) && self.is_armed.swap(false, Ordering::AcqRel) {
            waker.wake_by_ref();
        }
    }
}

impl fmt::Debug for CommitWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CommitWatch").finish_non_exhaustive()
    }
}
