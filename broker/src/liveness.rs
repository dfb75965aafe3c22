//! Watchdog for the broker's threads: it checks the progress of each thread, not only that the process
//! is alive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use penstock_runtime::profile::Rounds;
use tracing::{error, info};

/// Time between two checks.
pub const CHECK_EVERY: Duration = Duration::from_secs(1);
/// A thread's loop runs several times a second, even without work. If it has not run for this long, the
/// thread hangs.
const LIMIT: Duration = Duration::from_secs(10);
/// Lower bound of that limit: a thread that waits for a core for a moment does not hang.
const LEAST_LIMIT: Duration = Duration::from_secs(2);

/// A thread without work counts a round after this time, milliseconds.
pub const IDLE_ROUND_MS: u16 = 500;
/// Time limit of a round that may create a log, besides the log's size at [`SLOW_RATE`].
const SLOW_LIMIT: Duration = Duration::from_secs(60);
/// Lowest rate at which a file system allocates a log, bytes per second.
const SLOW_RATE: u64 = 100 << 20;

/// The progress of a thread.
#[derive(Debug, Clone, Default)]
pub struct Pulse {
    rounds: Rounds,
    /// The current round may create a log.
    is_slow: Arc<AtomicBool>,
}

impl Pulse {
    /// Counts a round of the thread's loop.
    pub fn count(&self) {
        self.rounds.count();
    }

    /// Runs work that may take as long as creating a log.
    pub fn slowly<T>(&self, work: impl FnOnce() -> T) -> T {
        self.is_slow.store(true, Ordering::Relaxed);
        let result = work();
        self.is_slow.store(false, Ordering::Relaxed);
        self.count();
        result
    }
}

impl From<Rounds> for Pulse {
    fn from(rounds: Rounds) -> Self {
        Self {
            rounds,
            is_slow: Arc::default(),
        }
    }
}

/// The threads that must make progress.
#[derive(Debug)]
pub struct Liveness {
    threads: Vec<Watched>,
    limit: Duration,
    slow_limit: Duration,
}

#[derive(Debug)]
struct Watched {
    name: String,
    pulse: Pulse,
    seen: u64,
    seen_at: Instant,
    hangs: bool,
}

impl Liveness {
    /// `watchdog` is the interval in which the service manager expects a sign of progress, `log_bytes`
    /// the size of a log.
    pub fn new(watchdog: Option<Duration>, log_bytes: u64) -> Self {
        // Detect a hanging thread before the service manager's watchdog expires.
        let limit = watchdog.map_or(LIMIT, |watchdog| (watchdog / 2).max(LEAST_LIMIT).min(LIMIT));
        Self {
            threads: Vec::new(),
            limit,
            slow_limit: SLOW_LIMIT + Duration::from_secs(log_bytes / SLOW_RATE),
        }
    }

    /// Adds a thread to check.
    pub fn watch(&mut self, name: &str, pulse: impl Into<Pulse>, now: Instant) {
        let pulse = pulse.into();
        self.threads.push(Watched {
            name: name.to_owned(),
            seen: pulse.rounds.so_far(),
            pulse,
            seen_at: now,
            hangs: false,
        });
    }

    /// Stops checking this thread.
    pub fn forget(&mut self, name: &str) {
        self.threads.retain(|thread| thread.name != name);
    }

    /// Whether all threads make progress. Logs once when one hangs.
    pub fn check(&mut self, now: Instant) -> bool {
        for thread in &mut self.threads {
            let rounds = thread.pulse.rounds.so_far();
            let limit = match thread.pulse.is_slow.load(Ordering::Relaxed) {
                true => self.slow_limit,
                false => self.limit,
            };
            if rounds != thread.seen {
                (thread.seen, thread.seen_at) = (rounds, now);
                if std::mem::take(&mut thread.hangs) {
                    info!("thread {} makes progress again", thread.name);
                }
            } else if !thread.hangs && now.duration_since(thread.seen_at) >= limit {
                thread.hangs = true;
                error!(
                    "thread {} hangs: no progress for {limit:.0?}, and what depends on it waits",
                    thread.name
                );
            }
        }
        !self.threads.iter().any(|thread| thread.hangs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_threads_that_go_round_live() {
        let (first, second) = (Rounds::default(), Rounds::default());
        let start = Instant::now();
        let mut liveness = Liveness::new(Some(Duration::from_secs(6)), 0);
        liveness.watch("accept", first.clone(), start);
        liveness.watch("worker-0", second.clone(), start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert!(liveness.check(at(2)));
        first.count();
        assert!(!liveness.check(at(3)), "worker-0 hangs");
        second.count();
        assert!(liveness.check(at(4)));
        second.count();
        assert!(!liveness.check(at(6)), "accept hangs");
        liveness.forget("accept");
        assert!(liveness.check(at(7)));
    }

    #[test]
    fn a_log_that_is_made_may_take_its_time() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let pulse = Pulse::default();
        let mut liveness = Liveness::new(None, 10 * SLOW_RATE);
        liveness.watch("topics", pulse.clone(), start);
        pulse.slowly(|| {
            assert!(liveness.check(at(69)));
            assert!(!liveness.check(at(70)));
        });
        assert!(liveness.check(at(71)));
        assert!(!liveness.check(at(81)));
    }

    #[test]
    fn a_short_watchdog_does_not_make_busy_hosts_fail() {
        assert_eq!(
            Liveness::new(Some(Duration::from_millis(100)), 0).limit,
            LEAST_LIMIT
        );
        let long = Liveness::new(Some(Duration::from_secs(600)), 0);
        assert_eq!(long.limit, LIMIT);
        assert_eq!(Liveness::new(None, 0).limit, LIMIT);
    }
}
