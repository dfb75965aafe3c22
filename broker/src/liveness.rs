//! Watchdog for the threads that serve publishers: it checks the progress of each thread, not only that
//! the process is alive.

use std::time::{Duration, Instant};

use penstock_dataplane::profile::Rounds;
use tracing::{error, info};

/// Time between two checks.
pub const CHECK_EVERY: Duration = Duration::from_secs(1);
/// A thread's loop runs several times a second, even without work. If it has not run for this long, the
/// thread hangs.
const LIMIT: Duration = Duration::from_secs(10);
/// Lower bound of that limit: a thread that waits for a core for a moment does not hang.
const LEAST_LIMIT: Duration = Duration::from_secs(2);

/// The threads that must make progress.
#[derive(Debug)]
pub struct Liveness {
    threads: Vec<Watched>,
    limit: Duration,
}

#[derive(Debug)]
struct Watched {
    name: String,
    rounds: Rounds,
    seen: u64,
    seen_at: Instant,
    hangs: bool,
}

impl Liveness {
    /// `watchdog` is the interval in which the service manager expects a sign of progress.
    pub fn new(watchdog: Option<Duration>) -> Self {
        // Detect a hanging thread before the service manager's watchdog expires.
        let limit = watchdog.map_or(LIMIT, |watchdog| (watchdog / 2).max(LEAST_LIMIT).min(LIMIT));
        Self {
            threads: Vec::new(),
            limit,
        }
    }

    /// Adds a thread to check.
    pub fn watch(&mut self, name: &str, rounds: Rounds, now: Instant) {
        self.threads.push(Watched {
            name: name.to_owned(),
            seen: rounds.so_far(),
            rounds,
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
            let rounds = thread.rounds.so_far();
            if rounds != thread.seen {
                (thread.seen, thread.seen_at) = (rounds, now);
                if std::mem::take(&mut thread.hangs) {
                    info!("thread {} makes progress again", thread.name);
                }
            } else if !thread.hangs && now.duration_since(thread.seen_at) >= self.limit {
                thread.hangs = true;
                error!(
                    "thread {} hangs: no progress for {:.0?}, and its publishers wait",
                    thread.name, self.limit
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
        let mut liveness = Liveness::new(Some(Duration::from_secs(6)));
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
    fn a_short_watchdog_does_not_make_busy_hosts_fail() {
        assert_eq!(
            Liveness::new(Some(Duration::from_millis(100))).limit,
            LEAST_LIMIT
        );
        assert_eq!(Liveness::new(Some(Duration::from_secs(600))).limit, LIMIT);
        assert_eq!(Liveness::new(None).limit, LIMIT);
    }
}
