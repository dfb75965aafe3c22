//! The clock behind `--timeout`: how long a stream has waited for its broker without progress.
//!
//! A sign of life is not progress. A broker that waits for room in its log sends one every second.
//! Without a limit its publishers would wait as long as the reader that blocks the log is stopped.

use std::time::{Duration, Instant};

use crate::Error;

/// Bytes that the broker's host must accept before they count as progress. A peer that accepts one byte
/// a second makes none; a link of 1 kB/s does.
const LEAST_BYTES: u64 = 4 << 10;
/// A broker that waits for room says so every second.
const BLOCKED_FOR: Duration = Duration::from_secs(3);

/// Measures the time since a stream last made progress.
#[derive(Debug)]
pub(crate) struct ProgressClock {
    limit: Duration,
    last_progress: Instant,
    /// Bytes accepted since then.
    taken: u64,
    last_heard: Instant,
    last_blocked: Option<Instant>,
}

impl ProgressClock {
    /// A clock that starts now.
    pub(crate) fn new(limit: Duration) -> Self {
        let now = Instant::now();
        Self {
            limit,
            last_progress: now,
            taken: 0,
            last_heard: now,
            last_blocked: None,
        }
    }

    /// Restarts the clock: the stream made progress, or had nothing to wait for.
    pub(crate) fn restart(&mut self, now: Instant) {
        self.last_progress = now;
        self.taken = 0;
    }

    /// Counts bytes of a batch that the kernel or the broker accepted.
    pub(crate) fn on_bytes(&mut self, now: Instant, bytes: u64) {
        self.taken += bytes;
        if self.taken >= LEAST_BYTES {
            self.restart(now);
        }
    }

    /// Records a sign of life, and whether the broker waits for room in its log.
    pub(crate) fn on_heard(&mut self, now: Instant, is_blocked: bool) {
        self.last_heard = now;
        self.last_blocked = is_blocked.then_some(now);
    }

    /// When the broker last gave a sign of life, or became due to give one.
    pub(crate) fn owed_since(&self) -> Instant {
        self.last_progress.max(self.last_heard)
    }

    /// Checks the timeout; `unacked` counts the unacknowledged messages.
    ///
    /// # Errors
    /// Why there was no progress, as far as the broker has reported.
    pub(crate) fn check(
        &self,
        now: Instant,
        broker: &str,
        unacked: impl FnOnce() -> u64,
    ) -> Result<(), Error> {
        if now.saturating_duration_since(self.last_progress) <= self.limit {
            return Ok(());
        }
        let (broker, timeout, unacked) = (broker.to_owned(), self.limit, unacked());
        let is_recent = |at| now.saturating_duration_since(at) < BLOCKED_FOR;
        Err(if self.last_blocked.is_some_and(is_recent) {
            Error::Blocked {
                broker,
                timeout,
                unacked,
            }
        } else if self.last_heard > self.last_progress && self.last_blocked.is_none() {
            Error::NoProgress {
                broker,
                timeout,
                unacked,
            }
        } else {
            Error::Silent {
                broker,
                timeout,
                unacked,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);
    const SECOND: Duration = Duration::from_secs(1);

    fn verdict(clock: &ProgressClock, now: Instant) -> Error {
        clock.check(now, "b:1", || 7).unwrap_err()
    }

    #[test]
    fn the_reason_is_what_the_broker_said_last() {
        let mut clock = ProgressClock::new(LIMIT);
        let late = clock.last_progress + LIMIT + SECOND;
        let error = verdict(&clock, late);
        assert!(matches!(error, Error::Silent { unacked: 7, .. }), "{error}");
        clock.on_heard(late - SECOND, true);
        let error = verdict(&clock, late);
        assert!(
            matches!(error, Error::Blocked { unacked: 7, .. }),
            "{error}"
        );
        // A broker that has stopped since then no longer says so.
        let error = verdict(&clock, late + LIMIT);
        assert!(matches!(error, Error::Silent { .. }), "{error}");
        clock.on_heard(late, false);
        let error = verdict(&clock, late);
        assert!(matches!(error, Error::NoProgress { .. }), "{error}");
    }

    #[test]
    fn signs_of_life_and_drops_of_bytes_are_no_progress() {
        let mut clock = ProgressClock::new(LIMIT);
        let start = clock.last_progress;
        clock.check(start + LIMIT, "b:1", || 0).unwrap();
        let late = start + LIMIT + SECOND;
        clock.on_heard(late, true);
        clock.on_bytes(late, 1);
        clock.on_bytes(late, LEAST_BYTES - 2);
        verdict(&clock, late);
        clock.on_bytes(late, 1);
        clock.check(late + LIMIT, "b:1", || 0).unwrap();
        clock.restart(late + LIMIT);
        clock.check(late + 2 * LIMIT, "b:1", || 0).unwrap();
    }
}
