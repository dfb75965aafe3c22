//! The schedule of a fault run, drawn from a seed: publishers with their parameters, and faults with start
//! and duration.

use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::fault_catalog::{FAULT_CATALOG, Kind, LogCapacity};
use super::path::FaultPath;
use penstock_testbed::random::seconds_between;
use penstock_testbed::settings::Mode;

/// Maximum number of faults beside the one that the run tests.
const MAX_OTHER_FAULTS: usize = 3;
/// Rate of all publishers together, bytes/s: faults must find them busy, and the log must hold everything.
const RATE: [u64; 2] = [1_000_000, 3_000_000];

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScheduledFault {
    pub kind: &'static Kind,
    /// Start, relative to the publishers' start.
    pub at: Duration,
    pub lasts: Duration,
}

/// One fault run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Number of the run; with the seed it reproduces the run.
    pub number: u64,
    pub path: FaultPath,
    /// The fault that it tests.
    pub kind: &'static Kind,
    pub faults: Vec<ScheduledFault>,
    /// When datagrams stop and resume passing, if streams are to fall back to tcp.
    pub silence: Option<[Duration; 2]>,
    pub publishers: Vec<Publisher>,
    /// Seed of decisions during the run.
    pub seed: u64,
}

/// Parameters of a publisher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Publisher {
    pub streams: u32,
    /// Message bytes per second.
    pub rate: u64,
    /// Bytes of a batch.
    pub batch: u64,
    /// Bytes of all lines.
    pub bytes: u64,
}

/// A scheduled fault, as reported.
#[derive(Debug, Serialize, Deserialize)]
pub struct ScheduledFaultReport {
    pub fault: String,
    pub at_ms: u64,
    pub lasts_ms: u64,
}

impl ScheduledFault {
    pub fn report(&self) -> ScheduledFaultReport {
        ScheduledFaultReport {
            fault: self.kind.name.to_owned(),
            at_ms: self.at.as_millis() as u64,
            lasts_ms: self.lasts.as_millis() as u64,
        }
    }
}

