//! Figures of a thread that others may look at while it runs, without holding it up.

use std::sync::Mutex;
use std::time::Duration;

use crate::poison::lock;

/// How often workers show their figures; what is looked at is at most so old.
pub const SHOW_EVERY: Duration = Duration::from_millis(100);

/// The latest figures of one thread.
#[derive(Debug, Default)]
pub struct Live<T>(Mutex<T>);

impl<T: Clone> Live<T> {
    /// Shows new figures. While somebody looks at the old ones, they stay until the next time.
    pub fn show(&self, figures: T) {
        if let Ok(mut shown) = self.0.try_lock() {
            *shown = figures;
        }
    }

    /// The figures that were shown last.
    #[must_use]
    pub fn look(&self) -> T {
        lock(&self.0).clone()
    }
}
