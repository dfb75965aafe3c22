//! Keeps a publisher to a rate: waits when it is ahead of the clock.
//!
//! Messages that are far apart go out one by one, each when it is due: so a load of few large
//! batches has no bursts. Messages that are close together go out a few in a row, for a sleep costs
//! more than they do.

use std::hint;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Messages at least so far apart are sent one by one.
const APART: Duration = Duration::from_micros(100);
/// Between others, shorter waits than this are put off.
const GRAIN: Duration = Duration::from_micros(200);
/// A sleep ends so much too late, nearly always: 50 µs of timer slack (prctl(2)) and the way back to
/// a core. Who has to be exact is awake by then.
const LATE: Duration = Duration::from_micros(100);
/// Longest sleep without a look at the stop flag.
const NAP: Duration = Duration::from_millis(100);

/// A rate from now on.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: u64,
    start: Instant,
    bytes: u64,
}

/// What to do about the time until the next message is due.
#[derive(Debug, PartialEq, Eq)]
enum Wait {
    No,
    Sleep(Duration),
    /// Too short for a sleep, and to be kept exactly.
    Spin,
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
            match wait(due.saturating_sub(self.start.elapsed()), gap) {
                Wait::No => return,
                Wait::Sleep(time) => thread::sleep(time.min(NAP)),
                Wait::Spin => hint::spin_loop(),
            }
        }
    }
}

/// The next message is due in `ahead`, `gap` behind the last.
fn wait(ahead: Duration, gap: Duration) -> Wait {
    match gap >= APART {
        _ if ahead.is_zero() => Wait::No,
        true if ahead > LATE => Wait::Sleep(ahead - LATE),
        true => Wait::Spin,
        false if ahead >= GRAIN => Wait::Sleep(ahead),
        false => Wait::No,
    }
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
        assert_eq!(wait(900 * US, gap), Wait::Sleep(800 * US));
        assert_eq!(wait(60 * US, gap), Wait::Spin);
        assert_eq!(wait(Duration::ZERO, gap), Wait::No);
    }

    #[test]
    fn messages_close_together_are_sent_a_few_in_a_row() {
        let gap = 10 * US;
        assert_eq!(wait(190 * US, gap), Wait::No);
        assert_eq!(wait(210 * US, gap), Wait::Sleep(210 * US));
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
