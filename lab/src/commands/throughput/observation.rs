//! `throughput --diagnose`: diagnoses a broker during a run.

use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde_json::Value;
use tracing::info;

use crate::commands::diagnose;
use crate::report::model::Diagnosed;
use penstock_process::interrupt::Interrupt;

/// From the first payload to the diagnosis: connections open their windows, rings are touched.
const SETTLE: Duration = Duration::from_millis(500);
/// A shorter diagnosis says too little.
const MIN_DURATION: Duration = Duration::from_millis(500);
/// Part of the estimated remaining time to use: a run that ends during the diagnosis looks idle.
const USED_SHARE: f64 = 0.8;
/// Maximum time for which system calls are traced.
const TRACE: Duration = Duration::from_secs(1);

/// The broker that is diagnosed; all do the same work.
const BROKER: usize = 0;

/// Waits for its time, then watches in a thread of its own.
pub struct Observation {
    pid: u32,
    wanted: Duration,
    /// Payload bytes of the whole run, if that is known.
    total: Option<u64>,
    interrupt: Interrupt,
    began: Instant,
    first_payload: Option<Instant>,
    watching: Option<Watching>,
}

struct Watching {
    after: Duration,
    thread: JoinHandle<Result<(Value, String)>>,
}

/// What came of it.
pub struct Observed {
    pub diagnosed: Diagnosed,
    /// As `diagnose` prints it.
    pub text: String,
}

impl Observation {
    /// Of a broker, for at most `wanted`.
    pub fn of(pid: u32, wanted: Duration, total: Option<u64>, interrupt: &Interrupt) -> Self {
        Self {
            pid,
            wanted,
            total,
            interrupt: interrupt.clone(),
            began: Instant::now(),
            first_payload: None,
            watching: None,
        }
    }

    /// Begins when it is time; `committed` is what brokers have so far, bytes.
    pub fn update(&mut self, committed: u64) {
        if committed == 0 || self.watching.is_some() {
            return;
        }
        let first = *self.first_payload.get_or_insert_with(Instant::now);
        let flowing = first.elapsed();
        if flowing < SETTLE {
            return;
        }
        let duration = duration(self.wanted, flowing, committed, self.total);
        if duration >= MIN_DURATION {
            self.begin(duration);
        }
    }

    fn begin(&mut self, duration: Duration) {
        info!(
            "diagnosing broker {BROKER} for {:.1} s",
            duration.as_secs_f64()
        );
        let (pid, interrupt) = (self.pid, self.interrupt.clone());
        let trace = TRACE.min(duration / 2);
        self.watching = Some(Watching {
            after: self.began.elapsed(),
            thread: thread::spawn(move || diagnose::of_process(pid, duration, trace, &interrupt)),
        });
    }

    /// What was found; fails if the run was too short.
    pub fn finish(self) -> Result<Observed> {
        let Some(Watching { after, thread }) = self.watching else {
            bail!(
                "the run was too short: give it more to do, some seconds at least (--total-size)"
            );
        };
        let outcome = thread
            .join()
            .map_err(|_| anyhow!("the diagnosis panicked"))?;
        let (found, text) = outcome?;
        Ok(Observed {
            diagnosed: Diagnosed {
                broker: BROKER,
                after_seconds: after.as_secs_f64(),
                found,
            },
            text,
        })
    }
}

/// How long there is to watch, at the rate so far.
fn duration(wanted: Duration, flowing: Duration, committed: u64, total: Option<u64>) -> Duration {
    let Some(total) = total else { return wanted };
    let left = total.saturating_sub(committed) as f64 / committed as f64;
    wanted.min(flowing.mul_f64((left * USED_SHARE).min(1e6)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_before_the_run_does() {
        let (wanted, second) = (Duration::from_secs(5), Duration::from_secs(1));
        assert_eq!(duration(wanted, second, 100, None), wanted);
        assert_eq!(duration(wanted, second, 100, Some(10_000)), wanted);
        assert_eq!(
            duration(wanted, second, 100, Some(200)),
            second.mul_f64(USED_SHARE)
        );
        assert_eq!(duration(wanted, second, 100, Some(100)), Duration::ZERO);
    }
}
