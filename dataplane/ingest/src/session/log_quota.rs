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
const TELL: Duration = Duration::from_secs(10);

/// Quota of log lines about peers, shared by events of connections; packets never log.
#[derive(Debug)]
pub(crate) struct LogQuota(Mutex<State>);

#[derive(Debug)]
struct State {
    left: u32,
    refilled: Instant,
    left_out: u64,
    told: Option<Instant>,
}

/// The decision about a line.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Written,
    LeftOut,
    /// Write it; the number of lines that were suppressed before and not reported yet.
    After(u64),
}

impl Default for LogQuota {
    fn default() -> Self {
        Self(Mutex::new(State {
            left: BURST,
            refilled: Instant::now(),
            left_out: 0,
            told: None,
        }))
    }
}

impl LogQuota {
    /// Whether a line may be written now. Logs from time to time how many were suppressed.
    pub(crate) fn allows(&self) -> bool {
        let mut state = lock(&self.0);
        match state.ask(Instant::now()) {
            Verdict::Written => true,
            Verdict::LeftOut => false,
            Verdict::After(left_out) => {
                warn!(
                    left_out,
                    "too many lines about peers were suppressed; the report's counters include every event"
                );
                true
            }
        }
    }
}

impl State {
    fn ask(&mut self, now: Instant) -> Verdict {
        let periods = (now - self.refilled).as_nanos() / REFILL.as_nanos();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        self.left = self.left.saturating_add(periods).min(BURST);
        self.refilled += REFILL * periods;
        if self.left == 0 {
            self.left_out += 1;
            return Verdict::LeftOut;
        }
        self.left -= 1;
        if self.left_out == 0 || self.told.is_some_and(|told| now - told < TELL) {
            return Verdict::Written;
        }
        self.told = Some(now);
        Verdict::After(std::mem::take(&mut self.left_out))
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
        let (mut written, mut told) = (0, Vec::new());
        // A hundred thousand a second, for 25 s.
        for event in 0..2_500_000 {
            match state.ask(start + event * Duration::from_micros(10)) {
                Verdict::Written => written += 1,
                Verdict::LeftOut => {}
                Verdict::After(left_out) => {
                    written += 1;
                    told.push(left_out);
                }
            }
        }
        assert_eq!(written, BURST + 25 * 20 - 1);
        assert_eq!(told.len(), 3);
        let left_out = told.iter().sum::<u64>() + state.left_out;
        assert_eq!(u64::from(written) + left_out, 2_500_000);
        // Once it is over there is room again.
        let later = start + Duration::from_secs(3600);
        assert!(matches!(state.ask(later), Verdict::After(_)));
        assert_eq!(state.left, BURST - 1);
    }
}
