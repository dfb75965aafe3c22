//! How long batches wait for their ack: a histogram that takes a figure without allocating.

use std::collections::VecDeque;

use hdrhistogram::Histogram;
use penstock_runtime::profile::Tick;
use serde::Serialize;

/// Shortest wait that the histogram resolves, nanoseconds.
const FINEST: u64 = 100;
/// Longest wait that the histogram resolves, nanoseconds: an hour. Longer ones count as an hour.
const LONGEST: u64 = 3_600_000_000_000;
/// Significant digits: 0.1 %. With these bounds a histogram takes 110 KB.
const DIGITS: u8 = 3;

/// Time from a batch being sealed to its ack, microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AckLatency {
    /// Half of the batches waited at most so long.
    pub p50: f64,
    /// 99 % of them.
    pub p99: f64,
    /// 99.9 % of them.
    pub p999: f64,
    /// The longest wait.
    pub max: f64,
    /// Batches.
    pub count: u64,
}

/// Ack latencies of batches, of one stream or of several.
#[derive(Debug, Clone)]
pub(crate) struct AckLatencyHistogram(Histogram<u32>);

impl Default for AckLatencyHistogram {
    fn default() -> Self {
        let histogram = Histogram::new_with_bounds(FINEST, LONGEST, DIGITS);
        Self(histogram.expect("bounds and digits are in the crate's ranges"))
    }
}

impl AckLatencyHistogram {
    pub(crate) fn record(&mut self, nanoseconds: u64) {
        self.0.saturating_record(nanoseconds);
    }

    /// Adds those of another stream.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.0.add(&other.0).expect("both have the same bounds");
    }

    /// The figures; none if no batch was acked.
    pub(crate) fn sum_up(&self) -> Option<AckLatency> {
        let at = |quantile| self.0.value_at_quantile(quantile) as f64 / 1e3;
        (!self.0.is_empty()).then(|| AckLatency {
            p50: at(0.5),
            p99: at(0.99),
            p999: at(0.999),
            max: self.0.max() as f64 / 1e3,
            count: self.0.len(),
        })
    }
}

/// Batches of one stream that wait for their ack, and how long others did.
#[derive(Debug)]
pub(crate) struct Stopwatch {
    /// When each was sealed, oldest first.
    sealed: VecDeque<Tick>,
    pub(crate) waits: AckLatencyHistogram,
}

impl Stopwatch {
    /// For at most `in_flight` batches at a time.
    pub(crate) fn new(in_flight: usize) -> Self {
        Self {
            sealed: VecDeque::with_capacity(in_flight),
            waits: AckLatencyHistogram::default(),
        }
    }

    /// A batch that was sealed then is on its way.
    pub(crate) fn start(&mut self, sealed: Tick) {
        self.sealed.push_back(sealed);
    }

    /// The oldest `batches` are acked; `nanos_since` returns the time since a batch was sealed.
    pub(crate) fn stop(&mut self, batches: u64, nanos_since: impl Fn(Tick) -> u64) {
        for _ in 0..batches {
            let Some(sealed) = self.sealed.pop_front() else {
                return;
            };
            self.waits.record(nanos_since(sealed));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_runtime::profile::StageTimer;

    use crate::summary::PublishStage;

    #[test]
    fn quantiles_are_those_of_what_was_recorded() {
        let mut waits = AckLatencyHistogram::default();
        assert_eq!(waits.sum_up(), None);
        for microseconds in 1..=1000 {
            waits.record(microseconds * 1000);
        }
        let told = waits.sum_up().unwrap();
        for (figure, exact) in [
            (told.p50, 500.0),
            (told.p99, 990.0),
            (told.p999, 999.0),
            (told.max, 1000.0),
        ] {
            assert!((figure / exact - 1.0).abs() < 0.002, "{figure} for {exact}");
        }
        assert_eq!(told.count, 1000);
    }

    #[test]
    fn extremes_are_kept_and_streams_are_added() {
        let (mut one, mut other) = (
            AckLatencyHistogram::default(),
            AckLatencyHistogram::default(),
        );
        one.record(0);
        other.record(u64::MAX);
        one.merge(&other);
        let told = one.sum_up().unwrap();
        assert_eq!(told.count, 2);
        assert!(told.max >= 3.6e9, "{}", told.max);
    }

    #[test]
    fn the_oldest_are_acked_first_and_no_more_than_there_are() {
        let mut watch = Stopwatch::new(2);
        let now = StageTimer::<PublishStage>::default().now();
        watch.start(now);
        watch.start(now);
        watch.stop(1, |_| 1_000);
        watch.stop(5, |_| 9_000);
        let told = watch.waits.sum_up().unwrap();
        assert_eq!(told.count, 2);
        assert!(told.p50 < 1.1 && told.max > 8.9, "{told:?}");
    }
}
