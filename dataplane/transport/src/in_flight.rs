//! How many bytes of batches may be unacknowledged: what the path needs to stay busy, and no queue
//! beyond that.
//!
//! By Little's law, what is unacknowledged is throughput times the time until it is acknowledged: more
//! than rate × round trip does not make a stream faster, only later. Both are measured as BBR does
//! (draft-ietf-ccwg-bbr, sections 5.5.10 and 5.3.4): the largest rate and the least round trip of a
//! while. A queue of the stream's own would pass for a long round trip; so the limit goes down for a
//! moment, now and then, and the queue drains.

use super::time::{Nanos, Timestamp};

/// A rate counts for one to two such periods, and at least for this many rounds.
const RATE_PERIOD: Nanos = Nanos::from_secs(1);
const RATE_ROUNDS: u64 = 8;
/// A round trip counts for one to two such periods, each of which begins with a probe.
const RTT_PERIOD: Nanos = Nanos::from_secs(10);
/// A rate is measured over at least this long: one ACK acknowledges many packets at once.
const MIN_ROUND: Nanos = Nanos::from_millis(1);
/// Round trips that a probe lasts: one to drain the queue, one to measure.
const PROBE_ROUNDS: u64 = 2;
/// A probe lasts no longer, however long the round trip.
const MAX_PROBE: Nanos = Nanos::from_millis(2_500);
/// Part of rate × round trip that may be unacknowledged. ACKs come in steps, and a batch counts until
/// all of it has arrived.
const GAIN: u64 = 2;

/// The best of this period and of the one before; periods in which nothing is added do not count.
#[derive(Debug, Clone, Copy)]
struct WindowedFilter<T> {
    start: Timestamp,
    now: T,
    before: T,
    none: T,
    best: fn(T, T) -> T,
}

impl<T: Copy> WindowedFilter<T> {
    fn new(start: Timestamp, none: T, best: fn(T, T) -> T) -> Self {
        Self {
            start,
            now: none,
            before: none,
            none,
            best,
        }
    }

    fn add(&mut self, at: Timestamp, value: T, period: Nanos) {
        if at - self.start >= period {
            self.before = self.now;
            self.now = self.none;
            self.start = at;
        }
        self.now = (self.best)(self.now, value);
    }

    fn best(&self) -> T {
        (self.best)(self.now, self.before)
    }
}

/// The limit of one stream, over either path.
#[derive(Debug)]
pub struct InFlightLimit {
    floor: u64,
    /// Added to times, so that streams of a publisher probe at the same moments: each would measure the
    /// others' queue if they did not.
    phase: Nanos,
    /// Bytes per second.
    rate: WindowedFilter<u64>,
    rtt: WindowedFilter<Nanos>,
    round_start: Timestamp,
    delivered_before: u64,
    /// The limit was all that held the stream back in this round.
    limited: bool,
    /// What the path needs, bytes.
    needed: u64,
}

impl InFlightLimit {
    /// Never less than `floor` bytes, but while it probes. `now` plus `phase` is the same for all
    /// streams that share a path.
    #[must_use]
    pub fn new(floor: u64, phase: Nanos, now: Timestamp) -> Self {
        Self {
            floor,
            phase,
            rate: WindowedFilter::new(now, 0, u64::max),
            rtt: WindowedFilter::new(now, Nanos::MAX, Nanos::min),
            round_start: now,
            delivered_before: 0,
            limited: false,
            needed: 0,
        }
    }

    /// A packet was acknowledged for the first time, `elapsed` after it was sent.
    pub fn on_round_trip(&mut self, now: Timestamp, elapsed: Nanos) {
        self.rtt.add(now, elapsed.max(Nanos::ONE), RTT_PERIOD);
    }

    /// `delivered` bytes have arrived since the stream began.
    pub fn on_delivered(&mut self, now: Timestamp, delivered: u64) {
        let elapsed = now - self.round_start;
        if elapsed < self.round() {
            return;
        }
        let bytes = u128::from(delivered - self.delivered_before);
        let rate = (bytes * 1_000_000_000 / u128::from(elapsed.as_nanos())) as u64;
        // A stream that had less to send than it might shows no limit of the path.
        if self.limited || rate > self.rate.best() {
            let period = RATE_PERIOD.max(RATE_ROUNDS * self.round());
            self.rate.add(now, rate, period);
        }
        self.limited = false;
        self.round_start = now;
        self.delivered_before = delivered;
        self.needed = self.rate_times_round_trip();
    }

    /// The stream, of which `delivered` bytes have arrived, would send more if the limit were higher.
    pub fn on_limited(&mut self, now: Timestamp, delivered: u64) {
        // While it is probed, and just after that, its rate is that of the probe.
        if self.limited || self.probe_end(now - self.round()).is_some() {
            return;
        }
        // Time in which it had nothing to send is not part of the round.
        self.round_start = now;
        self.delivered_before = delivered;
        self.limited = true;
    }

    /// Bytes of batches that may be unacknowledged.
    #[must_use]
    pub fn bytes(&self, now: Timestamp) -> u64 {
        match self.probe_end(now) {
            Some(_) => self.floor / 2,
            None => self.needed.max(self.floor),
        }
    }

