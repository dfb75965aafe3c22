//! How much may be on its way: CUBIC (RFC 9438) with a delay-based end of slow start (RFC 9406).
//!
//! A loss while the round-trip time shows no queue is more likely noise, or a burst that a short
//! ring did not hold, than a congested path: the window gives way only if there are many, and less.

use super::rtt::Rtt;
use super::time::{Nanos, Timestamp};

/// Window growth of CUBIC, segments per second cubed.
const C: f64 = 0.4;
/// What is left of the window after a loss on a path with a queue.
const BETA: f64 = 0.7;
/// What is left of it when there was no sign of a queue.
const BETA_RANDOM_LOSS: f64 = 0.9;
/// The window shrinks if fewer packets than this arrive for each one lost without a sign of a queue: 2 %
/// (`BBR.LossThresh`, draft-ietf-ccwg-bbr).
const PACKETS_PER_RANDOM_LOSS: u64 = 50;
/// Segments gained per round trip that keep pace with Reno: 3 (1 − β) / (1 + β).
const ALPHA_CUBIC: f64 = 3.0 * (1.0 - BETA) / (1.0 + BETA);
/// RFC 6928.
const INITIAL_SEGMENTS: u64 = 10;
const MIN_SEGMENTS: u64 = 4;
/// Pacing goes this much faster than the window per round trip, as the window must be filled.
const PACING_GAIN: f64 = 1.25;
const PACING_GAIN_SLOW_START: f64 = 2.0;
/// Bounds of the rise of the round-trip time that shows a queue, and ends slow start (RFC 9406).
const MIN_RTT_THRESH: Nanos = Nanos::from_millis(4);
const MAX_RTT_THRESH: Nanos = Nanos::from_millis(16);

/// The congestion window of one stream.
#[derive(Debug, Clone)]
pub struct Congestion {
    /// Bytes of a full packet.
    segment: u64,
    /// Bytes.
    window: f64,
    /// Slow start goes up to here, bytes.
    ssthresh: f64,
    /// When the window last shrank: packets sent before belong to that loss.
    recovery_start: Option<Timestamp>,
    epoch: Option<Epoch>,
    /// Losses without a queue that are not made up for, in bytes that have to arrive for it.
    random_loss_debt: u64,
}

/// Growth since the last loss.
#[derive(Debug, Clone, Copy)]
struct Epoch {
    start: Timestamp,
    /// Window at which the last loss came, segments.
    w_max: f64,
    /// Seconds until the w_max is reached again.
    k: f64,
    /// What Reno would have by now, bytes.
    w_est: f64,
}

impl Congestion {
    /// A fresh window for packets of `segment` bytes.
    #[must_use]
    pub fn new(segment: u64) -> Self {
        Self {
            segment,
            window: (INITIAL_SEGMENTS * segment) as f64,
            ssthresh: f64::INFINITY,
            recovery_start: None,
            epoch: None,
            random_loss_debt: 0,
        }
    }

    /// Full packets have another size from now on.
    pub fn set_segment(&mut self, segment: u64) {
        self.segment = segment;
        self.window = self.window.max(self.min_window());
    }

    /// Bytes that may be on their way.
    #[must_use]
    pub fn window(&self) -> u64 {
        self.window as u64
    }

    /// Time in which `bytes` may be sent.
    #[must_use]
    pub fn pace(&self, bytes: u64, rtt: &Rtt) -> Nanos {
        let gain = if self.in_slow_start() {
            PACING_GAIN_SLOW_START
        } else {
            PACING_GAIN
        };
        let smoothed = rtt.smoothed().as_nanos() as f64;
        Nanos::from_nanos((bytes as f64 * smoothed / (gain * self.window)) as u64)
    }

