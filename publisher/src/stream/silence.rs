//! Detects that a broker fell silent without ending the connection: its host lost power or its link, or its
//! process hangs. No socket, no clock.
//!
//! `TCP_USER_TIMEOUT` does not fit: it also ends connections whose peer answers every probe of a closed window
//! (`tcp_probe_timer` in net/ipv4/tcp_timer.c), as a broker does that waits for room in its log.

use std::time::{Duration, Instant};

/// Time without an answer after which a broker counts as lost, while answers are due.
const LOST_AFTER: Duration = Duration::from_millis(500);
/// On a long path: this number of round trips.
const LOST_AFTER_ROUND_TRIPS: u32 = 4;
/// Time without an answer of the broker's process after which it counts as lost, while the kernel of its host
/// answers for it.
const HUNG_AFTER: Duration = Duration::from_secs(3);
/// Interval between two looks at a connection over which nothing comes.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// How long a broker may be silent on a path with this round-trip time.
pub(crate) fn lost_after(round_trip: Duration) -> Duration {
    LOST_AFTER.max(LOST_AFTER_ROUND_TRIPS * round_trip)
}

/// What the kernel knows about a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ConnectionSample {
    /// Segments that were sent and not acknowledged.
    pub(crate) in_flight: u32,
    /// Time since the last segment that acknowledged something.
    pub(crate) last_ack: Duration,
    pub(crate) round_trip: Duration,
}

/// Watches one tcp connection while answers are due.
#[derive(Debug, Default)]
pub(crate) struct SilenceDetector {
    next_check: Option<Instant>,
    /// Since when segments have been in flight without any acknowledgement.
    unanswered_since: Option<Instant>,
}

/// Which part of the broker is silent, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silence {
    Host(Duration),
    Process(Duration),
}

impl SilenceDetector {
    /// Checks the connection; `owed_since` is the last time that the broker was heard or answers became due.
    /// Samples the connection rarely, and not while the broker is heard.
    pub(crate) fn check(
        &mut self,
        now: Instant,
        owed_since: Instant,
        sample: impl FnOnce() -> Option<ConnectionSample>,
    ) -> Option<Silence> {
        let quiet = now.saturating_duration_since(owed_since);
        if quiet < 2 * CHECK_INTERVAL {
            self.unanswered_since = None;
            return None;
        }
        if quiet > HUNG_AFTER {
            return Some(Silence::Process(quiet));
        }
        if self.next_check.is_some_and(|at| now < at) {
            return None;
        }
        self.next_check = Some(now + CHECK_INTERVAL);
        let Some(sample) = sample().filter(|sample| sample.in_flight > 0) else {
            self.unanswered_since = None;
            return None;
        };
        let last_ack = now.checked_sub(sample.last_ack).unwrap_or(now);
        let since = self.unanswered_since.unwrap_or(owed_since).max(last_ack);
        self.unanswered_since = Some(since);
        let unanswered = now.saturating_duration_since(since);
        (unanswered > lost_after(sample.round_trip)).then_some(Silence::Host(unanswered))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn sample(in_flight: u32, last_ack: u32) -> Option<ConnectionSample> {
        Some(ConnectionSample {
            in_flight,
            last_ack: last_ack * MS,
            round_trip: MS,
        })
    }

    /// When a connection counts as lost that was last heard at 0, if it is checked every 100 ms.
    fn lost_at(sample_at: impl Fn(u32) -> Option<ConnectionSample>) -> Option<(u32, Silence)> {
        let start = Instant::now();
        let mut detector = SilenceDetector::default();
        (0..100).map(|step| 100 * step).find_map(|ms| {
            let silence = detector.check(start + ms * MS, start, || sample_at(ms));
            silence.map(|silence| (ms, silence))
        })
    }

    #[test]
    fn a_host_that_answers_nothing_is_lost_within_a_second() {
        let lost = lost_at(|ms| sample(3, ms));
        assert_eq!(lost, Some((600, Silence::Host(600 * MS))));
        // The connection had been idle for long before.
        let lost = lost_at(|ms| sample(3, ms + 60_000));
        assert_eq!(lost, Some((600, Silence::Host(600 * MS))));
        // A round trip takes longer than that.
        let far = |ms| {
            sample(3, ms).map(|sample| ConnectionSample {
                round_trip: 300 * MS,
                ..sample
            })
        };
        assert_eq!(lost_at(far), Some((1300, Silence::Host(1300 * MS))));
    }

    #[test]
    fn a_process_that_hangs_is_lost_although_its_kernel_answers() {
        // A closed window: nothing is in flight. An open one: each segment is acknowledged.
        for in_flight in [0, 1] {
            let lost = lost_at(|_| sample(in_flight, 0));
            assert_eq!(lost, Some((3100, Silence::Process(3100 * MS))));
        }
        assert_eq!(lost_at(|_| None), Some((3100, Silence::Process(3100 * MS))));
    }

    #[test]
    fn a_broker_that_is_heard_is_not_sampled() {
        let start = Instant::now();
        let mut detector = SilenceDetector::default();
        for ms in (0..100_000).step_by(50) {
            let now = start + ms * MS;
            let heard = now - 150 * MS.min(now - start);
            assert_eq!(detector.check(now, heard, || panic!("sampled")), None);
        }
    }
}