/// Every fault on every path, shuffled, so that a few runs already cover many of them.
pub fn cells(
    seed: u64,
    kinds: &[&'static Kind],
    paths: &[FaultPath],
) -> Vec<(FaultPath, &'static Kind)> {
    let on_paths = kinds
        .iter()
        .flat_map(|kind| paths.iter().map(|path| (*path, *kind)));
    let mut cells: Vec<_> = on_paths.collect();
    Rng::with_seed(seed).shuffle(&mut cells);
    cells
}

impl Schedule {
    /// Draws schedule `number` of this seed.
    pub fn draw(seed: u64, number: u64, cells: &[(FaultPath, &'static Kind)]) -> Self {
        let (path, kind) = cells[(number % cells.len() as u64) as usize];
        let mut rng = Rng::with_seed(seed.wrapping_add(number));
        // Latest start of a fault, and how long publishers send, seconds. A stream gives up a path after
        // three seconds: faults should happen before, during and after that.
        let (begin, work) = match path {
            FaultPath::Fallback => (6.0, [4.0, 5.0]),
            _ => (2.0, [2.5, 3.5]),
        };
        let mut faults = Vec::new();
        let times = rng.u32(2..=3);
        for time in 0..times {
            // Spread, so that at least one of them finds busy streams.
            let part = |time| begin * f64::from(time) / f64::from(times);
            faults.push(ScheduledFault::draw(
                &mut rng,
                kind,
                [part(time), part(time + 1)],
            ));
        }
        let others: Vec<_> = FAULT_CATALOG
            .iter()
            .filter(|other| other.goes_with(kind))
            .collect();
        for _ in 0..rng.usize(0..=MAX_OTHER_FAULTS) {
            let other = others[rng.usize(..others.len())];
            faults.push(ScheduledFault::draw(&mut rng, other, [0.0, begin]));
        }
        let faults = one_at_a_time(faults);
        let silence = (path == FaultPath::Fallback).then(|| {
            let begin = match rng.u32(..3) {
                0 => Duration::ZERO,
                _ => seconds_between(&mut rng, 0.1, 1.2),
            };
            // Longer than a stream waits before it gives up a silent path.
            [begin, begin + seconds_between(&mut rng, 2.0, 6.0)]
        });
        let may_die = faults.iter().any(|fault| fault.kind.kills_publishers);
        let publishers = publishers(&mut rng, kind.capacity, may_die, work);
        Self {
            number,
            path,
            kind,
            faults,
            silence,
            publishers,
            seed: rng.u64(..),
        }
    }

    pub fn mode(&self) -> Mode {
        match self.path {
            FaultPath::Tcp => Mode::Tcp,
            FaultPath::Xdp => Mode::Xdp,
            FaultPath::Fallback => Mode::Auto,
        }
    }
}

impl ScheduledFault {
    fn draw(rng: &mut Rng, kind: &'static Kind, [from, to]: [f64; 2]) -> Self {
        Self {
            kind,
            at: seconds_between(rng, 0.1 + from, 0.1 + to),
            lasts: seconds_between(rng, kind.lasts[0], kind.lasts[1]),
        }
    }
}

/// Sorts faults by start and drops those that overlap one of their kind, whose end would end both.
fn one_at_a_time(mut faults: Vec<ScheduledFault>) -> Vec<ScheduledFault> {
    faults.sort_by_key(|fault| fault.at);
    let mut kept: Vec<ScheduledFault> = Vec::with_capacity(faults.len());
    for fault in faults {
        let lasts =
            |other: &ScheduledFault| other.kind == fault.kind && other.at + other.lasts >= fault.at;
        if !kept.iter().any(lasts) {
            kept.push(fault);
        }
    }
    kept
}

fn publishers(
    rng: &mut Rng,
    capacity: LogCapacity,
    may_die: bool,
    work: [f64; 2],
) -> Vec<Publisher> {
    // A reader that follows a log that does not hold everything reads one stream.
    let count = if capacity == LogCapacity::Small {
        1
    } else {
        rng.u64(1..=3)
    };
    let rate = rng.u64(RATE[0]..RATE[1]) / count;
    (0..count)
        .map(|_| Publisher {
            // The lines of a killed publisher can be checked only if it had one stream.
            streams: if may_die || capacity == LogCapacity::Small {
                1
            } else {
                rng.u32(1..=3)
            },
            rate,
            batch: 1 << rng.u32(11..=16),
            bytes: (rate as f64 * seconds_between(rng, work[0], work[1]).as_secs_f64()) as u64,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    fn all() -> Vec<(FaultPath, &'static Kind)> {
        cells(
            5,
            &FAULT_CATALOG.iter().collect::<Vec<_>>(),
            FaultPath::value_variants(),
        )
    }

    #[test]
    fn a_seed_repeats_a_schedule() {
        let draw = |seed, number| Schedule::draw(seed, number, &all());
        assert_eq!(draw(1, 7), draw(1, 7));
        assert_ne!(draw(1, 7).faults, draw(2, 7).faults);
        assert_ne!(draw(1, 7).faults, draw(1, 8).faults);
    }

    #[test]
    fn one_round_is_every_fault_on_every_path() {
        let cells = all();
        assert!(cells.len() >= 50);
        let mut met: Vec<_> = (0..cells.len() as u64)
            .map(|number| Schedule::draw(9, number, &cells))
            .map(|schedule| (schedule.path.name(), schedule.kind.name))
            .collect();
        met.sort_unstable();
        met.dedup();
        assert_eq!(met.len(), cells.len());
    }

    #[test]
    fn schedules_can_be_checked_afterwards() {
        let cells = all();
        for schedule in (0..2000).map(|number| Schedule::draw(3, number, &cells)) {
            assert_eq!(one_at_a_time(schedule.faults.clone()), schedule.faults);
            let own = |fault: &ScheduledFault| fault.kind.name == schedule.kind.name;
            assert!(schedule.faults.iter().any(own));
            assert_eq!(
                schedule.silence.is_some(),
                schedule.path == FaultPath::Fallback
            );
            let bytes: u64 = schedule
                .publishers
                .iter()
                .map(|publisher| publisher.bytes)
                .sum();
            let small = schedule.kind.capacity == LogCapacity::Small;
            assert!(
                small || bytes < schedule.kind.capacity.ring() / 2,
                "{bytes}"
            );
            let streams = schedule
                .publishers
                .iter()
                .map(|publisher| publisher.streams);
            let may_die = schedule
                .faults
                .iter()
                .any(|fault| fault.kind.kills_publishers);
            assert!(streams.max() == Some(1) || !(small || may_die));
            // A reader that follows ends with its broker.
            let dies = schedule.faults.iter().any(|fault| fault.kind.ends_brokers);
            assert!(!(small && dies));
        }
    }
}