    /// Bytes of batches that the path needs; 0 until that is known.
    #[must_use]
    pub fn needed(&self) -> u64 {
        self.needed
    }

    /// When the limit rises again, if it is down for a probe.
    #[must_use]
    pub fn probe_end(&self, now: Timestamp) -> Option<Timestamp> {
        let at = now - Timestamp::ZERO + self.phase;
        let period = at / RTT_PERIOD;
        let length = (PROBE_ROUNDS * self.round()).min(MAX_PROBE);
        let is_probing = period > 0 && at % RTT_PERIOD < length;
        is_probing.then(|| Timestamp::ZERO + (period * RTT_PERIOD + length - self.phase))
    }

    fn rate_times_round_trip(&self) -> u64 {
        let (rate, rtt) = (self.rate.best(), self.rtt.best());
        if rtt == Nanos::MAX {
            return 0;
        }
        let bytes = u128::from(GAIN * rate) * u128::from(rtt.as_nanos()) / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    fn round(&self) -> Nanos {
        match self.rtt.best() {
            Nanos::MAX => MIN_ROUND,
            rtt => rtt.max(MIN_ROUND),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = Nanos::from_millis(1);
    const START: Timestamp = Timestamp::ZERO;
    const FLOOR: u64 = 100_000;

    /// A path of `rate` bytes a millisecond and a round trip of `rtt` ms, with the queue that the stream
    /// itself makes; returns its limit after each millisecond.
    fn run(limit: &mut InFlightLimit, from: u64, to: u64, rate: u64, rtt: u64) -> Vec<u64> {
        let mut delivered = limit.delivered_before;
        let mut seen = Vec::new();
        for ms in from..to {
            let now = START + ms * MS;
            let in_flight = limit.bytes(now);
            // What is beyond the path's own waits in front of it.
            let queued = in_flight.saturating_sub(rate * rtt) / rate;
            delivered += rate.min(in_flight / rtt);
            limit.on_round_trip(now, (rtt + queued) * MS);
            limit.on_delivered(now, delivered);
            limit.on_limited(now, delivered);
            seen.push(limit.bytes(now));
        }
        seen
    }

    #[test]
    fn the_limit_becomes_what_the_path_needs() {
        // 1 GB/s and 10 ms: 10 MB.
        let (rate, rtt) = (1_000_000, 10);
        let mut limit = InFlightLimit::new(FLOOR, Nanos::ZERO, START);
        let seen = run(&mut limit, 0, 60_000, rate, rtt);
        assert!(*seen.iter().max().unwrap() <= 2 * rate * rtt + rate);
        let end = &seen[1000..];
        let full = end.iter().filter(|&&bytes| bytes >= rate * rtt).count();
        assert!(
            full > end.len() * 99 / 100,
            "the path is full but while it is probed"
        );
        assert!(end.contains(&(FLOOR / 2)), "it is probed");
    }

    #[test]
    fn a_path_that_becomes_longer_is_filled_again() {
        let mut limit = InFlightLimit::new(FLOOR, Nanos::ZERO, START);
        run(&mut limit, 0, 15_000, 100_000, 10);
        let seen = run(&mut limit, 15_000, 60_000, 100_000, 40);
        assert!(*seen.last().unwrap() >= 100_000 * 40);
        // And one that becomes shorter or slower gets no queue.
        let seen = run(&mut limit, 60_000, 100_000, 50_000, 5);
        assert!(*seen.last().unwrap() <= 2 * 50_000 * 5 + 50_000);
    }

    #[test]
    fn the_queue_that_the_floor_makes_does_not_raise_the_limit() {
        let mut limit = InFlightLimit::new(FLOOR, Nanos::ZERO, START);
        limit.on_round_trip(START, MS);
        let seen = run(&mut limit, 0, 60_000, 1000, 1);
        assert!(*seen.iter().max().unwrap() <= FLOOR * 11 / 10);
    }

    #[test]
    fn a_stream_with_little_to_send_keeps_its_limit() {
        let mut limit = InFlightLimit::new(FLOOR, Nanos::ZERO, START);
        let before = *run(&mut limit, 0, 2000, 1_000_000, 10).last().unwrap();
        let mut delivered = limit.delivered_before;
        for ms in 2000..9000 {
            delivered += 1000;
            let now = START + ms * MS;
            limit.on_round_trip(now, 10 * MS);
            limit.on_delivered(now, delivered);
            assert_eq!(limit.bytes(now), before);
        }
        // Nor does it lose it with the first batches that it has again.
        let seen = run(&mut limit, 15_000, 18_000, 1_000_000, 10);
        assert!(seen.iter().all(|&bytes| bytes >= 1_000_000 * 10));
    }

    #[test]
    fn a_probe_of_a_long_path_is_no_rate() {
        let mut limit = InFlightLimit::new(FLOOR, Nanos::ZERO, START);
        let seen = run(&mut limit, 0, 60_000, 10_000, 600);
        let end = &seen[15_000..];
        let full = end.iter().filter(|&&bytes| bytes >= 10_000 * 600).count();
        assert!(full > end.len() * 8 / 10, "{full} of {}", end.len());
    }
}
