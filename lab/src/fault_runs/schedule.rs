//! What is to happen in one fault run, by chance from a seed: who publishes how, and which faults begin
//! when and last how long.

use std::time::Duration;

use fastrand::Rng;
use serde::{Deserialize, Serialize};

use super::kinds::{KINDS, Kind, Room};
use crate::chance::seconds;
use crate::cli::{FaultPath, Mode};

/// Faults beside the one that the run is about, at most.
const OTHERS: usize = 3;
/// Of all publishers together: so much that faults find them at work, and that the log holds it all.
const RATE: [u64; 2] = [1_000_000, 3_000_000];

/// One fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Strike {
    pub kind: &'static Kind,
    /// Since the publishers began.
    pub at: Duration,
    pub lasts: Duration,
}

/// One fault run.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Of the run; with the seed it repeats it.
    pub number: u64,
    pub path: FaultPath,
    /// What it is about.
    pub kind: &'static Kind,
    pub strikes: Vec<Strike>,
    /// When datagrams stop to get through and when they do so again, if streams are to fall back.
    pub silence: Option<[Duration; 2]>,
    pub publishers: Vec<Publisher>,
    /// For what is decided on the way.
    pub seed: u64,
}

/// A publisher of a fault run.
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

/// A fault of a schedule, for the report.
#[derive(Debug, Serialize, Deserialize)]
pub struct StrikeReport {
    pub fault: String,
    pub at_ms: u64,
    pub lasts_ms: u64,
}

impl Strike {
    pub fn report(&self) -> StrikeReport {
        StrikeReport {
            fault: self.kind.name.to_owned(),
            at_ms: self.at.as_millis() as u64,
            lasts_ms: self.lasts.as_millis() as u64,
        }
    }
}

/// Every fault on every path, in an order by chance, so that few runs already meet many of them.
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
    /// Schedule `number` of a run with this seed.
    pub fn draw(seed: u64, number: u64, cells: &[(FaultPath, &'static Kind)]) -> Self {
        let (path, kind) = cells[(number % cells.len() as u64) as usize];
        let mut rng = Rng::with_seed(seed.wrapping_add(number));
        // Faults begin until the first time, seconds, and publishers have work until the others. A
        // path is given up after three seconds: faults are to happen before, while and after.
        let (begin, work) = match path {
            FaultPath::Fallback => (6.0, [4.0, 5.0]),
            _ => (2.0, [2.5, 3.5]),
        };
        let mut strikes = Vec::new();
        let times = rng.u32(2..=3);
        for time in 0..times {
            // Spread, so that one of them finds streams at work.
            let part = |time| begin * f64::from(time) / f64::from(times);
            strikes.push(Strike::draw(&mut rng, kind, [part(time), part(time + 1)]));
        }
        let others: Vec<_> = KINDS.iter().filter(|other| other.goes_with(kind)).collect();
        for _ in 0..rng.usize(0..=OTHERS) {
            let other = others[rng.usize(..others.len())];
            strikes.push(Strike::draw(&mut rng, other, [0.0, begin]));
        }
        let strikes = one_at_a_time(strikes);
        let silence = (path == FaultPath::Fallback).then(|| {
            let begin = match rng.u32(..3) {
                0 => Duration::ZERO,
                _ => seconds(&mut rng, 0.1, 1.2),
            };
            // Longer than a path without answers takes to be given up.
            [begin, begin + seconds(&mut rng, 2.0, 6.0)]
        });
        let may_die = strikes.iter().any(|strike| strike.kind.kills_publishers);
        let publishers = publishers(&mut rng, kind.room, may_die, work);
        Self {
            number,
            path,
            kind,
            strikes,
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

impl Strike {
    fn draw(rng: &mut Rng, kind: &'static Kind, [from, to]: [f64; 2]) -> Self {
        Self {
            kind,
            at: seconds(rng, 0.1 + from, 0.1 + to),
            lasts: seconds(rng, kind.lasts[0], kind.lasts[1]),
        }
    }
}

/// In order, and none while another of its kind lasts: that one's end would be its own.
fn one_at_a_time(mut strikes: Vec<Strike>) -> Vec<Strike> {
    strikes.sort_by_key(|strike| strike.at);
    let mut kept: Vec<Strike> = Vec::with_capacity(strikes.len());
    for strike in strikes {
        let lasts =
            |other: &Strike| other.kind == strike.kind && other.at + other.lasts >= strike.at;
        if !kept.iter().any(lasts) {
            kept.push(strike);
        }
    }
    kept
}

fn publishers(rng: &mut Rng, room: Room, may_die: bool, work: [f64; 2]) -> Vec<Publisher> {
    // Who reads along a log that does not hold everything reads one stream.
    let count = if room == Room::Small {
        1
    } else {
        rng.u64(1..=3)
    };
    let rate = rng.u64(RATE[0]..RATE[1]) / count;
    (0..count)
        .map(|_| Publisher {
            // What a killed one sent can only be told apart in one stream.
            streams: if may_die || room == Room::Small {
                1
            } else {
                rng.u32(1..=3)
            },
            rate,
            batch: 1 << rng.u32(11..=16),
            bytes: (rate as f64 * seconds(rng, work[0], work[1]).as_secs_f64()) as u64,
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
            &KINDS.iter().collect::<Vec<_>>(),
            FaultPath::value_variants(),
        )
    }

    #[test]
    fn a_seed_repeats_a_schedule() {
        let draw = |seed, number| Schedule::draw(seed, number, &all());
        assert_eq!(draw(1, 7), draw(1, 7));
        assert_ne!(draw(1, 7).strikes, draw(2, 7).strikes);
        assert_ne!(draw(1, 7).strikes, draw(1, 8).strikes);
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
            assert_eq!(one_at_a_time(schedule.strikes.clone()), schedule.strikes);
            let own = |strike: &Strike| strike.kind.name == schedule.kind.name;
            assert!(schedule.strikes.iter().any(own));
            assert_eq!(
                schedule.silence.is_some(),
                schedule.path == FaultPath::Fallback
            );
            let bytes: u64 = schedule
                .publishers
                .iter()
                .map(|publisher| publisher.bytes)
                .sum();
            let small = schedule.kind.room == Room::Small;
            assert!(small || bytes < schedule.kind.room.ring() / 2, "{bytes}");
            let streams = schedule
                .publishers
                .iter()
                .map(|publisher| publisher.streams);
            let may_die = schedule
                .strikes
                .iter()
                .any(|strike| strike.kind.kills_publishers);
            assert!(streams.max() == Some(1) || !(small || may_die));
            // A reader that follows ends with its broker.
            let dies = schedule
                .strikes
                .iter()
                .any(|strike| strike.kind.ends_brokers);
            assert!(!(small && dies));
        }
    }
}
