//! Keeps a publisher to a rate: waits when it is ahead of the clock.
//!
//! Messages that are far apart go out one by one, each when it is due: so a load of few large
//! batches has no bursts. Messages that are close together go out a few in a row, for a sleep costs
//! more than they do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Messages at least so far apart are sent one by one.
const APART: Duration = Duration::from_micros(100);
/// Between others, shorter waits than this are put off.
const GRAIN: Duration = Duration::from_micros(200);
/// Longest sleep without a check of the stop flag.
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

    /// Counts what was published; waits until the next is due, or `stop` is set.
    pub fn wait_after(&mut self, bytes: usize, stop: &AtomicBool) {
        self.bytes += bytes as u64;
        let due = due_after(self.bytes, self.bytes_per_second);
        let gap = due_after(bytes as u64, self.bytes_per_second);
        while !stop.load(Ordering::Relaxed) {
            match sleep(due.saturating_sub(self.start.elapsed()), gap) {
                None => return,
                Some(time) => thread::sleep(time.min(NAP)),
            }
        }
    }
}

/// How long to sleep when the next message is due in `ahead`, `gap` behind the last. Never spins: on
/// a small machine that would take the core of whoever is measured.
fn sleep(ahead: Duration, gap: Duration) -> Option<Duration> {
    let worth_it = if gap >= APART {
        !ahead.is_zero()
    } else {
        ahead >= GRAIN
    };
    worth_it.then_some(ahead)
}

fn due_after(bytes: u64, bytes_per_second: u64) -> Duration {
    Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    #[test]
    fn bytes_are_due_in_proportion() {
        assert_eq!(due_after(500, 1000), Duration::from_millis(500));
        assert_eq!(due_after(0, 1), Duration::ZERO);
    }

    #[test]
    fn a_message_far_from_the_last_is_waited_for_to_the_end() {
        let gap = 1000 * US;
        assert_eq!(sleep(900 * US, gap), Some(900 * US));
        assert_eq!(sleep(3 * US, gap), Some(3 * US));
        assert_eq!(sleep(Duration::ZERO, gap), None);
    }

    #[test]
    fn messages_close_together_are_sent_a_few_in_a_row() {
        let gap = 10 * US;
        assert_eq!(sleep(190 * US, gap), None);
        assert_eq!(sleep(210 * US, gap), Some(210 * US));
    }

    #[test]
    fn no_message_comes_before_it_is_due_if_they_are_far_apart() {
        let stop = AtomicBool::new(false);
        let mut pace = Pace::new(1_000_000);
        for number in 1..=20 {
            pace.wait_after(1000, &stop);
            assert!(pace.start.elapsed() >= number * 1000 * US);
        }
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let stop = AtomicBool::new(true);
        Pace::new(1).wait_after(1 << 30, &stop);
    }
}
