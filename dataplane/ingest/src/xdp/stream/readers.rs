//! How long a stream has waited for registered readers, which does not count against its publisher.

use penstock_transport::{Nanos, Timestamp};

/// The waits of a stream for readers.
#[derive(Debug)]
pub(super) struct ReaderWait {
    /// Whether the stream has something to place for which readers leave no room.
    is_waiting: bool,
    total: Nanos,
    checked_at: Timestamp,
}

impl ReaderWait {
    pub(super) fn new(now: Timestamp) -> Self {
        Self {
            is_waiting: false,
            total: Nanos::ZERO,
            checked_at: now,
        }
    }

    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// Records whether the stream has waited since the last call; returns whether that changed.
    pub(super) fn update(&mut self, is_waiting: bool, now: Timestamp) -> bool {
        if is_waiting {
            self.total += now - self.checked_at;
        }
        self.checked_at = now;
        std::mem::replace(&mut self.is_waiting, is_waiting) != is_waiting
    }

    /// The stream's own clock, which stops while it waits for readers.
    pub(super) fn clock(&self, now: Timestamp) -> Timestamp {
        now - self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_stops_while_the_stream_waits() {
        let at = |millis| Timestamp::ZERO + Nanos::from_millis(millis);
        let mut wait = ReaderWait::new(at(10));
        assert!(!wait.update(false, at(20)));
        assert_eq!(wait.clock(at(20)), at(20));
        assert!(wait.update(true, at(30)));
        assert!(!wait.update(true, at(40)));
        assert_eq!(wait.clock(at(40)), at(20));
        assert!(wait.update(false, at(50)));
        assert_eq!(wait.clock(at(60)), at(40));
    }
}