    /// `bytes`, sent at `sent_at`, arrived. `used` says whether the window was full meanwhile;
    /// an unused window does not grow.
    pub fn on_ack(
        &mut self,
        now: Timestamp,
        sent_at: Timestamp,
        bytes: u64,
        rtt: &Rtt,
        used: bool,
    ) {
        self.random_loss_debt = self.random_loss_debt.saturating_sub(bytes);
        if !used
            || self
                .recovery_start
                .is_some_and(|recovery_start| sent_at <= recovery_start)
        {
            return;
        }
        if self.in_slow_start() {
            if shows_queue(rtt) {
                self.ssthresh = self.window;
            } else {
                self.window += bytes as f64;
            }
            return;
        }
        let segment = self.segment as f64;
        let segments = self.window / segment;
        let epoch = self.epoch.get_or_insert(Epoch {
            start: now,
            w_max: segments,
            k: 0.0,
            w_est: self.window,
        });
        let ahead = (now - epoch.start + rtt.smoothed()).as_secs_f64() - epoch.k;
        let target = (C * ahead.powi(3) + epoch.w_max).clamp(segments, 1.5 * segments);
        epoch.w_est += ALPHA_CUBIC * segment * bytes as f64 / self.window;
        let grown = self.window + (target - segments) / segments * bytes as f64;
        self.window = grown.max(epoch.w_est);
    }

    /// A packet that was sent at `sent_at` is lost. Returns whether the window gave way: it does
    /// so once for all packets that were on their way together, and not for a few without a queue.
    pub fn on_loss(&mut self, now: Timestamp, sent_at: Timestamp, rtt: &Rtt) -> bool {
        if self
            .recovery_start
            .is_some_and(|recovery_start| sent_at <= recovery_start)
        {
            return false;
        }
        let queue = shows_queue(rtt);
        if !queue {
            self.random_loss_debt += PACKETS_PER_RANDOM_LOSS * self.segment;
            // Few packets say nothing about a share.
            let allowed = 2 * self.window().max(PACKETS_PER_RANDOM_LOSS * self.segment);
            if self.random_loss_debt <= allowed {
                return false;
            }
        }
        self.random_loss_debt = 0;
        self.recovery_start = Some(now);
        let beta = if queue { BETA } else { BETA_RANDOM_LOSS };
        let segments = self.window / self.segment as f64;
        // A window smaller than at the last loss: others have come, leave them room.
        let shrinking = self.epoch.is_some_and(|epoch| segments < epoch.w_max);
        let w_max = if shrinking {
            segments * (1.0 + beta) / 2.0
        } else {
            segments
        };
        self.window = (self.window * beta).max(self.min_window());
        self.ssthresh = self.window;
        let left = self.window / self.segment as f64;
        self.epoch = Some(Epoch {
            start: now,
            w_max,
            k: ((w_max - left).max(0.0) / C).cbrt(),
            w_est: self.window,
        });
        true
    }

    /// Nothing gets through any more: begin anew, carefully.
    pub fn on_persistent_congestion(&mut self, now: Timestamp) {
        self.ssthresh = (self.window / 2.0).max(self.min_window());
        self.window = self.min_window();
        self.recovery_start = Some(now);
        self.epoch = None;
    }

    fn in_slow_start(&self) -> bool {
        self.window < self.ssthresh
    }

    fn min_window(&self) -> f64 {
        (MIN_SEGMENTS * self.segment) as f64
    }
}

