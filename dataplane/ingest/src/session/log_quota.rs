//! Limits the log lines that peers can cause: a million connections do not write a million lines.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::warn;

use penstock_runtime::poison::lock;

/// Burst of lines: enough for every stream of a large publisher to open and end.
const BURST: u32 = 2048;
/// Time after which one more line is allowed.
const REFILL: Duration = Duration::from_millis(50);
/// Interval at which the number of suppressed lines is logged.
const SUMMARY_INTERVAL: Duration = Duration::from_secs(10);

/// Quota of log lines about peers, shared by events of connections; packets never log.
#[derive(Debug)]
pub(crate) struct LogQuota(Mutex<State>);

#[derive(Debug)]
struct State {
    left: u32,
    refilled: Instant,
    suppressed: u64,
    summarised_at: Option<Instant>,
}

/// The decision about a line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Write,
    Suppress,
    /// Write it after a summary of this many suppressed lines.
    Summarise(u64),
}

impl Default for LogQuota {
    fn default() -> Self {
        Self(Mutex::new(State {
            left: BURST,
            refilled: Instant::now(),
            suppressed: 0,
            summarised_at: None,
        }))
    }
}

impl LogQuota {
    /// Whether a line may be written now. Logs from time to time how many were suppressed.
    pub(crate) fn allows(&self) -> bool {
        let mut state = lock(&self.0);
        match state.decide(Instant::now()) {
            Verdict::Write => true,
            Verdict::Suppress => false,
            Verdict::Summarise(suppressed) => {
                warn!(
                    left_out = suppressed,
                    "too many lines about peers were suppressed; the report's counters include every event"
                );
                true
            }
        }
    }
}

impl State {
    fn decide(&mut self, now: Instant) -> Verdict {
        let periods = (now - self.refilled).as_nanos() / REFILL.as_nanos();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(periods).min(BURST);
        self.refilled += REFILL * periods;
        if self.left == 0 {
            self.suppressed += 1;
            return Verdict::Suppress;
        }
        self.left -= 1;
        if self.suppressed == 0
            || self
                .summarised_at
                .is_some_and(|at| now - at < SUMMARY_INTERVAL)
        {
            return Verdict::Write;
        }
        self.summarised_at = Some(now);
        Verdict::Summarise(std::mem::take(&mut self.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_writes_a_burst_and_then_twenty_lines_a_second() {
        let LogQuota(state) = LogQuota::default();
        let mut state = state.into_inner().unwrap();
        let start = state.refilled;
        let (mut written, mut summaries) = (0, Vec::new());
        // A hundred thousand a second, for 25 s.
        for event in 0..2_500_000 {
            match state.decide(start + event * Duration::from_micros(10)) {
                Verdict::Write => written += 1,
                Verdict::Suppress => {}
                Verdict::Summarise(suppressed) => {
                    written += 1;
                    summaries.push(suppressed);
                }
            }
        }
        assert_eq!(written, BURST + 25 * 20 - 1);
        assert_eq!(summaries.len(), 3);
        let suppressed = summaries.iter().sum::<u64>() + state.suppressed;
        assert_eq!(u64::from(written) + suppressed, 2_500_000);
        // After the flood the quota refills.
        let later = start + Duration::from_secs(3600);
        assert!(matches!(state.decide(later), Verdict::Summarise(_)));
        assert_eq!(state.left, BURST - 1);
    }
}
