//! Keeps a publisher to a rate: sleeps when it is ahead of the clock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Shorter waits than this are put off: sleeping is not that exact.
const GRAIN: Duration = Duration::from_millis(1);
/// Longest sleep without a look at the stop flag.
const NAP: Duration = Duration::from_millis(100);

/// A rate from now on.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    start: Instant,
    bytes: u64,
}

impl Pace {
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            start: Instant::now(),
            bytes: 0,
        }
    }

    /// Counts what was published; sleeps until it is due, or `stop` is set.
    pub fn wait_after(&mut self, bytes: usize, stop: &AtomicBool) {
        self.bytes += bytes as u64;
        let due = due_after(self.bytes, self.bytes_per_second);
        while !stop.load(Ordering::Relaxed) {
            let ahead = due.saturating_sub(self.start.elapsed());
            if ahead < GRAIN {
                return;
            }
            thread::sleep(ahead.min(NAP));
        }
    }
}

fn due_after(bytes: u64, bytes_per_second: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_due_in_proportion() {
        assert_eq!(due_after(500, 1000), Duration::from_millis(500));
        assert_eq!(due_after(0, 1), Duration::ZERO);
    }
}