/// Whether packets wait on the path, as RFC 9406 sees it.
fn shows_queue(rtt: &Rtt) -> bool {
    rtt.smoothed() > rtt.min() + (rtt.min() / 8).clamp(MIN_RTT_THRESH, MAX_RTT_THRESH)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = Nanos::from_millis(1);
    const START: Timestamp = Timestamp::ZERO;

    fn rtt(smoothed_ms: u64) -> Rtt {
        let mut rtt = Rtt::default();
        rtt.sample(10 * MS, Nanos::ZERO);
        for _ in 0..100 {
            rtt.sample(smoothed_ms * MS, Nanos::ZERO);
        }
        rtt
    }

    /// Acks a whole window each round trip of 10 ms, from `start` on.
    fn rounds(congestion: &mut Congestion, start: Timestamp, count: u64) -> Timestamp {
        let rtt = rtt(10);
        for round in 0..count {
            let now = start + (round + 1) * 10 * MS;
            let sent_at = now - 10 * MS + Nanos::ONE;
            congestion.on_ack(now, sent_at, congestion.window(), &rtt, true);
        }
        start + count * 10 * MS
    }

    #[test]
    fn slow_start_doubles_until_a_loss_or_a_queue() {
        let mut congestion = Congestion::new(1000);
        rounds(&mut congestion, START, 3);
        assert_eq!(congestion.window(), 80_000);
        assert!(congestion.on_loss(START + 40 * MS, START + 31 * MS, &rtt(20)));
        assert_eq!(congestion.window(), 56_000);
        assert!(
            !congestion.on_loss(START + 41 * MS, START + 39 * MS, &rtt(20)),
            "the same event"
        );
        let mut queueing = Congestion::new(1000);
        queueing.on_ack(START + MS, START, 10_000, &rtt(30), true);
        queueing.on_ack(START + 2 * MS, START, 10_000, &rtt(30), true);
        assert!(queueing.window() < 20_000);
    }

    #[test]
    fn losses_without_a_queue_count_once_they_are_many() {
        let mut congestion = Congestion::new(1000);
        let now = rounds(&mut congestion, START, 3);
        let rtt = rtt(10);
        (0..3).for_each(|_| assert!(!congestion.on_loss(now, now, &rtt)));
        assert_eq!(congestion.window(), 80_000);
        assert!(
            congestion.on_loss(now, now, &rtt),
            "more than 2 % of two windows"
        );
        assert_eq!(congestion.window(), 72_000);
        assert!(!congestion.on_loss(now, now, &rtt), "the same event");
    }

    #[test]
    fn losses_without_a_queue_are_made_up_for_by_what_arrives() {
        let mut congestion = Congestion::new(1000);
        for now in (1..100).map(|round| START + round * MS) {
            congestion.on_ack(now, now, 50_000, &rtt(10), false);
            assert!(!congestion.on_loss(now, now, &rtt(10)));
        }
        for now in (100..110).map(|round| START + round * MS) {
            congestion.on_ack(now, now, 40_000, &rtt(10), false);
            congestion.on_loss(now, now, &rtt(10));
        }
        assert!(congestion.window() < 10_000, "more than 2 %");
    }

    #[test]
    fn it_comes_back_to_the_plateau_and_goes_beyond() {
        let mut congestion = Congestion::new(1000);
        let now = rounds(&mut congestion, START, 4);
        congestion.on_loss(now, now, &rtt(20));
        let after_loss = congestion.window();
        let later = rounds(&mut congestion, now + MS, 100);
        assert!(congestion.window() > after_loss);
        rounds(&mut congestion, later, 1000);
        assert!(congestion.window() > 160_000);
    }

    #[test]
    fn a_window_that_is_not_full_does_not_grow() {
        let mut congestion = Congestion::new(1000);
        congestion.on_ack(START + MS, START, 10_000, &rtt(10), false);
        assert_eq!(congestion.window(), 10_000);
    }

    #[test]
    fn it_never_falls_below_a_few_packets() {
        let mut congestion = Congestion::new(1000);
        for now in (1..100).map(|round| START + round * MS) {
            congestion.on_loss(now, now, &rtt(20));
        }
        assert_eq!(congestion.window(), 4000);
        congestion.on_persistent_congestion(START + 200 * MS);
        assert_eq!(congestion.window(), 4000);
        congestion.set_segment(9000);
        assert_eq!(congestion.window(), 36_000);
    }

    #[test]
    fn pacing_sends_a_window_in_less_than_a_round_trip() {
        let mut congestion = Congestion::new(1000);
        congestion.on_loss(START, START, &rtt(20));
        let whole = congestion.pace(congestion.window(), &rtt(10));
        assert!(whole < 10 * MS && whole > 7 * MS, "{whole}");
    }
}
