//! Time per pipeline stage, accumulated by one thread without a system call.
//!
//! A timestamp is one read of the CPU's time-stamp counter (through `quanta`, which falls back to
//! `clock_gettime` where the counter is unreliable), taken once per stage and batch, never per
//! packet or message.

use std::fmt;
use std::marker::PhantomData;

use quanta::Clock;
use serde::{Deserialize, Serialize};

/// The stages of one pipeline, in the order in which a batch passes them.
pub trait Stage: Copy + 'static {
    /// Every stage, in pipeline order; [`Stage::index`] is a position in it.
    const ALL: &'static [Self];
    /// Position in [`Stage::ALL`].
    fn index(self) -> usize;
    /// Name in reports; stable.
    fn name(self) -> &'static str;
}

/// A raw reading of the clock, comparable only within one process.
#[derive(Debug, Clone, Copy)]
pub struct Tick(u64);

impl Tick {
    /// Clock ticks since `start`, for [`StageTimer::credit`].
    #[must_use]
    pub fn ticks_since(self, start: Self) -> u64 {
        self.0.saturating_sub(start.0)
    }
}

/// Accumulates time per stage for one thread; threads are merged for the report.
#[derive(Clone)]
pub struct StageTimer<S> {
    clock: Clock,
    raw: Vec<u64>,
    calls: Vec<u64>,
    stages: PhantomData<S>,
}

/// One line of a profile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StageReport {
    /// Name of the stage.
    pub name: String,
    /// Share of the wall-clock time of the threads that ran the pipeline, 0 to 100.
    pub percent: f64,
    /// Nanoseconds per batch.
    pub ns_per_batch: f64,
    /// Times that the stage was entered.
    pub calls: u64,
    /// Nanoseconds in all, over all threads.
    pub total_ns: u64,
}

impl<S: Stage> Default for StageTimer<S> {
    fn default() -> Self {
        let zeros = vec![0; S::ALL.len()];
        Self {
            clock: Clock::new(),
            raw: zeros.clone(),
            calls: zeros,
            stages: PhantomData,
        }
    }
}

impl<S: Stage> StageTimer<S> {
    /// Reads the clock, to start the first stage of a sequence.
    #[must_use]
    pub fn now(&self) -> Tick {
        Tick(self.clock.raw())
    }

    /// Counts the time since `start` for `stage`, and returns the start of the next stage.
    pub fn lap(&mut self, stage: S, start: Tick) -> Tick {
        let end = self.clock.raw();
        self.raw[stage.index()] += end.saturating_sub(start.0);
        self.calls[stage.index()] += 1;
        Tick(end)
    }

    /// Counts time that was measured on a sample: `ticks` for `calls` entries of `stage`.
    pub fn credit(&mut self, stage: S, ticks: u64, calls: u64) {
        self.raw[stage.index()] += ticks;
        self.calls[stage.index()] += calls;
    }

    /// Nanoseconds from `start` to `end`.
    #[must_use]
    pub fn nanos_between(&self, start: Tick, end: Tick) -> u64 {
        self.clock.delta_as_nanos(start.0, end.0)
    }

    /// Adds what another thread accumulated.
    pub fn merge(&mut self, other: &Self) {
        let add = |into: &mut [u64], from: &[u64]| {
            into.iter_mut()
                .zip(from)
                .for_each(|(into, from)| *into += from);
        };
        add(&mut self.raw, &other.raw);
        add(&mut self.calls, &other.calls);
    }

    /// The profile over `wall_ns` nanoseconds of thread time and `batches` batches.
    #[must_use]
    pub fn report(&self, wall_ns: u64, batches: u64) -> Vec<StageReport> {
        let line = |stage: &S| {
            let total_ns = self.clock.delta_as_nanos(0, self.raw[stage.index()]);
            StageReport {
                name: stage.name().to_owned(),
                percent: 100.0 * total_ns as f64 / wall_ns.max(1) as f64,
                ns_per_batch: total_ns as f64 / batches.max(1) as f64,
                calls: self.calls[stage.index()],
                total_ns,
            }
        };
        S::ALL.iter().map(line).collect()
    }
}

impl<S: Stage> fmt::Debug for StageTimer<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = S::ALL.iter().map(|s| (s.name(), self.calls[s.index()]));
        f.debug_map().entries(named).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy)]
    enum Two {
        First,
        Second,
    }

    impl Stage for Two {
        const ALL: &'static [Self] = &[Self::First, Self::Second];
        fn index(self) -> usize {
            self as usize
        }
        fn name(self) -> &'static str {
            ["First", "Second"][self.index()]
        }
    }

    #[test]
    fn laps_are_counted_per_stage_and_merged() {
        let mut timer = StageTimer::<Two>::default();
        let start = timer.now();
        let middle = timer.lap(Two::First, start);
        let end = timer.lap(Two::Second, middle);
        let mut sum = timer.clone();
        sum.merge(&timer);
        let report = sum.report(1_000_000_000, 2);
        assert_eq!(report.iter().map(|s| s.calls).collect::<Vec<_>>(), [2, 2]);
        let elapsed = timer.nanos_between(start, end);
        let total: u64 = report.iter().map(|s| s.total_ns).sum();
        assert!(
            total.abs_diff(2 * elapsed) <= 4,
            "{total} against twice {elapsed}"
        );
    }
}
