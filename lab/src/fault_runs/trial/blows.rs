//! What kinds of faults do to those who take part in a run.

use std::fs;
use std::time::Duration;

use anyhow::Result;

use super::super::schedule;
use super::{Player, Probe, Trial};
use crate::actors::Fate;
use crate::vitals::Look;

/// What publishers that only ask for a topic send, bytes.
const PROBE_BYTES: usize = 20_000;
/// Address space that a process may still get when it is to get no more: what its threads need to go on.
const SPARE_MEMORY: u64 = 1 << 20;
/// What a broker says that is started on an interface that is down.
const LINK_IS_DOWN: &str = "is down; ip link set";

impl Trial<'_> {
    pub fn count(&mut self, what: &str) {
        self.add(what, 1);
    }

    pub fn kill_broker(&mut self) -> Result<()> {
        if self.broker.kill() {
            self.count("brokers_killed");
        }
        Ok(())
    }

    /// Another broker takes up the log if there is none, with a monotonic clock so many seconds ahead.
    /// As long as it refuses to start because of another fault, it is started again and again.
    pub fn broker_comes(&mut self, ahead: i64) -> Result<()> {
        self.broker_due = None;
        match self.broker.ensure(ahead, self.interrupt) {
            Err(error) if error.to_string().contains(LINK_IS_DOWN) => {
                self.count("brokers_refused_to_start");
                self.broker_due = Some(ahead);
                Ok(())
            }
            other => other,
        }
    }

    pub fn signal_broker(&mut self, counted: &str, signal: i32) -> Result<()> {
        if let Some(process) = self.broker.process() {
            process.signal(signal);
            self.count(counted);
        }
        Ok(())
    }

    pub fn kill_publisher(&mut self) -> Result<()> {
        if let Some(player) = self.some_player() {
            player.publishing.meet(Fate::Killed(Duration::ZERO));
        }
        Ok(())
    }

    pub fn stop_publisher(&mut self, lasts: Duration) -> Result<()> {
        if let Some(player) = self.some_player() {
            player.publishing.meet(Fate::Stopped(Duration::ZERO, lasts));
            self.count("publishers_stopped");
        }
        Ok(())
    }

    pub fn stop_reader(&mut self, registered: bool, lasts: Duration) {
        if let Some(guest) = &mut self.guests[usize::from(!registered)] {
            guest.meet(Fate::Stopped(Duration::ZERO, lasts));
            self.count("readers_stopped");
        }
    }

    /// Kills the registered reader; another one comes.
    pub fn kill_reader(&mut self) -> Result<()> {
        if let Some(mut guest) = self.guests[0].take() {
            guest.meet(Fate::Killed(Duration::ZERO));
            self.reader_leaves(guest)?;
        }
        self.reader_comes(true)
    }

    /// A publisher asks for a new topic. If it may be refused, so may those that asked before it and
    /// still wait for a broker.
    pub fn probe(&mut self, probe: Probe) -> Result<()> {
        if probe != Probe::Accepted {
            let waiting = self.players.iter_mut().filter_map(|p| p.probe.as_mut());
            waiting.for_each(|earlier| *earlier = probe);
        }
        let topic = format!("probe-{}", self.publishers);
        let plan = schedule::Publisher {
            streams: 1,
            rate: 1 << 20,
            batch: 4096,
            bytes: PROBE_BYTES as u64,
        };
        self.publisher_comes(&topic, plan, Some(probe))
    }

    pub fn limit_broker(&mut self, resource: libc::__rlimit_resource_t) -> Result<()> {
        if let Some(process) = self.broker.process() {
            let has = held(process.id(), resource)?;
            process.limit(resource, Some(has))?;
            self.broker_may_die |= resource == libc::RLIMIT_AS;
            self.count("limits_set");
        }
        Ok(())
    }

    pub fn limit_publishers(&mut self, resource: libc::__rlimit_resource_t) -> Result<()> {
        for at in 0..self.players.len() {
            let player = &mut self.players[at];
            let process = player.publishing.process();
            // It may have ended by now, or not have become one yet.
            if process.ended()?.is_some() || !is_publisher(process.id()) {
                continue;
            }
            process.limit(resource, Some(held(process.id(), resource)?))?;
            player.may_die |= resource == libc::RLIMIT_AS;
            self.count("limits_set");
        }
        Ok(())
    }

    pub fn lift_limits(&mut self, resource: libc::__rlimit_resource_t) -> Result<()> {
        let players = self
            .players
            .iter_mut()
            .map(|player| player.publishing.process());
        for process in players.chain(self.broker.process()) {
            if process.ended()?.is_none() {
                process.limit(resource, None)?;
            }
        }
        self.broker_comes(0)
    }

    /// One of those that publish what the run is about.
    fn some_player(&mut self) -> Option<&mut Player> {
        let mut players: Vec<_> = self
            .players
            .iter_mut()
            .filter(|player| player.probe.is_none())
            .collect();
        let count = players.len();
        (count > 0).then(|| players.swap_remove(self.rng.usize(..count)))
    }
}

/// How much of a resource a process has now: its limit, if it is to get no more.
fn held(pid: u32, resource: libc::__rlimit_resource_t) -> Result<u64> {
    let look = Look::at(pid)?;
    Ok(match resource {
        libc::RLIMIT_AS => look.address_space_bytes + SPARE_MEMORY,
        _ => look.descriptors,
    })
}

/// Whether a process runs the publisher, not yet another program that becomes it.
fn is_publisher(pid: u32) -> bool {
    let name = fs::read_to_string(format!("/proc/{pid}/comm"));
    name.is_ok_and(|name| name.starts_with("penstock-pub"))
}
