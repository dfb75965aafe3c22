//! The worker's clock.

use penstock_transport::Timestamp;
use quanta::Clock;

/// Measures time since the creation of the worker.
#[derive(Debug)]
pub(super) struct WorkerClock {
    clock: Clock,
    start: u64,
}

impl WorkerClock {
    pub(super) fn new() -> Self {
        let clock = Clock::new();
        Self {
            start: clock.raw(),
            clock,
        }
    }

    pub(super) fn now(&self) -> Timestamp {
        Timestamp::from_nanos(self.clock.delta_as_nanos(self.start, self.clock.raw()))
    }
}
