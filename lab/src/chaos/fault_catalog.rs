//! The catalogue of faults: name, begin action and end action of each.

use std::time::Duration;

use anyhow::Result;
use penstock_ebpf::Faults;

use super::trial::{Probe, Trial};
use crate::netns::Place;

/// How much of a run fits in its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogCapacity {
    /// All of it; it is read afterwards.
    Large,
    /// All of it, in a directory with little more room.
    Bounded,
    /// Little, so that lagging readers matter.
    Small,
}

impl LogCapacity {
    /// Size of the log's ring, bytes.
    pub fn ring(self) -> u64 {
        match self {
            Self::Large | Self::Bounded => 32 << 20,
            Self::Small => 2 << 20,
        }
    }
}

/// A kind of fault.
pub struct Kind {
    pub name: &'static str,
    /// Description for `--list`.
    pub what: &'static str,
    /// Name of the counter that shows how often it happened.
    pub counted: &'static str,
    /// Range of its duration, seconds.
    pub lasts: [f64; 2],
    pub capacity: LogCapacity,
    /// Whether it may overlap with other faults.
    pub mixes: bool,
    /// Whether it may end publishers before they report all that was acknowledged.
    pub kills_publishers: bool,
    /// Whether it ends brokers, and with them readers that follow.
    pub ends_brokers: bool,
    pub begin: fn(&mut Trial<'_>, Duration) -> Result<()>,
    pub end: fn(&mut Trial<'_>) -> Result<()>,
}

impl Kind {
    /// Whether it may happen in a run that tests `main`.
    pub fn goes_with(&self, main: &Self) -> bool {
        self.mixes && !(self.ends_brokers && main.capacity == LogCapacity::Small)
    }
}

impl std::fmt::Debug for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for Kind {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

/// Defaults of a kind.
const PLAIN: Kind = Kind {
    name: "",
    what: "",
    counted: "",
    lasts: [0.3, 1.4],
    capacity: LogCapacity::Large,
    mixes: true,
    kills_publishers: false,
    ends_brokers: false,
    begin: |_, _| Ok(()),
    end: |_| Ok(()),
};

pub static FAULT_CATALOG: &[Kind] = &[
    Kind {
        name: "loss",
        what: "2 to 15 % of the packets are lost",
        counted: "lost",
        begin: |trial, _| draw_share(trial, 0.15, |faults, share| faults.loss = share),
        end: |trial| trial.links.set_faults(|faults| faults.loss = 0.0),
        ..PLAIN
    },
    Kind {
        name: "reorder",
        what: "2 to 30 % of the packets come 1 to 16 packets late",
        counted: "held",
        begin: |trial, _| draw_share(trial, 0.3, |faults, share| faults.reorder = share),
        end: |trial| trial.links.set_faults(|faults| faults.reorder = 0.0),
        ..PLAIN
    },
    Kind {
        name: "duplicate",
        what: "2 to 30 % of the packets come twice",
        counted: "duplicated",
        begin: |trial, _| draw_share(trial, 0.3, |faults, share| faults.duplicate = share),
        end: |trial| trial.links.set_faults(|faults| faults.duplicate = 0.0),
        ..PLAIN
    },
    Kind {
        name: "corrupt",
        what: "one bit of 2 to 5 % of the packets is another",
        counted: "corrupted",
        begin: |trial, _| draw_share(trial, 0.05, |faults, share| faults.corrupt = share),
        end: |trial| trial.links.set_faults(|faults| faults.corrupt = 0.0),
        ..PLAIN
    },
    Kind {
        name: "truncate",
        what: "2 to 5 % of the packets come without their end",
        counted: "truncated",
        begin: |trial, _| draw_share(trial, 0.05, |faults, share| faults.truncate = share),
        end: |trial| trial.links.set_faults(|faults| faults.truncate = 0.0),
        ..PLAIN
    },
    Kind {
        name: "delay",
        what: "packets to the broker take 1 to 20 ms, and up to as much again by chance",
        counted: "delayed",
        // It interrupts the link when it begins, and streams take a while to recover.
        lasts: [1.0, 2.0],
        mixes: false,
        begin: |trial, _| {
            let least = trial.rng.u32(1..=20);
            let jitter = trial.rng.u32(0..=least);
            trial.links.delay(&format!("{least}ms+{jitter}ms"))
        },
        end: |trial| trial.links.remove_delay(),
        ..PLAIN
    },
    Kind {
        name: "link-down",
        what: "an interface of the link is down, at either end or in the middle",
        counted: "links_down",
        begin: |trial, _| change_link(trial, "links_down", &["down"]),
        end: |trial| trial.links.change_all(&["up"]),
        ..PLAIN
    },
    Kind {
        name: "mtu",
        what: "an interface of the link has another MTU: 1280, 1400 or 9000 instead of 1500",
        counted: "mtu_changes",
        begin: |trial, _| {
            let mtu = ["1280", "1400", "9000"][trial.rng.usize(..3)];
            change_link(trial, "mtu_changes", &["mtu", mtu])
        },
        end: |trial| trial.links.change_all(&["mtu", "1500"]),
        ..PLAIN
    },
    Kind {
        name: "broker-killed",
        what: "kill -9 of the broker; another one starts on its log",
        counted: "brokers_killed",
        ends_brokers: true,
        begin: |trial, _| trial.kill_broker(),
        end: |trial| trial.ensure_broker(0),
        ..PLAIN
    },
    Kind {
        name: "broker-stopped",
        what: "the broker sleeps (SIGSTOP)",
        counted: "brokers_stopped",
        begin: |trial, _| trial.signal_broker("brokers_stopped", libc::SIGSTOP),
        end: |trial| trial.signal_broker("brokers_resumed", libc::SIGCONT),
        ..PLAIN
    },
    Kind {
        name: "publisher-killed",
        what: "kill -9 of a publisher; another one comes",
        counted: "publishers_killed",
        kills_publishers: true,
        begin: |trial, _| trial.kill_publisher(),
        ..PLAIN
    },
    Kind {
        name: "publisher-stopped",
        what: "a publisher sleeps (SIGSTOP)",
        counted: "publishers_stopped",
        begin: |trial, lasts| trial.stop_publisher(lasts),
        ..PLAIN
    },
    Kind {
        name: "directory-full",
        what: "no byte is free in the buffer directory: no new topic, but existing ones continue",
        counted: "directories_full",
        capacity: LogCapacity::Bounded,
        mixes: false,
        begin: |trial, _| {
            trial.broker.fill_directory()?;
            trial.count("directories_full");
            trial.probe(Probe::MayBeRefused("no room for"))
        },
        end: |trial| {
            trial.broker.empty_directory()?;
            trial.probe(Probe::Accepted)
        },
        ..PLAIN
    },
    Kind {
        name: "reader-slow",
        what: "readers sleep: the broker waits for the registered one, and overruns the other",
        counted: "readers_stopped",
        capacity: LogCapacity::Small,
        mixes: false,
        begin: |trial, lasts| {
            trial.stop_reader(true, lasts);
            trial.stop_reader(false, lasts);
            Ok(())
        },
        ..PLAIN
    },
    Kind {
        name: "reader-killed",
        what: "a registered reader that the broker waits for gets a kill -9; another one comes",
        counted: "readers_killed",
        capacity: LogCapacity::Small,
        mixes: false,
        begin: |trial, lasts| {
            trial.stop_reader(true, lasts * 2);
            Ok(())
        },
        end: |trial| trial.kill_reader(),
        ..PLAIN
    },
    Kind {
        name: "clock",
        what: "kill -9 of the broker; the next one's monotonic clock is days ahead, or behind",
        counted: "clock_jumps",
        mixes: false,
        ends_brokers: true,
        begin: |trial, _| {
            trial.count("clock_jumps");
            trial.kill_broker()
        },
        end: |trial| {
            let ahead = trial.rng.i64(-trial.uptime..=10 * 86_400);
            trial.ensure_broker(ahead)
        },
        ..PLAIN
    },
    Kind {
        name: "descriptors",
        what: "broker or publishers cannot open another file while a publisher connects or reconnects",
        counted: "limits_set",
        mixes: false,
        ends_brokers: true,
        begin: |trial, _| {
            if trial.rng.bool() {
                trial.limit_broker(libc::RLIMIT_NOFILE)?;
                trial.probe(Probe::MayBeRefused("Too many open files"))
            } else {
                trial.limit_publishers(libc::RLIMIT_NOFILE)?;
                trial.kill_broker()?;
                trial.ensure_broker(0)
            }
        },
        end: |trial| trial.lift_limits(libc::RLIMIT_NOFILE),
        ..PLAIN
    },
    Kind {
        name: "memory",
        what: "broker or publishers get no more memory (RLIMIT_AS); meanwhile there is a new topic",
        counted: "limits_set",
        mixes: false,
        kills_publishers: true,
        ends_brokers: true,
        begin: |trial, _| {
            if trial.rng.bool() {
                trial.limit_broker(libc::RLIMIT_AS)?;
                trial.probe(Probe::MayBeRefused("annot allocate memory"))
            } else {
                trial.limit_publishers(libc::RLIMIT_AS)
            }
        },
        end: |trial| trial.lift_limits(libc::RLIMIT_AS),
        ..PLAIN
    },
];

fn draw_share(trial: &mut Trial<'_>, most: f64, set: fn(&mut Faults, f64)) -> Result<()> {
    let share = 0.02 + trial.rng.f64() * (most - 0.02);
    trial.links.set_faults(|faults| set(faults, share))
}

fn change_link(trial: &mut Trial<'_>, counted: &'static str, change: &[&str]) -> Result<()> {
    let place = Place::ALL[trial.rng.usize(..Place::ALL.len())];
    trial.count(counted);
    trial.links.change(place, change)
}
