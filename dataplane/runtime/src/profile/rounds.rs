//! Whether a thread's loop makes progress.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts rounds of one thread's loop; another thread uses it to detect that the first one hangs.
#[derive(Debug, Clone, Default)]
pub struct Rounds(Arc<AtomicU64>);

impl Rounds {
    /// Counts a round. Only one thread may do so.
    pub fn count(&self) {
        // There is one writer, so this needs no atomic addition.
        let next = self.0.load(Ordering::Relaxed).wrapping_add(1);
        self.0.store(next, Ordering::Relaxed);
    }

    /// Rounds so far.
    #[must_use]
    pub fn so_far(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
