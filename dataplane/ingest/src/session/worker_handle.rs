//! Access to a running worker of either path from other threads.

use std::io;
use std::sync::Arc;

use penstock_runtime::poller::Poller;
use penstock_runtime::profile::{Rounds, SnapshotCell};

/// Handle of a running worker that publishes snapshots `S`.
#[derive(Debug, Clone)]
pub struct WorkerHandle<S> {
    poller: Arc<Poller>,
    snapshot: Arc<SnapshotCell<S>>,
    rounds: Rounds,
}

impl<S: Clone + Default> WorkerHandle<S> {
    /// A handle of the worker that waits on `poller`.
    #[must_use]
    pub fn new(poller: &Arc<Poller>) -> Self {
        Self {
            poller: Arc::clone(poller),
            snapshot: Arc::default(),
            rounds: Rounds::default(),
        }
    }

    /// Where the worker publishes its snapshots.
    #[must_use]
    pub fn snapshot(&self) -> Arc<SnapshotCell<S>> {
        Arc::clone(&self.snapshot)
    }

    /// The latest snapshot, at most [`SNAPSHOT_INTERVAL`](penstock_runtime::profile::SNAPSHOT_INTERVAL) ago.
    #[must_use]
    pub fn now(&self) -> S {
        self.snapshot.load()
    }

    /// Round counter, which grows while the worker makes progress, with or without work.
    #[must_use]
    pub fn rounds(&self) -> Rounds {
        self.rounds.clone()
    }

    /// Makes the worker check its stop flag.
    ///
    /// # Errors
    /// If the poller cannot be notified.
    pub fn wake(&self) -> io::Result<()> {
        self.poller.notify()
    }
}
