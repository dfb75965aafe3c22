//! Figures of a running thread that other threads read without delaying it.

use std::sync::Mutex;
use std::time::Duration;

use crate::poison::lock;

/// How often workers publish their figures.
pub const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(100);

/// The latest figures of one thread.
#[derive(Debug, Default)]
pub struct SnapshotCell<T>(Mutex<T>);

impl<T: Clone> SnapshotCell<T> {
    /// Publishes new figures. While another thread reads the old ones, they stay until the next time.
    pub fn publish(&self, figures: T) {
        if let Ok(mut latest) = self.0.try_lock() {
            *latest = figures;
        }
    }

    /// The figures that were published last.
    #[must_use]
    pub fn load(&self) -> T {
        lock(&self.0).clone()
    }
}
