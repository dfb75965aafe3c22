//! Whether the threads that serve publishers make progress: a watchdog that asks the threads
//! themselves, not only the process.

use std::time::{Duration, Instant};

use penstock_dataplane::profile::Rounds;
use tracing::{error, info};

/// How often it is looked at.
pub const CHECK_EVERY: Duration = Duration::from_secs(1);
/// A thread's loop goes round several times a second, also without work; one that has not for so
/// long hangs.
const LIMIT: Duration = Duration::from_secs(10);
/// Threads that wait for a core for a moment do not hang.
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
    /// With the time within which a service manager wants to hear of progress.
    pub fn new(watchdog: Option<Duration>) -> Self {
        // A thread that hangs is to be found before the manager loses patience.
        let limit = watchdog.map_or(LIMIT, |watchdog| (watchdog / 2).max(LEAST_LIMIT).min(LIMIT));
        Self {
            threads: Vec::new(),
            limit,
        }
    }

    /// Looks after a thread from now on.
    pub fn watch(&mut self, name: &str, rounds: Rounds, now: Instant) {
        self.threads.push(Watched {
            name: name.to_owned(),
            seen: rounds.so_far(),
            rounds,
            seen_at: now,
            hangs: false,
        });
    }

    /// Does not look after this thread any more.
    pub fn forget(&mut self, name: &str) {
        self.threads.retain(|thread| thread.name != name);
    }

    /// Whether all threads make progress. One that hangs is told of once.
    pub fn check(&mut self, now: Instant) -> bool {
        for thread in &mut self.threads {
            let rounds = thread.rounds.so_far();
            if rounds != thread.seen {
                (thread.seen, thread.seen_at) = (rounds, now);
                if std::mem::take(&mut thread.hangs) {
                    info!("thread {} goes on", thread.name);
                }
            } else if !thread.hangs && now.duration_since(thread.seen_at) >= self.limit {
                thread.hangs = true;
                error!(
                    "thread {} hangs: it has done nothing for {:.0?}; its publishers wait meanwhile",
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
